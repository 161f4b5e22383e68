"""Products of one tensor with several weights as one: random networks, models, what must be left alone, and what it costs."""

from __future__ import annotations

import random

import blockmodels
import pytest
import torch
from fusing import drawn_seeds, fuse
from shardwright.passes.capture import capture
from shardwright.passes.fuse.merge_linears import MergeLinears
from shardwright.passes.gain import Paying
from shardwright.passes.rewrite import rewritten
from shardwright.planner.prices import Prices
from shardwright.profiles.devices import parse_cluster
from torch import nn


class Branches(nn.Module):
    """Layers that project one tensor several times, by linears with or without biases or by products, some frozen."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.width, self.merged, self.plain = draw.choice((16, 24)), 0, draw.random() < 0.4
        self.layers = nn.ModuleList()
        for _ in range(draw.randint(1, 3)):
            widths = [draw.choice((8, 12)) for _ in range(draw.randint(2, 4))]
            layer = nn.ModuleList(nn.Linear(self.width, n, draw.random() < 0.5) for n in widths)
            frozen = [draw.random() < 0.2 for _ in widths]
            for part, still in zip(layer, frozen, strict=True):
                part.weight.requires_grad_(not still)
            self.layers.append(nn.ModuleList([layer, nn.Linear(sum(widths), self.width)]))
            groups = list(zip(widths, frozen, strict=True))
            self.merged += sum(groups.count(g) - 1 for g in set(groups))

    def forward(self, x):
        for layer, out in self.layers:
            x = x + out(torch.cat([torch.tanh(part(x)) for part in layer], -1))
        return x.square().mean()


@pytest.mark.parametrize("seed", drawn_seeds(24))
def test_random_networks(seed):
    torch.manual_seed(seed)
    model = Branches(seed).double()
    found = fuse(MergeLinears(), model, torch.randn(3, 6, model.width, dtype=torch.float64), seed=seed)
    products = sum(len(layer) + 1 for layer, _ in model.layers)
    assert found.count("aten.linear") == products - model.merged
    assert found.predicted == found.measured


@pytest.mark.parametrize(("name", "products"), [("llama", 9), ("qwen2", 9), ("bert", 10), ("vit", 9), ("t5", 33)])
def test_models(name, products):
    """Keys and values (queries too, where they are as wide), gates and what they gate."""
    model, kwargs = blockmodels.model(name)
    found = fuse(MergeLinears(), model, **kwargs)
    assert found.count("aten.linear") < products * 2
    assert found.count("aten.split") > 0
    assert found.predicted == found.measured


class Products(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(n, 8)) for n in (8, 8, 6))
        self.body = body

    def forward(self, x):
        return self.body(self, x)


LEFT = {
    "one weight twice": lambda m, x: (nn.functional.linear(x, m.a) * nn.functional.linear(x.sin(), m.a)).sum(),
    "unlike weights": lambda m, x: nn.functional.linear(x, m.a).sum() + nn.functional.linear(x, m.c).sum(),
    "unlike tensors": lambda m, x: nn.functional.linear(x, m.a).sum() + nn.functional.linear(x.sin(), m.b).sum(),
    "weights that are computed": lambda m, x: (x @ m.a.sin()).sum() + (x @ m.b.sin()).sum(),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    found = fuse(MergeLinears(), Products(LEFT[name]).double(), torch.randn(4, 8, dtype=torch.float64))
    assert found.nodes == 0


def test_products_by_mm():
    found = fuse(
        MergeLinears(), Products(lambda m, x: (x.mm(m.a) * x.mm(m.b)).sum()).double(), torch.randn(4, 8).double()
    )
    assert found.count("aten.mm") == 1


def test_a_copy_of_the_weights_does_not_pay_in_training():
    """It waits for the backward pass, as large as the weights."""
    model, kwargs = blockmodels.model("llama", torch.float32, seq=64)
    before = capture(model, (), kwargs)
    after = rewritten(before, [MergeLinears()], weigh=Paying(Prices(parse_cluster("h100-sxm:8"), "bfloat16")))
    verdict = after.records[-1].verdict
    assert not verdict.stays
    assert verdict.saved_bytes < 0
    assert [n.name for n in after.graph.graph.nodes] == [n.name for n in before.graph.graph.nodes]

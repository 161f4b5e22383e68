"""Adapters that make their input again: random frozen networks, real models, bytes, and what must be left alone."""

from __future__ import annotations

import random

import blockmodels
import pytest
import torch
import torch.nn.functional as F
from fusing import PRICES, calls, drawn_seeds, fuse, rule_problems
from shardwright.errors import UsageError
from shardwright.passes.fuse.adapters import SlimAdapters
from shardwright.passes.fuse.gated import FuseGated
from shardwright.passes.fuse.gelu import FuseGelu
from shardwright.passes.fuse.ops.remade_linear import remade_linear
from shardwright.passes.gain import Paying
from torch import nn

OP = "shardwright.remade_linear"
ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class Adapted(nn.Module):
    """A frozen linear map and a trained one of low rank beside it."""

    def __init__(self, base: nn.Module, width: int, out: int, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False)

    def forward(self, x):
        return self.base(x) + 2.0 * self.up(self.down(x))


class Frozen(nn.Module):
    """Layers of which some have adapters behind an activation or a gate, all else frozen at random."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.width, self.sites = draw.choice((4, 6, 10)), 0
        self.layers: list[tuple[str, bool]] = []
        self.table = nn.ModuleList()
        flows = False
        for _ in range(draw.randint(1, 4)):
            inner, gate, first = draw.choice((8, 12)), draw.random() < 0.5, draw.random() < 0.7
            parts = [nn.Linear(self.width, inner) for _ in range(2)]
            for part in parts:
                part.requires_grad_(draw.random() < 0.3)
            if first:
                parts[0] = Adapted(parts[0], self.width, inner)
            slim = draw.random() < 0.7
            last = nn.Linear(inner, self.width).requires_grad_(draw.random() < 0.5)
            trained = any(p.requires_grad for part in (parts if gate else parts[:1]) for p in part.parameters())
            self.sites += slim and (flows or trained)
            flows |= trained or slim or any(p.requires_grad for p in last.parameters())
            self.table.append(nn.ModuleList([*parts, Adapted(last, inner, self.width) if slim else last]))
            self.layers.append((draw.choice(sorted(ACTS)), gate))

    def forward(self, x):
        for (act, gate), (first, second, last) in zip(self.layers, self.table, strict=True):
            h = ACTS[act](first(x))
            x = x + last(h * second(x) if gate else h)
        return x.square().mean()


@pytest.mark.parametrize("seed", drawn_seeds(24))
def test_random_networks(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Frozen(draw).double()
    shape = [draw.randint(4, 7) for _ in range(draw.randint(1, 3))]
    x = torch.randn(*shape, model.width, dtype=torch.float64)
    if not any(p.requires_grad for p in model.parameters()):
        model.table[-1][-1].requires_grad_(True)
    found = fuse(SlimAdapters(), model, x, first=[FuseGelu(), FuseGated()], seed=seed)
    assert found.count(OP) == model.sites
    assert found.predicted == found.measured
    assert (found.measured > 0) == (model.sites > 0)


def adapted(model: nn.Module) -> nn.Module:
    """All linear maps of a model's blocks with adapters, all else frozen."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind in ("Linear", "Conv1D") and "head" not in name and "cls" not in name:
            width, out = module.weight.shape if kind == "Conv1D" else reversed(module.weight.shape)
            home, _, leaf = name.rpartition(".")
            dtype = module.weight.dtype
            setattr(model.get_submodule(home), leaf, Adapted(module, width, out).to(dtype))
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models(name, dtype):
    model, kwargs = blockmodels.model(name, dtype)
    found = fuse(SlimAdapters(), adapted(model), first=[FuseGelu(), FuseGated()], **kwargs)
    assert found.count(OP) == 2
    assert found.predicted == found.measured > 0


def _left(body, **trained):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 16)
            self.last = nn.Linear(16, 8, bias=False).requires_grad_(trained.get("last", False))
            self.down = nn.Linear(16, 2, bias=False).requires_grad_(trained.get("down", True))
            self.first.requires_grad_(trained.get("first", True))

        def forward(self, x):
            return body(self, self.first(x))

    return fuse(SlimAdapters(), Model().double(), torch.randn(4, 8, dtype=torch.float64))


def _both(m, h):
    return m.last(h).sum() + m.down(h).sum()


LEFT = {
    "another reader": (lambda m, x: _both(m, h := F.gelu(x)) + h.square().sum(), {}),
    "full training": (lambda m, x: _both(m, F.gelu(x)), {"last": True}),
    "nothing trained here": (lambda m, x: _both(m, F.gelu(x)), {"down": False}),
    "no gradient to the input": (lambda m, x: _both(m, F.gelu(x)), {"first": False}),
    "an op that keeps its result": (lambda m, x: _both(m, F.relu(x)), {}),
    "no frozen product": (lambda m, x: m.down(F.gelu(x)).sum(), {}),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    body, trained = LEFT[name]
    found = _left(body, **trained)
    assert found.count(OP) == 0
    assert found.nodes == 0


def test_what_it_costs_is_held_against_the_frozen_products():
    """Making the input again costs more than a tenth of a small product, but far less than a tenth of the large one beside it."""
    found = fuse(SlimAdapters(), Wide(), torch.randn(512, 256))
    assert found.count(OP) == calls(found.before, "aten.gelu") == 1
    assert Paying(PRICES)(found.step, found.before.graph.graph, found.after.graph.graph).stays


class Wide(nn.Module):
    """One block with adapters, large enough that products take most of its time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Adapted(nn.Linear(256, 1024), 256, 1024), Adapted(nn.Linear(1024, 256), 1024, 256)

    def forward(self, x):
        return self.last(F.gelu(self.first(x))).square().mean()


@pytest.mark.parametrize("count", [1, 2])
def test_rule_and_gradients(count):
    torch.manual_seed(0)
    sources = [torch.randn(2, 4, 6, dtype=torch.float64) for _ in range(count)]
    weight = torch.randn(8, 6, dtype=torch.float64)
    x = F.silu(sources[0]) * (sources[1] if count == 2 else 1.0)
    assert rule_problems(remade_linear, x, weight, sources, "silu") == []
    leaves = [*(s.requires_grad_() for s in sources), weight.requires_grad_()]

    def run(*given):
        made = F.silu(given[0]) * (given[1] if count == 2 else 1.0)
        return remade_linear(made, given[-1], [s.detach() for s in given[:-1]], "silu")

    assert torch.autograd.gradcheck(run, leaves)
    with pytest.raises(UsageError, match="second derivative"):
        torch.autograd.grad(run(*leaves).sum(), leaves, create_graph=True)

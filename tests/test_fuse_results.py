"""Activations that keep their results, and padding that convolutions do themselves: random layers, a real network, what is left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from convnets import NORMS, Draw, Loss, inputs, settle
from fusing import drawn_seeds, fuse, rule_problems
from shardwright.passes.fuse.by_result import KeepResults
from shardwright.passes.fuse.ops.by_result import ACTS, by_result
from shardwright.passes.fuse.pads import FoldPads
from shardwright.passes.summarize import summarize
from torch import nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

OP = "shardwright.by_result"
ACTIVATIONS = {
    "relu6": F.relu6, "hardtanh": F.hardtanh, "wide": lambda x: F.hardtanh(x, -0.3, 0.8),
    "leaky": lambda x: F.leaky_relu(x, 0.2), "steep": lambda x: F.leaky_relu(x, 1.5),
}  # fmt: skip
OTHERS = {
    "relu": F.relu, "flat": lambda x: F.leaky_relu(x, 0.0), "falling": lambda x: F.leaky_relu(x, -0.1),
    "clamp": lambda x: x.clamp(0, 1),
}  # fmt: skip


class Layers(nn.Module):
    """Convolutions with padding before them, even, uneven or of another kind, and an activation before that."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = Draw(seed)
        self.dims, self.acts, self.pads, self.kept, self.folded = draw.randint(1, 3), [], [], 0, 0
        self.widths = [draw.choice((4, 6, 8)) for _ in range(draw.randint(2, 4))]
        self.convs = nn.ModuleList()
        for inner, out in zip(self.widths, self.widths[1:], strict=False):
            self.convs.append(draw.conv(self.dims, inner, out, stride=1, padding=draw.choice((0, 1, 2))))
            self.acts.append(draw.choice((*ACTIVATIONS, *OTHERS)))
            kind, value = draw.choice(("even", "uneven", "none")), draw.choice((0.0, 0.0, 0.5, -5.0))
            ends = [draw.randint(0, 2) for _ in range(self.dims)]
            self.pads.append((kind, [n for end in ends for n in (end, end + (kind == "uneven"))], value))
            self.kept += self.acts[-1] in ACTIVATIONS
            self.folded += kind == "even" and value == 0.0 and any(ends)
        draw.freeze(self)

    def forward(self, x):
        for conv, act, (kind, ends, value) in zip(self.convs, self.acts, self.pads, strict=True):
            x = {**ACTIVATIONS, **OTHERS}[act](x * 1.5)
            x = conv(x if kind == "none" else F.pad(x, ends, value=value))
        return x


@pytest.mark.parametrize("seed", drawn_seeds(24))
def test_random_layers(seed):
    body = Layers(seed)
    model = settle(Loss(body, body.widths[-1]), seed)
    given = inputs(3, body.widths[0], *([9] * body.dims))
    pads = fuse(FoldPads(), model, *given, seed=seed)
    assert pads.nodes == body.folded
    assert pads.predicted == pads.measured
    found = fuse(KeepResults(), model, *given, seed=seed, first=[FoldPads()])
    assert found.count(OP) == body.kept
    assert found.nodes == 0
    assert found.predicted == found.measured
    summarize(found.after)


def mobile() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    config = MobileNetV2Config(num_labels=5, depth_multiplier=0.25, image_size=32, classifier_dropout_prob=0.0)
    return settle(MobileNetV2ForImageClassification(config)), inputs(2, 3, 32, 32)


def test_a_real_network():
    """ReLU6 before even and uneven padding: what was given to an activation is kept no more."""
    model, (pixels, labels) = mobile()
    norms = sum(isinstance(m, NORMS) for m in model.modules())
    pads = fuse(FoldPads(), model, pixel_values=pixels, labels=labels)
    assert pads.count("aten.pad") == 4 + 1  # of convolutions that halve the image
    found = fuse(KeepResults(), model, pixel_values=pixels, labels=labels, first=[FoldPads()])
    assert found.count(OP) == 35 < norms
    assert found.count("aten.hardtanh") == 0
    assert found.predicted == found.measured > 0


def acted(act, pad, mode="constant", value=0.0):
    return lambda m, x: m.conv(F.pad(act(m.first(x)), pad, mode=mode, value=value)).square().sum()


class One(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.body, self.first, self.conv = body, nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.turned = nn.ConvTranspose2d(4, 4, 3)

    def forward(self, x):
        return self.body(self, x)


LEFT = {
    "uneven": acted(F.relu, [1, 0, 1, 1]), "another number": acted(F.relu, [1, 1], value=1.0),
    "reflected": acted(F.relu, [1, 1, 1, 1], "reflect", None), "cut": acted(F.relu, [-1, -1]),
    "over channels": acted(lambda x: x[:, :2], [0, 0, 0, 0, 1, 1]),
    "a second user": lambda m, x: (m.conv(y := F.pad(m.first(x), [1, 1])).square().sum() + y.sin().sum()),
    "transposed": lambda m, x: m.turned(F.pad(m.first(x), [1, 1])).square().sum(),
    "no samples": lambda m, x: m.conv(F.pad(m.first(x[0]), [1, 1])).square().sum(),
    "same": lambda m, x: F.conv2d(F.pad(x, [1, 1]), m.first.weight, padding="same").square().sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_padding_left_alone(name):
    found = fuse(FoldPads(), settle(One(LEFT[name])), inputs(2, 3, 9, 9)[0])
    assert found.nodes == 0
    assert found.count("aten.pad") == 1


NUMBERS = [
    ("relu6", 0.0, True), ("relu6", -1.0, False), ("leaky", 2.0, True), ("leaky", -2.0, False), ("wide", 0.5, True),
    ("wide", 0.9, False),
]  # fmt: skip


@pytest.mark.parametrize(("act", "value", "before"), NUMBERS)
def test_padding_goes_before_what_leaves_its_number(act, value, before):
    found = fuse(KeepResults(), settle(One(acted(ACTIVATIONS[act], [1, 0, 1, 1], value=value))), inputs(2, 3, 9, 9)[0])
    assert found.count(OP) == 1
    order = [n.name.partition("_")[0] for n in found.after.graph.graph.nodes if n.name.startswith(("pad", "by"))]
    assert order == (["pad", "by"] if before else ["by", "pad"])


@pytest.mark.parametrize("name", OTHERS)
def test_activations_left_alone(name):
    found = fuse(KeepResults(), settle(One(acted(OTHERS[name], [1, 1]))), inputs(2, 3, 9, 9)[0])
    assert found.count(OP) == 0


def test_the_rule_holds():
    x = torch.randn(4, 6, dtype=torch.float64)
    for act, given in (("hardtanh", [0.0, 6.0]), ("leaky_relu", [0.1])):
        assert rule_problems(by_result, x, act, given) == []


@pytest.mark.parametrize("act", ACTS)
def test_gradients_at_the_borders(act):
    """Where torch's own takes one side, so does the op; infinities and gradients of gradients, too."""
    given = {"hardtanh": [0.0, 6.0], "leaky_relu": [0.1]}[act]
    x = torch.tensor([-torch.inf, -1.0, 0.0, 1e-300, 3.0, 6.0, 7.0, torch.inf], dtype=torch.float64, requires_grad=True)
    way = torch.randn(8, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (lambda x: by_result(x, act, given), lambda x: getattr(torch.ops.aten, act)(x, *given)):
        y = run(x)
        (first,) = torch.autograd.grad(y, x, way, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), way)
        found.append((y.detach(), first.detach(), second))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

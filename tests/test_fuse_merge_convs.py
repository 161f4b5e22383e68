"""Convolutions of one input side by side: random ones, Inception, all convolution passes in a row, and what must be left alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from convnets import NETS, Draw, Loss, inputs, settle
from fusing import PRICES, Fused, drawn_seeds, fuse, rule_problems
from shardwright.passes.capture import capture
from shardwright.passes.checked import Verifying
from shardwright.passes.fuse.conv_bn import FoldNorm
from shardwright.passes.fuse.merge_convs import MergeConvs
from shardwright.passes.fuse.ops.folded_conv import folded_conv
from shardwright.passes.fuse.reparameterize import Reparameterize
from shardwright.passes.gain import Paying
from shardwright.passes.rewrite import rewritten
from shardwright.passes.summarize import summarize
from torch import fx, nn

OP = "shardwright.folded_conv"
EVERY = (FoldNorm(), Reparameterize(), MergeConvs())


class Parallel(nn.Module):
    """Convolutions of one input in some forms, several of each, with norms behind some; channels one after the other."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = Draw(seed)
        self.dims = draw.randint(1, 3)
        forms = [
            {"taps": 1, "padding": 0, "dilation": 1},
            {"taps": 3, "padding": 1, "dilation": 1},
            {"taps": 3, "padding": 2, "dilation": 2},
        ]
        self.counts = [draw.randint(0, 3) for _ in forms] if seed % 5 else [2, 0, 1]
        self.counts[0] += not any(self.counts)
        ways = [f for f, n in zip(forms, self.counts, strict=True) for _ in range(n)]
        draw.shuffle(ways)
        self.widths = [draw.randint(1, 4) for _ in ways]
        self.ways = nn.ModuleList(
            draw.conv(self.dims, 4, width, groups=1, **way) for way, width in zip(ways, self.widths, strict=True)
        )
        self.norms = nn.ModuleList(
            draw.norm(self.dims, n) if draw.random() < 0.5 else nn.Identity() for n in self.widths
        )
        self.acts = [draw.choice((torch.relu, torch.sin, lambda x: x)) for _ in ways]
        draw.freeze(self)

    def forward(self, x):
        x = x.tanh()
        each = zip(self.acts, self.norms, self.ways, strict=True)
        return torch.cat([act(norm(way(x))) for act, norm, way in each], 1)


def forms(found: Fused) -> Counter[object]:
    """How many convolutions of one input, kernel, distance and need of a gradient there were."""
    count = Counter[object]()
    for n in found.before.graph.graph.nodes:
        if n.op == "call_function" and "conv" in n.name:
            weight = n.args[1] if isinstance(n.args[1], fx.Node) else n.args[1][0]
            dilation = n.args[6 if "folded" in n.name else 5] if len(n.args) > 5 else [1]
            count[n.args[0], weight.meta["val"].shape[2:], set(dilation) == {1}, n.meta["differentiable"]] += 1
    return count


@pytest.mark.parametrize("seed", drawn_seeds(24))
@pytest.mark.parametrize("first", [(), (FoldNorm(),)])
def test_random_convolutions(seed, first):
    body = Parallel(seed)
    model = settle(
        Loss(nn.Sequential(nn.Conv1d(3, 4, 1) if body.dims == 1 else nn.Identity(), body), sum(body.widths)), seed
    )
    pixels, labels = inputs(4, 3 if body.dims == 1 else 4, *([10] * body.dims))
    found = fuse(MergeConvs(), model, pixels, labels, seed=seed, first=first)
    made = [n for n in found.after.graph.graph.nodes if "folded_conv" in n.name]
    merged = sorted(len(n.kwargs["parts"]) for n in made if "parts" in n.kwargs)
    assert merged == sorted(n for n in forms(found).values() if n > 1)
    assert found.count("aten.split_with_sizes") == len(merged)
    assert found.predicted == found.measured
    summarize(found.after)


def test_inception():
    """Three 1 x 1 convolutions with their norms are one in each of two blocks."""
    model = settle(NETS["inception"]())
    found = fuse(MergeConvs(), model, *inputs(2, 3, 12, 12), first=(FoldNorm(),))
    made = [n for n in found.after.graph.graph.nodes if "folded_conv" in n.name]
    assert [n.kwargs["parts"] for n in made if "parts" in n.kwargs] == [[1, 1, 1]] * 2
    assert found.nodes == 2 * 2 - 2 * 4
    assert found.predicted == found.measured == 0


@pytest.mark.parametrize("name", NETS)
def test_all_passes_in_a_row(name):
    """Every pass keeps the function of every network, to 1e-10 in float64; the result has rules for all it does."""
    model = settle(NETS[name](), 7)
    captured = capture(model, inputs(2, 3, 12, 12), lift_float64=True)
    after = rewritten(captured, EVERY, weigh=Verifying(captured.constants))
    records = after.records[-len(EVERY) :]
    assert all(r.verdict is None or r.verdict.stays for r in records), records
    assert records[0].verdict is not None
    names = [str(n.target) for n in after.graph.graph.nodes]
    assert not any("batch_norm" in n or "conv2d" in n for n in names)
    assert summarize(after).outline.ops


@pytest.mark.parametrize("name", NETS)
def test_what_pays(name):
    """On a GPU, larger networks gain seconds by every pass that finds something, and keep no more."""
    model = settle(NETS[name](), 7).float()
    captured = capture(model, inputs(32, 3, 56, 56, dtype=torch.float32))
    after = rewritten(captured, EVERY, weigh=Paying(PRICES))
    verdicts = {r.name: r.verdict for r in after.records[-len(EVERY) :] if r.verdict is not None}
    assert all(v.stays and v.seconds > 0 and v.saved_bytes >= 0 for v in verdicts.values()), verdicts
    assert {"resnet": 2, "repvgg": 2, "unirep": 2, "inception": 2}[name] == len(verdicts)


class Pair(nn.Module):
    """What a test makes of two or three convolutions."""

    def __init__(self, body, **other) -> None:
        super().__init__()
        self.body, self.a = body, nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1} | other)

    def forward(self, x):
        return self.body(self, x)


def both(m, x):
    return m.a(x).square().sum() + m.b(x).sin().sum()


LEFT = {
    "another kernel": (both, {"kernel_size": 1, "padding": 0}),
    "another stride": (both, {"stride": 2}),
    "another padding": (both, {"padding": 0}),
    "another dilation": (both, {"dilation": 2}),
    "groups": (both, {"groups": 2}),
    "another input": (lambda m, x: both(m, x) if x is None else m.a(x).square().sum() + m.b(x.sin()).sum(), {}),
    "weights that outweigh the input": (lambda m, x: both(m, x[:, :, :2, :2].sin()), {}),
    "a weight made of the other's result": (
        lambda m, x: torch.nn.functional.conv2d(x, m.b.weight * m.a(x).mean(), padding=1).square().sum(), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    body, other = LEFT[name]
    found = fuse(MergeConvs(), settle(Pair(body, **other)), inputs(3, 4, 8, 8)[0])
    assert found.count(OP) == found.nodes == 0


def test_results_that_are_outputs_or_used_again():
    """Pieces of the whole may go anywhere."""
    found = fuse(MergeConvs(), settle(Pair(lambda m, x: ((y := m.a(x)).square().sum() + y.sin().sum(), y, m.b(x)))),
                 inputs(3, 4, 8, 8)[0])  # fmt: skip
    assert found.count(OP) == 1


@pytest.mark.parametrize("vectors", [("", ""), ("b", ""), ("bgtmv", "b")])
def test_rule_and_gradients(vectors):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    weights = [torch.randn(n, 4, 3, dtype=torch.float64) for n in (4, 6)]
    given = [
        torch.rand(n, dtype=torch.float64) + 0.5 if v in names else None
        for n, names in zip((4, 6), vectors, strict=True)
        for v in "bgtmv"
    ]
    frame = [0.1, 0.0], [1], [1], [1]
    assert rule_problems(folded_conv, x, weights, given, *frame, parts=[1, 1]) == []
    leaves = [v.clone().requires_grad_() for v in (x, *weights, *given) if v is not None]

    def run(x, *rest):
        left = iter(rest)
        sides = [[None if v is None else next(left) for v in side] for side in (weights, given)]
        return folded_conv(x, *sides, *frame, parts=[1, 1])

    assert torch.autograd.gradcheck(run, leaves)

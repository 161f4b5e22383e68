"""Batch norms folded into the convolutions before them: random layers, real networks, bytes, and what must be left alone."""

from __future__ import annotations

import pytest
import torch
from convnets import NETS, NORMS, Draw, Loss, Normed, inputs, settle
from fusing import Fused, drawn_seeds, fuse, rule_problems
from shardwright.passes.capture import capture
from shardwright.passes.checked import outcome
from shardwright.passes.fuse.conv_bn import FoldNorm
from shardwright.passes.fuse.ops.folded_conv import folded_conv
from shardwright.passes.rewrite import rewritten
from shardwright.passes.summarize import summarize
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

OP = "shardwright.folded_conv"


class Layers(nn.Module):
    """Convolutions, most with a batch norm behind, some with a second user of what stands between, or a call."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = Draw(seed)
        self.dims, self.folds = draw.randint(1, 3), 0
        self.widths = [draw.choice((4, 6, 8)) for _ in range(draw.randint(2, 4))]
        self.convs, self.norms, self.kinds = nn.ModuleList(), nn.ModuleList(), []
        for inner, out in zip(self.widths, self.widths[1:], strict=False):
            turned = draw.random() < 0.25
            stride = {} if turned else {"stride": 1}
            self.convs.append(
                draw.transposed(self.dims, inner, out) if turned else draw.conv(self.dims, inner, out, **stride)
            )
            self.norms.append(draw.norm(self.dims, out))
            self.kinds.append(draw.choice(("plain", "plain", "plain", "shared", "scaled")))
            self.folds += self.kinds[-1] == "plain"
        draw.freeze(self)

    def forward(self, x):
        for conv, norm, kind in zip(self.convs, self.norms, self.kinds, strict=True):
            y = conv(x)
            z = norm(y * 1.5 if kind == "scaled" else y)
            x = torch.relu(z + y.sin() if kind == "shared" else z)
        return x


@pytest.mark.parametrize("seed", drawn_seeds(24))
def test_random_layers(seed):
    body = Layers(seed)
    model = settle(Loss(body, body.widths[-1]), seed)
    found = fuse(FoldNorm(), model, *inputs(3, body.widths[0], *([7] * body.dims)), seed=seed)
    assert found.count(OP) == found.nodes == body.folds
    assert found.count("aten.batch_norm") == len(body.norms) - body.folds
    assert found.predicted == found.measured
    assert found.predicted > 0 or not body.folds or not all(p.requires_grad for p in model.parameters())
    summarize(found.after)


def _conv_outputs(found: Fused) -> int:
    """Bytes of the results of convolutions."""
    convs = [n for n in found.before.graph.graph.nodes if n.op == "call_function" and "conv" in n.name]
    return sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in convs)


def test_a_residual_network_keeps_no_results_of_convolutions():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], num_labels=5, layer_type="bottleneck")
    pixels, labels = inputs(2, 3, 32, 32)
    model = settle(ResNetForImageClassification(config))
    found = fuse(FoldNorm(), model, pixel_values=pixels, labels=labels)
    norms = sum(isinstance(m, NORMS) for m in model.modules())
    assert found.count(OP) == found.nodes == norms == 15
    assert found.count("aten.batch_norm") == 0
    assert found.predicted == found.measured == _conv_outputs(found)
    summarize(found.after)


def test_an_inference_graph_has_no_batch_norm_left():
    model = settle(nn.Sequential(Normed(3, 4, 3), Normed(4, 6, 1)))
    x, _ = inputs(2, 3, 8, 8)
    before = capture(model, (x,), train=False)
    after = rewritten(before, [FoldNorm()])
    assert [n.name.split("_")[0] for n in after.graph.graph.nodes if n.op == "call_function"] == ["folded", "relu"] * 2
    values = before.values(model) | before.flatten((x,))
    (result,) = after.graph(*(values[e.node] for e in after.entries))
    assert (result - model(x)).abs().max() < 1e-12


class One(nn.Module):
    """A convolution, a batch norm, and what a test makes of them."""

    def __init__(self, body, frozen=(), **norm) -> None:
        super().__init__()
        self.body, self.conv, self.norm = body, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **norm)
        self.register_buffer("mean", torch.randn(5))
        self.register_buffer("var", torch.rand(5) + 0.5)
        for name in frozen:
            getattr(self, name).requires_grad_(False)

    def forward(self, x):
        return self.body(self, x)


LEFT = {
    "a second user": lambda m, x: (m.norm(y := m.conv(x)) * y).sum(),
    "an output": lambda m, x: (m.norm(y := m.conv(x)).square().sum(), y),
    "a call between": lambda m, x: m.norm(m.conv(x).relu()).square().sum(),
    "an image without samples": lambda m, x: torch.nn.functional.batch_norm(
        m.conv(x[0]), m.mean, m.var
    ).square().sum(),
    "an uneven padding": lambda m, x: m.norm(
        torch.nn.functional.conv2d(x, m.conv.weight[..., :2], padding="same")
    ).square().sum(),
    "the batch's statistics": lambda m, x: torch.nn.functional.batch_norm(m.conv(x), None, None, training=True).pow(3).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    found = fuse(FoldNorm(), settle(One(LEFT[name])), inputs(2, 3, 7, 7)[0])
    assert found.count(OP) == found.nodes == 0


def test_training_mode_is_left_alone():
    model = settle(One(lambda m, x: m.norm(m.conv(x)).pow(3).sum())).train()
    assert fuse(FoldNorm(), model, inputs(2, 3, 7, 7)[0]).count(OP) == 0
    without = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False).eval()))
    assert fuse(FoldNorm(), without, inputs(2, 3, 7, 7)[0]).count(OP) == 0


def test_statistics_that_the_graph_writes():
    """One norm twice: training first, which writes its statistics, then on what it wrote."""

    def body(m, x):
        y = m.conv(x)
        m.norm.train()
        first = m.norm(y)
        m.norm.eval()
        return (first.sin() + m.norm(m.conv(x + 1))).square().sum()

    found = fuse(FoldNorm(), settle(One(body)), inputs(2, 3, 7, 7)[0])
    assert found.count(OP) == 1
    (made,) = [n for n in found.after.graph.graph.nodes if OP.split(".")[1] in n.name]
    assert [v.name.partition("_")[0] for v in made.args[2][3:]] == ["getitem", "getitem"]
    assert len(found.after.writes) == 3


@pytest.mark.parametrize("frozen", [("conv",), ("norm",), ("conv", "norm")])
@pytest.mark.parametrize("affine", [True, False])
def test_frozen_parameters(frozen, affine):
    model = settle(
        Loss(nn.Sequential(nn.Conv2d(3, 3, 1), One(lambda m, x: m.norm(m.conv(x)), frozen, affine=affine)), 4)
    )
    found = fuse(FoldNorm(), model, *inputs(2, 3, 7, 7))
    assert found.count(OP) == 1
    assert found.predicted == found.measured >= 0


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding(name, dtype):
    """Gradients are about as near to those in float64 as they were. In half precision the norms' parameters stay in float32."""
    model = settle(NETS[name](), 1).to(dtype)
    for norm in (m for m in model.modules() if isinstance(m, NORMS)):
        norm.float()
    found = _folded(model, dtype)
    assert found.predicted == found.measured > 0
    plain, folded = (outcome(c.graph.graph, found.values).gradients for c in (found.before, found.after))
    double = _folded(model.double(), torch.float64, like=dtype)
    exact = outcome(double.before.graph.graph, double.values).gradients
    assert all(g is None or g.dtype == folded[n].dtype for n, g in plain.items())
    assert _error(folded, exact) < 10 * _error(plain, exact)


def _folded(model: nn.Module, dtype: torch.dtype, like: torch.dtype | None = None) -> Fused:
    pixels, labels = inputs(4, 3, 16, 16, dtype=like or dtype)
    args = pixels.to(dtype), labels
    before = capture(model, args)
    values = before.values(model) | before.flatten(args)
    return Fused(before, rewritten(before, [FoldNorm()]), FoldNorm(), values)


def _error(found, exact) -> float:
    return max(float((found[n].double() - g).norm() / g.norm()) for n, g in exact.items() if g is not None)


def _vectors(channels: int, names: str = "bgtmv") -> list[torch.Tensor | None]:
    made = [torch.randn(channels, dtype=torch.float64) if n in names else None for n in "bgtm"]
    return [*made, torch.rand(channels, dtype=torch.float64) + 0.5 if "v" in names else None]


FORMS = {
    "grouped": ((2, 4, 5, 6), (6, 2, 3, 3), "bgtmv", ([2, 1], [1, 1], [1, 2], 2)),
    "no bias, no scale": ((2, 4, 5), (6, 4, 3), "mv", ([1], [1], [1])),
    "bias alone": ((2, 4, 5), (6, 4, 3), "b", ([1], [1], [2])),
    "nothing": ((2, 4, 4, 4, 3), (6, 2, 1, 3, 3), "", ([1, 1, 1], [0, 1, 1], [1, 1, 1], 2)),
    "transposed": ((2, 4, 5), (4, 3, 3), "bgtmv", ([2], [1], [1], 2, True, [1])),
}


@pytest.mark.parametrize("name", FORMS)
def test_rule_and_gradients(name):
    shape, weight, names, frame = FORMS[name]
    torch.manual_seed(0)
    x, w = torch.randn(shape, dtype=torch.float64), torch.randn(weight, dtype=torch.float64)
    vectors = _vectors(6, names)
    assert rule_problems(folded_conv, x, [w], vectors, [1e-3], *frame) == []
    given = [v.requires_grad_() for v in (x, w, *vectors) if v is not None]

    def run(x, w, *rest):
        left = iter(rest)
        return folded_conv(x, [w], [None if v is None else next(left) for v in vectors], [1e-3], *frame)

    assert torch.autograd.gradcheck(run, given)


def test_halves_of_the_backward_pass():
    """A gradient of the input, then those of the parameters (runtime/meetings.py)."""
    x, w = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(6, 4, 3, dtype=torch.float64)
    given = [v.requires_grad_() for v in (x, w, *_vectors(6))]
    y = folded_conv(given[0], [given[1]], given[2:], [1e-3], [1], [1], [1])
    grad = torch.randn_like(y)
    whole = torch.autograd.grad(y, given, grad, retain_graph=True)
    y.grad_fn.half = "input"
    (flowing,) = torch.autograd.grad(y, given[:1], grad, retain_graph=True)
    y.grad_fn.half = "weight"
    rest = torch.autograd.grad(y, given[1:], grad)
    assert all(torch.equal(a, b) for a, b in zip(whole, (flowing, *rest), strict=True))

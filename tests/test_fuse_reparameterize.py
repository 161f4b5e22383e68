"""Linear branches that are added as one product: random sums, real blocks, bytes, and what must be left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from convnets import CONVS, NETS, Draw, Loss, inputs, settle
from fusing import drawn_seeds, fuse, rule_problems
from shardwright.passes.fuse.conv_bn import FoldNorm
from shardwright.passes.fuse.ops.folded_conv import folded_conv
from shardwright.passes.fuse.ops.linear_sum import linear_sum
from shardwright.passes.fuse.reparameterize import Reparameterize
from shardwright.passes.summarize import summarize
from torch import nn

CONV, LINEAR = "shardwright.folded_conv", "shardwright.linear_sum"


def nested(draw: Draw, terms: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the terms, in any order and nesting."""
    draw.shuffle(terms)
    while len(terms) > 1:
        at = draw.randrange(len(terms) - 1)
        terms[at : at + 2] = [terms[at] + terms[at + 1]]
    return terms[0]


class Branches(nn.Module):
    """Convolutions inside one large kernel, added, with norms behind, the input or its norm, and terms that are neither."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, draw = seed, Draw(seed)
        dims, groups, self.out = draw.choice((1, 2, 2, 3)), draw.choice((1, 2, 4)), draw.choice((4, 8))
        stride, step, large = draw.choice((1, 1, 2)), draw.randint(1, 2), draw.choice((3, 5))
        taps = [large, *(draw.choice([k for k in (1, 3, 5) if k <= large]) for _ in range(draw.randint(1, 3)))]
        self.ways = nn.ModuleList(
            CONVS[dims - 1](4, self.out, k, stride, step * (k - 1) // 2, step, groups, draw.random() < 0.5)
            for k in taps
        )
        self.norms = nn.ModuleList(draw.norm(dims, self.out) if draw.random() < 0.5 else nn.Identity() for _ in taps)
        still = stride == 1 and self.out == 4
        self.same = draw.choice((None, nn.Identity(), draw.norm(dims, 4))) if still else None
        self.shift = nn.Parameter(torch.randn(self.out, *[1] * dims)) if draw.random() < 0.5 else None
        self.mix, self.dims = draw.conv(dims, 3, 4, 1, groups=1, padding=0), dims
        draw.freeze(self)

    def forward(self, x):
        x = self.mix(x)
        terms = [norm(way(x)) for way, norm in zip(self.ways, self.norms, strict=True)]
        terms += [self.same(x)] if self.same is not None else []
        terms += [self.shift, self.shift.expand_as(terms[0]).tanh()] if self.shift is not None else []
        return nested(Draw(self.seed), terms)


@pytest.mark.parametrize("seed", drawn_seeds(30))
def test_random_sums(seed):
    body = Branches(seed)
    found = fuse(
        Reparameterize(),
        settle(Loss(body, body.out), seed),
        *inputs(2, 3, *([9] * body.dims)),
        seed=seed,
        first=(FoldNorm(),),
    )
    assert found.count(CONV) == 1
    assert found.count("aten.batch_norm") == 0
    assert found.predicted == found.measured
    summarize(found.after)


class Maps(nn.Module):
    """Linear maps of two inputs, in one sum with their biases, a product with a matrix and other terms."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, draw = seed, Draw(seed)
        self.deep = draw.random() < 0.5
        self.first = nn.ModuleList(nn.Linear(6, 7, bias=draw.random() < 0.5) for _ in range(draw.randint(2, 4)))
        self.second = nn.ModuleList(nn.Linear(6, 7, bias=draw.random() < 0.5) for _ in range(draw.randint(1, 3)))
        self.matrices = nn.ParameterList(torch.randn(6, 7) for _ in range(draw.randint(0, 2)))
        self.mix = nn.Linear(6, 6)
        draw.freeze(self)

    def forward(self, x):
        x = self.mix(x)
        y = x.sin()
        terms = [way(x) for way in self.first] + [way(y) for way in self.second] + [self.first[0].weight.sum(1)]
        if x.dim() == 2:
            terms += [torch.mm(x, m) for m in self.matrices]
        return nested(Draw(self.seed), terms).tanh().square().sum()

    def merged(self, rank: int) -> int:
        return 1 + (len(self.second) > 1) + (rank == 2 and len(self.matrices) > 1)


@pytest.mark.parametrize("seed", drawn_seeds(24))
def test_random_sums_of_linear_maps(seed):
    model = settle(Maps(seed), seed)
    shape = (8, 5, 6) if model.deep else (20, 6)
    found = fuse(Reparameterize(), model, torch.randn(shape, dtype=torch.float64), seed=seed)
    assert found.count(LINEAR) == model.merged(len(shape))
    assert found.count("aten.linear") == 1 + (len(model.second) == 1)
    assert found.predicted == found.measured == 0
    summarize(found.after)


@pytest.mark.parametrize(("name", "convs"), [("repvgg", 4), ("unirep", 3)])
def test_blocks(name, convs):
    """Every block is one convolution, whatever its branches: 3 x 3, 1 x 1, identity, dilated, strided, grouped."""
    found = fuse(Reparameterize(), settle(NETS[name]()), *inputs(2, 3, 12, 12), first=(FoldNorm(),))
    assert found.count(CONV) == convs
    assert found.count("aten.batch_norm") == 0
    assert (
        found.count("aten.add") == {"repvgg": 1, "unirep": 3}[name]
    )  # the classifier's bias, and residuals behind a ReLU
    assert found.predicted == found.measured == 0
    summarize(found.after)


class Sum(nn.Module):
    """What a test makes of convolutions of several kernels, and of linear maps."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body = body
        for name, kernel, given in (
            ("one", 1, {}), ("three", 3, {"padding": 1}), ("wide", (1, 7), {"padding": (0, 3)}),
            ("high", (7, 1), {"padding": (3, 0)}),
            ("grouped", 3, {"padding": 1, "groups": 2}), ("bare", 3, {}), ("odd", 3, {"padding": 2, "dilation": 2}),
            ("pair", 2, {"padding": 1, "dilation": 2}),
        ):  # fmt: skip
            setattr(self, name, nn.Conv2d(4, 4, kernel, **given))
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.body(self, x)


LEFT = {
    "another input": lambda m, x: (m.one(x) + m.three(x.sin())).square().sum(),
    "a second user": lambda m, x: ((y := m.one(x)) + m.three(x)).square().sum() + y.sum(),
    "an output": lambda m, x: (((y := m.one(x)) + m.three(x)).square().sum(), y),
    "a kernel too large": lambda m, x: (m.wide(x) + m.high(x)).square().sum(),
    "other groups": lambda m, x: (m.grouped(x) + m.three(x)).square().sum(),
    "another size": lambda m, x: (m.bare(x) + m.three(x)[..., 1:-1, 1:-1]).square().sum(),
    "a call between": lambda m, x: (m.one(x).relu() + m.three(x)).square().sum(),
    "scaled": lambda m, x: torch.add(m.one(x), m.three(x), alpha=2).square().sum(),
    "a product": lambda m, x: (m.one(x) * m.three(x)).square().sum(),
    "twice the same": lambda m, x: ((y := m.three(x)) + y).square().sum(),
    "one alone": lambda m, x: m.three(x).square().sum() + x.sum(),
    "linear maps of others": lambda m, x: (m.a(x) + m.b(x.sin())).square().sum(),
    "a linear map used again": lambda m, x: (
        (F.linear(x, m.a.weight) + (y := F.linear(x, m.b.weight))).sum() + y.sin().sum()
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    found = fuse(Reparameterize(), settle(Sum(LEFT[name])), inputs(2, 4, 8, 8)[0])
    assert found.count(CONV) == found.count(LINEAR) == found.nodes == 0


TAKEN = {
    "identity": (lambda m, x: m.three(x) + x, [3, 3]),
    "a dilated one": (lambda m, x: m.three(x) + m.odd(x) + m.one(x), [3, 3]),
    "one inside a row": (lambda m, x: m.one(x) + m.wide(x), [1, 7]),
    "even taps that lie between": (lambda m, x: m.pair(x) + m.three(x) + m.grouped(x), [3, 3]),
    "rows and columns, each with what fits": (lambda m, x: m.wide(x) + m.high(x) + m.one(x) + x, [1, 7]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_fits_is_taken(name):
    body, kernel = TAKEN[name]
    found = fuse(Reparameterize(), settle(Sum(lambda m, x: body(m, x.sin()).square().sum())), inputs(2, 4, 8, 8)[0])
    (made,) = [n for n in found.after.graph.graph.nodes if "folded_conv" in n.name]
    assert made.kwargs["kernel"] == kernel
    assert found.predicted == found.measured == 0


BRANCHES = {
    "two kernels and an identity": ([(4, 2, 3, 3), (4, 2, 1, 1), None], 2, [0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    "a dilated one": ([(6, 4, 3, 3), (6, 4, 2, 2)], 1, [0, 1, 0, 1, 0, 2, 0, 2]),
}


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("vectors", ["", "b", "bgtmv"])
def test_rule_and_gradients(name, vectors):
    shapes, groups, places = BRANCHES[name]
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64)
    weights = [None if s is None else torch.randn(s, dtype=torch.float64) for s in shapes]
    given = [torch.rand(shapes[0][0], dtype=torch.float64) + 0.5 if v in vectors else None for v in "bgtmv"] * len(
        shapes
    )
    frame = [0.1] * len(shapes), [1, 1], [1, 1], [1, 1], groups
    assert rule_problems(folded_conv, x, weights, given, *frame, kernel=[3, 3], places=places) == []
    leaves = [v.clone().requires_grad_() for v in (x, *weights, *given) if v is not None]

    def run(x, *rest):
        left = iter(rest)
        sides = [[None if v is None else next(left) for v in side] for side in (weights, given)]
        return folded_conv(x, *sides, *frame, kernel=[3, 3], places=places)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("transposed", [False, True])
def test_rule_and_gradients_of_linear_sums(transposed):
    shape = (6, 8) if transposed else (8, 6)
    x, *weights = (torch.randn(s, dtype=torch.float64) for s in ((2, 4, 6), shape, shape, shape))
    assert rule_problems(linear_sum, x, weights, transposed) == []
    leaves = [v.requires_grad_() for v in (x, *weights)]
    assert torch.autograd.gradcheck(lambda x, *w: linear_sum(x, w, transposed), leaves)

"""RMS norms as one op: random forms and casts, real models, bytes, and what must be left alone."""

from __future__ import annotations

import random

import blockmodels
import pytest
import torch
from fusing import drawn_seeds, fuse, rule_problems
from shardwright.passes.fuse.ops.rms_norm import rms_norm
from shardwright.passes.fuse.rms_norm import FuseRmsNorm
from torch import nn

OP = "shardwright.rms_norm"
EPS = 1e-5
FORMS = [
    lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    lambda x: torch.rsqrt((x * x).mean(x.dim() - 1, keepdim=True) + EPS) * x,
    lambda x: x / torch.sqrt(EPS + x.square().mean(-1, keepdim=True)),
    lambda x: x * (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPS) ** -0.5,
    lambda x: x / ((x**2).mean(-1, keepdim=True) + EPS) ** 0.5,
    lambda x: x * (1 / torch.sqrt((x.pow(2).sum(-1, True) * (1 / x.shape[-1])) + EPS)),
    lambda x: torch.rsqrt(x.pow(2).mean(-1, True)) * x,
]
WIDE, NARROW = torch.float64, torch.float32
"""Casts to these stand for those between float32 and half precision, whose errors would hide others."""


class Norm(nn.Module):
    """One norm as a model may write it: a form, casts before and after, a weight, an offset."""

    def __init__(self, draw: random.Random, width: int, cast: bool) -> None:
        super().__init__()
        self.form, self.cast = draw.choice(FORMS), cast and draw.random() < 0.8
        self.weight = nn.Parameter(torch.randn(width)) if draw.random() < 0.8 else None
        self.offset = draw.choice((0, 1.0)) if self.weight is not None else 0
        self.late, self.first = draw.random() < 0.5, draw.random() < 0.5

    def forward(self, x):
        h = self.form(x.to(WIDE) if self.cast else x)
        h = h if self.late or not self.cast else h.to(x.dtype)
        if self.weight is not None:
            scale = self.offset + self.weight.to(h.dtype) if self.offset else self.weight
            h = scale * h if self.first else h * scale
        return h.to(x.dtype)


class Norms(nn.Module):
    def __init__(self, seed: int, cast: bool) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.width = draw.choice((34, 40, 48))  # wide enough for every tensor to be counted
        self.norms = nn.ModuleList(Norm(draw, self.width, cast) for _ in range(draw.randint(1, 3)))
        self.mix = nn.ModuleList(nn.Linear(self.width, self.width) for _ in self.norms)

    def forward(self, x):
        for norm, mix in zip(self.norms, self.mix, strict=True):
            x = x + mix(norm(mix(x)))
        return x.square().mean()


@pytest.mark.parametrize("seed", drawn_seeds(24))
@pytest.mark.parametrize("dtype", [WIDE, NARROW, torch.bfloat16])
def test_random_networks(seed, dtype):
    torch.manual_seed(seed)
    draw = random.Random(-seed)
    model = Norms(seed, cast=dtype != WIDE).to(dtype)
    shape = [draw.randint(6, 8) for _ in range(draw.randint(2, 3))]
    found = fuse(FuseRmsNorm(), model, torch.randn(*shape, model.width, dtype=dtype), seed=seed)
    assert found.count(OP) == len(model.norms)
    assert found.predicted == found.measured >= 0


COUNTS = {"llama": 5, "mistral": 5, "qwen2": 5, "gemma": 5, "t5": 12}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_models(name, dtype):
    model, kwargs = blockmodels.model(name, dtype)
    found = fuse(FuseRmsNorm(), model, **kwargs)
    assert found.count(OP) == COUNTS[name]
    assert found.count("aten.rsqrt") == 0
    assert found.predicted == found.measured > 0


class One(nn.Module):
    """A linear, one function of its result and of a weight, a sum."""

    def __init__(self, body, frozen="") -> None:
        super().__init__()
        self.body, self.first, self.weight = body, nn.Linear(8, 8), nn.Parameter(torch.randn(8))
        if frozen:
            getattr(self, frozen).requires_grad_(False)

    def forward(self, x):
        return self.body(self.first(x), self.weight)


X = torch.randn(5, 6, 8, dtype=torch.float64)


def norm(x, dim=-1):
    return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + EPS)


LEFT = {
    "another dim": lambda x, w: (norm(x, 1) * w).sum(),
    "two dims": lambda x, w: (norm(x, (-2, -1)) * w).sum(),
    "another count": lambda x, w: (x * torch.rsqrt(x.pow(2).sum(-1, True) / 7 + EPS)).sum(),
    "another power": lambda x, w: (x * torch.rsqrt(x.pow(4).mean(-1, True) + EPS)).sum(),
    "another root": lambda x, w: (x * (x.pow(2).mean(-1, True) + EPS) ** -0.25).sum(),
    "variance": lambda x, w: (x * torch.rsqrt((x - 1).pow(2).mean(-1, True) + EPS)).sum(),
    "a second user": lambda x, w: (x * (r := torch.rsqrt(x.pow(2).mean(-1, True) + EPS))).sum() + r.sum(),
    "an output": lambda x, w: ((x * (r := torch.rsqrt(x.pow(2).mean(-1, True) + EPS))).sum(), r),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    found = fuse(FuseRmsNorm(), One(LEFT[name]).double(), X)
    assert found.count(OP) == 0
    assert found.nodes == 0


PARTLY = {
    "a weight that is no row": lambda x, w: (norm(x) * w.sum()).sum(),
    "a gate": lambda x, w: (norm(x) * torch.sigmoid(x)).sum(),
    "the normed rows are used again": lambda x, w: ((h := norm(x)) * w).sum() + h.sin().sum(),
    "the weight's sum is used again": lambda x, w: (norm(x) * (s := 1 + w)).sum() + s.sum(),
}


@pytest.mark.parametrize("name", PARTLY)
def test_what_stands_around_stays(name):
    found = fuse(FuseRmsNorm(), One(PARTLY[name]).double(), X)
    assert found.count(OP) == 1
    assert found.count("aten.rsqrt") == 0
    if "sum" not in name:
        assert found.count("aten.mul") == 1


@pytest.mark.parametrize("frozen", ["first", "weight"])
def test_frozen_parameters(frozen):
    found = fuse(FuseRmsNorm(), One(lambda x, w: (norm(x) * w).sum(), frozen).double(), X)
    assert found.count(OP) == 1
    assert found.predicted == found.measured >= 0


def test_a_weight_that_is_offset_in_half_precision_rounds_there():
    """bfloat16 + 1 rounds before the product, so the sum stays outside."""
    x = torch.randn(5, 6, 8, dtype=torch.bfloat16)
    found = fuse(FuseRmsNorm(), One(lambda x, w: (norm(x.float()) * (1 + w)).to(x.dtype).sum()).bfloat16(), x)
    assert found.count(OP) == 1
    assert found.count("aten.add") == 2  # the linear's bias, and this


@pytest.mark.parametrize(("weight", "offset"), [(True, 0.0), (True, 1.0), (False, 0.0)])
def test_rule_and_gradients(weight, offset):
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True) if weight else None
    plain = [v.detach() if v is not None else None for v in (x, w)]
    assert rule_problems(rms_norm, *plain, EPS, offset) == []
    assert torch.autograd.gradcheck(
        lambda *v: rms_norm(v[0], v[1] if weight else None, EPS, offset), (x, w) if weight else (x,)
    )

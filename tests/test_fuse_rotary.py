"""Rotary embeddings as one op: random forms, real models, and what must be left alone."""

from __future__ import annotations

import random

import blockmodels
import pytest
import torch
from fusing import drawn_seeds, fuse, rule_problems
from shardwright.passes.fuse.ops.rotary import rotary
from shardwright.passes.fuse.rotary import FuseRotary
from torch import nn

OP = "shardwright.rotary"


def _halves(x, way):
    if way == 0:
        return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x.chunk(2, -1) if way == 1 else x.split(x.shape[-1] // 2, dim=x.dim() - 1)


def _pairs(x, way):
    if way == 0:
        return x[..., ::2], x[..., 1::2]
    pairs = x.unflatten(-1, (-1, 2))
    return (pairs[..., 0], pairs[..., 1]) if way == 1 else pairs.unbind(-1)


def by_halves(x, cos, sin, way):
    first, second = _halves(x, way)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def by_pairs(x, cos, sin, way):
    even, odd = _pairs(x, way)
    return sin * torch.stack((-odd, even), dim=-1).flatten(-2) + cos * x


def of_halves(x, cos, sin, way):
    first, second = _halves(x, way)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def of_pairs(x, cos, sin, way):
    even, odd = _pairs(x, way)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


FORMS = {by_halves: 1, by_pairs: 1, of_halves: 2, of_pairs: 2}


class Rotating(nn.Module):
    """Queries and keys rotated in one of the forms, whole or in part, with tables over heads or over all."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.form, self.way = draw.choice(list(FORMS)), draw.randrange(3)
        self.heads, self.width, self.length = draw.choice((1, 3)), draw.choice((4, 6, 8)), draw.choice((3, 5))
        self.part = draw.choice((self.width, 4))
        self.first = draw.random() < 0.5  # heads stand before positions
        self.project = nn.Linear(8, self.heads * self.width)
        self.scale = nn.Parameter(torch.ones(())) if draw.random() < 0.3 else 1.0
        self.part = max(self.part, 4)

    def forward(self, x):
        q = self.project(x).unflatten(-1, (self.heads, self.width))
        q = q.transpose(1, 2) if self.first else q
        angles = torch.arange(self.length, dtype=x.dtype)[:, None] * torch.arange(1, self.part // FORMS[self.form] + 1)
        angles = angles if self.first else angles[:, None]
        turned = self.form(q[..., : self.part], self.scale * angles.cos(), angles.sin(), self.way)
        y = torch.cat((turned, q[..., self.part :]), -1)
        return (y * y.roll(1, -1).exp()).sum()


@pytest.mark.parametrize("seed", drawn_seeds(32))
def test_random_networks(seed):
    torch.manual_seed(seed)
    model = Rotating(seed).double()
    found = fuse(FuseRotary(), model, torch.randn(2, model.length, 8, dtype=torch.float64), seed=seed)
    assert found.count(OP) == 1
    assert found.nodes >= 5
    if isinstance(model.scale, float):  # else the turned halves or their source is kept for the tables' gradient
        assert found.predicted == found.measured


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma", "neox", "phi", "gptj"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models(name, dtype):
    model, kwargs = blockmodels.model(name, dtype)
    found = fuse(FuseRotary(), model, **kwargs)
    assert found.count(OP) == 4
    assert found.count("aten.neg") == 0
    assert found.predicted == found.measured == 0


class One(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.body, self.project = body, nn.Linear(8, 8)

    def forward(self, x):
        return self.body(
            self.project(x), torch.linspace(0, 1, 8, dtype=x.dtype), torch.linspace(1, 2, 8, dtype=x.dtype)
        )


def _swapped(x, cos, sin):
    return (x * cos + torch.cat((x[..., :4], -x[..., 4:]), -1) * sin).sum()


def _other_dim(x, cos, sin):
    return (x * cos + torch.cat((-x[:, 4:], x[:, :4]), 1) * sin).sum()


def _other_cut(x, cos, sin):
    return (x * cos + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin).sum()


def _used_again(x, cos, sin):
    turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
    return (x * cos + turned * sin).sum() + turned.sin().sum()


def _output(x, cos, sin):
    turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
    return (x * cos + turned * sin).sum(), turned


def _broadcast(x, cos, sin):
    return (x * cos[:1] + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin).sum()


def _grown(x, cos, sin):
    return (x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin.expand(3, 2, 8, 8)).sum()


@pytest.mark.parametrize("body", [_swapped, _other_dim, _other_cut, _used_again, _output, _broadcast, _grown])
def test_left_alone(body):
    found = fuse(FuseRotary(), One(body).double(), torch.randn(2, 8, 8, dtype=torch.float64))
    assert found.count(OP) == 0
    assert found.nodes == 0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("share", [1, 2])
def test_rule_and_gradients(interleaved, share):
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(2, 1, 6, 8 // share, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert rule_problems(rotary, x.detach(), cos.detach(), sin.detach(), interleaved) == []
    small = tuple(t[:1, :2, :2].detach().requires_grad_() for t in (x, cos, sin))
    assert torch.autograd.gradcheck(lambda *v: rotary(*v, interleaved), small)

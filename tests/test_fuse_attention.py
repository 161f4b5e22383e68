"""Attention written out as one op: random forms and masks, real models, blocked rows, and what must be left alone."""

from __future__ import annotations

import math
import random

import blockmodels
import pytest
import torch
from fusing import drawn_seeds, fuse
from shardwright.passes.fuse.attention import FuseAttention
from shardwright.passes.pattern import target_of
from torch import nn

OP = "aten.scaled_dot_product_attention"
B, S, D = 2, 5, 8


def call_of(found):
    """The attention call: query, key, value, mask, dropout, causal, and the scale."""
    (node,) = [n for n in found.after.graph.graph.nodes if target_of(n) == OP]
    return (*node.args, *(None, 0.0, False)[len(node.args) - 3 :]), node.kwargs["scale"]


def _causal(s, dtype=torch.bool):
    allowed = torch.ones(s, s, dtype=torch.bool).tril()
    return (
        allowed if dtype == torch.bool else torch.zeros(s, s, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    )


MASKS = {
    "none": lambda x, s, pad: x,
    "causal, added": lambda x, s, pad: x + _causal(s, x.dtype),
    "causal, filled": lambda x, s, pad: x.masked_fill(~_causal(s), float("-inf")),
    "causal, chosen": lambda x, s, pad: torch.where(_causal(s), x, torch.finfo(x.dtype).min),
    "padding, added": lambda x, s, pad: (1.0 - pad.to(x.dtype)) * -1e9 + x,
    "padding, chosen": lambda x, s, pad: torch.where(pad, x, torch.full([], torch.finfo(x.dtype).min, dtype=x.dtype)),
    "bias and causal": lambda x, s, pad: torch.where(_causal(s), x + 0.1 * torch.arange(s, dtype=x.dtype), -1e9),
    "window": lambda x, s, pad: x.masked_fill(~(_causal(s) & _causal(s).T.tril(2)), -1e9),
}


class Attending(nn.Module):
    """One attention, in a random form."""

    def __init__(self, seed: int, cast: bool) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.mask, self.merged, self.cast = sorted(MASKS)[seed % len(MASKS)], draw.random() < 0.4, cast
        self.heads, self.place = draw.choice((1, 3)), draw.choice(("none", "before", "after", "over", "both"))
        self.turn, self.bias = draw.choice(("last", "permute")), draw.random() < 0.3
        self.project = nn.Linear(D, 3 * self.heads * D)
        self.slope = nn.Parameter(torch.randn(self.heads, 1, S)) if self.bias else None

    def _scores(self, q, k):
        t = k.transpose(-1, -2) if self.turn == "last" else k.permute(*range(k.dim() - 2), -1, -2)
        if self.place in ("before", "both"):
            q = q * D**-0.25
        scores = torch.bmm(q, t) if self.merged else torch.matmul(q, t)
        if self.place in ("after", "both"):
            scores = D**-0.5 * scores
        return scores / math.sqrt(D) if self.place == "over" else scores

    def forward(self, x, pad):
        q, k, v = (t.unflatten(-1, (self.heads, D)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        if self.merged:
            q, k, v = (t.reshape(B * self.heads, S, D) for t in (q, k, v))
        scores = self._scores(q, k)
        scores = scores.view(B, self.heads, S, S) if self.merged else scores
        scores = scores + self.slope if self.bias else scores
        scores = MASKS[self.mask](scores, S, pad[:, None, None])
        scores = scores.view(B * self.heads, S, S) if self.merged else scores
        p = torch.softmax(scores, -1, dtype=torch.float64 if self.cast else None).to(v.dtype)
        y = torch.bmm(p, v) if self.merged else p @ v
        return y.view(B, self.heads, S, D).square().sum()

    @property
    def times(self):
        return {"none": 1.0, "before": D**-0.25, "both": D**-0.75}.get(self.place, D**-0.5)


@pytest.mark.parametrize("seed", drawn_seeds(32))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_forms(seed, dtype):
    torch.manual_seed(seed)
    model = Attending(seed, cast=dtype == torch.float32).to(dtype)
    pad = torch.arange(S) < torch.tensor([[S], [2]])
    found = fuse(FuseAttention(), model, torch.randn(B, S, D, dtype=dtype), pad)
    assert found.count(OP) == 1
    assert found.count("aten.softmax") == 0
    (*_, mask, dropped, causal), scale = call_of(found)
    assert causal == (model.mask.startswith("causal,") and not model.bias)
    assert (mask is None) == (causal or (model.mask == "none" and not model.bias))
    assert scale == pytest.approx(model.times)
    assert dropped == 0.0
    assert found.predicted == found.measured


EAGER = {"attn_implementation": "eager"}
CALLS = {"llama": 2, "mistral": 2, "gemma": 2, "gpt2": 2, "bert": 2, "vit": 2, "t5": 6, "neox": 2, "phi": 2, "gptj": 2}
DECODERS = {"llama", "mistral", "gemma", "gpt2", "neox", "phi", "gptj"}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models(name, dtype):
    model, kwargs = blockmodels.model(name, dtype, seq=20, **({} if name == "gptj" else EAGER))
    found = fuse(FuseAttention(), model, **kwargs)
    assert found.count(OP) == CALLS[name]
    assert found.count("aten.softmax") == 0
    assert found.predicted == found.measured
    if name in DECODERS:
        shapes = [
            tuple(n.meta["val"].shape) for n in found.after.graph.graph.nodes if hasattr(n.meta.get("val"), "shape")
        ]
        assert not [s for s in shapes if s[-2:] == (20, 20)]


def test_long_sequences_keep_no_scores():
    model, kwargs = blockmodels.model("llama", torch.float32, seq=128, **EAGER)
    found = fuse(FuseAttention(), model, **kwargs)
    scores = 4 * 4 * 128 * 128 * 4
    assert found.predicted == found.measured > 1.9 * scores


class One(nn.Module):
    """Projections, and one function of query, key, value and an input."""

    def __init__(self, body) -> None:
        super().__init__()
        self.body, self.project, self.learned = body, nn.Linear(D, 3 * D), nn.Parameter(torch.ones(()))

    def forward(self, x, given):
        return self.body(
            self, *(t.unflatten(-1, (2, D // 2)).transpose(1, 2) for t in self.project(x).chunk(3, -1)), given
        )


def fused(body, given=None, dtype=torch.float64):
    given = torch.zeros(B, 1, 1, S, dtype=dtype) if given is None else given
    return fuse(FuseAttention(), One(body).to(dtype), torch.randn(B, S, D, dtype=dtype), given)


def plain(scores, v):
    return (scores.softmax(-1) @ v).square().sum()


def _kept(m, q, k, v, g):
    p = (q @ k.mT).softmax(-1)
    return (p @ v).square().sum(), p


LEFT = {
    "the weights are an output": _kept,
    "the weights are read again": lambda m, q, k, v, g: (
        ((p := (q @ k.mT).softmax(-1)) @ v).square().sum() + p.sin().sum()
    ),
    "the scores are read again": lambda m, q, k, v, g: plain(s := q @ k.mT, v) + s.sin().sum(),
    "capped": lambda m, q, k, v, g: plain(torch.tanh(q @ k.mT), v),
    "another dim": lambda m, q, k, v, g: ((q @ k.mT).softmax(-2) @ v).square().sum(),
    "a learned scale": lambda m, q, k, v, g: plain(q @ k.mT * m.learned, v),
    "weights on the right": lambda m, q, k, v, g: (v.mT @ (q @ k.mT).softmax(-1)).square().sum(),
    "a negative number of another size": lambda m, q, k, v, g: plain((q @ k.mT).masked_fill(g < 0, -5.0), v),
    "zero fills": lambda m, q, k, v, g: plain((q @ k.mT).masked_fill(g < 0, 0.0), v),
    "rows may be -inf": lambda m, q, k, v, g: plain((q @ k.mT).masked_fill(g < 0, float("-inf")), v),
    "an input that may hold -inf": lambda m, q, k, v, g: plain(q @ k.mT + g, v),
    "two unknown masks": lambda m, q, k, v, g: plain(q @ k.mT + (g > 0) * -3e38 + (g < 1) * -3e38, v),
    "sums of weights": lambda m, q, k, v, g: ((q @ k.mT).softmax(-1).cumsum(-1) @ v).square().sum(),
    "narrow scores": lambda m, q, k, v, g: plain((q.to(torch.bfloat16) @ k.to(torch.bfloat16).mT).to(v.dtype), v),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    found = fused(LEFT[name])
    assert found.count(OP) == 0
    assert found.nodes == 0


PADDED = torch.tensor([[True, True, False, True, True], [True, False, False, False, False]])[:, None, None]
LEAST = torch.finfo(torch.float64).min
BY_KEY = [
    lambda m, q, k, v, g: plain((q @ k.mT).masked_fill(~g, LEAST), v),
    lambda m, q, k, v, g: plain(torch.where(g.expand(B, 1, S, S), q @ k.mT, LEAST), v),
    lambda m, q, k, v, g: plain(q @ k.mT + torch.where(g, torch.zeros(()).double(), LEAST), v),
    lambda m, q, k, v, g: plain(q @ k.mT + ((1.0 - g.double()) * -1e9).expand(B, 2, S, S), v),
]


@pytest.mark.parametrize("body", BY_KEY)
def test_padding_is_the_same_for_every_query(body):
    assert fused(body, PADDED).count(OP) == 1


@pytest.mark.parametrize("body", BY_KEY)
def test_padding_beside_a_causal_mask_may_block_rows(body):
    """The first rows of samples that are padded on the left: fused kernels make something else of them."""
    causal = torch.zeros(S, S).double().masked_fill(~_causal(S), LEAST)
    found = fused(lambda m, q, k, v, g: body(m, q, k, v, g & _causal(S)), PADDED)
    assert found.count(OP) == found.nodes == 0
    found = fused(
        lambda m, q, k, v, g: plain(q @ k.mT + causal + torch.where(g, torch.zeros(()).double(), LEAST), v), PADDED
    )
    assert found.count(OP) == found.nodes == 0


def test_known_masks_with_infinities():
    """A linear bias by distance with -inf ahead: known, and no row is blocked."""
    ahead = torch.arange(S)[None] - torch.arange(S)[:, None]
    bias = (0.5 * ahead).double().masked_fill(ahead > 0, float("-inf"))
    assert fused(lambda m, q, k, v, g: plain(q @ k.mT + bias, v)).count(OP) == 1
    bias[2] = float("-inf")
    found = fuse_unchecked(lambda m, q, k, v, g: plain(q @ k.mT + bias, v))
    assert found == 0


def fuse_unchecked(body):
    """Calls after the pass, where values are not numbers."""
    from shardwright.passes.capture import capture
    from shardwright.passes.rewrite import rewritten

    captured = capture(One(body).double(), (torch.randn(B, S, D).double(), torch.zeros(B, 1, 1, S).double()))
    return sum(target_of(n) == OP for n in rewritten(captured, [FuseAttention()]).graph.graph.nodes)


def test_one_key_head_for_all():
    found = fused(lambda m, q, k, v, g: plain(q @ k[:, :1].mT, v[:, :1]))
    assert found.count(OP) == 1


def test_dropout_goes_in():
    from shardwright.passes.capture import capture
    from shardwright.passes.rewrite import rewritten

    def body(m, q, k, v, g):
        return (nn.functional.dropout((q @ k.mT).softmax(-1), 0.25, True) @ v).square().sum()

    captured = capture(One(body), (torch.randn(B, S, D), torch.zeros(1)))
    after = rewritten(captured, [FuseAttention()])
    (node,) = [n for n in after.graph.graph.nodes if target_of(n) == OP]
    assert node.args[4] == 0.25
    assert not [n for n in after.graph.graph.nodes if target_of(n) == "aten.dropout"]

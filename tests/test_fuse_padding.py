"""Padding removal: values at valid positions and all gradients, products by count, bytes, the rule, and what must be left alone."""

from __future__ import annotations

import random

import eager
import pytest
import torch
import torch.nn.functional as F
from fusing import PRICES, drawn_seeds, rule_problems, saved_bytes
from shardwright.passes.capture import capture
from shardwright.passes.choose import asked
from shardwright.passes.fuse import PASSES
from shardwright.passes.fuse.ops.packed import packed
from shardwright.passes.fuse.padding import PackPadding
from shardwright.passes.gain import Paying
from shardwright.passes.random import seeded_call
from shardwright.passes.rewrite import rewritten
from shardwright.passes.summarize import summarize
from shardwright.planner.pins import parse_pins
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5ForConditionalGeneration

TARGET = "shardwright.packed.default"
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def masks(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Masks of every sort: padded right, left and anywhere, a sample of nothing but padding, nothing padded."""
    generator = torch.Generator().manual_seed(batch * length)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    at = torch.arange(length).expand(batch, length)
    gone = (at < lengths) & (torch.arange(batch).unsqueeze(1) > 0)
    anywhere = torch.rand(batch, length, generator=generator) < 0.6
    return {"right": at < lengths, "left": at >= length - lengths, "anywhere": anywhere, "gone": gone, "whole": at >= 0}


def parts(captured) -> int:
    return sum(str(n.target) == TARGET for n in captured.graph.graph.nodes)


def outcome(captured, values, valid, places):
    """Outputs, zero where padded (`places`: those with positions), and the gradients of a loss that reads valid ones."""
    leaves = [values[e.node].detach().clone() for e in captured.entries]
    for leaf, entry in zip(leaves, captured.entries, strict=True):
        leaf.requires_grad_(entry.trainable and leaf.is_floating_point())
    outputs = [o for o in captured.graph(*leaves) if o is not None and o.is_floating_point()]
    kept = []
    for i, o in enumerate(outputs):
        seen = valid.view(*valid.shape, *[1] * (o.dim() - 2)) if i in places else torch.ones(o.shape, dtype=torch.bool)
        kept.append(o.masked_fill(~seen, 0.0))
    loss = sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in kept)
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return kept, grads


def agree(before, after, values, valid, places=frozenset({1}), tolerance=1e-10):
    (outs, grads), (others, found) = (outcome(c, values, valid, places) for c in (before, after))
    for a, b in zip((*outs, *grads), (*others, *found), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            a, b = a.detach(), b.detach()
            assert float((a - b).abs().max()) <= tolerance * max(1.0, float(a.abs().max()))


class Encoder(nn.Module):
    """Layers of attention under a padding mask, and of what works position by position, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        draw = random.Random(seed)
        self.heads, self.width, self.depth = draw.choice((1, 2, 4)), draw.choice((8, 16)), draw.randint(1, 3)
        self.written, self.merged, self.inverted = (draw.random() < 0.5 for _ in range(3))
        self.first, self.gated, self.act = (
            draw.random() < 0.5,
            draw.random() < 0.4,
            draw.choice((F.gelu, F.relu, torch.tanh)),
        )
        biased, inner = draw.random() < 0.7, draw.choice((8, 24))
        w = self.width

        def maps(*sizes):
            return nn.ModuleList(nn.Linear(*sizes, bias=biased) for _ in range(self.depth))

        self.qkv, self.out = maps(w, 3 * w), maps(w, w)
        self.up, self.gate, self.down = maps(w, inner), maps(w, inner), maps(inner, w)
        self.norms = nn.ModuleList(draw.choice((nn.LayerNorm, nn.RMSNorm))(w) for _ in range(2 * self.depth))
        self.places = nn.Parameter(torch.randn(1, 64, w))
        if draw.random() < 0.3:
            self.up.requires_grad_(False)

    def attention(self, i, x, mask):
        b, s, w = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv[i](x).chunk(3, -1))
        allowed = (mask == 0 if self.inverted else mask != 0)[:, None, None, :]
        if not self.written:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        else:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            scores = (
                scores + torch.where(allowed, 0.0, -1e9).to(x.dtype) if i % 2 else scores.masked_fill(~allowed, -1e9)
            )
            y = scores.softmax(-1) @ v
        return self.out[i](y.transpose(1, 2).reshape(b, s, w))

    def block(self, i, x):
        flat = x.reshape(-1, self.width) if self.merged else x
        inner = self.act(self.up[i](flat))
        return self.down[i](inner * self.gate[i](flat) if self.gated else inner).reshape(x.shape)

    def forward(self, x, mask):
        x = x + self.places[:, : x.shape[1]]
        for i in range(self.depth):
            if self.first:
                x = x + self.attention(i, self.norms[2 * i](x), mask)
                x = x + self.block(i, self.norms[2 * i + 1](x)) * 0.5
            else:
                x = self.norms[2 * i](x + self.attention(i, x, mask))
                x = self.norms[2 * i + 1](self.block(i, x) + x)
        valid = (mask == 0 if self.inverted else mask != 0).unsqueeze(-1)
        return (x * valid).square().sum(), x


@pytest.mark.parametrize("seed", drawn_seeds(24))
def test_random_encoders(seed):
    draw = random.Random(seed)
    model = Encoder(seed).double()
    batch, length = draw.choice((1, 2, 3, 5)), draw.choice((4, 7, 8))
    x, wanted = torch.randn(batch, length, model.width).double(), masks(batch, length)
    dtype = draw.choice((torch.int64, torch.bool, torch.float64))
    before = capture(model, (x, wanted["whole"].to(dtype)), {})
    after = rewritten(before, [PackPadding()])
    assert parts(after) == model.depth + 1
    assert not any(str(n.target) == "aten.linear.default" for n in after.graph.graph.nodes)
    assert len(summarize(after).outline.ops) < len(summarize(before).outline.ops)
    for valid in wanted.values():
        mask = (~valid if model.inverted else valid).to(dtype)
        agree(before, after, before.values(model) | before.flatten((x, mask), {}), valid)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch", [1, 4])
def test_bert(attention, batch):
    model, kwargs = eager.family("bert-padded", attn_implementation=attention, **STILL)
    model = model.base_model.double()
    ids = kwargs["input_ids"][:batch]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = capture(model, (), given, lift_float64=True)
    after = rewritten(before, [PackPadding()])
    assert parts(after) == 3
    for name, valid in masks(*ids.shape).items():
        places = frozenset({0})
        values = before.values(model) | before.flatten((), given | {"attention_mask": valid.long()})
        if not bool(valid[:, 0].all()):  # the pooled output reads the first position
            continue
        assert name != "gone"
        agree(before, after, values, valid, places)


def test_t5_packs_its_encoder():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
    }
    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)).double()
    ids, labels = torch.randint(1, 50, (3, 6)), torch.randint(1, 50, (3, 6))  # as long as the decoder
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    before = capture(model, (), given, lift_float64=True)
    after = rewritten(before, [PackPadding()])
    assert parts(after) == 3
    for name, valid in masks(3, 6).items():
        if name == "gone":  # a decoder beside nothing but padding reads padding
            continue
        values = before.values(model) | before.flatten((), given | {"attention_mask": valid.long()})
        agree(before, after, values, valid, frozenset({2}))  # loss and logits are of the decoder


def test_products_are_those_of_valid_positions():
    model = Encoder(3).double()
    valid = torch.arange(8) < torch.tensor([[8], [3], [1], [4]])
    x = torch.randn(4, 8, model.width).double()
    before = capture(model, (x, valid), {})
    after = rewritten(before, [PackPadding(share=float(valid.double().mean()))])
    values = before.values(model) | before.flatten((x, valid), {})

    def counted(captured):
        leaves = [values[e.node].detach().clone().requires_grad_(e.trainable) for e in captured.entries]
        with FlopCounterMode(display=False) as counter:
            captured.graph(*leaves)[0].backward()
        return counter.get_flop_counts()["Global"]

    products = torch.ops.aten.mm, torch.ops.aten.addmm
    was, now = ([sum(counted(c).get(p, 0) for p in products)] for c in (before, after))
    assert now[0] / was[0] == int(valid.sum()) / valid.numel()
    outline = summarize(after).outline
    inside = [op for op in outline.ops if op.kind == "packed"]
    assert sum(op.flops + op.backward_flops for op in inside) == now[0]


@pytest.mark.parametrize("seed", drawn_seeds(12))
def test_bytes_are_as_predicted(seed):
    model = Encoder(seed)
    valid = torch.arange(16) < torch.tensor([[16], [3], [12], [9]])
    x = torch.randn(4, 16, model.width)
    before = capture(model, (x, valid), {})
    step = PackPadding(share=float(valid.double().mean()))
    after = rewritten(before, [step])
    mask = ~valid if model.inverted else valid
    values = before.values(model) | before.flatten((x, mask), {})
    values = {name: v.detach() for name, v in values.items()}
    verdict = Paying(PRICES)(step, before.graph.graph, after.graph.graph)
    assert verdict.saved_bytes == saved_bytes(before, values) - saved_bytes(after, values)
    assert verdict.saved_bytes > 0


def test_the_rule_is_true():
    program = (
        '{"share":0.5,"zero":false,"leads":[2,1],"lines":[["aten.linear.default",["%0","%2","%3"],{},96.0,0],'
        '["rows.reshape",["%4",1,[4]],{},0,0],["aten.add.Tensor",["%5","%1"],{"alpha":2},0,12.0]],"out":[[6,1],[4,2]]}'
    )
    valid = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = [torch.randn(4, 6, 3).double(), torch.randn(24, 4).double()]
    given = [torch.randn(4, 3).double(), torch.randn(4).double()]
    assert rule_problems(packed, valid, rows, given, program, 1.0) == []
    found = packed(valid, rows, given, program)
    whole = F.linear(rows[0], *given)
    torch.testing.assert_close(found[1], whole * valid.unsqueeze(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0], (whole.view(24, 4) + 2 * rows[1]) * valid.view(-1, 1), rtol=0, atol=1e-12)


def test_dropout_inside_is_seeded():
    program = '{"share":0.5,"zero":false,"leads":[2],"lines":[["aten.dropout.default",["%0",0.5,true],{},0,8.0]],"out":[[1,2]]}'
    valid, x = torch.arange(64) < torch.tensor([[64], [30]]), torch.ones(2, 64, 32)
    form = seeded_call((packed, (valid, [x], [], program, 1.0), {}), 7)
    assert form is not None

    def run(seed):
        target, args, kwargs = form(torch.tensor(seed))
        return target(*args, **kwargs)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert set(run(1)[valid].unique().tolist()) == {0.0, 2.0}
    assert abs(float(run(1)[valid].mean()) - 1.0) < 0.1
    assert torch.equal(packed(valid, [x], [], program, 0.0)[0], x * valid.unsqueeze(-1))


def test_compiled_it_is_the_same():
    model = Encoder(2).double()
    valid = torch.arange(8) < torch.tensor([[8], [3]])
    x = torch.randn(2, 8, model.width).double()
    before = capture(model, (x, valid), {})
    after = rewritten(before, [PackPadding()])
    values = before.values(model) | before.flatten((x, ~valid if model.inverted else valid), {})
    torch._dynamo.reset()
    closed = torch.compile(after.graph, fullgraph=True, dynamic=False, backend="aot_eager")
    leaves = [values[e.node] for e in after.entries]
    wanted = [v for v in leaves if v.requires_grad]
    sides = []
    for run in (after.graph, closed):
        sides.append(torch.autograd.grad(run(*leaves)[0], wanted, allow_unused=True))
    for a, b in zip(*sides, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Mixed(Encoder):
    """An encoder with something else between its layers."""

    def __init__(self, way: str) -> None:
        super().__init__(1)
        self.way, self.conv = way, nn.Conv1d(self.width, self.width, 3, padding=1)

    def block(self, i, x):
        x = super().block(i, x)
        mixed = {
            "convolution": lambda: self.conv(x.transpose(1, 2)).transpose(1, 2),
            "flip": lambda: x + x.flip(1),
            "sum so far": lambda: x.cumsum(1),
            "mean": lambda: x + x.mean(1, keepdim=True),
            "first": lambda: x * x[:, :1],
            "attention": lambda: F.scaled_dot_product_attention(x, x, x),
        }
        return mixed[self.way]()


@pytest.mark.parametrize("way", ["convolution", "flip", "sum so far", "mean", "first", "attention"])
def test_positions_that_mix_without_the_mask_leave_it_alone(way):
    model = Mixed(way)
    before = capture(model, (torch.randn(2, 8, model.width), torch.ones(2, 8)), {})
    after = rewritten(before, [PackPadding()])
    assert [str(n) for n in after.graph.graph.nodes] == [str(n) for n in before.graph.graph.nodes]


def test_no_mask_no_packing():
    for name in ("vit", "gpt2", "bert"):
        model, kwargs = eager.family(name)
        before = capture(model, (), kwargs)
        assert parts(rewritten(before, [PackPadding()])) == 0


def test_a_causal_decoder_with_padding():
    model, kwargs = eager.family("llama", attn_implementation="sdpa")
    model = model.double()
    ids = kwargs["input_ids"]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = capture(model, (), given, lift_float64=True)
    after = rewritten(before, [PackPadding()])
    assert parts(after) == 3
    for name in ("right", "whole"):
        valid = masks(*ids.shape)[name]
        values = before.values(model) | before.flatten((), given | {"attention_mask": valid.long()})
        agree(before, after, values, valid, frozenset({0}))


def test_nobody_gets_it_unasked():
    assert PASSES["padding"].semantics == "VALID"
    assert "padding" not in asked(parse_pins(["passes=auto"]), PRICES).names
    assert asked(parse_pins(["passes=padding"]), PRICES).names == ("padding",)

"""The ways to run attention: what they keep, and the price of separate kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attention_outlines import Form, decoder
from shardwright.planner.attention import (
    MATH,
    MATH_KIND,
    byte_masks,
    fused_attention,
    math_attention,
    math_kernels,
    moved,
)
from shardwright.planner.costs import Costs, Shape
from shardwright.planner.fusing import fusions
from shardwright.planner.outline import Op, Outline, Saved
from shardwright.planner.plan import MeshAxis
from shardwright.planner.prices import Prices
from shardwright.planner.ring import RING
from shardwright.planner.template import retyped
from shardwright.profiles.devices import parse_cluster

FORM = Form(layers=2, batch=2, seq=2048, heads=16, width=128)
ROWS = FORM.batch * FORM.heads * FORM.seq
SCORES = ROWS * FORM.seq
CLUSTER = parse_cluster("a100-sxm-80gb:8")


def outline(**changes: object) -> Outline:
    return retyped(decoder(replace(FORM, **changes)), "bfloat16")


def attention(found: Outline) -> Op:
    return found.by_name["l1.attn"]


def new(op: Op) -> list[int]:
    return [s.bytes for s in op.saved if s.source == "new"]


def test_what_each_form_keeps() -> None:
    found = outline()
    assert new(attention(fused_attention(found))) == [4 * ROWS]
    assert new(attention(math_attention(found))) == [2 * SCORES]
    dropped = math_attention(found, {"l1.attn"})
    assert sum(new(attention(dropped))) == 5 * SCORES  # Korthikanti et al. 2022, section 4.1: 5 a s^2 b
    assert new(dropped.by_name["l0.attn"]) == [2 * SCORES]
    assert Saved("result", 0) in attention(fused_attention(found)).saved
    assert Saved("result", 0) not in attention(dropped).saved
    for changed in (fused_attention(found), dropped):
        assert [op for op in changed.ops if op.kind != "attention"] == [
            op for op in found.ops if op.kind != "attention"
        ]
        assert attention(changed).kind == "attention"  # selective recompute and rings find it all the same


def test_scores_are_split_with_heads_and_queries() -> None:
    op = attention(math_attention(outline(causal=False)))
    (scores,) = (s.factors for s in op.saved if s.source == "new")
    assert {op.factors[f].name for f in scores} == {"b", "h", "s", "t"}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_the_price_is_that_of_separate_kernels(causal: bool, drops: bool) -> None:
    found = math_attention(outline(causal=causal), {"l1.attn"} if drops else ())
    op, device = attention(found), CLUSTER.device
    forward, backward = Prices(CLUSTER, "bfloat16").op(op, tuple(f.size for f in op.factors), found.tensors)
    product = 2.0 * SCORES * FORM.width
    best = device.peak("bfloat16") * device.efficiency(MATH_KIND)
    rate = device.memory_bytes_per_second * device.efficiency("elementwise")
    # Two products; scores written, softmax reads and writes, second product reads; mask and dropout read and write.
    started = [n * device.kernel_overhead_seconds for n in math_kernels(op)]
    there = started[0] + 2 * product / best + SCORES * (2 * (4 + 2 * causal + 2 * drops) + drops) / rate
    back = started[1] + 4 * product / best + SCORES * (2 * (7 + 2 * drops) + drops) / rate
    assert forward.seconds == pytest.approx(there, rel=0.02)
    assert backward.seconds == pytest.approx(back, rel=0.02)


def test_separate_kernels_are_slower_than_a_fused_one() -> None:
    found = outline()
    prices, sizes = Prices(CLUSTER, "bfloat16"), tuple(f.size for f in attention(found).factors)
    fused, math = (prices.op(attention(o), sizes, o.tensors) for o in (fused_attention(found), math_attention(found)))
    assert math[0].seconds > 2 * fused[0].seconds
    assert math[1].seconds > 1.2 * fused[1].seconds


def test_dropout_is_told_apart_at_equal_shapes() -> None:
    found = math_attention(outline(), {"l1.attn"})
    costs = Costs(Prices(CLUSTER, "bfloat16"), Shape((MeshAxis("tp", 2, "model", ""),)))
    plain, dropping = (costs.run(found.by_name[n], found.tensors, ("h",)) for n in ("l0.attn", "l1.attn"))
    assert plain is not None
    assert dropping is not None
    assert dropping.forward > plain.forward


def test_a_ring_of_separate_kernels_shares_work_and_scores() -> None:
    found = math_attention(outline())
    op, prices = attention(found), Prices(CLUSTER, "bfloat16")
    whole, ring = (
        Costs(prices, Shape((MeshAxis("cp", n, "context", ""),)), ahead=True).run(op, found.tensors, (choice,))
        for n, choice in ((1, "R"), (4, RING))
    )
    assert whole is not None
    assert ring is not None
    started = math_kernels(op)[0] * CLUSTER.device.kernel_overhead_seconds
    assert ring.forward - 4 * started == pytest.approx((whole.forward - started) / 4, rel=0.1)


def test_fused_kernels_mask_where_they_normalise() -> None:
    found = math_attention(outline(causal=True), {"l1.attn"})
    op = attention(found)
    assert math_kernels(op) == (5, 7)  # two products, mask, softmax, dropout; four products backward
    assert math_kernels(op, masks=True) == (4, 6)
    sizes = tuple(f.size for f in op.factors)
    eager, fused = (Prices(CLUSTER, "bfloat16", fused=f).op(op, sizes, found.tensors) for f in ({}, fusions(found)))
    assert fused[0].seconds < eager[0].seconds
    assert fused[0].issue_seconds == 4 * CLUSTER.device.issue_seconds


def test_other_ops_move_nothing_beside() -> None:
    assert moved(attention(outline()), "bfloat16") == ((), ())
    assert attention(math_attention(outline())).target == MATH


def test_masks_of_dropout_take_a_byte() -> None:
    found = outline()
    op = replace(
        found.by_name["l1.silu"],
        target="aten.dropout",
        kind="random",
        saved=(Saved("new", 0, (0, 1, 2), 2 * 4 * ROWS * 128),),
    )
    (changed,) = (o for o in byte_masks(replace(found, ops=(op,))).ops)
    assert new(changed) == [found.tensors[op.results[0].tensor].elements]

"""Context parallelism: choices found by propagation, rings and what they cost, and Ulysses on the model axis."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from attention_outlines import Form, decoder
from shardwright.planner.choices import states
from shardwright.planner.collectives import wire_bytes
from shardwright.planner.context import context_choices
from shardwright.planner.costs import Costs, Shape
from shardwright.planner.fronts import Fronts
from shardwright.planner.memory import Setting
from shardwright.planner.outline import Outline
from shardwright.planner.overlap import NONE, Overlap
from shardwright.planner.part import chain
from shardwright.planner.pins import Pins
from shardwright.planner.placement import R, V, split
from shardwright.planner.plan import MeshAxis
from shardwright.planner.precision import RECIPES
from shardwright.planner.prices import Prices
from shardwright.planner.residual import residual_factors
from shardwright.planner.ring import RING, TILE, block_bytes, repeated, ring_of, scratch_bytes, stretches
from shardwright.planner.roofline import CAUSAL_HALF, WHOLE_HALF
from shardwright.profiles.devices import parse_cluster
from solver_outlines import FakePrices

LONG = Form(layers=3, batch=1, seq=8192, heads=16, width=64, vocab=4096)


def axis(ways: int) -> Shape:
    return Shape((MeshAxis("cp", ways, "context", ""),))


def attention(outline: Outline):
    return outline.by_name["l0.attn"]


def fronts(outline: Outline, cluster: str = "h100-sxm:8x4", overlap: Overlap = NONE) -> Fronts:
    found = parse_cluster(cluster)
    setting = Setting(RECIPES["fp32"].precision(), "adamw")
    return Fronts(chain(outline), Prices(found, "float32"), Pins(), setting, residual_factors(outline), overlap=overlap)


# -- choices


@pytest.mark.parametrize("form", [Form(), Form(causal=False), Form(groups=2)])
def test_every_op_over_positions_splits_them_and_attention_is_a_ring(form: Form) -> None:
    outline = decoder(form)
    cut = context_choices(outline, 4)
    assert cut.blockers == ()
    assert cut.rings == ("l0.attn", "l1.attn")
    over = {op.name for op in outline.ops if any(outline.tensors[u.tensor].differentiable for u in op.results)}
    assert {n for n in over if cut.choice[n] == "s"} == over - {"l0.attn", "l1.attn", "div"}
    moved = [(op.name, u.tensor) for op, u, have, want in changes(outline, cut) if have != want]
    assert moved == [("loss", "labels")]  # whole for their count, sliced for the loss


def changes(outline: Outline, cut):
    for op in outline.ops:
        for use, want in zip(op.operands, states(op, dict(outline.tensors), cut.choice[op.name])[0], strict=True):
            if outline.tensors[use.tensor].role != "parameter":
                yield op, use, cut.states[use.tensor], want


def test_losses_end_partial_and_counts_are_whole() -> None:
    cut = context_choices(decoder(Form()), 4)
    assert str(cut.states["total"]) == str(cut.states["mean"]) == "P"
    assert cut.choice["ne"] == cut.choice["sum"] == "R"  # labels are on every rank: nothing is sent
    assert cut.states["count"] == R
    assert cut.states["ids"] == cut.states["x"] == split(1)
    assert cut.states["cos"] == split(0)  # the rotary table


def test_eager_attention_gathers_keys_and_values_and_keeps_queries_split() -> None:
    outline = decoder(Form(eager=True))
    cut = context_choices(outline, 4)
    assert (cut.rings, cut.blockers) == ((), ())
    moved = {u.tensor: (have, want) for _, u, have, want in changes(outline, cut) if have != want}
    del moved["labels"]
    keys = {f"l{k}.{n}" for k in (0, 1) for n in ("k.r", "v.h")}
    assert moved == dict.fromkeys(keys, (split(2), V))
    assert cut.states["l0.scores"] == split(2)
    assert cut.states["mask"] == split(0)


@pytest.mark.parametrize(
    ("form", "ways", "words"),
    [
        (Form(seq=12), 4, "12 positions do not divide by 8 (twice 4: the mask is causal): embed (aten.embedding)"),
        (Form(seq=197, causal=False), 4, "197 positions do not divide by 4: embed (aten.embedding)"),
        (Form(shift=True), 2, "mixes positions without being attention: roll (aten.roll)"),
    ],
)
def test_blockers_are_named_once(form: Form, ways: int, words: str) -> None:
    outline = decoder(form)
    assert context_choices(outline, ways).blockers == (words,)
    assert fronts(outline).numbers(1, 1, 1, ways) == ()


def test_without_positions_nothing_is_split() -> None:
    outline = decoder(Form())
    plain = tuple(replace(op, factors=tuple(replace(f, token=f.batch) for f in op.factors)) for op in outline.ops)
    assert context_choices(replace(outline, ops=plain), 2).blockers == ("no op runs over positions",)
    assert set(context_choices(outline, 1).choice.values()) == {"R"}


# -- the ring


def test_states_of_a_ring() -> None:
    outline = decoder(Form())
    op = attention(outline)
    assert ring_of(op) is not None
    assert states(op, dict(outline.tensors), RING) == ((split(2), split(2), split(2)), (split(2),))
    with pytest.raises(ValueError, match="cannot run as a ring"):
        states(outline.by_name["l0.n1.norm"], dict(outline.tensors), RING)


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_a_ring_sends_what_ring_attention_sends(ways: int) -> None:
    outline = decoder(LONG)
    op, f = attention(outline), LONG
    run = Costs(FakePrices(), axis(ways)).run(op, outline.tensors, (RING,))
    assert run is not None
    sent = Counter[bool]()
    for call in run.calls:
        sent[call.backward] += round(wire_bytes(call.collective, call.bytes, ways))
    block = 4 * f.batch * f.heads * (f.seq // ways) * f.width  # bytes of one block of keys
    assert sent[False] == 2 * (ways - 1) * block
    assert sent[True] == 4 * (ways - 1) * block
    # Li et al. 2021: 2 (P-1) forward and 6 (P-1) backward, together the four all-reduces of 1-D tensor parallelism.
    literal = 8 * (ways - 1) * f.batch * f.heads * f.width * (f.seq // ways) * 4
    assert sent[False] == literal / 4
    assert sent.total() == literal * 6 / 8
    assert literal == 4 * wire_bytes("all_reduce", 4.0 * f.batch * f.seq * f.heads * f.width, ways)


def test_a_ring_sends_repeated_keys_once() -> None:
    outline = decoder(replace(LONG, groups=4))
    shares = repeated(outline)
    assert set(shares.values()) == {0.25}
    op = attention(outline)
    one, four = (Costs(FakePrices(), axis(4), repeated=s).run(op, outline.tensors, (RING,)) for s in (shares, {}))
    assert one is not None
    assert four is not None
    assert [4 * c.bytes for c in one.calls] == [c.bytes for c in four.calls]


@pytest.mark.parametrize("causal", [False, True])
def test_work_of_a_ring_is_shared(causal: bool) -> None:
    outline = decoder(replace(LONG, causal=causal))
    op, prices = attention(outline), Prices(parse_cluster("h100-sxm:8"), "bfloat16")
    whole = Costs(prices, axis(1), ahead=True).run(op, outline.tensors, ("R",))
    ring = Costs(prices, axis(4), ahead=True).run(op, outline.tensors, (RING,))
    assert whole is not None
    assert ring is not None
    launches = 4 * prices.cluster.device.kernel_overhead_seconds
    # A round looks at a quarter of the keys, where fused attention is slower.
    short = [1 + (CAUSAL_HALF if causal else WHOLE_HALF) / keys for keys in (LONG.seq / 4, LONG.seq)]
    expected = (whole.forward - launches / 4) / 4 * short[0] / short[1]
    assert ring.forward - launches == pytest.approx(expected, rel=1e-6)
    assert whole.backward / 4 < ring.backward < whole.backward / 3 * short[0] / short[1]


def test_zigzag_gives_every_rank_the_same_work() -> None:
    ways, size = 4, 8
    held = [[p for part in stretches(r, ways) for p in range(part * size, (part + 1) * size)] for r in range(ways)]
    assert sorted(p for positions in held for p in positions) == list(range(2 * ways * size))
    work = [[sum(k <= q for q in held[r] for k in held[o]) for o in range(ways)] for r in range(ways)]
    assert len({sum(row) for row in work}) == 1
    others = {work[r][o] for r in range(ways) for o in range(ways) if r != o}
    assert others == {2 * size * size}  # half of a block, every round


def test_sends_hide_under_all_rounds_but_the_last() -> None:
    outline = decoder(LONG)
    op, cluster = attention(outline), parse_cluster("h100-sxm:8")
    prices, ways = Prices(cluster, "bfloat16"), 4
    open_, hidden = (
        Costs(prices, axis(ways), overlap=o).run(op, outline.tensors, (RING,)) for o in (NONE, Overlap(1.0, 1.0))
    )
    assert open_ is not None
    assert hidden is not None
    assert hidden.forward == open_.forward
    assert hidden.inside == pytest.approx(max(0.0, open_.inside - open_.forward * 3 / 4))
    assert hidden.inside_backward == pytest.approx(max(0.0, open_.inside_backward - open_.backward * 3 / 4))
    assert hidden.inside < open_.inside


@pytest.mark.parametrize(
    ("compute", "talk", "exposed"), [(10.0, 4.0, 0.4), (4.0, 10.0, 8.2), (0.0, 3.0, 3.0), (10.0, 0.0, 0.0)]
)
def test_overlap_is_bounded_and_slows_down(compute: float, talk: float, exposed: float) -> None:
    assert Overlap(0.5, 1.1).exposed(compute, talk) == pytest.approx(exposed)


def test_buffers_of_a_ring() -> None:
    outline = decoder(LONG)
    op, tensors = attention(outline), outline.tensors
    pair = 2 * 4 * LONG.heads * LONG.width * LONG.seq // 4
    tile, rows = 4 * TILE, 4 * TILE // (LONG.seq // 8) * LONG.width  # causal: queries against half of a rank's keys
    assert scratch_bytes(op, tensors, (RING,), (4,), training=False) == 2 * pair + 3 * tile + rows
    assert scratch_bytes(op, tensors, (RING,), (4,), training=True) == 3 * pair + 4 * tile + rows
    assert scratch_bytes(op, tensors, (RING,), (2,), training=True) == 2 * (2 * pair) + 4 * tile + rows // 2
    assert scratch_bytes(op, tensors, (RING, "h"), (4, 2), training=False) == pair + 3 * tile + rows
    assert scratch_bytes(op, tensors, ("R",), (4,), training=False) == 0
    assert block_bytes(op, tensors, [f.size for f in op.factors]) == 4 * pair


# -- units on a context axis


@pytest.mark.parametrize("ways", [1, 2])
def test_a_unit_on_a_context_axis(ways: int) -> None:
    found = fronts(decoder(LONG))
    alone = {named: n for named, n in found.numbers(1, ways, 1)}
    split_ = dict(found.numbers(1, ways, 1, 4))
    assert set(split_) == set(alone)
    for named, n in split_.items():
        assert n.saved == pytest.approx(alone[named].saved / 4, rel=1e-9)
        assert n.compute_forward < 0.35 * alone[named].compute_forward
        assert n.peak < 0.5 * alone[named].peak
        assert sum(w.elements for w in n.weights) == sum(w.elements for w in alone[named].weights)
        assert any(c.axis == 0 and c.backward for c, _ in n.calls)


def test_numbers_without_a_context_axis_are_those_of_the_model_axis() -> None:
    found = fronts(decoder(Form(batch=2)))
    for region in range(3):
        for named, n in found.numbers(region, 2, 1):
            assert found.bench(region, 2, 1).measure(named.design) == n
            assert all(c.axis == 0 for c, _ in n.calls)


def test_positions_split_on_both_axes() -> None:
    found = fronts(decoder(LONG))
    layout = found.bench(1, 2, 1, 4).layouts["S"]
    assert set(layout.values()) == {(split(1), split(1))}
    styles = Counter(named.style for named, _ in found.numbers(1, 2, 1, 4))
    assert styles["tensor+sequence"] > 0


def test_eager_attention_on_a_context_axis_is_gathered() -> None:
    found = fronts(decoder(replace(LONG, seq=1024, eager=True)))
    (first, n), *_ = found.numbers(1, 1, 1, 2)
    names = Counter((c.collective, c.backward) for c, times in n.calls for _ in range(times))
    assert names == {("all_gather", False): 2, ("reduce_scatter", True): 2}, first


# -- Ulysses


def sent(style: str, ways: int, seq: int) -> tuple[float, Counter[str]]:
    """(bytes one rank sends, how often each collective runs) in a style's fastest design of a layer."""
    found = fronts(decoder(replace(LONG, seq=seq)))
    n = next(n for named, n in found.numbers(1, ways, 1) if (named.style, named.policy) == (style, "none"))
    names = Counter(
        {name: sum(t for c, t in n.calls if c.collective == name) for name in {c.collective for c, _ in n.calls}}
    )
    return math.fsum(times * wire_bytes(c.collective, c.bytes, ways) for c, times in n.calls), names


def test_ulysses_emerges_and_its_bytes_stay_constant() -> None:
    """DeepSpeed-Ulysses (Jacobs et al. 2023, section 3.2): 4 n h / P elements per layer and direction."""
    few, many = sent("free", 2, 8192), sent("free", 4, 16384)
    assert few[1] == many[1] == {"all_to_all": 8}  # queries, keys, values and the result, both ways
    for ways, seq, (bytes_, _) in ((2, 8192, few), (4, 16384, many)):
        elements = 2 * 4 * seq * LONG.heads * LONG.width / ways
        assert bytes_ == pytest.approx(4 * elements * (ways - 1) / ways)
    leaves = {2: 1 / 2, 4: 3 / 4}  # the share (P-1)/P of what is exchanged that leaves a rank
    assert few[0] / leaves[2] == pytest.approx(many[0] / leaves[4])
    megatron = [sent("tensor+sequence", ways, seq)[0] / leaves[ways] for ways, seq in ((2, 8192), (4, 16384))]
    assert megatron[1] == pytest.approx(2 * megatron[0])  # grows with the sequence instead

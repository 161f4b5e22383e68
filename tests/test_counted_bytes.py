"""Bytes that are counted op by op, against sums by hand: gradients that change placements or share memory, who needs a parameter,
what ops keep as other kernels, backward passes in two halves."""

from __future__ import annotations

import pytest
from shardwright.planner.dispatch import DISPATCH
from shardwright.planner.memory import facts
from shardwright.planner.needing import Needing
from shardwright.planner.outline import Factor, Op, Outline, Saved, Tensor, Use
from shardwright.planner.passing import Passing
from shardwright.planner.placement import R, State, V, split
from shardwright.planner.rankmemory import Halves, RankMemory, StageMemory
from shardwright.planner.ring import RING
from shardwright.planner.rule_experts import TARGET
from shardwright.planner.saves import saves
from shardwright.planner.schedules import Action
from shardwright.planner.turning import turning_bytes
from shardwright.planner.uses import Uses
from solver_outlines import transformer

P = State("P")
HIDDEN, WIDE = 8 * 16 * 32 * 4, 8 * 16 * 128 * 4


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (P, split(0), 192 + 384),  # gathered in one stretch
        (P, split(1), 192 + 2 * 384),  # the pieces of an inner dim are joined
        (R, split(0), 192 + 384),
        (split(0), V, 384 + 192),
        (split(1), V, 2 * 384 + 192),  # cut into pieces before they are sent
        (R, V, 2 * 384),
        (V, R, 2 * 384),
        (split(0), split(1), 192 + 2 * 192),
        (R, R, 384),
    ],
)
def test_gradients_that_change_placements(source: State, target: State, expected: int) -> None:
    tensor = Tensor("x", ((8,), (6,)), "float64", "activation", True, "x")
    assert turning_bytes(tensor, (source,), (target,), (2,)) == expected


def test_steps_of_several_axes_take_what_the_largest_does() -> None:
    tensor = Tensor("x", ((8,), (6,)), "float64", "activation", True, "x")
    # Forward, half of it is taken and then summed and cut, which sends the least; backward, a quarter is gathered to a half in
    # one stretch, and that to the whole, whose pieces are joined.
    assert turning_bytes(tensor, (P, R), (split(0), split(1)), (2, 2)) == 192 + 2 * 384


def _whole(outline: Outline) -> Uses:
    wanted = {op.name: ((R,),) * len(op.operands) for op in outline.ops}
    return Uses(wanted, {name: (R,) for name in outline.tensors}, {})


def _alive(outline: Outline, name: str, lasting: frozenset[str] = frozenset()) -> float:
    found, at = facts(outline), [op.name for op in outline.ops].index(name)
    intervals = Passing(outline, found, _whole(outline), (1,), lasting).intervals()
    return sum(amount for low, high, amount in intervals if low <= at <= high)


def test_a_residual_has_one_gradient_until_the_branch_has_another() -> None:
    outline = transformer(1)
    assert _alive(outline, "l0.lin_down") == HIDDEN  # of the sum, the branch and what went past it
    assert _alive(outline, "l0.gelu") == HIDDEN + WIDE
    assert _alive(outline, "l0.norm_n2") == 2 * HIDDEN  # the branch's own, before it is added
    assert _alive(outline, "l0.add_r1") == HIDDEN  # their sum


def test_gradients_that_last_stay_beside_those_made_of_them() -> None:
    outline = transformer(1)
    assert _alive(outline, "l0.add_r1", frozenset({"l0.upy"})) == HIDDEN + WIDE
    assert _alive(outline, "l0.add_r1", frozenset({"l0.downy"})) == 2 * HIDDEN


def test_who_needs_a_parameter() -> None:
    outline = transformer(2)
    order = {op.name: i for i, op in enumerate(outline.ops)}
    plain = Needing(outline.ops, facts(outline), lambda op: op.saved, ())
    assert plain.ops_of["wte"] == [order["head"]]  # a table is not read again
    assert plain.asked(("l0.up", "l0.down")) == order["l0.lin_down"]
    assert plain.asked(("l0.up", "l1.up"), (1, 0)) == order["l0.lin_up"]
    assert plain.asked(("nobody",)) == -1
    again = Needing(outline.ops, facts(outline), lambda op: op.saved, {"l0.lin_up"})
    assert again.ops_of["l0.up"] == [order["l0.add_r2"], order["l0.lin_up"]]  # from where the unit's pass begins
    assert again.ops_of["l0.down"] == [order["l0.lin_down"]]


def _tensors(dtype: str = "float64") -> dict[str, Tensor]:
    return {n: Tensor(n, ((4,), (16,), (8,)), dtype, "activation", True, n) for n in "qkvy"}


@pytest.mark.parametrize(("dtype", "width"), [("float64", 8), ("bfloat16", 4)])
def test_a_ring_keeps_its_operands_its_result_and_a_sum_per_row(dtype: str, width: int) -> None:
    factors = (Factor("b", 4), Factor("s", 16), Factor("k", 8), Factor("t", 16))
    queries, keys = ((0,), (1,), (2,)), ((0,), (3,), (2,))
    operands = (Use("q", queries), Use("k", keys), Use("v", keys))
    observed = (Saved("new", 0, (0, 1, 3), 4 * 16 * 16 * 8),)
    op = Op("a", "aten.sdpa", "attention", operands, (Use("y", queries),), factors, saved=observed)
    kept = saves(op, (RING,), _tensors(dtype))
    assert [(s.source, s.index) for s in kept[:-1]] == [("operand", 0), ("operand", 1), ("operand", 2), ("result", 0)]
    assert (kept[-1].source, kept[-1].bytes) == ("new", 4 * 16 * width)
    assert saves(op, ("b",), _tensors(dtype)) == observed


def test_experts_keep_the_rows_that_came() -> None:
    factors = (Factor("t", 16, batch=True), Factor("k", 2), Factor("h", 8), Factor("e", 4))
    tokens = Use("q", ((), (0,), (2,)))
    op = Op("m", TARGET, "experts", (tokens,), (Use("y", ((), (0,), (2,))),), factors,
            saved=(Saved("operand", 0), Saved("new", 0, (0, 1), 128)))  # fmt: skip
    first, rows = saves(op, (DISPATCH,), _tensors())
    assert first == op.saved[1]
    assert (rows.source, rows.bytes, rows.factors) == ("new", 16 * 2 * 8 * 8, (0, 1, 2))


def test_what_waits_between_the_halves_of_a_backward_pass() -> None:
    kept, owed = 100.0, 40.0
    halves = Halves([{"saved": kept}], [{"saved": owed}], [{"saved": owed, "temporaries": 3.0}], owed)
    stage = StageMemory(kept, {"gradients": 30.0, "gathered": 0.0}, [], [], {}, 0.0, [], halves)
    steps = [Action(kind, 0, i) for kind, i in (("F", 0), ("F", 1), ("I", 0), ("I", 1), ("W", 0), ("W", 1))]
    moments = RankMemory({0: stage}, steps, [0], {}, {}, {}).play()
    assert [m["saved"] for m in moments] == [kept, 2 * kept, 2 * kept, kept + owed, 2 * owed, owed]
    assert [m["gradients"] for m in moments] == [0, 0, 0, 0, 30, 30]  # from the first second half on
    assert [m["temporaries"] for m in moments] == [0, 0, 0, 0, 0, 3]

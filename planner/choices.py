"""How one op may run along one mesh axis, and the states that makes of its operands and results (docs/placements.md).

Along an axis an op splits one factor, or splits none and runs on whole values (all R, or all V), or lets a partial sum pass.
The spelling of a choice, as it stands in a plan, is the factor's name, "R", "V", "P" + the index of the op's linear entry, or
"ring": attention with queries and keys both split along their positions (planner/ring.py), or "dispatch": experts and samples
both split, tokens sent between ranks (planner/dispatch.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from .dispatch import DISPATCH, dispatched, factor_at
from .outline import Op, Tensor, Use
from .placement import P, Placement, R, State, V, split
from .ring import RING, ring_of

Tensors = dict[str, Tensor]


def choices(op: Op, tensors: Tensors, axis_size: int) -> tuple[str, ...]:
    """Every legal choice of `op` along an axis of `axis_size` ranks, "R" first."""
    found = ["R"]
    if any(tensors[use.tensor].differentiable for use in op.operands):
        found.append("V")
    found += [f"P{i}" for i, group in enumerate(op.linear) if group]
    found += [f.name for f in op.factors if f.split != "never" and f.size % axis_size == 0 and f.size >= axis_size]
    return tuple(found)


def states(op: Op, tensors: Tensors, choice: str) -> tuple[tuple[State, ...], tuple[State, ...]]:
    """(operand states, result states) of `op` under `choice`; raises ValueError for a choice the op does not have."""
    if choice in ("R", "V"):
        wanted = State(choice)
        return _all(op.operands, tensors, wanted), _all(op.results, tensors, wanted)
    if choice[:1] == "P" and choice[1:].isdigit():
        if int(choice[1:]) >= len(op.linear):
            raise ValueError(f"{op.name} has no linear entry {choice[1:]}")
        group = op.linear[int(choice[1:])]
        operands = tuple(P if i in group else _plain(tensors, use, V) for i, use in enumerate(op.operands))
        return operands, tuple(P for _ in op.results)
    if choice == RING:
        return _ring(op, tensors)
    if choice == DISPATCH:
        return _dispatch(op, tensors)
    names = [f.name for f in op.factors]
    if choice not in names:
        raise ValueError(f"{op.name} ({op.target}) has no factor {choice!r}; it has {', '.join(names) or 'none'}")
    index = names.index(choice)
    lacking = op.factors[index].split
    operands = tuple(_side(tensors, use, index, V) for use in op.operands)
    # An implementation closes its own sums (vocabulary-parallel loss): a result lacking the factor is whole.
    missing = R if lacking in CLOSED else P
    return operands, tuple(_side(tensors, use, index, missing) for use in op.results)


def placed(op: Op, tensors: Tensors, chosen: Iterable[str]) -> tuple[tuple[Placement, ...], tuple[Placement, ...]]:
    """Wanted operand placements and produced result placements of `op` under one choice per mesh axis."""
    sides = [states(op, tensors, choice) for choice in chosen]
    operands = tuple(tuple(side[0][i] for side in sides) for i in range(len(op.operands)))
    return operands, tuple(tuple(side[1][i] for side in sides) for i in range(len(op.results)))


def _ring(op: Op, tensors: Tensors) -> tuple[tuple[State, ...], tuple[State, ...]]:
    """Queries, masks and results split along the queries' positions, keys and values along theirs."""
    ring = ring_of(op)
    if ring is None:
        raise ValueError(f"{op.name} ({op.target}) cannot run as a ring")
    positions = [ring.key if i in (1, 2) else ring.query for i in range(len(op.operands))]
    operands = tuple(_side(tensors, use, f, V) for use, f in zip(op.operands, positions, strict=True))
    return operands, tuple(_side(tensors, use, ring.query, R) for use in op.results)


def _dispatch(op: Op, tensors: Tensors) -> tuple[tuple[State, ...], tuple[State, ...]]:
    """Tokens and results split by samples, weights by experts."""
    factors = dispatched(op)
    if factors is None:
        raise ValueError(f"{op.name} ({op.target}) cannot send its tokens to experts")
    operands = tuple(_side(tensors, use, factor_at(op, i, factors), V) for i, use in enumerate(op.operands))
    return operands, tuple(_side(tensors, use, factors[0], R) for use in op.results)


def implementation(op: Op, choice: str) -> str:
    """The name of the implementation that a choice needs; "" where the op itself runs on its parts."""
    if choice in (RING, DISPATCH):
        return choice
    kind = next((f.split for f in op.factors if f.name == choice), "free")
    return "" if kind == "free" else kind


CLOSED = frozenset({"vocab_loss", "vocab_head", "batch_norm"})
"""Implementations that reduce inside: their results are R, not P, where they lack the split factor."""


def _all(uses: tuple[Use, ...], tensors: Tensors, wanted: State) -> tuple[State, ...]:
    return tuple(_plain(tensors, use, wanted) for use in uses)


def _plain(tensors: Tensors, use: Use, wanted: State) -> State:
    """`wanted`, or R where no gradient flows (there V and R are one state)."""
    return R if wanted == V and not tensors[use.tensor].differentiable else wanted


def _side(tensors: Tensors, use: Use, factor: int, lacking: State) -> State:
    place = use.place(factor)
    return split(*place) if place is not None else _plain(tensors, use, lacking)

"""The four placement states, their duals, and the transitions between them (docs/placements.md).

Along one mesh axis a tensor of a differentiated program is in one of four states:

    S(d)   its slice along dim d; the gradient is sliced the same way
    R      the whole value; the whole gradient
    V      the whole value; a partial sum of the gradient ("varying use")
    P      a partial sum of the value; the whole gradient

A change `a -> b` runs one collective forward and `dual(b) -> dual(a)` backward. A dim may be a merge of factors, major to
minor; `S(d)` splits the major one and `S(d.i)` the i-th, which for i > 0 is a strided split of the dim. A placement is
one state per mesh axis. Where two axes split the same factor, the later axis is the more minor, and only the most minor may
change in one step.
"""

from __future__ import annotations

import functools
import heapq
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

Dims = tuple[tuple[int, ...], ...]
"""Factor sizes of each dim, major to minor; a dim of size 1 is the empty tuple."""


@dataclass(frozen=True, slots=True, order=True)
class State:
    """One state along one mesh axis: kind "S", "R", "V" or "P"; `dim` and `factor` only for "S"."""

    kind: str
    dim: int = 0
    factor: int = 0

    def __str__(self) -> str:
        if self.kind != "S":
            return self.kind
        return f"S({self.dim})" if self.factor == 0 else f"S({self.dim}.{self.factor})"

    @property
    def is_split(self) -> bool:
        return self.kind == "S"


R, V, P = State("R"), State("V"), State("P")
Placement = tuple[State, ...]
_SPELLING = re.compile(r"S\((\d+)(?:\.(\d+))?\)")


def split(dim: int, factor: int = 0) -> State:
    """The state S on factor `factor` of dim `dim`."""
    return State("S", dim, factor)


def parse_state(text: str) -> State:
    """Inverse of `str(state)`; raises ValueError for anything else."""
    if text in ("R", "V", "P"):
        return State(text)
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a placement state; write R, V, P, S(dim) or S(dim.factor)")
    return State("S", int(match[1]), int(match[2] or 0))


def dual(state: State) -> State:
    """The state of the gradient of a tensor in `state`."""
    return {"V": P, "P": V}.get(state.kind, state)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the transition table: what runs forward, what runs backward."""

    forward: str
    backward: str
    known_as: str = ""


# (from kind, to kind) -> collectives. "slice", "pad", "scale" and "none" are local. S -> S is between different factors.
TRANSITIONS: dict[tuple[str, str], Row] = {
    ("R", "V"): Row("none", "all_reduce", "data-parallel weights; entry of Megatron tensor parallelism"),
    ("P", "R"): Row("all_reduce", "none", "exit of Megatron tensor parallelism"),
    ("P", "V"): Row("all_reduce", "all_reduce"),
    ("S", "V"): Row("all_gather", "reduce_scatter", "ZeRO-3 / FSDP weights; entry of Megatron sequence parallelism"),
    ("P", "S"): Row("reduce_scatter", "all_gather", "exit of Megatron sequence parallelism"),
    ("S", "R"): Row("all_gather", "slice"),
    ("R", "S"): Row("slice", "all_gather"),
    ("S", "S"): Row("all_to_all", "all_to_all", "DeepSpeed-Ulysses"),
    ("V", "S"): Row("slice", "pad"),
    ("S", "P"): Row("pad", "slice"),
    ("R", "P"): Row("scale", "none"),
    ("V", "R"): Row("none", "scale"),
    ("V", "P"): Row("scale", "scale"),
}
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def row(source: State, target: State) -> Row:
    """The table row of one single-axis change (identity changes run nothing)."""
    return Row("none", "none") if source == target else TRANSITIONS[source.kind, target.kind]


def shape_of(dims: Dims) -> tuple[int, ...]:
    """The plain shape of a tensor with these factors."""
    return tuple(math.prod(d) for d in dims)


def replaced(placement: Placement, axis: int, state: State) -> Placement:
    """`placement` with another state on one axis."""
    return (*placement[:axis], state, *placement[axis + 1 :])


def local_dims(dims: Dims, placement: Placement, axis_sizes: Sequence[int]) -> Dims:
    """Factor sizes of the local tensor; raises ValueError where a split does not divide."""
    sizes = [list(d) for d in dims]
    for state, n in zip(placement, axis_sizes, strict=True):
        if not state.is_split or n == 1:
            continue
        if not (state.dim < len(sizes) and state.factor < len(sizes[state.dim])):
            raise ValueError(f"{state} names no factor of a tensor with dims {dims}")
        if sizes[state.dim][state.factor] % n:
            raise ValueError(f"{state} over {n} ranks does not divide {sizes[state.dim][state.factor]}")
        sizes[state.dim][state.factor] //= n
    return tuple(tuple(d) for d in sizes)


def local_elements(dims: Dims, placement: Placement, axis_sizes: Sequence[int]) -> float:
    """Elements of the local tensor (a float: planning prices sizes that need not divide)."""
    total = float(math.prod(math.prod(d) for d in dims))
    for state, n in zip(placement, axis_sizes, strict=True):
        if state.is_split:
            total /= n
    return total


@dataclass(frozen=True, slots=True)
class Step:
    """One single-axis change: on mesh axis `axis`, from `source` to `target`, of a tensor placed as `before`."""

    axis: int
    source: State
    target: State
    before: Placement


def _legal(before: Placement, axis: int, target: State) -> bool:
    """Only the most minor axis of a factor may change: no later axis may split what this one leaves or enters."""
    for state in (before[axis], target):
        if state.is_split and any(before[b] == state for b in range(axis + 1, len(before))):
            return False
    return (before[axis].kind, target.kind) in TRANSITIONS or before[axis] == target


def _step_cost(dims: Dims, before: Placement, axis: int, target: State, axis_sizes: Sequence[int]) -> float:
    """Bytes-equivalent of one step, forward and backward together; local steps cost a little so that paths stay short."""
    names = row(before[axis], target)
    whole = local_elements(dims, tuple(s if i != axis else R for i, s in enumerate(before)), axis_sizes)
    weight = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0 / axis_sizes[axis]}
    return whole * (weight.get(names.forward, 0.001) + weight.get(names.backward, 0.001)) + 1.0


@functools.lru_cache(maxsize=65536)
def steps(dims: Dims, source: Placement, target: Placement, axis_sizes: tuple[int, ...]) -> tuple[Step, ...]:
    """The cheapest legal chain of single-axis changes from `source` to `target` (Dijkstra over placements).

    Intermediate states are those of the two ends plus R and V, so a chain never splits a factor neither end splits.
    """
    if source == target:
        return ()
    options = [sorted({source[a], target[a], R, V}) for a in range(len(source))]
    best: dict[Placement, float] = {source: 0.0}
    queue: list[tuple[float, int, Placement, tuple[Step, ...]]] = [(0.0, 0, source, ())]
    pushed = 0
    while queue:
        cost, _, here, path = heapq.heappop(queue)
        if here == target:
            return path
        if cost > best.get(here, math.inf):
            continue
        for axis in range(len(here)):
            for state in options[axis]:
                if state == here[axis] or not _legal(here, axis, state):
                    continue
                there = replaced(here, axis, state)
                price = cost + _step_cost(dims, here, axis, state, axis_sizes)
                if price < best.get(there, math.inf):
                    best[there] = price
                    pushed += 1
                    step = Step(axis, here[axis], state, here)
                    heapq.heappush(queue, (price, pushed, there, (*path, step)))
    raise ValueError(f"no chain of transitions from {source} to {target}")


def reduced_over(at: Placement, want: Placement, shared: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Sets of axes over which the gradient of a parameter that is R is summed where it is wanted V, one all-reduce each.

    Those of the axes `shared` (data and context) are summed together, every other one alone.
    """
    axes = [a for a in range(len(at)) if at[a] == R and want[a] == V]
    together = tuple(a for a in axes if a in shared)
    return (*([together] if together else []), *((a,) for a in axes if a not in shared))

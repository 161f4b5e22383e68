"""Context parallelism: every op's choice on an axis that splits positions, found by propagation.

Like the cut into microbatches (planner/microbatch.py) the choice is forced: an op that runs over positions splits them, attention
runs as a ring (planner/ring.py), and all else runs whole on every rank. Unlike there, states may change between ops, by the
transitions of the table, so that attention written as matmuls and softmax gathers its keys and values and keeps its queries split.

An op with one position factor splits it. One with several (scores, their masks, a bias by distance) splits what its consumers
want, else what arrives. Sums over positions end partial, as the loss does. What no gradient flows through is split only where
all its users want it so: counts of labels are sums of whole tensors, which every rank has, so nothing is sent for them. A
sequence may also end in a gather, where a model takes its mean or its first position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .choices import states
from .factors import Classes
from .outline import Factor, Op, Outline, Tensor
from .placement import P, R, State, V, split
from .ring import RING, Ring, ring_of


@dataclass(frozen=True, slots=True)
class ContextCut:
    """Choice per op along the context axis, state per tensor as it is made or given, and what cannot be split.

    `rings` are the attention ops that run as a ring. With `blockers` the other fields say how far it got.
    """

    ways: int
    choice: Mapping[str, str]
    states: Mapping[str, State]
    rings: tuple[str, ...]
    blockers: tuple[str, ...]


def context_choices(outline: Outline, ways: int) -> ContextCut:
    """Split the positions of `outline` over `ways` ranks."""
    if ways == 1:
        return ContextCut(1, {op.name: "R" for op in outline.ops}, {}, (), ())
    return _Propagation(outline, ways).cut()


class _Propagation:
    """One propagation; `choice` grows until it says how every op runs."""

    def __init__(self, outline: Outline, ways: int) -> None:
        self.ops, self.ways = outline.ops, ways
        self.tensors: dict[str, Tensor] = dict(outline.tensors)
        self.rings = {op.name: ring for op in outline.ops if (ring := ring_of(op)) is not None}
        self.uses: dict[str, int] = {}
        for op in self.ops:
            for use in op.operands:
                self.uses[use.tensor] = self.uses.get(use.tensor, 0) + 1
        for name in (*outline.outputs, outline.loss):
            self.uses[name] = self.uses.get(name, 0) + 1  # wanted whole
        self.divisors = _Divisors(outline, self.rings, ways)
        self.open = {op.name: self._candidates(op) for op in self.ops}
        self.choice: dict[str, str] = {}
        self.made: dict[str, State] = {}
        self.wanted: dict[str, list[State]] = {}
        self.blockers: list[str] = []

    def cut(self) -> ContextCut:
        """Decide every op."""
        self._sizes()
        before = -1
        while len(self.choice) > before:
            before = len(self.choice)
            for op in reversed(self.ops):
                if op.name not in self.choice:
                    self._by_consumers(op)
            for op in self.ops:
                if op.name not in self.choice:
                    self._by_producers(op)
        if not self.choice and not self.blockers:
            self.blockers.append("no op runs over positions")
        for op in self.ops:
            if op.name not in self.choice or self.choice[op.name] == "V":
                self._whole(op)
        rings = tuple(op.name for op in self.ops if self.choice[op.name] == RING)
        return ContextCut(self.ways, self.choice, self._states(), rings, tuple(dict.fromkeys(self.blockers)))

    # -- what may be split

    def _candidates(self, op: Op) -> tuple[str, ...]:
        """Choices of `op` that split positions."""
        if op.name in self.rings:
            return (RING,) if self._ring_divides(op, self.rings[op.name]) else ()
        return tuple(
            f.name for i, f in enumerate(op.factors)
            if _is_position(f) and f.split != "never" and f.size % self.divisors.of(op, i) == 0
        )  # fmt: skip

    def _ring_divides(self, op: Op, ring: Ring) -> bool:
        return all(op.factors[i].size % self.divisors.of(op, i) == 0 for i in (ring.query, ring.key))

    def _sizes(self) -> None:
        """Blockers for positions that do not divide: one per size."""
        found: dict[tuple[int, int], Op] = {}
        for op in self.ops:
            if self.open[op.name] or not self._flows(op):
                continue
            if op.name in self.rings:
                ring = self.rings[op.name]
                indices = [ring.query, ring.key]
            else:
                indices = [i for i, f in enumerate(op.factors) if _is_position(f) and f.split != "never"]
                indices = indices if len(indices) == 1 else []
            for i in indices:
                divisor = self.divisors.of(op, i)
                if op.factors[i].size % divisor:
                    found.setdefault((op.factors[i].size, divisor), op)
        for (size, divisor), op in found.items():
            zigzag = f" (twice {self.ways}: the mask is causal)" if divisor > self.ways else ""
            self.blockers.append(f"{size} positions do not divide by {divisor}{zigzag}: {_named(op)}")

    # -- decisions

    def _decide(self, op: Op, choice: str) -> None:
        self.choice[op.name] = choice
        operands, results = states(op, self.tensors, choice)
        for use, state in zip(op.operands, operands, strict=True):
            self.wanted.setdefault(use.tensor, []).append(state)
        for use, state in zip(op.results, results, strict=True):
            self.made[use.tensor] = state

    def _by_consumers(self, op: Op) -> None:
        found = self.open[op.name]
        wants = {u.tensor: self.wanted.get(u.tensor, []) for u in op.results}
        if not self._flows(op):
            for choice in found:
                sides = [(w, s) for u in op.results if (w := wants[u.tensor]) and (s := _at(op, u.tensor, choice))]
                whole = all(len(w) == self.uses.get(name, 0) for name, w in wants.items())
                if whole and sides and all(state == s for w, s in sides for state in w):
                    self._decide(op, choice)
                    return
            return
        if len(found) == 1:
            self._decide(op, found[0])
        elif found:
            hits = {c: sum(w.count(s) for n, w in wants.items() if (s := _at(op, n, c))) for c in found}
            best = max(found, key=lambda c: hits[c])
            if hits[best]:
                self._decide(op, best)
        elif all(w and len(w) == self.uses[n] and set(w) == {V} for n, w in wants.items()):
            self._decide(op, "V")

    def _by_producers(self, op: Op) -> None:
        if not self._flows(op):
            return
        for choice in self.open[op.name]:
            operands = states(op, self.tensors, choice)[0]
            if any(s.is_split and self.made.get(u.tensor) == s for u, s in zip(op.operands, operands, strict=True)):
                self._decide(op, choice)
                return

    def _whole(self, op: Op) -> None:
        """An op that splits nothing: a partial sum passes where the op is linear in it, all else arrives whole."""
        arrived = [self.made.get(u.tensor, R) for u in op.operands]
        split_in = [u.tensor for u, state in zip(op.operands, arrived, strict=True) if state.is_split]
        if any(self.tensors[name].differentiable for name in split_in) and self._mixes(op):
            self.blockers.append(f"mixes positions without being attention: {_named(op)}")
        if op.name in self.choice:
            return
        partial = {i for i, state in enumerate(arrived) if state == P}
        passing = [i for i, group in enumerate(op.linear) if partial and not split_in and partial == set(group)]
        self._decide(op, f"P{passing[0]}" if passing else "R")

    def _mixes(self, op: Op) -> bool:
        """Whether the results still run over positions (or places that were positions)."""
        return any(
            _is_position(op.factors[f]) and op.factors[f].size > 1
            for u in op.results if self.tensors[u.tensor].differentiable
            for dim in u.factors for f in dim
        )  # fmt: skip

    def _flows(self, op: Op) -> bool:
        return any(self.tensors[u.tensor].differentiable for u in op.results)

    def _states(self) -> dict[str, State]:
        """Made by an op; or given, then split where all users want it so."""
        found = {}
        for name, tensor in self.tensors.items():
            wants = self.wanted.get(name, [])
            alike = wants and all(w == wants[0] for w in wants) and len(wants) == self.uses.get(name, 0)
            given = wants[0] if alike and wants[0].is_split and tensor.role != "parameter" else R
            found[name] = self.made.get(name, given)
        return found


class _Divisors:
    """What positions must divide by: twice the ranks where a causal ring runs over them, for the two stretches of a rank."""

    def __init__(self, outline: Outline, rings: Mapping[str, Ring], ways: int) -> None:
        self.ways, self.classes = ways, Classes()
        for op in outline.ops:
            first: dict[int, tuple[str, int, int]] = {}
            for use in (*op.operands, *op.results):
                for dim, members in enumerate(use.factors):
                    for i, factor in enumerate(members):
                        place = (use.tensor, dim, i)
                        self.classes.union(place, first.setdefault(factor, place))
        self.paired = set()
        for op in outline.ops:
            ring = rings.get(op.name)
            if ring is not None and ring.causal:
                self.paired |= {self.classes.find(_place(op, f)) for f in (ring.query, ring.key)}

    def of(self, op: Op, factor: int) -> int:
        """The divisor of one factor of `op`."""
        return 2 * self.ways if self.classes.find(_place(op, factor)) in self.paired else self.ways


def _place(op: Op, factor: int) -> tuple[str, int, int]:
    for use in (*op.operands, *op.results):
        where = use.place(factor)
        if where is not None:
            return (use.tensor, *where)
    return (op.name, -1, factor)


def _at(op: Op, tensor: str, choice: str) -> State | None:
    """The state of a result under a choice that splits one factor; None where it lacks the factor."""
    index = next((i for i, f in enumerate(op.factors) if f.name == choice), None)
    if index is None:
        return None
    use = next(u for u in op.results if u.tensor == tensor)
    place = use.place(index)
    return split(*place) if place is not None else None


def _is_position(factor: Factor) -> bool:
    return factor.token and not factor.batch


def _named(op: Op) -> str:
    return f"{op.name} ({op.target})" + (f", {op.source}" if op.source else "")

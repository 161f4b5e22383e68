"""A static memory plan: where in one arena every buffer lies, from when it is alive.

Two buffers that are alive at once may not overlap. The arena is no smaller than the most bytes alive at once. Buffers are put
one after another into the smallest gap that holds them, the largest first (Pisarchyk and Lee 2020, "Efficient Memory Management
for Deep Neural Net Inference", section 5.2), in other orders too, and the smallest arena is kept. Where that is above the bound,
a search improves it: of any plan, buffers taken from the lowest to the highest each lie right on those below that they meet, so
that plans are orders, and an order is cut off where what is left cannot fit below the best plan. It finds the optimum where it
ends before its effort does (orders times the square of the number of buffers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .liveness import Interval

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Arena:
    """Offsets by buffer, the bytes of the arena, and the most (aligned) bytes alive at once, which no arena is below.

    `optimal` says that no smaller one is possible.
    """

    offsets: Mapping[str, int]
    bytes: int
    bound: int
    optimal: bool


def place(
    intervals: Sequence[Interval],
    *,
    alignment: int = 64,
    inside: Mapping[str, str] | None = None,
    effort: int = 20_000_000,
) -> Arena:
    """Plan an arena. Offsets and sizes are multiples of `alignment` bytes.

    `inside` has, per buffer that may take the place of another, that other: it does where the other ends as it begins and is
    no smaller (an op that works in place).
    """
    homes, merged = _in_place(intervals, inside or {})
    units = [replace(i, bytes=-(-i.bytes // alignment)) for i in merged if i.bytes]
    offsets, optimal = _placed(units, effort // max(len(units) ** 2, 1))
    found = {i.name: alignment * offsets.get(homes[i.name], 0) for i in intervals}
    size = max((offsets[u.name] + u.bytes for u in units), default=0)
    return Arena(found, alignment * size, alignment * most_alive(units), optimal)


def most_alive(intervals: Sequence[Interval]) -> int:
    """The most bytes alive at once."""
    change: dict[int, int] = {}
    for i in intervals:
        change[i.first] = change.get(i.first, 0) + i.bytes
        change[i.last + 1] = change.get(i.last + 1, 0) - i.bytes
    alive = most = 0
    for moment in sorted(change):
        alive += change[moment]
        most = max(most, alive)
    return most


def _in_place(intervals: Sequence[Interval], inside: Mapping[str, str]) -> tuple[dict[str, str], list[Interval]]:
    """The buffer that each one lies in, and those buffers with the time of all that lie there."""
    homes: dict[str, str] = {}
    merged: dict[str, Interval] = {}
    known = {i.name: i for i in intervals}
    for i in sorted(intervals, key=lambda i: i.first):
        other = inside.get(i.name, "")
        home = homes.get(other, "")
        if home and merged[home].last == i.first and known[other].bytes >= i.bytes:
            merged[home] = replace(merged[home], last=i.last)
            homes[i.name] = home
        else:
            merged[i.name] = i
            homes[i.name] = i.name
    return homes, list(merged.values())


ORDERS: tuple[Callable[[Interval], tuple[int, ...]], ...] = (
    lambda i: (-i.bytes, i.first),
    lambda i: (-i.bytes * (i.last - i.first + 1), i.first),
    lambda i: (i.first - i.last, -i.bytes),
    lambda i: (i.first, -i.bytes),
    lambda i: (-i.last, -i.bytes),
)
"""Orders in which buffers are put into gaps: largest first, most byte steps first, longest first, as they come, as they go."""


def _placed(units: Sequence[Interval], nodes: int) -> tuple[dict[str, int], bool]:
    """Offsets of the best plan found, and whether it is the best there is."""
    bound, best = most_alive(units), dict[str, int]()
    size = None
    for order in ORDERS:
        offsets = _fitted(sorted(units, key=order))
        top = max((offsets[u.name] + u.bytes for u in units), default=0)
        if size is None or top < size:
            best, size = offsets, top
        if size == bound:
            return best, True
    search = _Search(units, size or 0, nodes)
    search.run(bound)
    return search.best or best, search.done


def _fitted(ordered: Sequence[Interval]) -> dict[str, int]:
    """Every buffer in the smallest gap between those placed before that it meets, or on top of them."""
    offsets: dict[str, int] = {}
    first, last, begin, end = (np.empty(len(ordered), dtype=np.int64) for _ in range(4))
    for n, unit in enumerate(ordered):
        meets = (first[:n] <= unit.last) & (last[:n] >= unit.first)
        offsets[unit.name] = _gap(begin[:n][meets], end[:n][meets], unit.bytes)
        first[n], last[n] = unit.first, unit.last
        begin[n], end[n] = offsets[unit.name], offsets[unit.name] + unit.bytes
    return offsets


def _gap(begin: Numbers, end: Numbers, size: int) -> int:
    """The offset of the smallest gap of at least `size` below, between or above blocks."""
    if not len(begin):
        return 0
    order = np.argsort(begin, kind="stable")
    tops = np.maximum.accumulate(end[order])
    below = np.concatenate([[0], tops[:-1]])
    gaps = begin[order] - below
    fits = np.flatnonzero(gaps >= size)
    if not len(fits):
        return int(tops[-1])
    return int(below[fits[np.argmin(gaps[fits])]])


_Next = tuple[Numbers, list[int], int, dict[str, int]]
"""What is there at every moment, what is left, the last offset, and all offsets."""


class _Search:
    """Depth first through orders from the lowest buffer to the highest; `done` when the best plan is known to be the best."""

    def __init__(self, units: Sequence[Interval], size: int, nodes: int) -> None:
        self.units, self.size, self.left = list(units), size, nodes
        self.best: dict[str, int] = {}
        self.done = False
        moments = sorted({u.first for u in units})
        self.alive = np.array([[u.first <= m <= u.last for m in moments] for u in units], dtype=bool)
        self.bytes = np.array([u.bytes for u in units], dtype=np.int64)

    def run(self, bound: int) -> None:
        """Search until the bound is met, all is seen, or no nodes are left."""
        count = len(self.units)
        level = np.zeros(self.alive.shape[1], dtype=np.int64)
        stack = [self._candidates(level, list(range(count)), 0, {})]
        while stack and self.left > 0 and self.size > bound:
            step = next(stack[-1], None)
            if step is None:
                stack.pop()
                continue
            self.left -= 1
            level, rest, base, offsets = step
            if not rest:
                self.size, self.best = int(level.max()), offsets
            elif self._bound(level, rest) < self.size:
                stack.append(self._candidates(level, rest, base, offsets))
        self.done = self.size == bound or not stack

    def _bound(self, level: Numbers, rest: list[int]) -> int:
        """No plan that goes on like this is below: at every moment what is left lies on top of what is there."""
        return int((level + self.bytes[rest] @ self.alive[rest]).max())

    def _candidates(self, level: Numbers, rest: list[int], base: int, offsets: dict[str, int]) -> Iterator[_Next]:
        """What may be next, no lower than the one before (`base`), the lowest first."""
        lowest = [(int(level[self.alive[i]].max()), -int(self.bytes[i]), i) for i in rest]
        for offset, _, i in sorted(lowest):
            if offset < base or offset + self.bytes[i] >= self.size:
                continue
            after = level.copy()
            after[self.alive[i]] = offset + self.bytes[i]
            yield after, [r for r in rest if r != i], offset, {**offsets, self.units[i].name: offset}

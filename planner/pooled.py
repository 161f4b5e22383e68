"""Divisions over pools of unlike devices: a bound of all of them, one to begin with, and its neighbours.

One chunk a rank. What a rank of a pool may hold within T seconds and its memory is an interval (planner/screen.py), so how far the
ranks from the front reach, and from the back, are fences that every division keeps; where they cross, T is a bound. A unit before
a rank counts with the least seconds of the pools that the fences leave to it.

Several chunks a rank have one division, as on equal devices: units go where ranks are fast and have room. What any division takes
is bounded first: every pool has n ranks with T seconds and a room of bytes each, and shares of the units may go anywhere:

    T >= sum over regions of units x min over pools of (w x seconds + v x bytes)  -  sum over pools of n x v x room

for all prices w of a second and v of a byte of each pool with sum of n x w = 1 (linear programming duality).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np

from .arcs import Line
from .even import apart
from .labels import Floats
from .screen import STEP_ROW, Bounded, Held, Tables
from .stageproblem import StageProblem

POWER = 12.0
"""A division is judged by this mean of the seconds of its ranks: nearly the greatest, but a second one counts too."""

RANGES = 12
"""Stages up to which any row of neighbouring borders moves together; beyond, single borders and rows from either end."""

PASSES = 300
"""Moves of the first division at the most."""

SHORT = 1.02
"""Memory counts in the one division of several chunks where it makes the slowest rank so much slower."""

MOST_INSIDE = 2000
"""Beginnings of divisions that are looked at in listing them."""

Fences = tuple[list[int], list[int]]
"""By rank (and the end): the first unit it can begin with, and the last."""


def shared_seconds(counts: Mapping[int, int], seconds: Sequence[Mapping[int, float]], ranks: Sequence[int]) -> float:
    """No plan keeps its busiest rank below this: `seconds` of a unit of a region by pool, `ranks` of each pool, any shares."""
    columns = {r: np.array([[mine[r]] for mine in seconds]) for r in counts}
    return _dual(counts, columns, np.array(ranks, dtype=np.float64), np.zeros((len(ranks), 1)))


def _dual(counts: Mapping[int, int], least: Mapping[int, Floats], ranks: Floats, room: Floats) -> float:
    """`least` by region (pools x prices) and `room` (pools x prices) seconds, at the best of a few prices of a pool's second.

    With two pools one of them is the best of all: there the optimum makes some region's units worth the same on both.
    """
    total = sum(n * least[r][:, 0] for r, n in counts.items())
    best = 0.0
    for paid in [*(least[r][:, 0] for r in counts), total]:
        weights = 1.0 / np.maximum(paid, 1e-30)
        weights = weights / float(weights @ ranks)
        found = sum(n * (weights[:, None] * least[r]).min(axis=0) for r, n in counts.items())
        best = max(best, float((found - (weights * ranks) @ room).max()))
    return best


class PooledBound(Bounded):
    """One problem over several pools, bounded and divided."""

    def __init__(self, problem: StageProblem, held: Held | None, splits: bool, kept: dict[object, Tables] | None = None,
                 key: object = None) -> None:  # fmt: skip
        self.kept = kept if kept is not None else {}
        ends = splits or problem.pipeline.chunks > 1  # several chunks: a rank's own seconds, its finish among them
        self.each = [self._tables(problem, p, ends, key) for p in range(len(problem.pools))]
        super().__init__(problem, self.each[0], held, splits)
        self.units = [_line_part(pool.line, splits) for pool in problem.pools]
        self.ahead = np.concatenate([[0.0], np.cumsum(np.min(self.units, axis=0))])
        self.local = held.local if held is not None else tuple((r,) for r in range(problem.pipeline.ranks))

    def _tables(self, problem: StageProblem, pool: int, ends: bool, key: object) -> Tables:
        found = self.kept.get((key, pool, ends))
        if found is None:
            found = self.kept[key, pool, ends] = Tables(problem.of(pool), ends)
        return found

    def seconds(self, low: float, most: float) -> float:
        """No plan of the problem takes less; looked for between `low` and `most` seconds."""
        p = self.problem.pipeline
        if len(self.problem.line) < p.stages:
            return low
        low = max(low, self._alone())
        if p.chunks == 1:
            return self._free(low, most)
        low = max(low, self._shared())
        return low if low >= most else max(low, max(self._rank(r, self.division) for r in range(p.ranks)))

    @cached_property
    def division(self) -> list[int]:
        """Several chunks a rank: their one division, by seconds, and by memory too where that is short."""
        cuts = self._moved(self._by_speed(), self._quick)
        seconds, held = (max(rank(r, cuts) for r in range(len(self.local))) for rank in (self._quick, self._rank))
        return cuts if held <= seconds * SHORT else self._moved(cuts, self._rank)

    def _quick(self, rank: int, cuts: Sequence[int]) -> float:
        line = self.problem.pools[self.problem.at[rank]].line
        stages = self.local[rank]
        busy = sum(line.seconds(cuts[s], cuts[s + 1]) for s in stages)
        return self.problem.pipeline.microbatches * busy + float(self.ahead[cuts[stages[0]]])

    def _alone(self) -> float:
        """One microbatch passes every unit and comes back, without the weight halves where they are put off."""
        least: dict[int, float] = {}
        for pool in self.problem.pools:
            for r, mine in zip(self.problem.line.regions, pool.line.regions, strict=True):
                seconds = min(o.seconds - (o.weight if self.splits else 0.0) for o in self.problem.options[mine])
                least[r] = min(least.get(r, np.inf), seconds)
        return sum(least[r] for r in self.problem.line.regions)

    # -- one chunk a rank

    def _divides(self, most: float) -> bool:
        return self.fences(most) is not None

    def fences(self, most: float) -> Fences | None:
        """Where every rank can begin if all are done within `most` seconds; None where they cannot be."""
        ranks, count = self.problem.pipeline.ranks, len(self.problem.line)
        first = [0] * ranks + [count]
        for rank in range(ranks - 1, -1, -1):
            tables, live = self.each[self.problem.at[rank]], [v[0] for v in self._live(rank)]
            start = tables.back(first[rank + 1], live, self.ahead, most)
            if start >= first[rank + 1]:
                return None
            first[rank] = max(start, rank)
        last = [0] * (ranks + 1)
        for rank in range(ranks):
            tables, live = self.each[self.problem.at[rank]], [v[0] for v in self._live(rank)]
            beside = self._ahead(rank, first, last)[last[rank]]
            end = tables.reach(last[rank], live, float(beside), most)
            last[rank + 1] = min(end, count - (ranks - 1 - rank))
            if end == last[rank] or last[rank + 1] < first[rank + 1]:
                return None
        return (first, last) if first[0] == 0 and last[-1] == count else None

    def inside(self, most: float, count: int) -> list[tuple[int, ...]] | None:
        """Every division that may be done within `most` seconds; None where there are more than `count`."""
        stages, last = self.problem.pipeline.stages, len(self.problem.line)
        fences = self.fences(most) if self.problem.pipeline.chunks == 1 else None
        if fences is None and self.problem.pipeline.chunks == 1:
            return []
        low, high = fences or ([*range(stages), last], [0, *(last - (stages - s) for s in range(1, stages + 1))])
        found: list[tuple[int, ...]] = [(0,)]
        for s in range(1, stages + 1):
            found = [(*cuts, c) for cuts in found for c in range(max(low[s], cuts[-1] + 1), high[s] + 1)]
            if len(found) > MOST_INSIDE:
                return None
        return found if len(found) <= count else None

    def arcs(self, fences: Fences) -> list[list[tuple[int, int]]]:
        """The intervals of every rank that the fences leave."""
        first, last = fences
        ends = [range(a, b + 1) for a, b in zip(first, last, strict=True)]
        return [[(i, j) for i in ends[r] for j in ends[r + 1] if i < j] for r in range(len(ends) - 1)]

    def _ahead(self, rank: int, first: Sequence[int], last: Sequence[int]) -> Floats:
        """Least seconds of the units before each position that the ranks up to this one may hold between the fences."""
        at, count = self.problem.at, len(self.problem.line)
        least = np.full(count, np.inf)
        for p in dict.fromkeys(at[: rank + 1]):
            mine = [r for r in range(rank + 1) if at[r] == p]
            low, high = first[mine[0]], count if mine[-1] == rank else last[mine[-1] + 1]
            least[low:high] = np.minimum(least[low:high], self.units[p][low:high])
        least = np.where(np.isfinite(least), least, np.min(self.units, axis=0))
        return np.concatenate([[0.0], np.cumsum(least)])

    # -- several chunks a rank

    def _shared(self) -> float:
        p, found = self.problem, 0.0
        counts = Counter(p.line.regions)
        ranks = np.array([float(p.at.count(k)) for k in range(len(p.pools))])
        alive = [self._alive(k) for k in range(len(p.pools))]
        for live in (alive, [STEP_ROW] * len(p.pools)):
            prices = [t.prices for t in self.each]
            most = 1 if len({len(x) for x in prices}) > 1 else len(prices[0])
            least: dict[int, Floats] = {}
            for r in counts:
                mine = [t.problem.line.regions[p.line.regions.index(r)] for t in self.each]
                found_by_pool = [t.least(k, n)[:most] for t, k, n in zip(self.each, mine, live, strict=True)]
                least[r] = np.stack(found_by_pool)
            room = np.stack([x[:most] * t.room_of(k) for x, t, k in zip(prices, self.each, live, strict=True)])
            found = max(found, _dual(counts, least, ranks, room))
        return found

    def _alive(self, pool: int) -> int:
        """Microbatches that every stage of some moment of each rank of a pool holds at the least."""
        ranks = [r for r, k in enumerate(self.problem.at) if k == pool]
        vectors = [self.held.live[r] if self.held is not None else ((1,),) for r in ranks]
        return min(max(min(v) for v in mine) for mine in vectors)

    # -- divisions

    def first(self, low: float, most: float) -> list[int]:
        """A division to begin with: seconds and memory of every rank even."""
        p = self.problem.pipeline
        found = self.fences(self._free(low, most) * (1 + 4e-3)) if p.chunks == 1 else None
        if found is None:
            return self.division
        middle = [(a + b) // 2 for a, b in zip(*found, strict=True)]
        return self._moved(apart(middle, len(self.problem.line)), self._rank)

    def _by_speed(self) -> list[int]:
        """Every stage as many units of the mean as its pool is fast."""
        line, at = self.problem.line, self.problem.at
        totals = [pool.line.before[-1] for pool in self.problem.pools]
        rank_of = {s: r for r, stages in enumerate(self.local) for s in stages}
        speeds = [1.0 / max(totals[at[rank_of[s]]], 1e-30) for s in range(len(rank_of))]
        ends = np.array(list(accumulate(speeds, initial=0.0))) / sum(speeds) * line.before[-1]
        cuts = [min(range(len(line) + 1), key=lambda k: (abs(line.before[k] - end), k)) for end in ends.tolist()]
        return apart(cuts, len(line))

    def judged(self, cuts: Sequence[int]) -> float:
        """How good a division looks: a mean of the seconds of its ranks, memory at its best price."""
        return self._mean([self._rank(r, cuts) for r in range(len(self.local))])

    def _mean(self, seconds: Sequence[float]) -> float:
        most = max(seconds)
        return most * sum((x / most) ** POWER for x in seconds) ** (1 / POWER) if most > 0 else 0.0

    def _rank(self, rank: int, cuts: Sequence[int]) -> float:
        stages = self.local[rank]
        mine = [(cuts[s], cuts[s + 1]) for s in stages]
        tables = self.each[self.problem.at[rank]]
        return tables.rank(mine, self._live(rank))[0] + float(self.ahead[mine[0][0]])

    def _moved(self, cuts: list[int], seconds_of: Callable[[int, Sequence[int]], float]) -> list[int]:
        """Borders moved while that makes the mean of the ranks' seconds shorter."""
        rank_of = {s: r for r, stages in enumerate(self.local) for s in stages}
        seconds = [seconds_of(r, cuts) for r in range(len(self.local))]
        for _ in range(PASSES):
            known = self._mean(seconds)
            for other in list(neighbours(cuts)):
                ends = [s for s in range(len(cuts) - 1) if (cuts[s], cuts[s + 1]) != (other[s], other[s + 1])]
                changed = {r: seconds_of(r, other) for r in sorted({rank_of[s] for s in ends})}
                found = [changed.get(r, x) for r, x in enumerate(seconds)]
                if self._mean(found) < self._mean(seconds) * (1 - 1e-9):
                    cuts, seconds = other, found
                    break
            if self._mean(seconds) >= known:
                break
        return cuts


def neighbours(cuts: Sequence[int]) -> Iterator[list[int]]:
    """Divisions with a border, or a row of neighbouring borders, moved by one unit; every stage keeps a unit."""
    last = len(cuts) - 1
    for i in range(1, last):
        for j in range(i, last):
            if last > RANGES and j > i and i > 1 and j < last - 1:
                continue
            for step in (-1, 1):
                other = [*cuts[:i], *(c + step for c in cuts[i : j + 1]), *cuts[j + 1 :]]
                if other[i - 1] < other[i] and other[j] < other[j + 1]:
                    yield other


def _line_part(line: Line, splits: bool) -> Floats:
    """Least seconds of every unit that stand before a rank's own (`Line.beside`)."""
    return np.array(line.ahead if splits else line.least)

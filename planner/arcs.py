"""Which intervals of units a stage may hold, and a first division of the chain: by the least seconds of each unit.

A stage that holds units [i, j) is an arc from position i to position j; a division of the chain is a path of arcs, one per stage.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from .labels import Runs


@dataclass(frozen=True)
class Line:
    """The chain as the stage solve sees it: the region of each unit, and the least seconds of it.

    `least` is of forward and backward together, `ahead` and `back` of each alone.
    """

    regions: tuple[int, ...]
    least: tuple[float, ...]
    ahead: tuple[float, ...]
    back: tuple[float, ...]

    @classmethod
    def of(cls, regions: Sequence[int], times: Sequence[Sequence[tuple[float, float]]]) -> Line:
        """From the region of each unit and the (forward, backward) seconds of each region's options."""
        both = [min(f + b for f, b in options) for options in times]
        ahead, back = ([min(t[k] for t in options) for options in times] for k in (0, 1))
        return cls(
            tuple(regions), tuple(both[r] for r in regions), tuple(ahead[r] for r in regions), tuple(back[r] for r in regions)
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.regions)

    @cached_property
    def before(self) -> tuple[float, ...]:
        """Least seconds of all units before each position."""
        return tuple(accumulate(self.least, initial=0.0))

    @cached_property
    def _sums(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(accumulate(self.ahead, initial=0.0)), tuple(accumulate(self.back, initial=0.0))

    def forward(self, start: int, end: int) -> float:
        """Least forward seconds of units [start, end)."""
        return self._sums[0][end] - self._sums[0][start]

    def backward(self, start: int, end: int) -> float:
        """Least backward seconds of units [start, end)."""
        return self._sums[1][end] - self._sums[1][start]

    def seconds(self, start: int, end: int) -> float:
        """Least seconds of units [start, end)."""
        return self.before[end] - self.before[start]

    def beside(self, start: int, splits: bool) -> float:
        """Least seconds of a step before and after the work of a rank whose first stage starts at a position.

        The first microbatch passes the units before. The last one passes them on its way back, while the rank has its finish
        and the weight halves it put off (where the backward pass `splits`): so either may count, not both.
        """
        return self.forward(0, start) if splits else self.before[start]

    def runs(self, start: int, end: int) -> Runs:
        """The interval as runs of equal units."""
        return tuple((region, len(tuple(members))) for region, members in groupby(self.regions[start:end]))

    def bottleneck(self, stages: int) -> float:
        """The least possible seconds of the slowest of `stages` intervals that cover the chain (binary search, greedy)."""
        low, high = max(self.least), self.before[-1]
        for _ in range(44):
            middle = (low + high) / 2
            low, high = (low, middle) if self._covers(stages, middle) else (middle, high)
        return high

    def _covers(self, stages: int, most: float) -> bool:
        at = 0
        for _ in range(stages):
            at = self._reach(at, most)
        return at == len(self)

    def _reach(self, at: int, most: float) -> int:
        """The furthest end of an interval from `at` that takes at most `most` (at least one unit)."""
        end = bisect_right(self.before, self.before[at] + most * (1 + 1e-12)) - 1
        return min(max(end, at + 1), len(self))

    def arcs(self, stages: int, most: float) -> list[list[tuple[int, int]]]:
        """Per stage, the intervals of at most `most` seconds that lie on some division into `stages`."""
        count = len(self)
        furthest = [0]
        for _ in range(stages):
            furthest.append(self._reach(furthest[-1], most) if furthest[-1] < count else count)
        nearest = [count]
        for _ in range(stages):
            nearest.append(self._back(nearest[-1], most))
        nearest.reverse()
        found = []
        for s in range(stages):
            mine = []
            for i in range(max(nearest[s], s), min(furthest[s], count - (stages - s)) + 1):
                for j in range(max(i + 1, nearest[s + 1]), count - (stages - s - 1) + 1):
                    if j > i + 1 and self.seconds(i, j) > most:
                        break
                    if (s == 0) <= (i == 0) and (s == stages - 1) <= (j == count):
                        mine.append((i, j))
            found.append(mine)
        return found

    def _back(self, at: int, most: float) -> int:
        start = at - 1
        while start > 0 and self.seconds(start - 1, at) <= most * (1 + 1e-12):
            start -= 1
        return max(start, 0)


def spare(line: Line, regions: Sequence[int]) -> float:
    """Seconds of one more typical unit: how much more than the bottleneck an uneven division may take."""
    counts: dict[int, int] = {}
    for region in regions:
        counts[region] = counts.get(region, 0) + 1
    common = max(counts, key=lambda r: (counts[r], -r))
    return 1.05 * line.least[regions.index(common)]

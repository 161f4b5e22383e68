"""The stage solve over pools of unlike devices: a division even in seconds and memory, then its neighbours while they help.

Every division is solved by counts (planner/fixed.py). Where few are left that may be better than the best, all of them are, and
the least of their bounds is one for the shape; otherwise the program with the division in it is (planner/free.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .division import Division
from .fixed import Fixed
from .free import Free
from .master import PathRow
from .paths import makespan
from .pooled import PooledBound, neighbours
from .program import INFINITE
from .ready import Ready
from .screen import Held as Live
from .stageproblem import Held, StageProblem, StageSolution
from .trial import merged

MOVES = 24
"""Divisions that are solved at the most in looking for a better one."""

FEW_MOVES = 4
"""The same with several chunks a rank, where the first division is what is bounded."""

LOST = 8
"""The same while nothing fits."""

EVERY = 48
"""Divisions up to which all are solved."""

NEAREST = 8
"""Of its neighbours, so many are simulated to see which comes first."""

FREE_ARCS = 1500
"""Intervals of all stages up to which the program with the division in it is solved."""

FAR = 1e3
"""How many times longer than its least a step over unlike devices is looked for; beyond, memory is what is short."""


class Walk(Division):
    """Divisions over unlike devices."""

    def __init__(
        self, problem: StageProblem, *, gap: float = 1e-3, limit_seconds: float = INFINITE, ready: Ready | None = None,
        quick: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(problem, gap=gap, limit_seconds=limit_seconds, ready=ready, quick=quick)
        self.tried: dict[tuple[int, ...], float] = {}

    def _solution(self, bound: float, rounds: int) -> StageSolution:
        if self.best is None:
            return StageSolution(None, INFINITE, bound)
        stages = tuple(Held(c.start, c.end, c.picks, *c.layouts, *c.time) for c in self.best)
        return StageSolution(stages, self.seconds, min(max(bound, self.least), self.seconds), self.coarse.flat, rounds)

    def _rows(self) -> list[PathRow]:
        unique = {tuple(sorted(path.counts.items())): path for path in self.paths}
        return [PathRow(path, self.p.stages) for path in unique.values()]

    def _live(self) -> Live | None:
        """Who holds what in the schedule; None where there is no backward pass."""
        return Live(self.local, tuple(merged(v) for v in self.ready.live)) if self.problem.training else None

    def _unlike(self) -> StageSolution:
        """Unlike devices: one division even in seconds and memory, then neighbours of the best while they help.

        The bound is one for all divisions (planner/pooled.py).
        """
        bounded = PooledBound(self.problem, self._live(), self.ready.splits)
        longest = FAR * max(pool.line.before[-1] for pool in self.problem.pools) * self.p.microbatches
        most = min(self.limit, longest)
        low = bounded.seconds(0.0, most)
        if low >= self.limit * (1 - self.gap):
            return StageSolution(None, INFINITE, min(low, self.limit))
        if low >= longest:
            return StageSolution(None, INFINITE, INFINITE)
        self._walk(bounded, bounded.first(low, most), low)
        limit = min(self.seconds, self.limit)
        if limit == INFINITE:
            return StageSolution(None, INFINITE, low)
        if self.p.chunks > 1:
            low = max(low, min(self.tried[tuple(bounded.division)], limit))
        elif low < limit * (1 - self.gap):
            low = max(low, self._every(bounded))
        if self.p.chunks == 1 and low < limit * (1 - self.gap):
            low = max(low, self._freely(bounded, min(self.seconds, self.limit)))
        return self._solution(low, len(self.tried))

    def _walk(self, bounded: PooledBound, cuts: list[int], low: float) -> None:
        """Solve a division, then neighbours of the best as long as they help."""
        best, queue, most = INFINITE, [cuts], MOVES if self.p.chunks == 1 else FEW_MOVES
        while (
            queue
            and len(self.tried) < (most if self.best is not None else min(most, LOST))
            and low < self.seconds * (1 - self.gap)
        ):
            cuts, known = queue.pop(0), self.seconds
            found = self._division(cuts)
            # Above the limit nothing is looked for: what the division takes at the least shows the way.
            found = self.seconds if self.seconds < known else found
            if found < best or len(self.tried) == 1:
                best = found
                queue = self._beside_of(bounded, [c for c in neighbours(cuts) if tuple(c) not in self.tried])

    def _division(self, cuts: Sequence[int]) -> float:
        """Look for better plans of one division; returns a bound for all of its plans."""
        found = Fixed(self, list(pairwise(cuts))).solve(min(self.seconds, self.limit))
        self.tried[tuple(cuts)] = found
        return found

    def _every(self, bounded: PooledBound) -> float:
        """Where few divisions are left that may be better: all of them, and so a bound; else 0."""
        found = bounded.inside(min(self.seconds, self.limit), EVERY)
        if found is None:
            return 0.0
        for cuts in sorted(found, key=lambda c: (bounded.judged(c), c)):
            if cuts not in self.tried:
                self._division(cuts)
        return min((self.tried[cuts] for cuts in found), default=min(self.seconds, self.limit))

    def _beside_of(self, bounded: PooledBound, found: list[list[int]]) -> list[list[int]]:
        """Neighbours in the order in which they are tried: by seconds and memory, the first few by their least step."""
        ranked = sorted(found, key=lambda c: (bounded.judged(c), c))

        def least(cuts: list[int]) -> float:
            step = makespan(self.compiled, self.placement, *Fixed(self, list(pairwise(cuts))).least())[0]
            return max(step, bounded.judged(cuts))

        return [*sorted(ranked[:NEAREST], key=lambda c: (least(c), c)), *ranked[NEAREST:]]

    def _freely(self, bounded: PooledBound, limit: float) -> float:
        """A bound over divisions inside the fences of `limit` seconds, divided freely; 0 where they leave too many."""
        fences = bounded.fences(limit)
        if fences is None:
            return limit
        arcs = bounded.arcs(fences)
        return Free(self, arcs).solve(limit) if sum(map(len, arcs)) <= FREE_ARCS else 0.0

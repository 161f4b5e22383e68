"""Plans of one stage problem tried out: columns of mixtures, simulated together, with the paths that were critical."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from .labels import PAIRS, Bag, Bags, Layouts, MemoryRows, Runs
from .paths import Path, makespan, rank_paths
from .program import INFINITE
from .ready import Ready, make_ready, seed_paths
from .stageproblem import Column, StageProblem

EXACT = 1e-6
"""A gap below which nothing is thinned, and any number of mixtures listed."""

MOST_ROWS = 6
"""Maximal vectors of live microbatches a rank's memory is checked at; more are merged, which only asks for more memory."""

SLOWER = (1.1, 1.5, 4.0)
"""How much slower one rank is made to find the paths that run through it."""


class Trial:
    """What is known of a stage problem: its schedule, memory rows, the best plan so far and all critical paths met.

    A `quick` solve leaves out what costs most (`skipped`): programs in whole numbers, and listing mixtures.
    """

    def __init__(
        self, problem: StageProblem, *, gap: float = 1e-3, limit_seconds: float = INFINITE, ready: Ready | None = None,
        quick: bool = False,
    ) -> None:  # fmt: skip
        self.problem, self.gap, self.limit, self.quick = problem, gap, limit_seconds, quick
        self.p = problem.pipeline
        name = self.p.schedule if problem.training else "forward"
        self.ready = ready or make_ready(name, self.p.ranks, self.p.chunks, self.p.microbatches)
        self.compiled, self.placement, self.local = self.ready.compiled, self.ready.placement, self.ready.local
        mine = [problem.of(p) for p in range(max(len(problem.pools), 1))]
        self.here = [mine[problem.at[rank] if problem.pools else 0] for rank in self.placement]
        self.rows = self._memory_rows()
        m = float(self.p.microbatches)
        self.busy = (m, m, 0.0, 1.0)
        # Work of a rank that comes, with what `_beside` says of the stages before it, one after the other.
        self.alone = self.busy if self.ready.splits else (m, m, 0.0, 0.0)
        self.best: tuple[Column, ...] | None = None
        self.floors: dict[tuple[str, Runs, MemoryRows], float] = {}
        self.seconds = INFINITE
        self.paths: list[Path] = []
        self.division: list[list[tuple[int, int]]] = []
        self.slow = self.skipped = False
        self.least = 0.0
        self.coarse = Bags(problem.options, problem.change, [self.busy], coarse=True)

    @property
    def pairs(self) -> float:
        """Pairs of mixtures that may be compared: any number where the solve is to be exact."""
        return INFINITE if self.problem.exact or self.gap <= EXACT else PAIRS

    def skips(self) -> bool:
        """Whether what comes next is left out, which is then remembered."""
        self.skipped = self.skipped or self.quick
        return self.quick

    def enough(self, low: float) -> bool:
        """Whether a bound is within the gap of the best plan, or of the limit where that is less."""
        return low >= min(self.seconds, self.limit) * (1 - self.gap)

    def _memory_rows(self) -> list[MemoryRows]:
        once = self.p.microbatches == 1 and self.p.stages == 1
        vectors = [merged(v) for v in self.ready.live]
        found = []
        for stage, rank in enumerate(self.placement):
            chunk = self.local[rank].index(stage)
            live = tuple(v[chunk] for v in vectors[rank]) if self.problem.training else (1,)
            memory = self.here[stage].memory
            found.append(MemoryRows(live, memory.cap_bytes, memory.host_bytes, memory.disk_bytes, once))
        return found

    def _value(self, column: Column) -> float:
        return sum(w * t for w, t in zip(self.busy, column.time, strict=True))

    def made(self, stage: int, start: int, end: int, layouts: Layouts, bag: Bag) -> list[Column]:
        """Columns of the mixtures of a bag."""
        sends = self.sends(stage, start, end, layouts)
        return [
            Column(
                stage, start, end, layouts, (t[0], t[1], t[2], t[3]), tuple(b), float(w), tuple(p), sends
            )
            for t, b, w, p in zip(
                bag.time.tolist(), bag.bytes.tolist(), bag.work.tolist(), bag.picks.tolist(), strict=True
            )
        ]  # fmt: skip

    def sends(self, stage: int, start: int, end: int, layouts: Layouts) -> tuple[float, float]:
        """Seconds of handing on what leaves the interval of a stage, forward and back."""
        ahead = self.problem.handing(stage + 1, end, layouts[1])[0] if end < len(self.problem.line) else 0.0
        return ahead, self.problem.handing(stage, start, layouts[0])[1] if start > 0 else 0.0

    @cached_property
    def place(self) -> dict[int, int]:
        """The place of each option in the flat list, by identity."""
        return {id(o): k for k, o in enumerate(self.coarse.flat)}

    def attempt(self, path: tuple[Column, ...]) -> float:
        """Simulate a plan, keep it if it fits and is the best, and take its critical paths as rows; returns its step time."""
        if not self._fits(path):
            return INFINITE
        table = self._table(path)
        seconds, critical = makespan(self.compiled, self.placement, *table)
        self.paths.append(critical)
        self.paths += [row for _, row in rank_paths(self.compiled, self.placement, *table)]
        if seconds < self.seconds:
            self.seconds, self.best = seconds, path
        return seconds

    def _seed(self) -> None:
        """Paths that become critical where one rank is slower than the others: rows that bind before a solve finds them."""
        assert self.best is not None
        self.paths += seed_paths(self.ready, self._table(self.best), SLOWER)

    def _fits(self, path: tuple[Column, ...]) -> bool:
        """Whether the chunks of every rank fit together."""
        for stages in self.local:
            rows = self.rows[stages[0]]
            total = np.sum([path[s].bytes for s in stages], axis=0)
            total[: rows.activations] += max(path[s].work for s in stages)
            if (total > np.array(rows.caps) * (1 + 1e-9)).any():
                return False
        return True

    def _table(self, path: tuple[Column, ...]) -> tuple[list[float], ...]:
        return (
            [c.time[0] for c in path], [c.time[1] for c in path], [c.time[2] for c in path],
            [c.sends[0] for c in path], [c.sends[1] for c in path], [c.time[3] for c in path],
        )  # fmt: skip

    def _beside(self, start: int) -> float:
        return self.problem.beside(start, self.ready.splits)

    def _floor(self, stage: int, start: int, end: int, ranks: int = 1) -> float:
        if ranks == 1:
            return self._kept("alone", stage, start, end, self.alone)
        return self.coarse.floor([(self.problem.line.runs(start, end), self.rows[stage])], self.alone, ranks)

    def cycle_floor(self, stage: int, start: int, end: int) -> float:
        """Least forward and backward seconds of one microbatch of an interval, within the memory of its stage."""
        return self._kept("cycle", stage, start, end, (1.0, 1.0, 0.0, 0.0))

    def busy_floor(self, stage: int, start: int, end: int) -> float:
        """Least seconds of all microbatches and the step's end of an interval, within the memory of its stage."""
        return self._kept("busy", stage, start, end, self.busy)

    def _kept(self, name: str, stage: int, start: int, end: int, weights: tuple[float, float, float, float]) -> float:
        key = (name, self.here[stage].line.runs(start, end), self.rows[stage])
        if key not in self.floors:
            self.floors[key] = self.coarse.floor([(key[1], key[2])], weights)
        return self.floors[key]


def merged(vectors: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """At most `MOST_ROWS` vectors that no given one exceeds: neighbours are merged by their greatest entries."""
    kept = sorted(vectors)
    while len(kept) > MOST_ROWS:
        pairs = range(len(kept) - 1)
        k = min(pairs, key=lambda i: sum(abs(a - b) for a, b in zip(kept[i], kept[i + 1], strict=True)))
        merged = tuple(max(a, b) for a, b in zip(kept[k], kept[k + 1], strict=True))
        kept[k : k + 2] = [merged]
    return tuple(kept)

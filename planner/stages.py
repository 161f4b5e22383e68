"""The stage solve: which units each virtual stage holds and under which options, for one schedule and number of microbatches.

    minimise   T
    variables  x[s, arc, mixture]   stage s holds the units of the arc under this mixture of options          binary
    rows       one path of arcs from the first unit to the last, one per stage (flow by position and layout)
               per rank: bytes of its chunks on every memory row + working memory <= cap
               T >= sum of path coefficients x seconds                                   (added until they say no more)

Mixtures come from planner/labels.py: complete within what a known plan leaves open, so the bound holds for all of them. Path rows
are critical paths of the simulator, one per rank, on each plan found; every one is a valid bound for all plans (planner/paths.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from .counts import best_counts
from .fixed import TRIES, Fixed
from .free import Free
from .labels import FEW, GRID, MOST, Bags, Exhausted, Limit
from .master import Master, PathRow
from .options import end_to_end
from .outer import outer_bound
from .paths import makespan
from .program import INFINITE
from .screen import Bounded, Tables
from .stageproblem import Column, Columns, Held, Memory, Pipeline, StageProblem, StageSolution
from .trial import EXACT
from .walk import FAR, Walk

NEAR = (0.0, 0.1, 0.3)
"""Which mixtures of an arc the first search for a better plan looks at (0: the quickest)."""

POLISH = 4
"""Solves of that search."""

LISTED = 40
"""Units up to which every mixture that fits is listed where the quickest ones of all arcs do not."""

WIDE = 2e-3
"""A gap from which on mixtures are not listed in full."""

ROUNDS = 8
"""Solves per shape: each adds the critical paths of the plan found before."""

FEW_UNITS = 12
"""Units of one stage up to which all its mixtures are listed; beyond, a program over counts is quicker."""


class StageSolve(Walk):
    """One run of the stage solve."""

    def run(self) -> StageSolution:
        """Solve; deterministic. Stops when the gap is met, or no more paths are found."""
        if len(self.problem.line) < self.p.stages:
            return StageSolution(None, INFINITE, INFINITE)
        if self.problem.pools:
            self.quick = False
            return self._unlike()
        return self._single() if self.p.stages == 1 else self._several()

    def _several(self) -> StageSolution:
        """Several stages."""
        listed = FEW_UNITS if self.gap >= WIDE else LISTED
        counted = not self.problem.exact and self.gap > EXACT
        if self.p.chunks > 1 and counted:
            low = Fixed(self, [mine[0] for mine in self._even()]).solve(self.limit)
            if self._counted_enough(low, listed):
                return self._told(min(low, self.limit) if low < INFINITE else low)
            self.least = low
        elif self.limit < INFINITE and self._hopeless():
            return StageSolution(None, INFINITE, self.limit)
        elif counted:
            low = self._counting()
            if self._counted_enough(low, listed):
                return self._told(low)
            self.least = max(self.least, low)
        try:
            return self._listed(listed, counted)
        except Exhausted:
            return self._solution(self.least, TRIES)

    def _counted_enough(self, low: float, listed: int) -> bool:
        """Whether mixtures need not be listed after a solve by counts: its bound is close, the chain is long, or time is short."""
        if self.enough(low) or (self.best is not None and len(self.problem.line) > listed):
            return True
        return self.skips()

    def _told(self, low: float) -> StageSolution:
        """The solution so far, open where something was skipped that may prove more than `low` seconds."""
        return replace(self._solution(low, TRIES), open=self.skipped and not self.enough(low))

    def _listed(self, listed: int, counted: bool) -> StageSolution:
        """By mixtures of options; raises Exhausted where they are too many."""
        line, arcs = self.problem.line, self._first()
        fitting = not arcs and not self.slow and (self.problem.exact or len(line) <= LISTED)
        if fitting:
            arcs = self._fitting()
        if self.best is None:
            return StageSolution(None, INFINITE, self.limit if self.slow else INFINITE if fitting else self.least)
        self._seed()
        limit = min(self.seconds, self.limit)
        low = outer_bound(self, self._rows(), limit)
        if low >= limit * (1 - self.gap):
            return self._solution(low, 0)
        if self.p.chunks == 1 and counted and len(line) > listed:
            return self._solution(max(low, self._free(limit)), TRIES)
        found = self._columns(limit)
        if all(found.columns) and self._relaxed(found, limit) < limit * (1 - self.gap):
            self._program(self._near(arcs), limit, rounds=POLISH, gap=max(self.gap, 2e-3))
            if self.seconds < limit:
                limit = self.seconds
                found = self._columns(limit)
        if not all(found.columns):
            # Nothing beats the known plan: its value is the bound, up to the limit that was asked for.
            return self._solution(limit - found.slack, 0)
        return self._close(found, limit)

    def _counting(self) -> float:
        """Plans by counts, the chain divided evenly and then freely; returns a bound (inf: nothing fits)."""
        splits, tables = self.ready.splits, Tables(self.problem, self.ready.splits)
        longest = FAR * self.problem.line.before[-1] * self.p.microbatches
        low, cuts = Bounded(self.problem, tables, self._live(), splits).even(0.0, min(self.limit, longest))
        if cuts is None:
            return INFINITE if low >= longest else low
        self.least = max(self.least, low)
        Fixed(self, list(pairwise(cuts))).solve(self.limit)
        limit = min(self.seconds, self.limit)
        return max(low, self._free(limit)) if limit < INFINITE else low

    def _free(self, limit: float) -> float:
        low = Free(self, self.problem.line.arcs(self.p.stages, limit / self.p.microbatches)).solve(limit)
        self.least = max(self.least, low)
        return low

    def _hopeless(self) -> bool:
        """Whether no division has every rank done within the limit, each unit by itself and memory at its best price."""
        line, m = self.problem.line, self.p.microbatches
        if self.p.chunks > 1:
            # The division is not known yet: the busiest rank has at least its share of the least any stage may take.
            least = min(self._floor(s, 0, len(line), self.p.ranks) for s in range(self.p.stages))
            return least / self.p.ranks > self.limit
        ends = {0}
        for s, mine in enumerate(line.arcs(self.p.stages, self.limit / m)):
            ends = {j for i, j in mine if i in ends and self._floor(s, i, j) + self._beside(i) <= self.limit}
        return len(line) not in ends

    def _single(self) -> StageSolution:
        """One stage: the step is microbatches x (forward + backward) + finish, so one column of seconds is exact."""
        problem, line = self.problem, self.problem.line
        if self.coarse.floor([(line.runs(0, len(line)), self.rows[0])], self.busy) > self.limit:
            return StageSolution(None, INFINITE, self.limit)
        counted = self._counted() if not problem.exact and len(problem.line) > FEW_UNITS else None
        if counted is not None and (counted.bound_seconds >= min(counted.step_seconds * (1 - self.gap), self.limit)):
            return counted
        # The order of the chain decides: counts only bound the step.
        self.least = counted.bound_seconds if counted is not None else 0.0
        # One objective first, then what fits if anything does, then all that may be faster.
        for bags in (self.coarse, Bags(problem.options, problem.change, [])):
            if self.best is None:
                self._quickest(bags, None)
        if self.best is None:
            return StageSolution(None, INFINITE, INFINITE)
        known = min(self.seconds, self.limit)
        # One column of seconds takes a fine grid at little cost.
        try:
            lost = self._quickest(self._bags([self.busy], [known / 100]), Limit(self.busy, known))
        except Exhausted:
            lost = INFINITE
        found = self._solution(max(0.0, min(self.seconds, self.limit) - lost), 0)
        if counted is not None and counted.step_seconds < found.step_seconds:
            return replace(counted, bound_seconds=min(found.bound_seconds, counted.step_seconds))
        return found

    def _counted(self) -> StageSolution:
        """A long chain on one stage: counts instead of mixtures."""
        problem, m = self.problem, self.p.microbatches
        found = best_counts(problem.line.regions, problem.options, self.rows[0], m, problem.change)
        if found.bound > self.limit:
            return StageSolution(None, INFINITE, min(found.bound, self.limit if found.units else INFINITE))
        if not found.units:
            return StageSolution(None, INFINITE, found.bound)
        units, parts = found.units, end_to_end(found.units, problem.change)
        held = Held(0, len(units), tuple(self.place[id(o)] for o in units), units[0].entry, units[-1].exit, *parts)
        seconds = sum(w * t for w, t in zip(self.busy, parts, strict=True))
        return StageSolution((held,), seconds, min(found.bound, seconds), self.coarse.flat, 1)

    def _quickest(self, bags: Bags, room: Limit | None) -> float:
        """Keep the quickest mixture of the only stage where it is the best; returns seconds that thinning may hide."""
        line = self.problem.line
        found = bags.interval(line.runs(0, len(line)), self.rows[0], room)
        columns = [c for sides, bag in found.items() for c in self.made(0, 0, len(line), sides, bag)]
        best = min(columns, key=lambda c: (self._value(c), c.picks), default=None)
        if best is not None and self._value(best) <= self.seconds:
            self.best, self.seconds = (best,), self._value(best)
        return max((b.slack for b in found.values()), default=0.0) * (
            0.0 if bags.cells is None else float(bags.cells[0])
        )

    def _near(self, arcs: list[list[tuple[int, int]]]) -> list[list[Column]]:
        """A few mixtures of every arc that may beat the plan so far: what a better plan is looked for among first."""
        rows = self._rows()
        return [
            [
                c for i, j in mine if self._room(rows, s, i, j, self.seconds) is not None
                for level in NEAR for c in self._cheap(s, i, j, level)
            ]
            for s, mine in enumerate(arcs)
        ]  # fmt: skip

    def _columns(self, limit: float) -> Columns:
        """Every mixture of every arc that a plan below `limit` may use; empty where no path of arcs is left."""
        line, m = self.problem.line, self.p.microbatches
        found, several = Columns(), self.p.chunks > 1
        arcs = self.division if several else line.arcs(self.p.stages, limit / m)
        rows = self._rows()
        rooms = [
            {(i, j): room for i, j in mine if (room := self._room(rows, s, i, j, limit)) is not None}
            for s, mine in enumerate(arcs)
        ]  # fmt: skip
        if not several:
            rooms = self._reachable(rooms, limit)
        bags, lost = self._exact(limit), [0.0] * self.p.stages
        for s, mine in enumerate(rooms):
            made: list[Column] = []
            for (i, j), room in mine.items():
                for layouts, bag in bags.interval(line.runs(i, j), self.rows[s], room).items():
                    made += self.made(s, i, j, layouts, bag)
                    lost[s] = max(lost[s], bag.slack)
            found.columns.append(made)
            if not made:
                found.columns = [[] for _ in rooms]
                break
        found.slack = self._lost(lost, bags)
        return found

    def _reachable(self, rooms: list[dict[tuple[int, int], Limit]], limit: float) -> list[dict[tuple[int, int], Limit]]:
        """Arcs that still lie on a division once the least busy seconds *within memory* of each are known."""
        line = self.problem.line
        bags = Bags(self.problem.options, self.problem.change, [self.alone], pairs=self.pairs)
        kept: list[dict[tuple[int, int], Limit]] = []
        for s, mine in enumerate(rooms):
            alive = {}
            for (i, j), room in mine.items():
                busy = Limit(self.alone, _rounded(limit - self._beside(i), limit))
                if any(len(bag) for bag in bags.interval(line.runs(i, j), self.rows[s], busy).values()):
                    alive[i, j] = room
            kept.append(alive)
        ahead = [{0}]
        for mine in kept:
            ahead.append({j for i, j in mine if i in ahead[-1]})
        behind = [{len(line)}]
        for mine in reversed(kept):
            behind.append({i for i, j in mine if j in behind[-1]})
        behind.reverse()
        return [
            {(i, j): room for (i, j), room in mine.items() if i in ahead[s] and j in behind[s + 1]}
            for s, mine in enumerate(kept)
        ]  # fmt: skip

    def _room(self, rows: Sequence[PathRow], stage: int, start: int, end: int, limit: float) -> Limit | None:
        """The tightest limit that a path puts on the seconds of one arc; None where even the least breaks it."""
        line, best, tightest = self.problem.line, None, INFINITE
        for row in rows:
            weights = row.weights[stage]
            least = float(row.least[stage] @ (line.forward(start, end), line.backward(start, end)))
            left = limit - row.others(stage, line, start, end)
            if least <= 0.0:
                continue
            if left < least * (1 - 1e-9):
                return None
            if left / least < tightest:
                best, tightest = (weights, left), left / least
        if best is None:
            return Limit(self.busy, limit)
        return Limit(tuple(float(w) for w in best[0]), _rounded(best[1], limit))  # type: ignore[arg-type]

    def _exact(self, limit: float) -> Bags:
        """Bags of all mixtures that any path may want: the step never falls with one of the seconds compared.

        Where the backward pass is split, paths run through its halves: less of one may be more of the other.
        """
        m = float(self.p.microbatches)
        forward, finish = (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0)
        halves = [(0.0, 1.0, -1.0, 0.0), (0.0, 0.0, 1.0, 0.0)] if self.ready.splits else [(0.0, 1.0, 0.0, 0.0)]
        columns = [forward, *halves, finish]
        return self._bags(columns, [limit / len(columns) / times for times in (*(m for _ in columns[1:]), 1.0)])

    def _bags(self, columns: Sequence[Sequence[float]], cells: Sequence[float]) -> Bags:
        """Bags thinned on a grid of shares of `cells` seconds; not at all where no gap is left for it."""
        grid = [GRID * self.gap * c for c in cells] if self.gap > EXACT else None
        return Bags(
            self.problem.options, self.problem.change, columns, cells=grid, most=MOST if self.gap <= 2e-3 else FEW,
            pairs=self.pairs,
        )  # fmt: skip

    def _lost(self, lost: Sequence[float], bags: Bags) -> float:
        """Seconds of the step that thinning may hide, from the cells lost in each stage.

        The step is the greatest of sums of durations: it grows by at most the step that what they grow by makes.
        """
        if bags.cells is None or not any(lost):
            return 0.0
        forward, *halves, finish = bags.cells.tolist()
        parts = (forward, sum(halves), halves[-1] if self.ready.splits else 0.0, 0.0, 0.0, finish)
        return makespan(self.compiled, self.placement, *([n * part for n in lost] for part in parts))[0]

    def _close(self, found: Columns, limit: float) -> StageSolution:
        low = self._relaxed(found, limit)
        if low >= limit * (1 - self.gap):
            return self._solution(low, 1)
        bound, rounds = self._program(found.columns, limit, rounds=ROUNDS, gap=self.gap)
        # What stands for a thinned mixture may lie above the limit where the mixture did not.
        return self._solution(max(0.0, low, min(bound, limit) - found.slack), rounds)

    def _relaxed(self, found: Columns, limit: float) -> float:
        """The bound of the relaxed program over all paths known."""
        master = Master(self, found.columns, limit)
        for path in self.paths:
            master.path(path)
        return min(master.relaxed(), limit) - found.slack


def _rounded(seconds: float, limit: float) -> float:
    """A little more than `seconds`, on a grid: so that arcs of equal units share their mixtures."""
    step = limit / 400
    return (int(seconds / step) + 1) * step


__all__ = ["Memory", "Pipeline", "StageProblem", "StageSolution", "StageSolve"]

"""A first plan: the chain divided so that the slowest stage is fastest, each interval in its quickest mixture that fits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from .arcs import spare
from .labels import Bags
from .master import Master
from .program import INFINITE
from .stageproblem import Column
from .trial import Trial


class Division(Trial):
    """First plans of a stage problem."""

    def _first(self) -> list[list[tuple[int, int]]]:
        """A good plan: per interval the mixture with the least busy seconds, divided so that the slowest stage is fastest.

        Returns the arcs it was looked for among. Where chunks share a rank's memory, smaller and smaller mixtures are tried.
        """
        line = self.problem.line
        base, extra = line.bottleneck(self.p.stages), spare(line, line.regions)
        for times in (1.0, 3.0, 10.0, INFINITE):
            most = base + times * extra if times < INFINITE else line.before[-1]
            arcs = line.arcs(self.p.stages, most)
            if self.p.chunks > 1:
                if not self.division:
                    self.division = self._even()
                    self._share()
                arcs = self.division
                if self._slow(arcs):
                    return []
            for level in (0.0, 0.15, 0.3, 0.5, 0.75, 1.0) if self.p.chunks > 1 else (0.0,):
                columns = [[c for i, j in mine for c in self._cheap(s, i, j, level)] for s, mine in enumerate(arcs)]
                if all(columns):
                    self._divide(columns)
                if self.best is not None:
                    return arcs
            if most >= line.before[-1]:
                break
        return []

    def _slow(self, division: list[list[tuple[int, int]]]) -> bool:
        """Whether some rank cannot be done within the limit under a division, each unit by itself."""
        line = self.problem.line
        for stages in self.local:
            parts = [(line.runs(*division[s][0]), self.rows[s]) for s in stages]
            busy = self.coarse.floor(parts, self.alone) + self._beside(division[min(stages)][0][0])
            self.slow = self.slow or busy > self.limit
            self.least = max(self.least, min(busy, self.limit))
        return self.slow

    def _fitting(self) -> list[list[tuple[int, int]]]:
        """A plan from the mixtures that fit if any does; nothing where none does. Returns the arcs it was looked for among."""
        line, problem = self.problem.line, self.problem
        bags = Bags(problem.options, problem.change, [], pairs=self.pairs)
        arcs = self.division if self.p.chunks > 1 else line.arcs(self.p.stages, line.before[-1])
        columns = []
        for s, mine in enumerate(arcs):
            found = [(i, j, bags.interval(line.runs(i, j), self.rows[s])) for i, j in mine]
            columns.append(
                [c for i, j, made in found for sides, bag in made.items() for c in self.made(s, i, j, sides, bag)]
            )
            if not columns[-1]:
                return []
        if self.p.chunks == 1:
            self._divide(columns)
        else:
            most = sum(max(self._value(c) for c in mine) for mine in columns)
            self._program(columns, max(most, 1e-12), rounds=1, gap=1.0)
        return arcs

    def _share(self) -> None:
        """Once the units of every chunk are known: what the chunks of a rank may hold beside each other."""
        held = []
        for rows, ((start, end),) in zip(self.rows, self.division, strict=True):
            total = np.zeros(rows.activations + 3)
            work = 0.0
            for region, count in self.problem.line.runs(start, end):
                bags = self.coarse.single(region, rows).values()
                total += count * np.max([b.bytes.max(axis=0) for b in bags], axis=0)
                work = max(work, *(float(b.work.max()) for b in bags))
            total[: rows.activations] += work
            held.append(total)
        for stages in self.local:
            total = np.sum([held[s] for s in stages], axis=0)
            for s in stages:
                self.rows[s] = replace(self.rows[s], beside=tuple((total - held[s]).tolist()))

    def _even(self) -> list[list[tuple[int, int]]]:
        """The one division that several chunks a rank are tried in (planner/even.py)."""
        return [[(start, end)] for start, end in pairwise(self.problem.division(self.local))]

    def _cheap(self, stage: int, start: int, end: int, level: float) -> list[Column]:
        """Per pair of layouts one mixture, from the quickest (level 0) to the one that holds the least (level 1)."""
        found = []
        bags = self.coarse.interval(self.problem.line.runs(start, end), self.rows[stage])
        for layouts, bag in bags.items():
            made = sorted(self.made(stage, start, end, layouts, bag), key=lambda c: (self._value(c), c.picks))
            if made:
                found.append(made[round(level * (len(made) - 1))])
        return found

    def _divide(self, columns: list[list[Column]]) -> None:
        """Divisions whose slowest stage is the fastest possible, then a little slower ones with less in all; each simulated."""
        values = sorted({self._value(c) for mine in columns for c in mine})
        low, high = 0, len(values) - 1
        if self._path(columns, values[high]) is None:
            return
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._path(columns, values[middle]) is not None else (middle + 1, high)
        for times in (1.0, 1.005, 1.02, 1.05):
            path = self._path(columns, values[low] * times)
            if path is not None:
                self.attempt(path)

    def _path(self, columns: list[list[Column]], most: float) -> tuple[Column, ...] | None:
        """The path of arcs, none above `most` busy seconds, with the least seconds in all."""
        here: dict[tuple[int, str], tuple[float, tuple[Column, ...]]] = {}
        for s, mine in enumerate(columns):
            there: dict[tuple[int, str], tuple[float, tuple[Column, ...]]] = {}
            for c in mine:
                value = self._value(c)
                if value > most:
                    continue
                before = (0.0, ()) if s == 0 else here.get((c.start, c.layouts[0]))
                if before is None:
                    continue
                total = before[0] + value + c.sends[0] + c.sends[1]
                known = there.get((c.end, c.layouts[1]))
                if known is None or total < known[0]:
                    there[c.end, c.layouts[1]] = (total, (*before[1], c))
            here = there
        ends = [v for (end, _), v in here.items() if end == len(self.problem.line)]
        return min(ends, key=lambda v: v[0])[1] if ends else None

    def _program(self, columns: list[list[Column]], limit: float, rounds: int, gap: float) -> tuple[float, int]:
        """Solve over the columns, adding paths; returns the proven bound and the number of solves."""
        if not all(columns):
            return min(limit, self.seconds), 0
        master = Master(self, columns, limit)
        done, bound = 0, 0.0
        taken = 0
        while done < rounds:
            for path in self.paths[taken:]:
                master.path(path)
            taken = len(self.paths)
            done += 1
            answer = master.solve(gap / 2)
            if answer is None:
                return (min(limit, self.seconds), done) if done == 1 else (max(bound, min(limit, self.seconds)), done)
            picked, low = answer
            bound = max(bound, low)
            if picked is None:
                break
            value = self.attempt(picked)
            if min(value, self.seconds) <= bound * (1 + gap) or len(self.paths) == taken:
                break
        return bound, done

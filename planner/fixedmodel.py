"""The program over counts of options in stages whose units are known (planner/fixed.py says what for)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .labels import Floats, unit_bytes
from .master import path_weights
from .options import Option
from .paths import Path
from .program import INFINITE, Program
from .trial import Trial

Spans = Sequence[tuple[int, int]]
Offered = Mapping[int, Sequence[int]]
"""By region, the places of the options that are looked at."""

Counts = dict[tuple[int, int, int], float]
"""Units by stage, region and place of the option."""

Taken = dict[int, dict[int, list[int]]]
"""By stage and region, the place of each unit's option."""

Table = Sequence[Sequence[float]]
"""Seconds by stage: forward, backward, weight, send forward, send backward, finish."""


def taken(counts: Counts) -> Taken:
    """Counts of a whole solution, unit by unit."""
    found: Taken = {}
    for (s, r, k), n in counts.items():
        found.setdefault(s, {}).setdefault(r, []).extend([k] * round(n))
    return found


class Divided:
    """Where the chain may be divided, and what stages are made of: `arcs` lists the intervals that each stage may hold.

    One interval each is a division; with more of them the division is part of the program. `runs` are the most units of each
    region in any of them.
    """

    def __init__(self, trial: Trial, arcs: Sequence[Spans]) -> None:
        self.trial, self.arcs = trial, arcs
        self.runs = [dict[int, int]() for _ in arcs]
        for s, mine in enumerate(arcs):
            for start, end in mine:
                for region, count in self.units(s, start, end).items():
                    self.runs[s][region] = max(self.runs[s].get(region, 0), count)
        self.regions = sorted({r for runs in self.runs for r in runs})
        self.times: dict[int, Floats] = {
            r: np.array([[o.forward, o.backward, o.weight, o.finish] for o in trial.problem.options[r]])
            for r in self.regions
        }

    def units(self, s: int, start: int, end: int) -> dict[int, int]:
        """Units of each region in an interval held by a stage."""
        found: dict[int, int] = {}
        for region, count in self.trial.here[s].line.runs(start, end):
            found[region] = found.get(region, 0) + count
        return found

    def working(self, s: int) -> float:
        """Working memory that a stage has in any plan."""
        options = self.trial.problem.options
        return min(max(min(o.work for o in options[r]) for r in self.units(s, *arc)) for arc in self.arcs[s])

    def sends(self, s: int, layouts: tuple[str, str]) -> tuple[float, float]:
        """The least seconds of handing on what leaves a stage, forward and back."""
        found = [self.trial.sends(s, start, end, layouts) for start, end in self.arcs[s]]
        return min(f for f, _ in found), min(b for _, b in found)

    @cached_property
    def every(self) -> Offered:
        """All options."""
        return {r: range(len(self.trial.problem.options[r])) for r in self.regions}

    def option(self, region: int, place: int) -> Option:
        """An option by its place."""
        return self.trial.problem.options[region][place]

    def busy(self, region: int, place: int) -> float:
        """Seconds that a unit keeps its rank busy in a step."""
        option = self.option(region, place)
        return self.trial.p.microbatches * option.seconds + option.finish


@dataclass
class _Layouts:
    """Variables of layouts by stage: in use, changed inside it, and handed to it."""

    used: dict[int, dict[str, int]] = field(default_factory=dict)
    changed: dict[int, int] = field(default_factory=dict)
    handed: dict[int, dict[str, int]] = field(default_factory=dict)


class Model:
    """The program with its variables, for all stages or for those of one rank.

    `share` of the mean busy seconds of the ranks is paid beside the step. With `flags`, working memory is exact.
    """

    def __init__(
        self, division: Divided, offered: Offered, scale: float, *, flags: bool, share: float = 0.0,
        rank: int | None = None, whole: bool = True,
    ) -> None:  # fmt: skip
        self.division, self.trial, self.offered = division, division.trial, offered
        self.scale, self.share, self.whole = scale, share, whole
        self.program, self.paths, self.rows = Program(), list[Path](), list[int]()
        self.seen: set[tuple[tuple[tuple[int, str], int], ...]] = set()
        self.time = self.program.add(1.0, upper=INFINITE)
        ranks = division.trial.local if rank is None else division.trial.local[rank : rank + 1]
        self.stages = sorted(s for stages in ranks for s in stages)
        self.n: dict[int, dict[int, list[int]]] = {}
        for s in self.stages:
            self.n[s] = {r: [self._count(r, k, n) for k in offered[r]] for r, n in division.runs[s].items()}
        self.x = self._divide()
        for stages in ranks:
            self._memory(stages, flags)
        names = sorted({side for r in offered for o in self.options(r) for side in (o.entry, o.exit)})
        self.layouts = _Layouts()
        self.several = len(names) > 1 and rank is None
        if self.several:
            self._layouts(names)

    def _count(self, region: int, place: int, most: int) -> int:
        cost = self.share * self.division.busy(region, place) / self.trial.p.ranks * self.scale
        return self.program.add(cost, upper=float(most), whole=self.whole)

    def _divide(self) -> dict[int, list[int]]:
        """Which interval each stage holds, and that its units are those of it."""
        program, found, nodes = self.program, dict[int, list[int]](), dict[tuple[int, int], list[tuple[int, float]]]()
        for s in self.stages:
            arcs = self.division.arcs[s]
            found[s] = [program.add(lower=float(len(arcs) == 1), whole=True) for _ in arcs]
            program.row([(v, 1.0) for v in found[s]], 1.0, 1.0)
            units = [self.division.units(s, *arc) for arc in arcs]
            for r, variables in self.n[s].items():
                held = [(v, -float(n[r])) for v, n in zip(found[s], units, strict=True) if r in n]
                program.row([*((v, 1.0) for v in variables), *held], 0.0, 0.0)
            for v, (start, end) in zip(found[s], arcs, strict=True):
                if s:
                    nodes.setdefault((s, start), []).append((v, -1.0))
                if s + 1 < len(self.division.arcs):
                    nodes.setdefault((s + 1, end), []).append((v, 1.0))
        if len(self.stages) == len(self.division.arcs):
            for node in sorted(nodes):
                program.row(nodes[node], 0.0, 0.0)
        return found

    def spans(self, values: Floats) -> list[tuple[int, int]]:
        """The division of a solution."""
        return [
            self.division.arcs[s][max(range(len(xs)), key=lambda k: (values[xs[k]], -k))] for s, xs in self.x.items()
        ]

    def options(self, region: int) -> list[Option]:
        """The options of a region that are looked at."""
        return [self.division.option(region, k) for k in self.offered[region]]

    def _memory(self, stages: Sequence[int], flags: bool) -> None:
        rows = self.trial.rows[stages[0]]
        unit = max(rows.cap_bytes, 1.0) if rows.cap_bytes < INFINITE else 1.0
        held = [(s, r, v) for s in stages for r, v in self.n[s].items()]
        always = max(self.division.working(s) for s in stages)
        work = self.program.add(lower=always / unit, upper=INFINITE)
        if flags and rows.cap_bytes < INFINITE:
            self._working(held, always, work, unit)
        table = {(s, r): [unit_bytes(o, self.trial.rows[s]) for o in self.options(r)] for s, r, _ in held}
        for i, cap in enumerate(rows.caps):
            if cap == INFINITE:
                continue
            terms = [(v, b[i] / unit) for s, r, vs in held for v, b in zip(vs, table[s, r], strict=True)]
            extra = [(work, 1.0)] if i < rows.activations else []
            self.program.row([*terms, *extra], high=cap / unit)

    def _working(self, held: Sequence[tuple[int, int, list[int]]], always: float, work: int, unit: float) -> None:
        """One flag for each size above what any plan must have: whether something used needs at least that much."""
        program = self.program
        for level in sorted({o.work for _, r, _ in held for o in self.options(r) if o.work > always}):
            flag = program.add(whole=True)
            program.row([(work, 1.0), (flag, -(level - always) / unit)], low=always / unit)
            for s, r, variables in held:
                over = [v for v, o in zip(variables, self.options(r), strict=True) if o.work >= level]
                if over:
                    program.row([(flag, float(self.division.runs[s][r])), *((v, -1.0) for v in over)], low=0.0)

    def _layouts(self, names: Sequence[str]) -> None:
        program, found = self.program, self.layouts
        for s, mine in self.n.items():
            found.used[s] = {name: program.add(whole=True) for name in names}
            found.handed[s] = {name: program.add(whole=True) for name in names} if s else {}
            for r, variables in mine.items():
                count = float(self.division.runs[s][r])
                for name, flag in found.used[s].items():
                    sides = [v for v, o in zip(variables, self.options(r), strict=True) if name in (o.entry, o.exit)]
                    program.row([(flag, count), *((v, -1.0) for v in sides)], low=0.0)
            found.changed[s] = program.add(upper=float(len(names)))
            program.row([(found.changed[s], 1.0), *((v, -1.0) for v in found.used[s].values())], low=-1.0)
        for s in self.stages[1:]:
            program.row([(v, 1.0) for v in found.handed[s].values()], 1.0, 1.0)
            for name, flag in found.handed[s].items():
                for side in (s - 1, s):
                    program.row([(found.used[side][name], 1.0), (flag, -1.0)], low=0.0)

    @cached_property
    def seconds(self) -> dict[int, tuple[list[int], Floats]]:
        """By stage: variables, and the forward, backward, weight, finish, send forward, send backward seconds of each."""
        found = {}
        for s, mine in self.n.items():
            variables = [v for vs in mine.values() for v in vs]
            times = [
                np.hstack([self.division.times[r][list(self.offered[r])], np.zeros((len(vs), 2))])
                for r, vs in mine.items()
            ]
            more = self._handing(s) if self.several else []
            found[s] = [*variables, *(v for v, _ in more)], np.vstack([*times, *(np.array([t]) for _, t in more)])
        return found

    def _handing(self, s: int) -> list[tuple[int, tuple[float, ...]]]:
        """What layouts cost in a stage: changes inside it, and what it hands on."""
        found: list[tuple[int, tuple[float, ...]]] = [(self.layouts.changed[s], (*self._change(s), 0.0, 0.0, 0.0, 0.0))]
        for name, v in self.layouts.handed.get(s + 1, {}).items():
            found.append((v, (0.0, 0.0, 0.0, 0.0, self.division.sends(s, (name, name))[0], 0.0)))
        for name, v in self.layouts.handed[s].items():
            found.append((v, (0.0, 0.0, 0.0, 0.0, 0.0, self.division.sends(s, (name, name))[1])))
        return found

    def _change(self, s: int) -> tuple[float, float]:
        """The least seconds of a change of layout; nothing where an option may itself be one."""
        turning = any(o.entry != o.exit for r in self.offered for o in self.options(r))
        change = self.trial.here[s].change.values()
        if turning or not change:
            return 0.0, 0.0
        return min(f for f, _ in change), min(b for _, b in change)

    def _constant(self, s: int) -> tuple[float, ...]:
        """Seconds of handing on where there is one layout."""
        if self.several:
            return (0.0,) * 6
        layout = next(o.entry for r in self.n[s] for o in self.options(r))
        return (0.0,) * 4 + self.division.sends(s, (layout, layout))

    @cached_property
    def lengths(self) -> dict[int, tuple[int, ...]]:
        """By stage, variables that are its forward, backward, weight, finish, send forward and send backward seconds.

        A path then names a few of them, not every option of every stage.
        """
        found = {}
        for s, (variables, seconds) in self.seconds.items():
            made = [self.program.add(upper=INFINITE) for _ in range(6)]
            for v, column, constant in zip(made, (seconds * self.scale).T.tolist(), self._constant(s), strict=True):
                terms = [(n, -x) for n, x in zip(variables, column, strict=True) if x]
                self.program.row([(v, 1.0), *terms], constant * self.scale, constant * self.scale)
            found[s] = tuple(made)
        return found

    def path(self, path: Path) -> bool:
        """Add T >= the length of a path; False where it is known."""
        key = tuple(sorted(path.counts.items()))
        if key in self.seen:
            return False
        self.seen.add(key)
        self.paths.append(path)
        weights = path_weights(path, len(self.division.arcs))
        terms = [(self.time, 1.0)]
        for s, variables in self.lengths.items():
            terms += [(v, -w) for v, w in zip(variables, weights[s].tolist(), strict=True) if w]
        self.rows.append(self.program.row(terms, low=path.constant * self.scale))
        return True

    def counts(self, values: Floats) -> Counts:
        """Counts of a solution that are not nothing."""
        return {
            (s, r, k): float(values[v])
            for s, mine in self.n.items()
            for r, variables in mine.items()
            for k, v in zip(self.offered[r], variables, strict=True)
            if values[v] > USED
        }

    def table(self, values: Floats) -> Table:
        """Seconds of every stage under a solution, in the simulator's order."""
        rows = [np.array(self._constant(s)) + values[v] @ t for s, (v, t) in self.seconds.items()]
        forward, backward, weight, finish, ahead, back = np.array(rows).T.tolist()
        return [forward, backward, weight, ahead, back, finish]


USED = 1e-6
"""From here on a count is not nothing."""

"""Stages whose units are known: how many units of each stage and region run under each option, as one program.

    minimise   T
    variables  n[s, r, k]   units of region r in stage s under option k                               whole
               w[rank]      working memory of a rank;  u[s, r, k]  whether an option is used that needs more than any plan must
               y[s, layout], c[s]   layouts in use in a stage, and whether they change inside it
               z[s, layout] the layout in which stage s is handed its input
    rows       sum over k of n[s, r, k] = units of r in s
               per rank and memory row: bytes x n + w <= cap
               T >= sum of path coefficients x seconds of the stages          (critical paths, until they say no more)

The seconds of a stage are sums over its units, so nothing is listed and nothing thinned. The relaxation is closed by cutting
planes: simulate the stages of its solution, fractions and all, and add the paths that are longer than it says; its value is a
bound for every plan (a path is one for any durations). A plan is its best solution rounded rank by rank (planner/rounding.py);
few counts are also solved in whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from .counts import in_order
from .fixedmodel import Counts, Divided, Model, Spans, Table, Taken, taken
from .hull import FIRST, MOST, Hull, whole_ranks
from .labels import Floats, unit_bytes
from .options import Option, end_to_end
from .paths import Path, makespan, rank_paths
from .program import INFINITE
from .rankprices import RankPrices
from .rounding import Rounding
from .stageproblem import Column
from .trial import Trial

ROUNDS = 14
"""Solves of the relaxation at the most."""

STILL = 3
"""It ends when its value has not risen by a quarter of the gap in so many of them."""

CUTS = 10
"""Paths added after one of them."""

SEEDS = 16
"""Paths that it begins with."""

SMALL = 1500
"""Counts up to which the program is also solved in whole numbers, with a bound of its own."""

TRIES = 2
"""Solves for whole plans."""

NODES = 60

SHARE = 0.6
"""Weight of the mean busy seconds of the ranks beside the step: of two equal solutions, the one that is quick everywhere."""

NEARLY = 0.1
"""An option is left out of the relaxation where another holds no more and takes at most this share longer.

Both are shares of the gap that is asked for.
"""


@dataclass
class _Relaxed:
    """The relaxation closed: its bound, its paths with their duals, the counts met, and the solution that simulates best."""

    low: float
    paths: list[Path]
    counts: Counts = field(default_factory=dict)
    duals: Sequence[float] = ()
    best: float = INFINITE
    table: Table = ()


class Fixed:
    """The program of one division; plans go to the trial it belongs to."""

    def __init__(self, trial: Trial, spans: Spans) -> None:
        self.trial, self.spans, self.division = trial, spans, Divided(trial, [[span] for span in spans])

    def solve(self, limit: float) -> float:
        """Look for plans below `limit`; returns a bound for all plans of the division (inf: none fits)."""
        least = self.least()
        low, path = makespan(self.trial.compiled, self.trial.placement, *least)
        if self.trial.problem.pools:
            self.trial.paths.append(path)  # other divisions are tried, and bounded together
        if self._enough(low, limit):
            return low
        hull = self._hull(limit, _seeds(self.trial, least)) if whole_ranks(self.division) else None
        low = max(low, hull.low if hull is not None else 0.0)
        if self._enough(low, limit):
            return low
        found = self._relaxed(limit, least, low, _scale(limit, low))
        if hull is not None and found.counts and not self._enough(found.low, limit):
            hull = self._hull(limit, found.paths, found.duals)
            found.low = max(found.low, hull.low)
        if not found.counts or self._enough(found.low, limit):
            return found.low
        for plan in Rounding(self.division, found.counts, found.table, _scale(limit, low)).plans():
            self.attempt(plan)
        if found.low >= min(limit, self.trial.seconds) * (1 - 2 * self.trial.gap):
            return found.low
        if sum(len(self.division.every[r]) for runs in self.division.runs for r in runs) > SMALL or self.trial.skips():
            return found.low
        return max(found.low, self._whole(found.paths, limit, _scale(limit, low)))

    @cached_property
    def ranks(self) -> RankPrices:
        """What whole ranks take at the least."""
        return RankPrices(self.division)

    def _hull(self, limit: float, paths: Sequence[Path], duals: Sequence[float] = ()) -> Hull:
        """The program over what whole ranks may hold; a first look at it where the paths have no weights."""
        hull = Hull(self.ranks, paths)
        weights = np.array(duals) if duals else np.ones(len(paths))
        hull.bound(limit * (1 - self.trial.gap), weights, MOST if duals else FIRST)
        return hull

    def _enough(self, low: float, seconds: float) -> bool:
        return low >= seconds * (1 - self.trial.gap)

    def least(self) -> Table:
        """The least seconds of every stage, each part by itself."""
        division, trial, found = self.division, self.trial, []
        for part in range(4):
            least = {r: float(times[:, part].min()) for r, times in division.times.items()}
            if part == 1 and trial.ready.splits:  # the halves run apart, and each may be at its least
                least = {r: float((t[:, 1] - t[:, 2]).min() + t[:, 2].min()) for r, t in division.times.items()}
            found.append([sum(n * least[r] for r, n in runs.items()) for runs in division.runs])
        sides = sorted({(o.entry, o.exit) for r in division.regions for o in trial.problem.options[r]})
        sends = [[division.sends(s, side) for side in sides] for s in range(len(division.arcs))]
        return [*found[:3], *([min(t[k] for t in mine) for mine in sends] for k in (0, 1)), found[3]]

    def _relaxed(self, limit: float, least: Table, low: float, scale: float) -> _Relaxed:
        share, nearly, options = SHARE * self.trial.gap, NEARLY * self.trial.gap, self.trial.problem.options
        offered = {r: cover(options[r], self.trial.p.microbatches, nearly) for r in self.division.regions}
        model = Model(self.division, offered, scale, flags=False, share=share)
        lost = (1 + share) * (1 + 2 * nearly)
        found, still = _Relaxed(low, model.paths), 0
        middle: Floats | None = None
        for path in _seeds(self.trial, least):
            model.path(path)
        while still < STILL and len(model.paths) < SEEDS + ROUNDS * CUTS:
            answer = model.program.solve(relaxed=True)
            if not answer.values:
                return _Relaxed(INFINITE, [])
            values = np.array(answer.values)
            known, new = answer.values[model.time] / scale, answer.objective / scale / lost
            still = 0 if new > found.low * (1 + self.trial.gap / 4) else still + 1
            found.low = max(found.low, new)
            found.counts |= model.counts(values)
            found.duals = [answer.duals[row] for row in model.rows] if answer.duals else ()
            if self._enough(found.low, limit):
                break
            # Half way to the best solution so far: corners of the program leap about, what lies between them does not.
            middle = values if middle is None else (middle + values) / 2
            cut = self._lengthen(model, middle, known, found)
            if not self._lengthen(model, values, known, found) and not cut:
                break
        return found

    def _lengthen(self, model: Model, values: Floats, known: float, found: _Relaxed) -> bool:
        """Add the longest paths of a simulated solution that are above `known` seconds; False where none is."""
        trial, table = self.trial, model.table(values)
        ends = sorted(rank_paths(trial.compiled, trial.placement, *table), key=lambda end: -end[0])
        if ends[0][0] < found.best:
            found.best, found.table = ends[0][0], table
        added = [model.path(path) for length, path in ends[:CUTS] if length > known * (1 + trial.gap / 8)]
        return any(added)

    def _whole(self, paths: Sequence[Path], limit: float, scale: float) -> float:
        """Whole plans, each simulated; returns the bound of the program, of what is worth finding."""
        low, trial = 0.0, self.trial
        model = Model(self.division, self.division.every, scale, flags=True)
        for path in paths:
            model.path(path)
        for _ in range(TRIES):
            most = min(limit, trial.seconds) * (1 - trial.gap / 2)
            model.program.limit(model.time, most * scale)
            answer = model.program.solve(gap=trial.gap / 2, nodes=NODES)
            if not answer.values:
                return max(low, min(most, answer.bound / scale))
            low = max(low, answer.bound / scale)
            before = len(trial.paths)
            value = self.attempt(taken(model.counts(np.array(answer.values))))
            told = value <= answer.objective / scale * (1 + trial.gap / 8)  # no path says more than the program did
            if told or value == INFINITE or low >= min(trial.seconds, limit) * (1 - trial.gap / 2):
                break
            if not [path for path in trial.paths[before:] if model.path(path)]:
                break
        return low

    def attempt(self, plan: Taken) -> float:
        """Try a plan out; inf where its layouts cannot be put in an order, or it does not fit."""
        columns = [self._column(s, plan[s]) for s in sorted(plan)]
        found = tuple(c for c in columns if c is not None)
        if len(found) < len(columns) or any(a.layouts[1] != b.layouts[0] for a, b in pairwise(found)):
            return INFINITE
        return self.trial.attempt(found)

    def _column(self, s: int, chosen: Mapping[int, list[int]]) -> Column | None:
        problem, (start, end) = self.trial.here[s], self.spans[s]
        picked = {r: [problem.options[r][k] for k in mine] for r, mine in chosen.items()}
        units = in_order(problem.line.regions[start:end], picked, problem.change)
        if not units:
            return None
        rows, place = self.trial.rows[s], self.trial.place
        held = np.sum([unit_bytes(o, rows) for o in units], axis=0)
        layouts = units[0].entry, units[-1].exit
        return Column(
            s, start, end, layouts, end_to_end(units, problem.change), tuple(held.tolist()), max(o.work for o in units),
            tuple(place[id(o)] for o in units), self.trial.sends(s, start, end, layouts),
        )  # fmt: skip


def cover(options: Sequence[Option], microbatches: int, nearly: float) -> list[int]:
    """Places of options such that every other one has one of them beside it that holds no more and is nearly as quick.

    Exchanged for it, a step grows by at most twice the share `nearly`: once for every microbatch, and once for the finish.
    """
    time = np.array([[o.forward, o.backward - o.weight, o.weight, o.finish] for o in options])
    held = np.array([[o.static, o.gradient, o.saved, o.work, o.step, o.host, o.host_saved, o.disk] for o in options])
    most = time * (1 + nearly)
    most[:, 3] = time[:, 3] + nearly * microbatches * (time[:, 0] + time[:, 1] + time[:, 2])
    kept: list[int] = []
    for k in np.lexsort((np.arange(len(options)), held.sum(axis=1))).tolist():
        same = [i for i in kept if (options[i].entry, options[i].exit) == (options[k].entry, options[k].exit)]
        if not any((held[i] <= held[k]).all() and (time[i] <= most[k]).all() for i in same):
            kept.append(k)
    return sorted(kept)


def _scale(limit: float, low: float) -> float:
    """What a program counts seconds in: so many of its units in one."""
    return 1e3 / limit if limit < INFINITE else 1e3 / max(low, 1e-12)


def _seeds(trial: Trial, table: Table) -> list[Path]:
    """Paths of the stages at their least, each to another rank's end."""
    paths = [path for _, path in rank_paths(trial.compiled, trial.placement, *table)]
    return paths[:: max(len(paths) // SEEDS, 1)]

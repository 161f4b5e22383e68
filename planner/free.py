"""The division left free where a rank holds one stage: the program of planner/fixed.py with the interval of each stage in it.

The counts are fractions here and the division is whole, which bounds all plans from below more closely the more units there
are; the divisions met are then solved by themselves. Few counts are solved for in whole numbers too, with a bound of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .fixed import CUTS, NEARLY, SHARE, SMALL, TRIES, Fixed, cover
from .fixedmodel import Divided, Model, taken
from .labels import Floats
from .paths import Path, rank_paths
from .program import INFINITE
from .trial import Trial

ROUNDS = 8
"""Solves at the most, each with the paths of the plans before."""

NODES = 60


class Free:
    """The program of all divisions into these arcs; plans go to the trial it belongs to."""

    def __init__(self, trial: Trial, arcs: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.trial, self.division = trial, Divided(trial, arcs)

    def solve(self, limit: float) -> float:
        """Look for plans below `limit` seconds; returns a bound for all plans (no more than the limit)."""
        trial, tried = self.trial, set[tuple[tuple[int, int], ...]]()
        share, nearly, scale = SHARE * trial.gap, NEARLY * trial.gap, 1e3 / limit
        offered = {r: cover(trial.problem.options[r], trial.p.microbatches, nearly) for r in self.division.regions}
        model = Model(self.division, offered, scale, flags=False, share=share, whole=False)
        for path in trial.paths:
            model.path(path)
        low, lost = 0.0, (1 + share) * (1 + 2 * nearly)
        for _ in range(ROUNDS):
            answer = model.program.solve(gap=trial.gap / 4, nodes=NODES)
            low = min(max(low, answer.bound / scale / lost), limit)
            if not answer.values or self._enough(low, limit):
                break
            values = np.array(answer.values)
            spans = tuple(model.spans(values))
            if spans not in tried and len(tried) < TRIES:
                tried.add(spans)
                Fixed(trial, spans).solve(min(limit, trial.seconds))
            if self._enough(low, limit) or not self._lengthen(model, values, answer.values[model.time] / scale):
                break
        few = sum(len(v) for s in model.n.values() for v in s.values()) <= SMALL
        if not self._enough(low, limit) and few and not trial.skips():
            low = max(low, self._whole(model.paths, limit, scale))
        return min(low, limit)

    def _enough(self, low: float, limit: float) -> bool:
        return low >= min(limit, self.trial.seconds) * (1 - self.trial.gap)

    def _lengthen(self, model: Model, values: Floats, known: float) -> bool:
        """Add the longest paths of a simulated solution, and those of the plans since; False where none is new."""
        trial = self.trial
        ends = sorted(rank_paths(trial.compiled, trial.placement, *model.table(values)), key=lambda end: -end[0])
        added = [model.path(path) for length, path in ends[:CUTS] if length > known * (1 + trial.gap / 8)]
        return any([*added, *(model.path(path) for path in trial.paths)])

    def _whole(self, paths: Sequence[Path], limit: float, scale: float) -> float:
        """Counts in whole numbers; returns the bound of the program."""
        low, trial = 0.0, self.trial
        model = Model(self.division, self.division.every, scale, flags=True)
        for path in [*paths, *trial.paths]:
            model.path(path)
        for _ in range(TRIES):
            answer = model.program.solve(gap=trial.gap / 2, nodes=10 * NODES)
            if not answer.values:
                return limit if answer.bound == INFINITE else max(low, answer.bound / scale)
            low = max(low, answer.bound / scale)
            values = np.array(answer.values)
            known = len(trial.paths)
            value = Fixed(trial, model.spans(values)).attempt(taken(model.counts(values)))
            if self._enough(low, limit) or value == INFINITE or not [p for p in trial.paths[known:] if model.path(p)]:
                break
        return low

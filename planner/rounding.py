"""Whole plans from fractions: every rank by itself keeps its stages as near to their fractional seconds as its memory lets it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from .fixedmodel import Counts, Divided, Model, Offered, Table, Taken, taken
from .program import INFINITE

NODES = 50

BUSY = 1e-2
"""Weight of a rank's busy seconds beside how far it is behind."""


class Rounding:
    """Rounds the solution whose stages take `table`, among the options in `counts` and a few that always help."""

    def __init__(self, division: Divided, counts: Counts, table: Table, scale: float) -> None:
        self.division, self.counts, self.table, self.scale = division, counts, table, scale

    def plans(self) -> Iterator[Taken]:
        """One plan for each layout that could be everywhere, the most used first; none where nothing fits so."""
        mass: dict[str, float] = {}
        for (_, r, k), n in sorted(self.counts.items()):
            mass[self.division.option(r, k).exit] = mass.get(self.division.option(r, k).exit, 0.0) + n
        for layout in sorted(mass, key=lambda name: (-mass[name], name)):
            offered = {r: self._offered(r, layout) for r in self.division.regions}
            if all(offered.values()):
                found = self._plan(offered)
                if found is not None:
                    yield found

    def _offered(self, region: int, layout: str) -> list[int]:
        """Options of one layout: those met, the quickest, and the one that holds the least."""
        options = self.division.trial.problem.options[region]
        mine = [k for k, o in enumerate(options) if (o.entry, o.exit) == (layout, layout)]
        if not mine:
            return []
        live = max(v for rows in self.division.trial.rows for v in rows.live)
        small = min(mine, key=lambda k: (options[k].static + options[k].gradient + live * options[k].saved, k))
        quick = min(mine, key=lambda k: (options[k].seconds, k))
        met = {k for _, r, k in self.counts if r == region} & set(mine)
        return sorted(met | {small, quick})

    def _plan(self, offered: Offered) -> Taken | None:
        plan: Taken = {}
        for rank in range(len(self.division.trial.local)):
            found = self._rank(rank, offered)
            if found is None:
                return None
            plan |= found
        return plan

    def _rank(self, rank: int, offered: Offered) -> Taken | None:
        """The stages of one rank: the least excess over their fractional seconds, then the least busy."""
        model = Model(self.division, offered, self.scale, flags=True, share=BUSY, rank=rank)
        m, splits = float(self.division.trial.p.microbatches), self.division.trial.ready.splits
        forward, back = np.array([m, 0, 0, 0, 0, 0]), np.array([0, m, -m if splits else 0, 0, 0, 0])
        whole: list[tuple[int, float]] = []
        total = 0.0
        for s, (variables, seconds) in model.seconds.items():
            f, b, w, _, _, finish = (column[s] for column in self.table)
            for weights, known in ((forward, m * f), (back, m * (b - w if splits else b))):
                self._row(model, zip(variables, (seconds @ weights).tolist(), strict=True), known)
            busy = seconds @ np.array([m, m, 0, 1, 0, 0])
            whole += zip(variables, busy.tolist(), strict=True)
            total += m * (f + b) + finish
        self._row(model, whole, total)
        answer = model.program.solve(gap=1e-4, nodes=NODES)
        if not answer.values or answer.objective == INFINITE:
            return None
        return taken(model.counts(np.array(answer.values)))

    def _row(self, model: Model, terms: Iterable[tuple[int, float]], known: float) -> None:
        """How far the rank is behind is at least what these terms are above `known` seconds."""
        pairs = [(v, -x * self.scale) for v, x in terms]
        model.program.row([(model.time, 1.0), *pairs], low=-known * self.scale)

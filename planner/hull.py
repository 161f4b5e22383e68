"""A closer bound of a division: every rank takes a mixture that fits it, not half of one and half of another.

Where a stage has one unit or two, the relaxation over counts (planner/fixed.py) takes fractions of options that no rank can run.
Here the program is over combinations of whole mixtures, one for each chunk of a rank, that fit its memory together:

    minimise   T
    variables  x[rank, combination]  in [0, 1], one in all per rank
    rows       T >= constant of a path + path coefficients x seconds of the combinations

(Dantzig & Wolfe, Decomposition Principle for Linear Programs, 1960). Weights of paths that add up to one give a bound: their
constants, and rank by rank the least weighted seconds of any combination. The weights are the duals of the program over the
combinations met so far, half way to the best weights so far (Wentges, Weighted Dantzig-Wolfe decomposition, 1997).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from .fixedmodel import Divided
from .labels import Exhausted, Floats
from .master import path_weights
from .paths import Path, rank_paths
from .program import INFINITE, Program
from .rankprices import Combination, RankPrices

UNITS = 6
"""Units of a rank up to which whole mixtures are worth their time: among more of them, fractions of one say little."""

MOST, FIRST = 16, 5
"""Solves of the program at the most, and those of a first look."""

CUTS = 10
"""Paths added after one of them."""


class Hull:
    """The program of one division: `low` is its bound so far. `paths` grow with what its solutions show to be critical."""

    def __init__(self, prices: RankPrices, paths: Sequence[Path]) -> None:
        self.prices, self.division, self.trial = prices, prices.division, prices.trial
        self.paths = list(paths)
        self.known = {tuple(sorted(path.counts.items())) for path in paths}
        self.weights = np.array([path_weights(path, len(self.division.arcs)) for path in paths])
        self.constants = np.array([path.constant for path in paths])
        self.taken: list[dict[object, Combination]] = [{} for _ in self.trial.local]
        self.low = 0.0
        self.best: Floats = np.zeros(0)

    def bound(self, limit: float, duals: Floats, rounds: int = MOST) -> float:
        """The bound, from paths weighted by `duals`; no more is looked for where it is above `limit` seconds."""
        with contextlib.suppress(Exhausted):  # what is known until then holds
            self._close(limit, duals, rounds)
        return self.low

    def _close(self, limit: float, duals: Floats, rounds: int) -> None:
        self._price(duals)
        for _ in range(rounds):
            if self.low >= limit:
                break
            known, shares, duals = self._solve()
            grew = self._lengthen(known, shares)
            new = self._price((_longer(duals, len(self.paths)) + _longer(self.best, len(self.paths))) / 2)
            new |= self.low < limit and self._price(duals)
            if self.low >= known * (1 - self.trial.gap / 4) or not (grew or new):
                break

    def _price(self, duals: Floats) -> bool:
        """The bound of some weights of paths, and the combinations that make it; False where all of them are in the program."""
        duals = np.maximum(duals, 0.0)
        duals = duals / duals.sum()
        weights = np.einsum("p,psk->sk", duals, self.weights[: len(duals)])
        low, new = float(duals @ self.constants[: len(duals)]), False
        for stages, taken in zip(self.trial.local, self.taken, strict=True):
            mine = weights[list(stages)]
            known = min((float((c.seconds * mine).sum()) for c in taken.values()), default=INFINITE)
            found = self.prices.least(stages, mine, known)
            if found is None:  # nothing fits
                self.low = INFINITE
                return False
            value, combination = found
            low, new = low + value, new or combination.picks not in taken
            taken[combination.picks] = combination
        if low > self.low or not len(self.best):
            self.low, self.best = max(low, self.low), duals
        return new

    def _solve(self) -> tuple[float, list[list[float]], Floats]:
        """The program over the combinations in it: its seconds, shares by rank and combination, and the weights of the paths."""
        program, scale = self._program()
        answer = program.solve(relaxed=True)
        return answer.values[0] / scale, self._shares(answer.values), np.array(answer.duals[: len(self.paths)])

    def _program(self) -> tuple[Program, float]:
        program, scale = Program(), 1e3 / max(self.low, 1e-12)
        time = program.add(1.0, upper=INFINITE)
        made = [[program.add() for _ in taken] for taken in self.taken]
        lengths = np.hstack([
            np.einsum("psk,csk->pc", self.weights[:, list(stages)], np.array([c.seconds for c in taken.values()]))
            for stages, taken in zip(self.trial.local, self.taken, strict=True)
        ])  # fmt: skip
        variables = [v for mine in made for v in mine]
        for constant, row in zip(self.constants.tolist(), (-lengths * scale).tolist(), strict=True):
            program.row([(time, 1.0), *zip(variables, row, strict=True)], low=constant * scale)
        for mine in made:
            program.row([(v, 1.0) for v in mine], 1.0, 1.0)
        return program, scale

    def _shares(self, values: Sequence[float]) -> list[list[float]]:
        found, at = [], 1
        for taken in self.taken:
            found.append(list(values[at : at + len(taken)]))
            at += len(taken)
        return found

    def _lengthen(self, known: float, shares: Sequence[Sequence[float]]) -> bool:
        """Add the longest paths of the simulated solution that are above `known` seconds; False where none is."""
        table = np.zeros((len(self.division.arcs), 6))
        for stages, taken, mine in zip(self.trial.local, self.taken, shares, strict=True):
            table[list(stages)] = sum(share * c.seconds for share, c in zip(mine, taken.values(), strict=True))
        forward, backward, weight, finish, ahead, back = table.T.tolist()
        ends = rank_paths(
            self.trial.compiled, self.trial.placement, forward, backward, weight, ahead, back, finish
        )  # fmt: skip
        found = []
        for length, path in sorted(ends, key=lambda end: -end[0])[:CUTS]:
            key = tuple(sorted(path.counts.items()))
            if length > known * (1 + self.trial.gap / 8) and key not in self.known:
                self.known.add(key)
                found.append(path)
        if found:
            self.paths += found
            self.weights = np.vstack([self.weights, [path_weights(p, len(self.division.arcs)) for p in found]])
            self.constants = np.append(self.constants, [p.constant for p in found])
        return bool(found)


def _longer(duals: Floats, count: int) -> Floats:
    """Weights of paths with none on those that came since."""
    return np.concatenate([duals, np.zeros(count - len(duals))])


def whole_ranks(division: Divided) -> bool:
    """Whether the program is worth its time for a division into given intervals (of equal devices)."""
    trial, units = division.trial, [end - start for ((start, end),) in division.arcs]
    return not trial.problem.pools and max(sum(units[s] for s in stages) for stages in trial.local) <= UNITS

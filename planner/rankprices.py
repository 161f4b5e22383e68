"""The best a rank can do where its seconds are weighted: one mixture for each of its stages, all of them in its memory together.

Options are thinned before mixtures are made: memory is paid for on the row and at the price that say most (Lagrange), and what is
then further above the bound than a combination that is known to fit cannot be in the best one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .fixedmodel import Divided
from .labels import Bag, Bags, Exhausted, Floats, Layouts, MemoryRows, together, unit_bytes
from .program import INFINITE

Index = npt.NDArray[np.intp]

PAIRS = 1e8
"""Pairs of mixtures of one stage, or of combinations of a rank, that are compared at the most."""

PRICES = 1.4 ** np.arange(-20, 12)
"""Prices of a rank's room that are tried, in units of the seconds that its options differ by."""

CLOSE = 1e-9


@dataclass(frozen=True)
class Combination:
    """What a rank takes, by stage: seconds (forward, backward, weight, finish, handing on each way), and options by unit."""

    seconds: Floats
    picks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Part:
    """Choices of a unit, a stage or several: weighted seconds, bytes, working memory; the place of each in what it is made of."""

    value: Floats
    bytes: Floats
    work: Floats
    index: tuple[Index, ...] = ()

    def only(self, kept: Index) -> _Part:
        """Some of the choices."""
        return _Part(self.value[kept], self.bytes[kept], self.work[kept], tuple(i[kept] for i in self.index))


class RankPrices:
    """The ranks of a division."""

    def __init__(self, division: Divided) -> None:
        self.division, self.trial = division, division.trial
        self.options = self.trial.problem.options
        self.layouts = sorted({side for group in self.options for o in group for side in (o.entry, o.exit)})
        self._units: dict[tuple[int, MemoryRows], tuple[Floats, Floats, Floats]] = {}
        self._sent: dict[tuple[int, Layouts], tuple[float, float]] = {}
        self._of: dict[tuple[int, str], Index] = {}

    def least(self, stages: Sequence[int], weights: Floats, known: float) -> tuple[float, Combination] | None:
        """The combination of least seconds under `weights` (stages of the rank x parts) and its seconds; None where none fits.

        `known`: the seconds of one that fits. Raises Exhausted where too many would have to be compared.
        """
        rows, pairs = self.trial.rows[stages[0]], list(zip(stages, weights, strict=True))
        units = {(s, r): self._unit(s, r, w) for s, w in pairs for r in self._runs(s)}
        if not all(len(part.value) for part in units.values()):
            return None
        counts = [self._runs(s)[r] for s, r in units]
        known = min([known, *(self._guess(layout, pairs, units, counts, rows) for layout in self.layouts)])
        single = [(unit, part) for (unit, part), n in zip(units.items(), counts, strict=True) for _ in range(n)]
        paid, _ = _paid([part for _, part in single], rows)
        sides = [(entry, leave) for entry in self.layouts for leave in self.layouts]
        low = paid.low + sum(min(self._handing(s, layouts, w) for layouts in sides) for s, w in pairs)
        kept = {
            unit: np.flatnonzero(low + more <= _above(known)) for (unit, _), more in zip(single, paid.over, strict=True)
        }
        made = [self._mixtures(s, w, {r: kept[s, r] for r in self._runs(s)}) for s, w in pairs]
        parts = [part for part, _ in made]
        whole = parts[0]
        for k, part in enumerate(parts[1:], start=2):
            rest = sum(float(paid.of(p).min(initial=INFINITE)) for p in parts[k:])
            whole = _joined(whole, part, rows, paid, _above(known) - rest)
        whole = whole.only(_fitting(whole.bytes, whole.work, rows))
        if not len(whole.value):
            return None
        best = int(whole.value.argmin())
        found = [_single(bags, int(index[best])) for (_, bags), index in zip(made, whole.index, strict=True)]
        seconds = np.array([
            [*bag.time[place].tolist(), *self._sends(s, layouts)]
            for s, (bag, place, layouts) in zip(stages, found, strict=True)
        ])  # fmt: skip
        picks = tuple(tuple(bag.picks[place].tolist()) for bag, place, _ in found)
        return float(whole.value[best]), Combination(seconds, picks)

    def _runs(self, stage: int) -> dict[int, int]:
        return self.division.units(stage, *self.division.arcs[stage][0])

    def _sends(self, stage: int, layouts: Layouts) -> tuple[float, float]:
        if (stage, layouts) not in self._sent:
            self._sent[stage, layouts] = self.trial.sends(stage, *self.division.arcs[stage][0], layouts)
        return self._sent[stage, layouts]

    def _handing(self, stage: int, layouts: Layouts, weights: Floats) -> float:
        """Weighted seconds of handing on what leaves a stage, and the gradient of what came, in the layouts of its ends."""
        ahead, back = self._sends(stage, layouts)
        return float(weights[4]) * ahead + float(weights[5]) * back

    def _unit(self, stage: int, region: int, weights: Floats) -> _Part:
        """The options of a unit in a stage."""
        key = region, self.trial.rows[stage]
        if key not in self._units:
            options = self.options[region]
            time = np.array([[o.forward, o.backward, o.weight, o.finish] for o in options]).reshape(-1, 4)
            held = np.array([unit_bytes(o, key[1]) for o in options]).reshape(-1, len(key[1].caps))
            self._units[key] = time, held, np.array([o.work for o in options])
        time, held, work = self._units[key]
        return _Part(time @ weights[:4], held, work)

    def _guess(
        self, layout: str, pairs: Sequence[tuple[int, Floats]], units: Mapping[tuple[int, int], _Part],
        counts: Sequence[int], rows: MemoryRows,
    ) -> float:  # fmt: skip
        """Weighted seconds of a combination that fits and has one layout everywhere; inf where none is met."""
        parts = [part.only(self._places(r, layout)) for (_, r), part in units.items()]
        if not all(len(part.value) for part in parts):
            return INFINITE
        single = [part for part, n in zip(parts, counts, strict=True) for _ in range(n)]
        places = _paid(single, rows)[1]
        if places is None:
            return INFINITE
        return _exchanged(single, places, rows) + sum(self._handing(s, (layout, layout), w) for s, w in pairs)

    def _places(self, region: int, layout: str) -> Index:
        if (region, layout) not in self._of:
            mine = [k for k, o in enumerate(self.options[region]) if (o.entry, o.exit) == (layout, layout)]
            self._of[region, layout] = np.array(mine, dtype=np.intp)
        return self._of[region, layout]

    def _mixtures(
        self, stage: int, weights: Floats, kept: Mapping[int, Index]
    ) -> tuple[_Part, Sequence[tuple[Layouts, Bag]]]:  # fmt: skip
        """Mixtures of the options kept in each region of a stage that may be the best, and their bags."""
        rows, problem = self.trial.rows[stage], self.trial.problem
        # Other stages of the rank decide which bytes matter.
        scarce = replace(rows, beside=(INFINITE,) * len(rows.caps))
        offered = [[group[k] for k in kept[r].tolist()] if r in kept else [] for r, group in enumerate(self.options)]
        bags = Bags(offered, problem.change, [weights[:4].tolist()], pairs=PAIRS)
        found = bags.interval(problem.line.runs(*self.division.arcs[stage][0]), scarce)
        place = np.array([self.trial.place[id(option)] for option in bags.flat], dtype=np.int16)
        named = [(sides, replace(bag, picks=place[bag.picks])) for sides, bag in found.items() if len(bag)]
        if not named:
            nothing = np.zeros(0)
            return _Part(nothing, np.zeros((0, len(rows.caps))), nothing, (np.zeros(0, dtype=np.intp),)), []
        bag = together([bag for _, bag in named])
        handing = np.concatenate([np.full(len(one), self._handing(stage, sides, weights)) for sides, one in named])
        return _Part(bag.time @ weights[:4] + handing, bag.bytes, bag.work, (np.arange(len(bag)),)), named


@dataclass(frozen=True)
class _Paid:
    """The price of a byte on a row at which a bound of choosing one of each part is greatest, and how much each choice adds to it.

    `room` is what the row has for all of them, at the least working memory.
    """

    low: float
    over: Sequence[Floats] = ()
    row: int = 0
    price: float = 0.0
    room: float = 0.0

    def of(self, part: _Part) -> Floats:
        """Weighted seconds and what bytes cost."""
        found: Floats = part.value + self.price * part.bytes[:, self.row]
        return found


def _paid(parts: Sequence[_Part], rows: MemoryRows) -> tuple[_Paid, tuple[int, ...] | None]:
    """The greatest bound of choosing one of each part, and the quickest choices met that fit (None: there are none)."""
    caps, least = np.array(rows.caps), max(float(part.work.min()) for part in parts)
    dearest = sum(float(np.ptp(part.value)) for part in parts)
    paid, known, best = _Paid(-INFINITE), INFINITE, None
    for row in [i for i in range(rows.activations) if caps[i] < INFINITE] or [0]:
        room = max(float(caps[row]) - least, 0.0) if caps[row] < INFINITE else 0.0
        prices = np.concatenate([[0.0], dearest / max(room, 1.0) * PRICES]) if caps[row] < INFINITE else np.zeros(1)
        costs = [part.value[:, None] + part.bytes[:, [row]] * prices for part in parts]
        lows = sum(c.min(axis=0) for c in costs) - prices * room
        choices = [c.argmin(axis=0) for c in costs]
        held = sum(part.bytes[k] for part, k in zip(parts, choices, strict=True))
        work = np.max([part.work[k] for part, k in zip(parts, choices, strict=True)], axis=0)
        seconds = sum(part.value[k] for part, k in zip(parts, choices, strict=True))
        for k in _fitting(held, work, rows).tolist():
            if seconds[k] < known:
                known, best = float(seconds[k]), tuple(int(c[k]) for c in choices)
        k = int(lows.argmax())
        if lows[k] > paid.low:
            over = [c[:, k] - c[:, k].min() for c in costs]
            paid = _Paid(float(lows[k]), over, row, float(prices[k]), room)
    return paid, best


def _exchanged(parts: Sequence[_Part], places: Sequence[int], rows: MemoryRows) -> float:
    """Seconds of choices that fit once each has been exchanged for the quickest that fits beside the others, while that helps."""
    chosen, seconds = list(places), INFINITE
    while (now := sum(float(p.value[i]) for p, i in zip(parts, chosen, strict=True))) < seconds:
        seconds = now
        for u, part in enumerate(parts):
            others = [(p, i) for v, (p, i) in enumerate(zip(parts, chosen, strict=True)) if v != u]
            held = part.bytes + sum(p.bytes[i] for p, i in others)
            work = np.maximum(part.work, max((float(p.work[i]) for p, i in others), default=0.0))
            fits = _fitting(held, work, rows)
            chosen[u] = int(fits[part.value[fits].argmin()])
    return seconds


def _joined(one: _Part, two: _Part, rows: MemoryRows, paid: _Paid, most: float) -> _Part:
    """Combinations of both that fit a rank and cost no more than `most` seconds and the room."""
    if len(one.value) * len(two.value) > PAIRS:
        raise Exhausted
    left, right = np.nonzero(
        paid.of(one)[:, None] + paid.of(two)[None, :] <= most + paid.price * paid.room * (1 + CLOSE)
    )
    held, work = one.bytes[left] + two.bytes[right], np.maximum(one.work[left], two.work[right])
    kept = _fitting(held, work, rows)
    left, right, held, work = left[kept], right[kept], held[kept], work[kept]
    index = (*(i[left] for i in one.index), *(i[right] for i in two.index))
    return _Part(one.value[left] + two.value[right], held, work, index)


def _fitting(held: Floats, work: Floats, rows: MemoryRows) -> Index:
    """Which of some choices a rank has room for."""
    total = held.copy()
    total[:, : rows.activations] += work[:, None]
    return np.flatnonzero((total <= np.array(rows.caps) * (1 + CLOSE)).all(axis=1))


def _above(seconds: float) -> float:
    """A little more, for what rounding makes of a sum."""
    return seconds + CLOSE * abs(seconds) if seconds < INFINITE else seconds


def _single(bags: Sequence[tuple[Layouts, Bag]], place: int) -> tuple[Bag, int, Layouts]:
    """One mixture of several bags, counted through: its bag, its place there, and its layouts."""
    for layouts, bag in bags:
        if place < len(bag):
            return bag, place, layouts
        place -= len(bag)
    raise IndexError(place)

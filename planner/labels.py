"""What a stage can be: every mixture of options over an interval of units, as the non-dominated vectors of what it costs.

A *bag* holds mixtures of one interval: seconds (forward, backward, weight gradients, step end), bytes against every memory row of
the stage (each linear in the options), the largest working memory, and which option each unit takes. Bags of two intervals join
by sums (and a maximum for working memory), so runs of equal units are built by doubling. A mixture goes when another one is no
worse in every one of these; so the bag holds an optimum for any objective that grows with them (planners.md 12, L1, made complete).
Where a bag would outgrow `MOST`, seconds are compared on a grid; what that may lose is bounded and reported as `slack`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .options import Option
from .pareto import best_rows
from .program import INFINITE

Floats = npt.NDArray[np.float64]
Picks = npt.NDArray[np.int16]
Layouts = tuple[str, str]

MOST = 400
"""Vectors of one bag compared exactly; more are thinned on a grid of seconds."""

FEW = 200
"""The same where a gap of more than a few thousandths is asked for."""

GRID = 0.02
"""A cell of the grid of seconds where a bag is thinned, as a share of step x gap; doubled until the bag is small enough."""

BYTES = 1e-4
"""The same for bags that compare bytes alone, as a share of what each row may hold."""

COARSE = 5e-4
"""Grid of seconds where only one objective is looked at, for a first plan."""

PRICES: Floats = 1.4 ** np.arange(-20.0, 24.0)
"""Prices of a byte that are tried, as multiples of the seconds of a unit for the whole of the memory."""

TIMES = 4
"""Columns of seconds: forward, backward, weight, finish."""


@dataclass(frozen=True)
class Bag:
    """`time` (n x 4) seconds, `bytes` (n x rows), `work` (n) bytes, `picks` (n x units) options.

    `slack` is what thinning may lose: so many cells of the grid in every compared column.
    """

    time: Floats
    bytes: Floats
    work: Floats
    picks: Picks
    slack: float = 0.0

    def __len__(self) -> int:
        return len(self.work)


@dataclass(frozen=True, slots=True)
class MemoryRows:
    """The memory rows of one stage. `live` are the microbatches alive in it, one figure per row of its rank.

    `once`: the only backward pass of the step runs alone, so gradients are not there yet where activations are all alive.
    `cap_bytes` bounds each row with the working memory, and the step's row; `host_bytes` what its rank may keep in the host.
    `beside` is the most that other stages of its rank may hold on every row, working memory included: what the stage alone
    cannot use up may still be scarce.
    """

    live: tuple[int, ...]
    cap_bytes: float
    host_bytes: float = float("inf")
    disk_bytes: float = float("inf")
    once: bool = False
    beside: tuple[float, ...] = ()

    @property
    def caps(self) -> tuple[float, ...]:
        """What bounds each row: those of activations, the step's, the host's, the disk's."""
        return (*(self.cap_bytes,) * (self.activations + 1), self.host_bytes, self.disk_bytes)

    @property
    def activations(self) -> int:
        """How many of the rows hold activations (and take working memory on top)."""
        return len(self.live)


@dataclass(frozen=True)
class Limit:
    """No mixture above `seconds` of `weights` (per second of each column) is of use: a better plan is known."""

    weights: tuple[float, float, float, float]
    seconds: float


PAIRS = 1e8
"""Pairs of mixtures that one stage solve may compare: some seconds."""


class Exhausted(Exception):
    """Mixtures are too many to be listed."""


class Bags:
    """Bags of the intervals of one chain under one shape, remembered.

    `options` by region; `change` is what a change of layout costs (forward, backward seconds). `columns` are the weights of
    what is compared between mixtures: seconds the step never falls with for all mixtures that may be optimal, one row for
    one objective, none for mixtures that fit if any does (to within the grid of `BYTES` where they are more than `most`).
    `coarse` bags serve a first plan, not a bound, and may be empty though something fits. `cells` is the grid of the columns
    (seconds) where a bag of more than `most` mixtures is thinned; None: none is. Exhausted is raised where more than `pairs`
    mixtures would be compared.
    """

    def __init__(
        self, options: Sequence[Sequence[Option]], change: Mapping[Layouts, tuple[float, float]],
        columns: Sequence[Sequence[float]], *, coarse: bool = False, cells: Sequence[float] | None = None, most: int = MOST,
        pairs: float = INFINITE,
    ) -> None:  # fmt: skip
        self.options, self.change, self.coarse, self.most, self.pairs = options, change, coarse, most, pairs
        self.cells = None if cells is None else np.array(cells, dtype=np.float64)
        self.columns = np.array(columns, dtype=np.float64).reshape(-1, TIMES)
        self.flat: list[Option] = [o for group in options for o in group]
        starts = np.cumsum([0, *(len(g) for g in options)])
        self._start = [int(s) for s in starts[:-1]]
        self._tables: dict[tuple[int, MemoryRows], dict[Layouts, Bag]] = {}
        self._known: dict[Any, dict[Layouts, Bag]] = {}
        self._lines: dict[Any, tuple[Floats, Floats]] = {}
        self._work: dict[int, float] = {}

    def interval(self, runs: Runs, rows: MemoryRows, limit: Limit | None = None) -> dict[Layouts, Bag]:
        """Bags by (entry, exit) layout of runs of (region, count) units one after the other."""
        key = (runs, rows, limit)
        if key not in self._known:
            self._known[key] = _Build(self, runs, rows, limit).bags()
        return self._known[key]

    def floor(
        self, parts: Sequence[tuple[Runs, MemoryRows]], weights: tuple[float, float, float, float], ranks: int = 1
    ) -> float:  # fmt: skip
        """Seconds under `weights` that no mixture of intervals that share a memory (of `ranks` ranks) is below.

        Every unit by itself, memory at its best price: that of a byte in the Lagrangian dual of one row, from a geometric list.
        """
        room = parts[0][1].cap_bytes - min(self._slightest(r) for runs, _ in parts for r, _ in runs)
        if not np.isfinite(room):
            return self._floor(parts, weights, 0, 0.0, 0.0)
        return max(self._floor(parts, weights, row, room, float(ranks)) for row in range(parts[0][1].activations))

    def _floor(
        self, parts: Sequence[tuple[Runs, MemoryRows]], weights: tuple[float, float, float, float], row: int, room: float,
        ranks: float,
    ) -> float:  # fmt: skip
        total, scale = np.zeros(len(PRICES) + 1), 0.0
        for runs, rows in parts:
            for region, count in runs:
                seconds, held = self._line(region, rows, weights, row)
                scale = scale or float(seconds.max()) / max(room, 1.0)
                prices = np.concatenate([[0.0], PRICES * scale])
                total += count * (seconds[None, :] + prices[:, None] * held[None, :]).min(axis=1)
        return (
            float((total - np.concatenate([[0.0], PRICES * scale]) * room * ranks).max()) if room else float(total[0])
        )

    def _slightest(self, region: int) -> float:
        """The least working memory of any option of a region."""
        if region not in self._work:
            self._work[region] = min(o.work for o in self.options[region])
        return self._work[region]

    def _line(
        self, region: int, rows: MemoryRows, weights: tuple[float, float, float, float], row: int
    ) -> tuple[Floats, Floats]:
        key = (region, rows, weights, row)
        if key not in self._lines:
            bags = list(self.single(region, rows).values())
            seconds = np.concatenate([b.time @ np.array(weights) for b in bags])
            self._lines[key] = seconds, np.concatenate([b.bytes[:, row] for b in bags])
        return self._lines[key]

    def single(self, region: int, rows: MemoryRows) -> dict[Layouts, Bag]:
        """One unit: its options by layout."""
        key = (region, rows)
        if key not in self._tables:
            found: dict[Layouts, list[int]] = {}
            for index, option in enumerate(self.options[region]):
                found.setdefault((option.entry, option.exit), []).append(index)
            made = {}
            for layouts, members in found.items():
                picked = [self.options[region][i] for i in members]
                made[layouts] = Bag(
                    np.array([[o.forward, o.backward, o.weight, o.finish] for o in picked]),
                    np.array([unit_bytes(o, rows) for o in picked]),
                    np.array([o.work for o in picked]),
                    np.array([[self._start[region] + i] for i in members], dtype=np.int16),
                )
            self._tables[key] = made
        return self._tables[key]


Runs = tuple[tuple[int, int], ...]
"""(region, count) of the units of an interval, in order."""


class _Build:
    """The bags of one interval, pruned by what is left of its memory and of its limit."""

    def __init__(self, owner: Bags, runs: Runs, rows: MemoryRows, limit: Limit | None) -> None:
        self.owner, self.runs, self.rows, self.limit = owner, runs, rows, limit
        self.units = {r: owner.single(r, rows) for r, _ in runs}
        all_bytes = [count * np.vstack([b.bytes for b in self.units[r].values()]) for r, count in runs if self.units[r]]
        self.caps = np.array(rows.caps)
        self.floor = {r: np.vstack([b.bytes for b in self.units[r].values()]).min(axis=0) for r, _ in runs}
        most = sum(b.max(axis=0) for b in all_bytes) + np.array(rows.beside or [0.0] * len(self.caps))
        work = max((float(b.work.max()) for r, _ in runs for b in self.units[r].values()), default=0.0)
        extra = np.array([work] * rows.activations + [0.0, 0.0, 0.0])
        self.binding = _outermost(np.flatnonzero(most + extra > self.caps), rows)
        self.price = self._price() if limit is not None else 0.0
        self.reduced = {r: self._least(r, self.price) for r, _ in runs} if limit is not None else {}

    def _values(self, bag: Bag, price: float) -> Floats:
        assert self.limit is not None
        found: Floats = bag.time @ np.array(self.limit.weights) + price * bag.bytes[:, 0]
        return found

    def _least(self, region: int, price: float) -> float:
        return min(float(self._values(b, price).min()) for b in self.units[region].values())

    def _price(self) -> float:
        """Seconds of a byte on the first memory row that give the best lower bound on the interval's seconds."""
        assert self.limit is not None
        room = self.caps[0] - min(float(b.work.min()) for r, _ in self.runs for b in self.units[r].values())
        self.room = room if room < float("inf") else 0.0
        if not self.room:
            return 0.0
        scale = max(self.limit.seconds, 1e-12) / max(room, 1.0)
        best, found = -float("inf"), 0.0
        for price in (0.0, *(scale * 1.25**k for k in range(-32, 33))):
            bound = sum(n * self._least(r, price) for r, n in self.runs) - price * room
            if bound > best:
                best, found = bound, price
        return found

    def bags(self) -> dict[Layouts, Bag]:
        total: dict[int, int] = {}
        for region, count in self.runs:
            total[region] = total.get(region, 0) + count
        bag: dict[Layouts, Bag] | None = None
        rest = dict(total)
        for region, count in self.runs:
            powers: dict[int, dict[Layouts, Bag]] = {}
            left = count
            size = 1
            while left:
                powers[size] = (
                    self._pruned(self.units[region], {**total, region: total[region] - 1})
                    if size == 1
                    else self._join(powers[size // 2], powers[size // 2], {**total, region: total[region] - size})
                )
                if left & 1:
                    rest[region] -= size
                    bag = powers[size] if bag is None else self._join(bag, powers[size], rest)
                left >>= 1
                size *= 2
        assert bag is not None
        return bag

    def _pruned(self, bags: dict[Layouts, Bag], rest: Mapping[int, int]) -> dict[Layouts, Bag]:
        return {layouts: found for layouts, bag in bags.items() if len(found := self._thin(bag, rest))}

    def _join(self, left: dict[Layouts, Bag], right: dict[Layouts, Bag], rest: Mapping[int, int]) -> dict[Layouts, Bag]:
        found: dict[Layouts, list[Bag]] = {}
        for (a, b), one in left.items():
            for (c, d), two in right.items():
                extra = (0.0, 0.0) if b == c else self.owner.change.get((b, c))
                if extra is not None:
                    pairs = self._pairs(one, two, extra, rest)
                    found.setdefault((a, d), []).append(_product(one, two, extra, pairs))
        return self._pruned({layouts: together(bags) for layouts, bags in found.items()}, rest)

    def _pairs(
        self, one: Bag, two: Bag, extra: tuple[float, float], rest: Mapping[int, int]
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Pairs of mixtures that the limit leaves, before anything of them is written out."""
        if self.limit is None:
            left, right = np.divmod(np.arange(len(one) * len(two)), len(two))
            return left, right
        base = sum(k * self.reduced[r] for r, k in rest.items()) - self.price * self.room
        base += extra[0] * self.limit.weights[0] + extra[1] * self.limit.weights[1]
        room = self.limit.seconds * (1 + 1e-9) - base
        found = np.nonzero(self._values(one, self.price)[:, None] + self._values(two, self.price)[None, :] <= room)
        return found[0], found[1]

    def _thin(self, bag: Bag, rest: Mapping[int, int]) -> Bag:
        n = self.rows.activations
        least = sum((k * self.floor[r] for r, k in rest.items()), start=np.zeros(len(self.caps)))
        total = bag.bytes + least
        total[:, :n] += bag.work[:, None]
        fits = (total <= self.caps).all(axis=1)
        if self.limit is not None:
            value = self._values(bag, self.price) + sum(k * self.reduced[r] for r, k in rest.items())
            fits &= value - self.price * self.room <= self.limit.seconds * (1 + 1e-9)
        bag = _take(bag, np.flatnonzero(fits))
        compared = bag.time @ self.owner.columns.T
        if self.owner.coarse:
            return _take(bag, _cheapest(compared[:, 0], bag.bytes[:, 0] + bag.work))
        held = bag.bytes[:, self.binding]
        if len(self.binding) and self.binding[0] < n:
            held = np.hstack([held, bag.work[:, None]])
        if self.owner.columns.size:
            return self._sparse(bag, compared, self.owner.cells, held)
        caps = self.caps[[*self.binding, 0][: held.shape[1]]]
        return self._sparse(bag, held, BYTES * np.maximum(caps, 1.0), compared)

    def _sparse(self, bag: Bag, loose: Floats, cells: Floats | None, exact: Floats) -> Bag:
        """The undominated mixtures; while they are too many, the `loose` columns are compared on a coarser and coarser grid.

        It ends where the grid says no more: the rest differ in `exact`.
        """
        times = 0
        self.owner.pairs -= len(bag) ** 2
        if self.owner.pairs < 0:
            raise Exhausted
        while True:
            grid = np.floor(np.maximum(loose, 0.0) / (times * cells)) if times and cells is not None else loose
            index = best_rows(np.hstack([grid, exact]))
            bag, loose, exact = _take(bag, index), loose[index], exact[index]
            if len(index) <= self.owner.most or cells is None or (times and not grid.any()):
                return Bag(bag.time, bag.bytes, bag.work, bag.picks, bag.slack + times)
            times = 2 * times or 1


def _outermost(binding: npt.NDArray[np.intp], rows: MemoryRows) -> npt.NDArray[np.intp]:
    """Rows that bind, but for those of activations between two others: who holds less on both holds less on them."""
    live = [rows.live[i] for i in binding.tolist() if i < rows.activations]
    ends = {rows.live.index(min(live)), rows.live.index(max(live))} if live else set()
    return np.array([i for i in binding.tolist() if i >= rows.activations or i in ends], dtype=np.intp)


def unit_bytes(option: Option, rows: MemoryRows) -> list[float]:
    """What a unit holds on every row of a stage, working memory apart."""
    held = option.static + (0.0 if rows.once else option.gradient)
    live = [held + k * option.saved for k in rows.live]
    most = max(rows.live, default=0)
    return [
        *live, option.static + option.gradient + option.step, option.host + most * option.host_saved, option.disk
    ]  # fmt: skip


def _product(
    one: Bag, two: Bag, extra: tuple[float, float], pairs: tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]
) -> Bag:
    left, right = pairs
    time = one.time[left] + two.time[right]
    time[:, 0] += extra[0]
    time[:, 1] += extra[1]
    return Bag(
        time, one.bytes[left] + two.bytes[right], np.maximum(one.work[left], two.work[right]),
        np.hstack([one.picks[left], two.picks[right]]), one.slack + two.slack,
    )  # fmt: skip


def together(bags: Sequence[Bag]) -> Bag:
    """Mixtures of several bags."""
    if len(bags) == 1:
        return bags[0]
    return Bag(
        np.vstack([b.time for b in bags]), np.vstack([b.bytes for b in bags]), np.concatenate([b.work for b in bags]),
        np.vstack([b.picks for b in bags]), max(b.slack for b in bags),
    )  # fmt: skip


def _take(bag: Bag, index: npt.NDArray[np.intp]) -> Bag:
    return Bag(bag.time[index], bag.bytes[index], bag.work[index], bag.picks[index], bag.slack)


def _cheapest(seconds: Floats, held: Floats) -> npt.NDArray[np.intp]:
    """Per cell of a grid of seconds, the mixture that holds the least: enough for a good plan, not for a bound."""
    if len(seconds) < 2:
        return np.arange(len(seconds))
    cells = np.floor(seconds / max(COARSE * float(seconds.max()), 1e-15))
    order = np.lexsort((held, cells))
    first = np.ones(len(order), dtype=bool)
    first[1:] = cells[order][1:] != cells[order][:-1]
    picked = order[first]
    lowest = np.minimum.accumulate(np.concatenate([[np.inf], held[picked][:-1]]))
    return np.sort(picked[held[picked] < lowest])

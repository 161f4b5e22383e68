"""One stage: how many units of each region run under each option, as an integer program over counts (planners.md 12, L1).

    minimise   sum of busy seconds x count (+ the least price of a change per further layout in use)
    variables  n[r, k]   units of region r under option k                                whole
               u[r, k]   whether any is, for options whose working memory is not that of every plan
               z[layout] whether a layout is in use
    rows       sum over k of n[r, k] = units of r,   bytes x n + working memory <= cap on every memory row

With one stage the step is exactly microbatches x (forward + backward) + finish, so nothing else is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from .labels import Layouts, MemoryRows, unit_bytes
from .options import Option
from .program import INFINITE, Program


@dataclass(frozen=True, slots=True)
class Counted:
    """The best mixture: an option for every unit in order, and the proven bound.

    No units and an infinite bound: nothing fits. No units and a finite one: these counts cannot be put in an order.
    """

    units: tuple[Option, ...]
    bound: float


def best_counts(
    regions: Sequence[int], options: Sequence[Sequence[Option]], rows: MemoryRows, microbatches: int,
    change: Mapping[Layouts, tuple[float, float]], *, gap: float = 1e-4,
) -> Counted:  # fmt: skip
    """The best options for a chain of units, given by the region of each."""
    found = _Counts(regions, options, rows, microbatches, change)
    answer = found.program.solve(gap=gap)
    if not answer.values:
        return Counted((), INFINITE)
    units = in_order(regions, found.taken(answer.values), change)
    return Counted(units, answer.bound / found.scale)


class _Counts:
    def __init__(
        self, regions: Sequence[int], options: Sequence[Sequence[Option]], rows: MemoryRows, m: int,
        change: Mapping[Layouts, tuple[float, float]],
    ) -> None:  # fmt: skip
        self.program, self.m = Program(), m
        self.units: dict[int, int] = {}
        for region in regions:
            self.units[region] = self.units.get(region, 0) + 1
        least = sum(n * min(self._busy(o) for o in options[r]) for r, n in self.units.items())
        self.scale = 1e4 / max(least, 1e-15)
        self.n: dict[int, list[tuple[int, Option]]] = {}
        for region, count in self.units.items():
            self.n[region] = [
                (self.program.add(self._busy(o) * self.scale, upper=float(count), whole=True), o)
                for o in options[region]
            ]
            self.program.row([(v, 1.0) for v, _ in self.n[region]], float(count), float(count))
        self._memory(options, rows)
        self._layouts(change)

    def _busy(self, option: Option) -> float:
        return self.m * (option.forward + option.backward) + option.finish

    def _memory(self, options: Sequence[Sequence[Option]], rows: MemoryRows) -> None:
        # The working memory that every plan has: each region has some option, and the largest of the smallest counts.
        always = max(min(o.work for o in options[r]) for r in self.units)
        work = self.program.add(lower=0.0, upper=INFINITE)
        caps = (*([rows.cap_bytes] * (rows.activations + 1)), rows.host_bytes, rows.disk_bytes)
        unit = max(rows.cap_bytes, 1.0) if rows.cap_bytes < INFINITE else 1.0
        for region, found in self.n.items():
            for variable, option in found:
                if option.work > always:
                    used = self.program.add(whole=True)
                    self.program.row([(used, float(self.units[region])), (variable, -1.0)], low=0.0)
                    self.program.row([(work, 1.0), (used, -(option.work - always) / unit)], low=0.0)
        for i, cap in enumerate(caps):
            if cap == INFINITE:
                continue
            terms = [(v, unit_bytes(o, rows)[i] / unit) for found in self.n.values() for v, o in found]
            extra = [(work, 1.0)] if i < rows.activations else []
            self.program.row([*terms, *extra], high=(cap - (always if extra else 0.0)) / unit)

    def _layouts(self, change: Mapping[Layouts, tuple[float, float]]) -> None:
        layouts = sorted({side for found in self.n.values() for _, o in found for side in (o.entry, o.exit)})
        turning = any(o.entry != o.exit for found in self.n.values() for _, o in found)
        if len(layouts) < 2 or not change or turning:
            return  # an option may itself lead from one layout to the other: nothing is known of changes
        price = min(self.m * (f + b) for f, b in change.values()) * self.scale
        flags = []
        for layout in layouts:
            flag = self.program.add(whole=True)
            flags.append(flag)
            for region, found in self.n.items():
                mine = [(v, -1.0) for v, o in found if layout in (o.entry, o.exit)]
                self.program.row([(flag, float(self.units[region])), *mine], low=0.0)
        changes = self.program.add(price, upper=float(len(layouts)))
        self.program.row([(changes, 1.0), *((f, -1.0) for f in flags)], low=-1.0)

    def taken(self, values: Sequence[float]) -> dict[int, list[Option]]:
        """The options of each region's units, in no order."""
        return {r: [o for v, o in found for _ in range(round(values[v]))] for r, found in self.n.items()}


def in_order(
    regions: Sequence[int], taken: Mapping[int, list[Option]], change: Mapping[Layouts, tuple[float, float]]
) -> tuple[Option, ...]:
    """Units of a region with equal layouts together, in the order (up or down, by region) that changes layouts least."""
    best: tuple[Option, ...] = ()
    fewest = INFINITE
    several = [r for r, found in taken.items() if len({(o.entry, o.exit) for o in found}) > 1]
    for turned in product((False, True), repeat=min(len(several), 6)):
        down = {r for r, t in zip(several, turned, strict=False) if t}
        queues = {
            r: iter(sorted(found, key=lambda o: (o.entry, o.exit), reverse=r in down)) for r, found in taken.items()
        }
        units = tuple(next(queues[r]) for r in regions)
        cost = sum(
            sum(change.get((a.exit, b.entry), (INFINITE, INFINITE)))
            for a, b in pairwise(units) if a.exit != b.entry
        )  # fmt: skip
        if cost < fewest:
            best, fewest = units, cost
    return best

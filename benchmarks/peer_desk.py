"""What peers' planners (peers.py) build on: options of units with nothing dropped, the memory of stages, and divisions.

Prices are the ones of planner/options.py; a peer's own estimate chooses, planner/appraise.py then prices what was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from shardwright.planner.appraise import appraise
from shardwright.planner.objectives import housed
from shardwright.planner.options import Option
from shardwright.planner.shapes import Arrangement
from shardwright.planner.workbench import Workbench

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
MOST_LIMITS = 400
"""Values of the slowest stage that a division is tried with."""

PRICED = 6
"""Plans of a peer, the best by its own estimate, that are priced; the cheapest of them is the peer's."""


NOTHING: frozenset[str] = frozenset()


def away(option: Option) -> frozenset[str]:
    """What an option has behind the device: classes of its label (planner/away.py), whatever the stride of the update."""
    return frozenset(word.partition("/")[0] for word in option.offload.split("+") if word)


@dataclass(frozen=True)
class Candidate:
    """A plan by the seconds that its planner expects."""

    estimate: float
    shape: Arrangement
    cuts: tuple[int, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Planned:
    """A plan at our prices."""

    seconds: float
    peak_bytes: int
    plan: Candidate


class Strip:
    """One option for every unit: sums over any interval by prefix sums. Seconds are of one microbatch, with its share of the
    step's end."""

    def __init__(self, options: Sequence[Option], microbatches: int) -> None:
        self.options = tuple(options)
        self._sums = {
            name: np.concatenate([[0.0], np.cumsum([getattr(o, name) for o in options])])
            for name in ("forward", "backward", "finish", "static", "gradient", "saved", "step", "host", "host_saved", "disk")
        }  # fmt: skip
        self.seconds = self._sums["forward"] + self._sums["backward"] + self._sums["finish"] / microbatches

    def sum(self, name: str, start: Counts, end: Counts) -> Floats:
        """The sum of a figure over units [start, end)."""
        found: Floats = self._sums[name][end] - self._sums[name][start]
        return found

    @cached_property
    def work(self) -> Floats:
        """(start, end) -> the largest working memory of [start, end)."""
        count = len(self.options)
        found = np.zeros((count + 1, count + 1))
        for start in range(count):
            found[start, start + 1 :] = np.maximum.accumulate([o.work for o in self.options[start:]])
        return found


class Desk:
    """One case: shapes, options and memory as the peers see them.

    `layer` says of each unit whether it is one of the model's layers: where none is repeated, each is.
    """

    def __init__(self, bench: Workbench, shapes: Iterable[Arrangement]) -> None:
        self.bench = bench
        self.units = tuple(r for r, _ in bench.chain.units)
        regions = bench.task.outline.regions
        whole = all(r.repeats == 1 for r in regions)
        self.layer = tuple(whole or regions[r].repeats > 1 for r in self.units)
        usual = ("pp", "dp", "ep", "cp", "tp")
        self.shapes = tuple(s for s in shapes if s.cp == 1 and s.order == usual)
        self._offers: dict[tuple[object, ...], list[Option]] = {}

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return sum(self.layer)

    # -- options

    def offers(
        self, shape: Arrangement, region: int, policies: tuple[str, ...], levels: tuple[int, ...]
    ) -> list[Option]:
        """Options of a unit under these recompute policies and ZeRO levels (0 where there is one data rank)."""
        bench, data = self.bench, self.bench.data(shape)
        levels = levels if data.ranks > 1 else (0,)
        key = (region, shape.pieces, data, policies, levels)
        if key not in self._offers:
            numbers = bench.fronts.numbers(region, shape.tp, shape.pieces, shape.cp)
            mine = [(named, n) for named, n in numbers if named.policy in policies]
            self._offers[key] = bench.storing.options(region, mine, data, levels)
        return self._offers[key]

    def like(
        self, shape: Arrangement, region: int, style: str, policy: str, level: int, offload: frozenset[str] = NOTHING
    ) -> list[Option]:
        """Options of one style, recompute policy, ZeRO level and offload, as far as a region has them.

        What has nothing to run again keeps everything; a sharding that two styles share has the name of the first; what has
        not all classes of the offload has those it has.
        """
        layout = "R" if style in ("single", "tensor") else "S"
        for wanted in (policy, "none") if self._is_layer(region) else ("none",):
            found = [o for o in self.offers(shape, region, (wanted,), (level,)) if o.entry == layout]
            found = [o for o in found if o.style == style] or found
            found = [o for o in found if away(o) <= offload]
            if found:
                most = max(len(away(o)) for o in found)
                return [o for o in found if len(away(o)) == most]
        return []

    def _is_layer(self, region: int) -> bool:
        return self.layer[self.units.index(region)]

    def strip(
        self, shape: Arrangement, style: str, policy: str, level: int, offload: frozenset[str] = NOTHING,
        best: Callable[[Option], float] = lambda o: o.seconds,
    ) -> Strip | None:  # fmt: skip
        """The same option for all units of a region; None where a region has none."""
        chosen = {}
        for region in dict.fromkeys(self.units):
            found = self.like(shape, region, style, policy, level, offload)
            if not found:
                return None
            chosen[region] = min(found, key=best)
        return Strip([chosen[r] for r in self.units], shape.microbatches)

    # -- memory

    def live(self, shape: Arrangement, stage: int) -> int:
        """Microbatches alive in a stage at most."""
        ready = self.bench.ready(shape)
        rank = ready.placement[stage]
        chunk = ready.local[rank].index(stage)
        return max((vector[chunk] for vector in ready.live[rank]), default=1)

    def even_cuts(self, stages: int) -> tuple[int, ...] | None:
        """As many layers in every stage, with what is no layer at the ends; what is left over goes to the last stage
        (Galvatron's pp_division_even). None where a stage would have none."""
        each = self.layers // stages
        if not each:
            return None
        places = [u for u, layer in enumerate(self.layer) if layer]
        return (0, *(places[s * each] for s in range(1, stages)), len(self.units))

    # -- prices

    def priced(self, plan: Candidate) -> Planned | None:
        """A plan at our prices; None where it does not fit."""
        figures = appraise(self.bench, plan.shape, plan.cuts, plan.options)
        if figures.peak_bytes > self.bench.task.limit_bytes:
            return None
        if self.bench.tiers and not housed(self.bench, plan.shape, plan.cuts, plan.options):
            return None
        return Planned(figures.step_seconds, figures.peak_bytes, plan)

    def best(self, plans: Iterable[Candidate]) -> Planned | None:
        """The cheapest of the plans with the best estimates, or the first that fits where none of these does."""
        found: Planned | None = None
        for number, plan in enumerate(sorted(plans, key=lambda p: p.estimate)):
            if number >= PRICED and found is not None:
                break
            priced = self.priced(plan)
            if priced is not None and (found is None or priced.seconds < found.seconds):
                found = priced
        return found


# -- stages of two strips


@dataclass(frozen=True)
class Mixed:
    """Stages whose first `c` layers run under one strip and the others under another."""

    first: Strip
    rest: Strip

    def seconds(self, start: Counts, middle: Counts, end: Counts) -> Floats:
        """Seconds of units [start, middle) and [middle, end)."""
        one, two = self.first.seconds, self.rest.seconds
        found: Floats = one[middle] - one[start] + two[end] - two[middle]
        return found

    def fits(self, desk: Desk, shape: Arrangement, alive: int, start: Counts, middle: Counts, end: Counts) -> Any:
        """Whether a rank that holds these units fits."""
        memory, once = desk.bench.memory(shape), shape.microbatches == 1 and shape.pp == 1

        def total(name: str) -> Floats:
            return self.first.sum(name, start, middle) + self.rest.sum(name, middle, end)

        work = np.maximum(self.first.work[start, middle], self.rest.work[middle, end])
        static, gradient = total("static"), total("gradient")
        running = static + (0.0 if once else gradient) + alive * total("saved") + work
        stepping = static + gradient + total("step")
        away = total("host") + alive * total("host_saved")
        return (
            (np.maximum(running, stepping) <= memory.cap_bytes)
            & (away <= memory.host_bytes)
            & (total("disk") <= memory.disk_bytes)
        )

    def options(self, start: int, middle: int, end: int) -> tuple[Option, ...]:
        """The options of units [start, end)."""
        return (*self.first.options[start:middle], *self.rest.options[middle:end])


# -- divisions


def divide(times: Sequence[Floats], microbatches: int, most: float) -> tuple[float, tuple[int, ...]] | None:
    """The division with the least (m - 1) max t + sum t below `most`; Alpa's dynamic program over the slowest stage
    (Zheng et al. 2022, section 5.2).

    `times[s][i, j]`: seconds of a microbatch of units [i, j) as stage s, inf where it does not fit. Returns it with the cuts.
    """
    finite = np.unique(np.concatenate([np.unique(t[np.isfinite(t)]) for t in times]))
    low, high = 0, len(finite) - 1
    if high < 0 or _divided(times, finite[high]) is None:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _divided(times, finite[middle]) is not None else (middle + 1, high)
    best: tuple[float, tuple[int, ...]] | None = None
    for slowest in finite[low : low + MOST_LIMITS]:
        if microbatches * slowest >= most:
            break
        answer = _divided(times, slowest)
        if answer is None:
            continue
        total, cuts = answer
        slow = max(times[s][i, j] for s, (i, j) in enumerate(pairwise(cuts)))
        value = total + (microbatches - 1) * slow
        if value < most:
            best, most = (value, cuts), value
    return best


def _divided(times: Sequence[Floats], slowest: float) -> tuple[float, tuple[int, ...]] | None:
    """The division with the least seconds in all, no stage above `slowest`."""
    here = np.full(len(times[0]), math.inf)
    here[0] = 0.0
    came = []
    for table in times:
        ways = here[:, None] + np.where(table <= slowest, table, math.inf)
        came.append(ways.argmin(0))
        here = ways.min(0)
    if not np.isfinite(here[-1]):
        return None
    cuts = [len(here) - 1]
    for step in reversed(came):
        cuts.append(int(step[cuts[-1]]))
    return float(here[-1]), tuple(reversed(cuts))

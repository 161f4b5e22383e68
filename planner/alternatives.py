"""How else a region of a plan could run, with everything else as it is, and what the step would come to.

The ways are those that the search chooses among (planner/workbench.py): another ZeRO level, something else run again, another
layout, something kept behind the device, or an option of the region's front that differs in several of these. Each is spelled as
an entry of the plan, and its figures are those of the plan with that entry, priced as an edited plan is (planner/repricing.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from ..errors import Infeasible, PinError, PlanError
from .appraise import appraise
from .capability import check_plan
from .causes import added
from .cluster import Cluster
from .costs import PriceBook
from .counted import counts_bytes
from .front import Design
from .fronts import Named
from .objectives import housed
from .onestage import COUNTED
from .options import Option
from .outline import Outline
from .plan import Plan, RegionPlan
from .plancheck import first_problem
from .repricing import bench_of, priced_anew
from .spell import entry_of, shape_in, units_in

PINNED = {"zero": ("zero",), "recompute": ("recompute",), "layout": ("tp", "sequence_parallel")}
"""By dimension, the pins that a way may go against: it is looked at all the same, and says so."""

MOST = 48
"""Options of a region's front that are priced, those of the least seconds."""

Choice = tuple[Design, int, str]
"""A design, a ZeRO level and what lies behind the device."""


@dataclass(frozen=True, slots=True)
class Way:
    """A region run in another way: what differs, by dimension (as it is, as it would be), and the figures of the whole plan.

    `entry` spells it. `refused` says why host memory or disk do not hold it, `against` which pins of the plan it goes against.
    """

    changes: Mapping[str, tuple[str, str]]
    entry: RegionPlan
    step_seconds: float
    peak_bytes: int
    limit_bytes: int
    refused: str = ""
    against: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every rank keeps its limit."""
        return not self.refused and self.peak_bytes <= self.limit_bytes


@dataclass(frozen=True, slots=True)
class RegionWays:
    """An entry of a plan with its other ways, quickest first; step and peak are the plan's, at the prices of today.

    `seconds` are those of the entry's units in one step, by cause; empty where prices do not tell units apart.
    """

    entry: RegionPlan
    step_seconds: float
    peak_bytes: int
    limit_bytes: int
    seconds: Mapping[str, float]
    ways: tuple[Way, ...]


class JointWays:
    """Ways of the regions of a plan that lists its stages."""

    def __init__(self, plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook) -> None:
        """Raises PlanError where the plan is not of this model."""
        self.plan, self.outline, self.cluster, self.prices = plan, outline, cluster, prices
        self.shape = shape_in(plan)
        self.bench = bench_of(loosened(plan), outline, cluster, prices)
        self.cuts, self.options = units_in(self.bench, plan)
        self.counted = counts_bytes(plan, cluster) or COUNTED in plan.search.given_up
        self.rank = [
            self.bench.ready(self.shape).placement[s] for s in range(len(plan.stages))
            for _ in range(self.cuts[s], self.cuts[s + 1])
        ]  # fmt: skip
        uses = [run.use for stage in plan.stages for run in stage.runs for _ in range(run.count)]
        self.units = {e.name: [u for u, name in enumerate(uses) if name == e.name] for e in plan.regions}
        self.step, self.peak, self.limit, _ = self._figures(plan, self.options)

    def of(self, entry: RegionPlan) -> RegionWays:
        """The other ways of an entry of the plan."""
        mine = self.units[entry.name]
        own = self.options[mine[0]]
        runs, options = self.shape.microbatches, [self.options[u] for u in mine]
        causes = added([part for o in options for part in (o.ahead.times(runs), o.back.times(runs), o.ends)])._asdict()
        found: dict[Choice, Way] = {}
        for named, zero, offload in self._choices(entry, own):
            key = (named.design, zero, offload)
            if key not in found and key != (own.design, own.zero, own.offload):
                way = self._way(entry, named, zero, offload)
                if way is not None:
                    found[key] = way
        ways = sorted(found.values(), key=lambda w: (w.step_seconds, w.peak_bytes, len(w.changes)))
        return RegionWays(entry, self.step, self.peak, self.limit, causes, tuple(ways))

    def _choices(self, entry: RegionPlan, own: Option) -> Iterator[tuple[Named, int, str]]:
        """What differs in one dimension, then the front."""
        shape, first = self.shape, self.units[entry.name][0]
        bench = self.bench.on(shape, self.rank[first])
        measured = bench.fronts.numbers(own.region, shape.tp, shape.pieces, shape.cp)
        as_it_is = Named(own.design, entry.style, entry.policy)
        data = bench.data(shape)
        stores = entry.parameters or bench.chain.parts[own.region].borrowed
        for zero in bench.levels(data) if stores else ():
            yield as_it_is, zero, own.offload
        for named, _ in measured:
            if _sharding(named.design) == _sharding(own.design) or named.policy == (entry.policy or "none"):
                yield named, own.zero, own.offload
        numbers = bench.fronts.bench(own.region, shape.tp, shape.pieces, shape.cp).measure(own.design)
        if numbers is not None:
            for option in bench.storing.options(own.region, [(as_it_is, numbers)], data, (own.zero,)):
                yield as_it_is, option.zero, option.offload
        names = {named.design: named for named, _ in measured}
        front = sorted(bench.options(own.region, shape), key=lambda o: shape.microbatches * o.seconds + o.finish)
        for option in front[:MOST]:
            yield names[option.design], option.zero, option.offload

    def _way(self, entry: RegionPlan, named: Named, zero: int, offload: str) -> Way | None:
        """The entry's units under another choice; None where that is not possible or not legal."""
        options, mine = list(self.options), self.units[entry.name]
        made: dict[int, Option | None] = {}
        for u in mine:
            rank = self.rank[u]
            pool = self.shape.pools[rank] if self.shape.pools else 0
            if pool not in made:
                bench = self.bench.on(self.shape, rank)
                made[pool] = bench.option(self.options[u].region, self.shape, named.design, zero, offload)
            other = made[pool]
            if other is None:
                return None
            options[u] = other
        starts = self.cuts[1:-1]
        if any(options[at - 1].exit != options[at].entry for at in starts):
            return None  # what crosses to another stage keeps its layout
        one, two = self.options[mine[0]], options[mine[0]]
        spelled = entry_of(self.bench, self.shape, entry.name, entry.region, entry.repeats, two)
        spelled = msgspec.structs.replace(spelled, policy=named.policy, style=named.style)
        edited = with_entry(self.plan, spelled)
        try:
            if first_problem(edited) is not None:
                return None
            if self.cluster.spec.startswith("local"):
                check_plan(edited, training=self.outline.training)
            step, peak, limit, refused = self._figures(edited, options)
        except (PlanError, PinError, KeyError):  # a KeyError: layouts that nothing leads between
            return None
        changes = differences(entry, spelled, (str(one.zero), str(two.zero)))
        return Way(changes, spelled, step, peak, limit, refused, against(self.plan, changes)) if changes else None

    def _figures(self, plan: Plan, options: Sequence[Option]) -> tuple[float, int, int, str]:
        """Seconds of a step, bytes of the fullest rank, its limit, and why host memory or disk do not hold it."""
        if self.counted:
            try:
                priced = priced_anew(plan, self.outline, self.cluster, self.prices, self.bench)
            except Infeasible as error:
                return *self._appraised(options)[:3], str(error)
            found = priced.predicted
            return found.step_seconds, found.peak_bytes_per_device, priced.memory_limit_bytes, ""
        return self._appraised(options)

    def _appraised(self, options: Sequence[Option]) -> tuple[float, int, int, str]:
        figures = appraise(self.bench, self.shape, self.cuts, options)
        held = housed(self.bench, self.shape, self.cuts, options)
        refused = "" if held else "it offloads more than a rank's share of host memory and disk"
        return figures.step_seconds, figures.peak_bytes, figures.limit_bytes, refused


def differences(entry: RegionPlan, other: RegionPlan, levels: tuple[str, str]) -> dict[str, tuple[str, str]]:
    """What another entry of the same region says otherwise, by dimension; `levels` are the ZeRO levels of the two."""
    found = {}
    if [op.choice for op in entry.ops] != [op.choice for op in other.ops] or _borders(entry) != _borders(other):
        found["layout"] = (entry.style or "as it is", other.style or "another")
    if set(entry.recompute) != set(other.recompute):
        found["recompute"] = (_again(entry), _again(other))
    if levels[0] != levels[1]:
        found["zero"] = levels
    if entry.offload != other.offload:
        found["offload"] = ("+".join(entry.offload) or "none", "+".join(other.offload) or "none")
    return found


def against(plan: Plan, changes: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    """The pins of a plan that changes go against."""
    found = []
    for text in plan.pins:
        key, sign, value = (part.strip() for part in re.split("(!?=)", text, maxsplit=1))
        news = [new for dimension, (_, new) in changes.items() if key in PINNED.get(dimension, ())]
        if news and (sign == "=" or value in news):
            found.append(text)
    return tuple(found)


def _again(entry: RegionPlan) -> str:
    """The policy of an entry, or how much it runs again."""
    if not entry.recompute:
        return "none"
    return entry.policy if entry.policy not in ("", "none") else f"{len(entry.recompute)} ops"


def _borders(entry: RegionPlan) -> tuple[str, str]:
    return entry.entry, entry.exit


def _sharding(design: Design) -> tuple[object, ...]:
    return design.entry, design.exit, design.choices


def with_entry(plan: Plan, entry: RegionPlan) -> Plan:
    """The plan with an entry in the place of the one of its name."""
    regions = tuple(entry if one.name == entry.name else one for one in plan.regions)
    return msgspec.structs.replace(plan, regions=regions)


def loosened(plan: Plan) -> Plan:
    """The plan without the pins that a way may go against."""
    free = {key for keys in PINNED.values() for key in keys}
    pins = tuple(text for text in plan.pins if re.split("!?=", text)[0].strip() not in free)
    return msgspec.structs.replace(plan, pins=pins)

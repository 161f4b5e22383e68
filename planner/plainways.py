"""The other ways of a region of a plan of one plain stage: another ZeRO level, or another layout on the model axis.

Such a plan is priced over its whole graph (planner/evaluate.py), and so is every way. What running something again or keeping
it behind the device would cost is priced for plans that list their stages alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ..errors import PinError, PlanError
from .alternatives import RegionWays, Way, against, differences, loosened, with_entry
from .cluster import Cluster
from .costs import PriceBook
from .outline import Outline
from .plan import Plan, RegionPlan
from .repricing import bench_of, priced_anew
from .spell import entry_of, shape_in


class PlainWays:
    """Ways of the regions of a plan without stages."""

    def __init__(self, plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook) -> None:
        """Raises PlanError where the plan is not of this model."""
        self.plan, self.outline, self.cluster, self.prices = plan, outline, cluster, prices
        self.shape = shape_in(plan)
        self.bench = bench_of(loosened(plan), outline, cluster, prices)
        self.step, self.peak = self._figures(plan)

    def of(self, entry: RegionPlan) -> RegionWays:
        """The other ways of an entry of the plan."""
        found, now = list[Way](), _levels(entry)
        for other in (*self._stored(entry), *self._laid_out(entry)):
            changes = differences(entry, other, (now, _levels(other)))
            if not changes or any(changes == way.changes for way in found):
                continue
            try:
                step, peak = self._figures(with_entry(self.plan, other))
            except (PlanError, PinError):
                continue
            found.append(
                Way(changes, other, step, peak, self.plan.memory_limit_bytes, against=against(self.plan, changes))
            )
        found.sort(key=lambda way: (way.step_seconds, way.peak_bytes))
        return RegionWays(entry, self.step, self.peak, self.plan.memory_limit_bytes, {}, tuple(found))

    def _figures(self, plan: Plan) -> tuple[float, int]:
        found = priced_anew(plan, self.outline, self.cluster, self.prices).predicted
        return found.step_seconds, found.peak_bytes_per_device

    def _stored(self, entry: RegionPlan) -> Iterator[RegionPlan]:
        """The entry with all its parameters at one ZeRO level."""
        axes = tuple(axis.name for axis in self.plan.mesh if axis.role == "data" and axis.size > 1)
        if not axes or not entry.parameters:
            return
        named = {name: p.tensor for p in self.outline.parameters for name in p.names}
        for level in (0, 1, 2, 3) if self.outline.training else (0, 3):
            parameters = []
            for p in entry.parameters:
                zero = level if self.outline.tensors[named[p.names[0]]].dims else 0
                parameters.append(msgspec.structs.replace(p, zero=zero, zero_axes=axes if zero else ()))
            yield msgspec.structs.replace(entry, parameters=tuple(parameters))

    def _laid_out(self, entry: RegionPlan) -> Iterator[RegionPlan]:
        """The entry under the fastest sharding of every style, its parameters at the level that most of them have."""
        if self.shape.tp == 1:
            return
        names = [region.name for region in self.outline.regions]
        region, levels = names.index(entry.region or entry.name), [p.zero for p in entry.parameters]
        zero = max(levels, key=lambda level: (levels.count(level), -level), default=0)
        for named, _ in self.bench.fronts.numbers(region, self.shape.tp, self.shape.pieces):
            if named.policy != "none":
                continue
            option = self.bench.option(region, self.shape, named.design, zero, "")
            if option is None:
                continue
            spelled = entry_of(self.bench, self.shape, entry.name, entry.region, entry.repeats, option)
            # Without stages nothing is laid out between them.
            yield msgspec.structs.replace(spelled, style=named.style, recompute=(), entry="R", exit="R")


def _levels(entry: RegionPlan) -> str:
    """The ZeRO levels of an entry's parameters: "0", or "0 and 1"."""
    return " and ".join(map(str, sorted({p.zero for p in entry.parameters}))) or "0"

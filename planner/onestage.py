"""Plans that run here and recompute: the joint search over what the runtime executes, its bytes counted op by op.

The joint search prices units apart from each other, which leaves what lies between them to an estimate. A plan of one stage is
executed as one graph, so its collectives and bytes are counted there, over every op of the model (planner/evaluate.py), and it
is those that the plan predicts and that the memory limit bounds. Seconds, and the bound on them, are the joint search's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from ..errors import Infeasible, PlanError
from .assign import assign
from .capability import MASK
from .cluster import Cluster
from .costs import PriceBook
from .outline import Outline
from .pins import Pins
from .plan import Plan

if TYPE_CHECKING:
    from .solve import Request

ROUNDS = 5
"""Searches at most, each with less memory than the one before, whose plan counted op by op was above the limit."""

COUNTED = "options are compared by bytes of units; the plan's own bytes and collectives are counted op by op"


def executed(pins: Pins) -> Pins:
    """The pins, with those keys fixed of which the runtime executes one value only."""
    only = {one.key: one.values[0] for one in MASK if len(one.values) == 1 and hasattr(pins, one.key)}
    return replace(pins, **{key: value for key, value in only.items() if getattr(pins, key) is None})  # type: ignore[arg-type]


def recomputes(pins: Pins) -> bool:
    """Whether the pins ask for recompute."""
    return pins.recompute not in (None, "none") or pins.forbids("recompute", "none")


def solve_here(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Plan | None:
    """The fastest plan found within the limit that the runtime executes; None where there is none."""
    from .solve import search_joint

    limit = asked = request.memory_limit_bytes
    inner = replace(request, pins=executed(request.pins))
    for _ in range(ROUNDS):
        plan = search_joint(outline, cluster, prices, replace(inner, memory_limit_bytes=asked))
        if plan is None:
            return None
        search = msgspec.structs.replace(plan.search, given_up=(*plan.search.given_up, COUNTED))
        plan = counted(msgspec.structs.replace(plan, search=search), outline, cluster, prices)
        over = plan.predicted.peak_bytes_per_device - limit
        if over <= 0:
            return msgspec.structs.replace(plan, memory_limit_bytes=limit)
        asked -= over
    return None


def counted(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook) -> Plan:
    """A plan of one stage with bytes and collectives counted over all its ops."""
    from .solve import evaluated

    found = evaluated(plan, outline, cluster, prices, assign(plan, outline))
    predicted = msgspec.structs.replace(
        plan.predicted, peak_bytes_per_device=found.peak_bytes, memory=dict(found.memory), traffic=found.traffic
    )
    stages = tuple(msgspec.structs.replace(stage, peak_bytes=found.peak_bytes) for stage in plan.stages)
    return msgspec.structs.replace(plan, predicted=predicted, stages=stages)


def recounted(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook) -> Plan:
    """An edited plan, counted as before if it was; raises PlanError where it is no longer one stage, Infeasible above its limit."""
    if plan.pipeline.stages > 1:
        raise PlanError("pipeline.stages: a plan whose bytes are counted op by op has one stage")
    plan = counted(plan, outline, cluster, prices)
    peak, memory = plan.predicted.peak_bytes_per_device, plan.predicted.memory
    if peak > plan.memory_limit_bytes:
        cause = max(memory, key=lambda c: memory[c])
        raise Infeasible(
            f"the edited plan needs {peak} bytes per device, its limit is {plan.memory_limit_bytes} (most of it: {cause})",
            cause=cause, nearest=(f"--memory-limit {peak}",),
        )  # fmt: skip
    return plan

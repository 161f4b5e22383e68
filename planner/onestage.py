"""Plans that run here beyond one plain stage: the joint search over what the runtime executes, its bytes counted op by op.

Pins that the one-stage search (planner/search.py) does not know come here, and so does what fits nowhere without: searches open one
dimension more at a time until one finds a plan.

The joint search prices units apart from each other, which leaves what lies between them to an estimate. A plan of one stage is
executed as one graph, so its collectives and bytes are counted there, over every op of the model (planner/evaluate.py), and it
is those that the plan predicts and that the memory limit bounds. Seconds, and the bound on them, are the joint search's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from ..errors import Infeasible, PinError, PlanError
from .assign import assign
from .beside import most_overlap
from .capability import executed_pins
from .cluster import Cluster, has_host
from .costs import PriceBook
from .counted import one_graph
from .evaluate import Evaluation
from .fitting import NEAR, held_to
from .infeasible import limit_text, size_text
from .joint import JointSearch
from .objectives import least_memory, limited
from .outline import Outline
from .pins import Pins, Value
from .plan import OverlapPlan, Plan
from .shapes import Arrangement
from .spell import plan_of
from .trim import trimmed
from .workbench import Workbench

if TYPE_CHECKING:
    from .solve import Request

ROUNDS = 7
"""Searches at most: what the joint search is allowed is raised or lowered until its plans, counted, come near the limit."""

WIDER = 1.3
"""Factor on the allowance after a search that found nothing."""

NARROW = (
    "context and expert axes are looked at where they are pinned; "
    "recompute, offload and pipelines also where nothing else fits"
)
"""What plans that run here give up."""

COUNTED = "options are compared by bytes of units; the plan's own bytes and collectives are counted op by op"


ONE_STAGE: dict[str, tuple[Value, ...]] = {
    "pp": (1,), "cp": (1,), "ep": (1,), "vpp": (1,), "schedule": ("none", "gpipe", "1f1b"), "offload": ("none",),
    "recompute": ("none",),
}  # fmt: skip
"""Values of pins under which the one-stage search (planner/search.py) answers; the first is what a plan has without a pin."""

WIDER_SEARCHES: tuple[tuple[str, ...], ...] = (("recompute",), ("recompute", "offload"), ("recompute", "offload", "pp"))
"""Keys left open, one set after the other, where nothing fits."""

STAGES = ("vpp", "schedule")
"""Pins that speak of a pipeline, and leave open how many ranks it has."""


def beyond_one_stage(pins: Pins, *, training: bool = True) -> bool:
    """Whether the pins ask for what the one-stage search does not know; without a backward pass nothing runs again."""
    return any(
        getattr(pins, key) not in (None, *known) or pins.forbids(key, known[0])
        for key, known in ONE_STAGE.items() if training or key != "recompute"
    )  # fmt: skip


def searches(pins: Pins) -> list[Pins]:
    """The pins of each joint search for a plan that runs here, from few open keys to many.

    Keys without a pin have their neutral value. Recompute is always open, and the depth of a pipeline that is spoken of.
    """
    spoken = any(getattr(pins, key) not in (None, *ONE_STAGE[key]) for key in STAGES)
    found: dict[Pins, None] = {}
    for keys in WIDER_SEARCHES:
        left = {*keys, *(("pp",) if spoken else ())}
        if "pp" in left or pins.pp not in (None, 1):
            left |= {"vpp", "schedule"}
        fixed = {
            k: v[0]
            for k, v in ONE_STAGE.items()
            if k not in left and getattr(pins, k) is None and not pins.forbids(k, v[0])
        }
        found[executed_pins(replace(pins, **fixed))] = None  # type: ignore[arg-type]
    return list(found)


def solve_here(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Plan | None:
    """The fastest plan found within the limit that the runtime executes; None where there is none.

    Searches go from few open keys to many and end with the first that finds a plan. Raises PinError where no shape meets the pins.
    """
    refused: list[PinError] = []
    tried = searches(request.pins)
    for pins in tried:
        try:
            plan = _solve(outline, cluster, prices, replace(request, pins=pins))
        except PinError as error:
            refused.append(error)
            continue
        if plan is not None:
            return plan
    if len(refused) == len(tried):
        raise refused[0]
    return None


def _solve(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Plan | None:
    """The fastest plan of one joint search."""
    from .solve import make_bench

    limit = request.memory_limit_bytes
    bench, shapes = make_bench(
        outline, cluster, prices, request, tiers=request.pins.offload != "none" and has_host(cluster)
    )
    bench.fronts.trim = trimmed
    best: Plan | None = None
    low, high, asked, bound = 0.0, math.inf, float(limit), math.inf
    for _ in range(ROUNDS):
        plan = _within(bench, shapes, math.floor(asked), request, outline)
        if (
            plan is not None
            and (not one_graph(plan) or _behind(plan))
            and plan.predicted.peak_bytes_per_device <= limit
        ):
            return _limited(plan, limit, plan.search.bound_seconds)
        peak = 0
        if plan is not None:
            plan, bound = counted(plan, outline, cluster, prices), min(bound, plan.search.bound_seconds)
            peak = plan.predicted.peak_bytes_per_device
        if plan is not None and peak > limit:
            high = asked
        else:
            low = asked
        if plan is not None and peak <= limit:
            same = best is not None and best.regions == plan.regions and best.pipeline == plan.pipeline
            best = plan if best is None or plan.predicted.step_seconds < best.predicted.step_seconds else best
            if same:
                break
        ratio = limit / peak / (NEAR if peak > limit else 1.0) if peak else WIDER
        asked = _next(low, high, asked, ratio, tried=best is not None)
        if not low * NEAR < asked < high / NEAR:
            break
    return _limited(best, limit, bound) if best is not None else None


def _next(low: float, high: float, asked: float, ratio: float, *, tried: bool) -> float:
    """What to allow next: between what was too little and too much, or as much more or less as the last plan needs."""
    if high < math.inf and (low > 0.0 or tried):
        return (low + high) / 2
    return asked * ratio


def _within(
    bench: Workbench, shapes: Sequence[Arrangement], limit: int, request: Request, outline: Outline
) -> Plan | None:  # fmt: skip
    """The plan of the joint search within a limit."""
    found = JointSearch(limited(bench, limit), shapes, request.progress).run()
    if found.best is None:
        return None
    return plan_of(bench, found, found.best, request, outline, limit)


def _limited(plan: Plan, limit: int, bound: float) -> Plan:
    counts = one_graph(plan) and not _behind(plan)
    return held_to(plan, limit, bound, NARROW, *((COUNTED,) if counts else ()))


def _behind(plan: Plan) -> bool:
    """Whether a plan of one graph keeps something behind the device."""
    return one_graph(plan) and any(region.offload for region in plan.regions)


def explain_here(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Infeasible:
    """The error to raise where nothing that is executed fits: what binds where the least memory is needed."""
    pins = searches(request.pins)[-1]
    least = least_memory(outline, cluster, prices, replace(request, pins=pins))
    if least is None:
        return Infeasible("no shape of the cluster can hold this model under the pins")
    least = counted(least, outline, cluster, prices)
    memory, peak = least.predicted.memory, least.predicted.peak_bytes_per_device
    cause = max(memory, key=lambda c: memory[c])
    mesh = " x ".join(f"{a.name}={a.size}" for a in least.mesh if a.size > 1) or "one device"
    return Infeasible(
        f"nothing fits in {size_text(request.memory_limit_bytes)} per device: the least any plan needs is {size_text(peak)} "
        f"({mesh}, {least.pipeline.microbatches} microbatches), most of it {cause} ({size_text(memory[cause])})",
        cause=cause, nearest=(f"devices with {limit_text(peak)} for the plan (--memory-limit)",),
    )  # fmt: skip


def counted(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook, *, edited: bool = False) -> Plan:
    """A plan with bytes and collectives counted over all its ops, where it is one graph; else as it is.

    What runs beside computing is what an edited plan says, else the most that fits.
    """
    from .solve import evaluated

    if not one_graph(plan):
        return plan
    assignment = assign(plan, outline)

    def evaluate(way: OverlapPlan) -> Evaluation:
        return evaluated(msgspec.structs.replace(plan, overlap=way), outline, cluster, prices, assignment)

    if edited:
        overlap, found = plan.overlap, evaluate(plan.overlap)
    else:
        overlap, found = most_overlap(plan.memory_limit_bytes, plan.objective, evaluate)
    predicted = msgspec.structs.replace(
        plan.predicted, peak_bytes_per_device=found.peak_bytes, memory=dict(found.memory), traffic=found.traffic
    )
    stages = tuple(msgspec.structs.replace(stage, peak_bytes=found.peak_bytes) for stage in plan.stages)
    return msgspec.structs.replace(plan, predicted=predicted, stages=stages, overlap=overlap)


def recounted(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook) -> Plan:
    """An edited plan, counted as before if it was; raises PlanError where it is no longer one stage."""
    if not one_graph(plan):
        raise PlanError(
            "search.given_up: bytes are counted op by op, which needs one stage, and no context axis or split experts"
        )
    return counted(plan, outline, cluster, prices, edited=True)

"""From an objective to a plan: what may be asked together, and which search answers it.

    throughput   the fastest step                                                           planner/joint.py, planner/search.py
    latency      the fastest forward pass of one phase of inference (planner/inference.py)  planner/joint.py
    memory       the least bytes on the fullest device                                      planner/leanest.py
    devices      the fewest devices that meet a target, or that fit                         planner/targets.py
    cost         the cheapest step among those that meet a target                           planner/targets.py

With a phase the last three are of inference too. A frontier comes on top of any of them (planner/frontier.py).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from ..errors import PinError, UsageError
from .cluster import Cluster
from .costs import PriceBook
from .frontier import frontier
from .goal import OBJECTIVES, PHASES, Aim
from .leanest import leanest
from .outline import Outline
from .pins import Pins
from .plan import Plan
from .solve import one_kind, solve
from .targets import cheapest, fewest

if TYPE_CHECKING:
    from .solve import Request

FORWARD_SCHEDULE = "gpipe"
"""The schedule of a pipeline that runs one microbatch forward; all of them are alike."""


def settled(objective: str, aim: Aim, *, runnable: bool = False) -> Aim:
    """`aim` with what the objective takes for granted; raises UsageError naming what cannot be asked together.

    `runnable`: the plan is for this machine, which runs training plans that are as fast as can be.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"objective={objective}: expected one of {', '.join(OBJECTIVES)}")
    if aim.phase and aim.phase not in PHASES:
        raise UsageError(f"phase={aim.phase}: expected one of {', '.join(PHASES)}")
    if aim.phase and objective == "throughput":
        raise UsageError(f"phase={aim.phase} needs the objective latency, memory, devices or cost")
    if runnable and (objective != "throughput" or aim.frontier):
        what = "a frontier" if aim.frontier else f"objective={objective}"
        raise UsageError(
            f"{what} is planned for named clusters (h100-sxm:8) or a cluster file; plans that are to run on this machine are "
            "the fastest ones (in Python: make_plan(..., runnable=False))"
        )
    _check_targets(objective, aim)
    if objective == "latency" and not aim.phase:
        return msgspec.structs.replace(aim, phase="decode")
    return aim


def _check_targets(objective: str, aim: Aim) -> None:
    numbers = {
        "target-seconds": aim.target_seconds, "target-tokens-per-second": aim.target_tokens_per_second,
        "price-per-device-hour": aim.price_per_device_hour,
    }  # fmt: skip
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name}={value}: expected a number above zero")
    if aim.target_seconds is not None and aim.target_tokens_per_second is not None:
        raise UsageError("target-seconds and target-tokens-per-second say the same in two ways; give one of them")
    given = [name for name, value in numbers.items() if value is not None]
    if given and objective not in ("devices", "cost"):
        raise UsageError(f"{given[0]} needs the objective devices or cost, not {objective}")
    if aim.price_per_device_hour is not None and objective != "cost":
        raise UsageError(f"price-per-device-hour needs the objective cost, not {objective}")


def pursue(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request, aim: Aim) -> Plan:
    """The plan for `request.objective`; `outline` is that of the phase where one is asked for.

    Raises Infeasible where nothing fits or meets the target, UsageError and PinError for what cannot be asked.
    """
    aim = settled(request.objective, aim, runnable=request.runnable)
    if request.objective != "throughput" or aim.frontier:
        one_kind(cluster, "a frontier" if aim.frontier else f"the objective {request.objective}")
    if aim.phase:
        request = replace(request, pins=_forward(request.pins, aim.phase))
    if request.objective == "memory":
        plan = leanest(outline, cluster, prices, request)
    elif request.objective == "devices":
        plan = fewest(outline, cluster, prices, request, aim)
    elif request.objective == "cost":
        plan = cheapest(outline, cluster, prices, request, aim)
    else:
        plan = solve(outline, cluster, prices, request)
    plan = msgspec.structs.replace(plan, objective=request.objective, phase=aim.phase)
    if not aim.frontier:
        return plan
    return msgspec.structs.replace(plan, frontier=frontier(outline, cluster, prices, request, plan))


def _forward(pins: Pins, phase: str) -> Pins:
    """Pins of a forward pass: no schedule but one, no chunks; of decoding, no positions to split."""
    if pins.cp not in (None, 1):
        raise PinError(f"cp={pins.cp}: positions are not split in inference plans; use tp")
    if pins.attention == "math":
        raise PinError("attention=math: inference is priced with fused attention")
    if pins.recompute not in (None, "none"):
        raise PinError(f"recompute={pins.recompute}: inference has no backward pass to run anything again in")
    if pins.offload in ("optimizer", "activations"):
        raise PinError(f"offload={pins.offload}: inference keeps no {pins.offload} for a step's end")
    if pins.zero in (1, 2):
        raise PinError(
            f"zero={pins.zero} shares out gradients and optimizer states; inference has none: use zero=0 or zero=3"
        )
    if phase == "decode" and pins.sequence_parallel:
        raise PinError("sequence_parallel=on: decoding has one position per sequence, which cannot be split")
    split = False if phase == "decode" else pins.sequence_parallel
    schedule = pins.schedule
    if schedule is None and not pins.forbids("schedule", FORWARD_SCHEDULE):
        schedule = FORWARD_SCHEDULE
    return replace(pins, schedule=schedule, vpp=pins.vpp or 1, sequence_parallel=split)

"""The fewest devices, or the cheapest number of them, whose fastest plan meets a target.

Numbers of devices are looked at one after the other (planner/fewer.py says which), each with a search of its own for the fastest
plan. Nothing is taken for granted about how step time falls with devices: a number is passed over only where a *bound* says that
no plan on it can meet the target (compute of its slowest rank, each op by its fastest strategy), or costs less than the best.
So the answer for `devices` is the least of the numbers considered, and the plan lists them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from ..errors import Infeasible, PinError
from .cluster import Cluster
from .costs import PriceBook
from .fewer import device_counts, priced_on, sized
from .goal import Aim, Goal, Trial
from .infeasible import size_text
from .outline import Outline
from .plan import Plan
from .progress import Event, silent

if TYPE_CHECKING:
    from .solve import Request


@dataclass(frozen=True)
class _Looked:
    """One number of devices and its plan, None where there is none."""

    trial: Trial
    plan: Plan | None


def fewest(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request, aim: Aim) -> Plan:
    """The plan on the fewest devices that meets the target, or fits at all where there is none. Raises Infeasible."""
    target = target_seconds(outline, aim)
    trials: list[Trial] = []
    for devices in device_counts(cluster):
        looked = _look(outline, cluster, prices, request, devices, target)
        trials.append(looked.trial)
        if looked.plan is not None and looked.trial.status == "met":
            return _with(looked.plan, Goal(target_seconds=target, trials=tuple(trials)))
    raise _none(trials, target, cluster)


def cheapest(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request, aim: Aim) -> Plan:
    """The plan with the least cost of a step (of a token: the batch is the same) among those that meet the target."""
    target, rate = target_seconds(outline, aim), hourly_price(cluster, aim)
    trials: list[Trial] = []
    best: _Looked | None = None
    for devices in device_counts(cluster):
        known = best.trial.dollars if best is not None else None
        # No more seconds than at which so many devices cost what the best does.
        most = known / dollars(devices, 1.0, rate) if known is not None and rate > 0 else math.inf
        looked = _look(outline, cluster, prices, request, devices, target, most)
        trial = looked.trial
        if trial.step_seconds is not None:
            trial = msgspec.structs.replace(trial, dollars=dollars(devices, trial.step_seconds, rate))
        trials.append(trial)
        if looked.plan is not None and trial.status == "met" and (known is None or (trial.dollars or 0.0) < known):
            best = _Looked(trial, looked.plan)
    if best is None or best.plan is None:
        raise _none(trials, target, cluster)
    return _with(best.plan, Goal(target, rate, best.trial.dollars, tuple(trials)))


def target_seconds(outline: Outline, aim: Aim) -> float | None:
    """The most seconds a step may take; None without a target."""
    if aim.target_seconds is not None:
        return aim.target_seconds
    if aim.target_tokens_per_second is not None:
        return outline.tokens / aim.target_tokens_per_second
    return None


def hourly_price(cluster: Cluster, aim: Aim) -> float:
    """US dollars of one device for an hour: what is given, else the list price of the device; raises PinError without one."""
    if aim.price_per_device_hour is not None:
        return aim.price_per_device_hour
    known = cluster.cost_per_hour
    if known is None:
        raise PinError(f"no list price of {cluster.device.name} is known; give --price-per-device-hour")
    return known / cluster.devices


def dollars(devices: int, seconds: float, rate: float) -> float:
    """What `devices` devices cost for `seconds` at `rate` dollars a device and hour."""
    return devices * seconds * rate / 3600.0


def _look(
    outline: Outline, cluster: Cluster, prices: PriceBook, request: Request, devices: int, target: float | None,
    most: float = math.inf,
) -> _Looked:  # fmt: skip
    """The fastest plan on so many devices, unless a bound says that it takes more than the target or `most` seconds."""
    from .solve import make_bench, search_joint

    small = sized(cluster, devices)
    book = priced_on(prices, small)
    request.progress(Event("devices", f"{devices}"))
    try:
        bench, shapes = make_bench(outline, small, book, replace(request, progress=silent), tiers=False)
        bound = min(bench.bound(shape) for shape in shapes)
        if target is not None and bound > target:
            return _Looked(Trial(devices, "skipped", bound, reason="its bound is above the target"), None)
        if bound > most:
            return _Looked(Trial(devices, "skipped", bound, reason="its bound costs more than the best"), None)
        plan = search_joint(outline, small, book, request)
    except PinError as error:
        return _Looked(Trial(devices, "refused", reason=str(error)), None)
    if plan is None:
        reason = f"nothing fits in {size_text(request.memory_limit_bytes)} per device"
        return _Looked(Trial(devices, "does not fit", bound, reason=reason), None)
    seconds = plan.predicted.step_seconds
    status = "met" if target is None or seconds <= target else "missed"
    trial = Trial(devices, status, plan.search.bound_seconds, seconds, plan.predicted.peak_bytes_per_device)
    return _Looked(trial, plan)


def _with(plan: Plan, goal: Goal) -> Plan:
    return msgspec.structs.replace(plan, goal=goal)


def _none(trials: list[Trial], target: float | None, cluster: Cluster) -> Exception:
    """Nothing meets the target or fits; where every number was refused, the pins are to blame."""
    if all(trial.status == "refused" for trial in trials):
        return PinError(f"no number of devices up to {cluster.devices} can be planned: {trials[-1].reason}")
    if all(trial.status in ("refused", "does not fit") for trial in trials):
        return Infeasible(f"on none of {_told(trials)} devices: {trials[-1].reason}", nearest=("a larger --cluster",))
    assert target is not None
    return Infeasible(
        f"no number of devices meets {target:.4g} s a step: tried {_told(trials)}; {_closest(trials)}",
        cause="target", nearest=tuple(_nearest(trials)),
    )  # fmt: skip


def _closest(trials: list[Trial]) -> str:
    known = [t for t in trials if t.step_seconds is not None]
    if known:
        best = min(known, key=lambda t: t.step_seconds or math.inf)
        return f"the fastest is {best.step_seconds:.4g} s on {best.devices}"
    least = min((t.bound_seconds for t in trials if t.bound_seconds is not None), default=0.0)
    return f"no plan takes less than {least:.4g} s on any of them"


def _nearest(trials: list[Trial]) -> Iterator[str]:
    known = [t.step_seconds for t in trials if t.step_seconds is not None]
    if known:
        yield f"--target-seconds {min(known):.4g}"
    yield "a larger --cluster"


def _told(trials: list[Trial]) -> str:
    return ", ".join(str(trial.devices) for trial in trials)

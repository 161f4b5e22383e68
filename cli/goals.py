"""How a plan meets an objective beside seconds, in words: one line, the numbers of devices looked at, and the frontier."""

from __future__ import annotations

from ..planner.plan import Plan
from .figures import bytes_text, percent_text, seconds_text

TRIALS = ("devices", "bound", "step", "peak", "cost", "outcome")
"""Columns of the numbers of devices looked at."""

POINTS = ("step", "peak", "devices", "mesh", "schedule", "microbatches", "gap", "")
"""Columns of the frontier."""

NUMBERS = frozenset(("devices", "bound", "step", "peak", "cost", "microbatches", "gap"))
"""Columns that hold numbers."""

_OUTCOMES = {"met": "meets it", "missed": "too slow"}


def goal_text(plan: Plan) -> str:
    """What was sought and what is known of it; "" for throughput."""
    goal, devices = plan.goal, plan.cluster.get("devices")
    if plan.objective == "latency":
        return f"latency of one step of {plan.phase}"
    if plan.objective == "memory":
        least = goal.least_bytes if goal is not None else None
        proven = "nothing is proven" if least is None else f"no plan of the space needs less than {bytes_text(least)}"
        return f"least memory: {bytes_text(plan.predicted.peak_bytes_per_device)} per device; {proven}"
    if goal is None:
        return ""
    target = (
        "that fits" if goal.target_seconds is None else f"with a step of at most {seconds_text(goal.target_seconds)}"
    )
    looked = ", ".join(str(trial.devices) for trial in goal.trials)
    if plan.objective == "devices":
        return f"fewest devices {target}: {devices} (looked at {looked})"
    if plan.objective == "cost":
        return f"cheapest step {target}: {_cost(goal.dollars_per_step)} at {goal.price_per_device_hour:g} $ per device and hour"
    return ""


def trial_rows(plan: Plan) -> list[tuple[str, ...]]:
    """The numbers of devices looked at, in order; cells as in `TRIALS`."""
    if plan.goal is None:
        return []
    return [
        (str(t.devices), _seconds(t.bound_seconds), _seconds(t.step_seconds),
         bytes_text(t.peak_bytes) if t.peak_bytes is not None else "", _cost(t.dollars),
         _OUTCOMES.get(t.status, t.status) + (f": {t.reason}" if t.reason else ""))
        for t in plan.goal.trials
    ]  # fmt: skip


def point_rows(plan: Plan) -> list[tuple[str, ...]]:
    """The frontier by seconds, runners-up marked; cells as in `POINTS`."""
    rows: list[tuple[str, ...]] = []
    for p in plan.frontier:
        mesh = " ".join(f"{name}={size}" for name, size in p.mesh.items())
        schedule = "" if p.schedule == "none" else p.schedule + (f" x {p.chunks}" if p.chunks > 1 else "")
        gap = percent_text(p.gap) if p.gap is not None else ""
        cut = f"{p.microbatches} of {p.micro_batch}"
        status = "" if p.status == "best" else p.status
        rows.append(
            (seconds_text(p.seconds), bytes_text(p.peak_bytes), str(p.devices), mesh, schedule, cut, gap, status)
        )
    return rows


def _seconds(value: float | None) -> str:
    return "" if value is None else seconds_text(value)


def _cost(dollars: float | None) -> str:
    return "" if dollars is None else f"{dollars:.3g} $"

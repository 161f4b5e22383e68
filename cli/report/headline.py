"""The first sentences of a report: what the plan does, why no other, and what it leaves, for someone who has never met the tool."""

from __future__ import annotations

from collections.abc import Mapping

from ...planner.plan import Plan
from ..figures import bytes_text, interval_text, memory_text, percent_text, seconds_text, time_text
from ..stages import mesh_rows

_ROLES: Mapping[str, str] = {
    "dp": "{n} copies each take a share of the batch (data parallel)",
    "tp": "every layer is split over {n} devices (tensor parallel)",
    "cp": "every sequence is split over {n} devices (context parallel)",
    "pp": "the layers are cut into {n} pipeline ranks that pass microbatches on",
    "ep": "{n} devices share the experts of a layer",
}
"""What an axis means, in plain words."""

_MIXED = "{name} splits work over {n} devices"


def headline(plan: Plan) -> str:
    """One sentence: what takes how long on what, and how much memory it needs."""
    predicted, devices = plan.predicted, plan.ranks
    name = str((plan.cluster.get("device") or {}).get("name", "device"))
    band = interval_text(predicted)
    doing = f"One {plan.phase} step" if plan.phase else "One training step"
    where = f"{devices} {name} devices" if devices > 1 else f"one {name} device"
    told = f" (nine runs in ten: {band})" if band else ""
    peak, limit = predicted.peak_bytes_per_device, plan.memory_limit_bytes
    return (
        f"{doing} of batch {plan.source.batch:,} on {where} is predicted to take {seconds_text(predicted.step_seconds)}{told}, "
        f"with at most {bytes_text(peak)} of {bytes_text(limit)} in use on any device."
    )


def how(plan: Plan) -> list[str]:
    """What each mesh axis does, a clause each; what runs again and what lies off the device."""
    found = []
    for name, size, _, _ in mesh_rows(plan):
        if size > 1:
            found.append(_ROLES.get(name, _MIXED).format(n=size, name=name))
    zero = max((p.zero for r in plan.regions for p in r.parameters), default=0)
    held = {1: "optimizer states", 2: "optimizer states and gradients", 3: "parameters, gradients and optimizer states"}
    if zero:
        levels = sorted({p.zero for r in plan.regions for p in r.parameters})
        told = (
            f"ZeRO-{zero}"
            if levels == [zero]
            else f"ZeRO-{zero} for some, {' and '.join(map(str, levels[:-1]))} for others"
        )
        found.append(f"{held[zero]} are divided among the copies ({told})")
    again = sum(r.repeats for r in plan.regions if r.recompute)
    if again:
        found.append(
            f"{again} of {sum(r.repeats for r in plan.regions)} regions run part of themselves again to save memory"
        )
    if any(r.offload for r in plan.regions):
        found.append("part of the state lies in host memory or on disk")
    return found or ["everything runs on one device, whole"]


def why(plan: Plan) -> list[str]:
    """What takes the time, what takes the memory, and what is proven of the choice."""
    predicted = plan.predicted
    time = sorted(predicted.seconds.items(), key=lambda item: -item[1])
    memory = sorted(predicted.memory.items(), key=lambda item: -item[1])
    found = []
    if time and time[0][1] > 0:
        whole = max(sum(predicted.seconds.values()), predicted.step_seconds) or 1.0
        parts = " and ".join(f"{time_text(k)} ({percent_text(v / whole)})" for k, v in time[:2] if v > whole / 1e4)
        found.append(f"Time goes to {parts}.")
    if memory and memory[0][1] > 0:
        parts = " and ".join(f"{memory_text(k)} ({bytes_text(v)})" for k, v in memory[:2] if v)
        found.append(f"Memory goes to {parts}; {bytes_text(max(plan.memory_limit_bytes - predicted.peak_bytes_per_device, 0))} "
                     "stay free.")  # fmt: skip
    if not plan.edited:
        found.append(f"{len(plan.search.shapes)} shapes were weighed; by the cost model no plan of that space is faster by more "
                     f"than {percent_text(plan.search.gap)}.")  # fmt: skip
    return found

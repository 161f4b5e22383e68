"""`shardwright explain PLAN [REGION] [--why-not K=V]`: why a plan and its regions are as they are, and what else would cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import Infeasible, PinError, PlanError, PlanMismatch, UsageError
from .options import json_option

if TYPE_CHECKING:
    from ..planner.plan import Plan, ShapeRecord

TIGHT = 0.95
"""Share of the memory limit from which on it binds."""
NEXT = 3
"""Shapes that came next, told."""


@click.command("explain")
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("region", required=False)
@click.option(
    "--why-not", metavar="K=V", help="Search again with this pin (or devices, batch, seq, memory, link) and compare."
)
@json_option
def command(plan: Path, region: str | None, why_not: str | None, as_json: bool) -> None:
    """Say what binds a plan and each of its regions, what came next, and what one other choice would cost.

    With REGION, every other choice of that region: layout, recompute, ZeRO level and offload, with the rest of the plan as it
    is. With --why-not, the whole plan is searched for again under that pin.
    """
    from ..garbage import held_back, leave_unswept
    from ..planner.planfile import load_plan
    from .edited import is_stale
    from .tables import print_json, progress, show

    if region is not None and why_not is not None:
        raise UsageError("--why-not is of the whole plan; leave out the region")
    loaded = load_plan(plan)
    if is_stale(loaded):
        raise UsageError(
            f"{plan} was edited: `shardwright report` or `run` price it again; explain a plan as it was made"
        )
    leave_unswept()
    with held_back(), progress() as tell:
        if why_not is not None:
            found = answer(loaded, why_not, tell)
        else:
            found = of_region(loaded, region, tell) if region is not None else of_plan(loaded, tell)
    if as_json:
        print_json(found)
        return
    show(*found["sentences"])


def of_plan(plan: Plan, tell: Any) -> dict[str, Any]:
    """The plan and each of its regions; without the model only what the plan itself says."""
    from .reasons import PLAIN, does_text, moved_text, reasons, region_facts, ways_of

    try:
        found = ways_of(plan, plan.regions, tell)
    except (UsageError, PlanError, PlanMismatch) as error:
        told = [does_text(entry) for entry in plan.regions]
        told.append(f"What other choices of a region cost is not known without the plan's model: {error}")
        return {"sentences": sentences(plan, told), "regions": []}
    told = [*moved_text(plan, found), *(reasons(plan, each) for each in found), *([] if plan.stages else [PLAIN])]
    return {"sentences": sentences(plan, told), "regions": [region_facts(plan, each) for each in found]}


def of_region(plan: Plan, name: str, tell: Any) -> dict[str, Any]:
    """One region with every other choice; raises UsageError for a name that the plan does not have."""
    from .reasons import PLAIN, chosen, details, moved_text, reasons, region_facts, ways_of

    entries = chosen(plan, name)
    found = ways_of(plan, entries, tell)
    told = moved_text(plan, found)
    for each in found:
        told += [reasons(plan, each), *_others(details(each))]
    told += [] if plan.stages else [PLAIN]
    return {"sentences": told, "regions": [region_facts(plan, each) for each in found]}


def _others(told: list[str]) -> list[str]:
    return ["Other choices, with the rest of the plan as it is:", *(f"- {line}" for line in told)] if told else []


def sentences(plan: Plan, regions: list[str]) -> list[str]:
    """What binds, where the time goes, what is told of the regions, what came next."""
    from .figures import bytes_text, memory_text, percent_text, seconds_text
    from .reasons import CAUSES

    predicted = plan.predicted
    share = predicted.peak_bytes_per_device / plan.memory_limit_bytes
    most = max(predicted.memory, key=lambda c: predicted.memory[c])
    binds = "Memory binds" if share >= TIGHT else "Memory does not bind"
    found = [
        f"{binds}: {bytes_text(predicted.peak_bytes_per_device)} of {bytes_text(plan.memory_limit_bytes)} per device "
        f"({percent_text(share)}), most of it {memory_text(most)} ({bytes_text(predicted.memory[most])})."
    ]
    if predicted.step_seconds:
        ranked = sorted(predicted.seconds.items(), key=lambda item: -item[1])
        told = [f"{CAUSES.get(c, c)} {percent_text(s / predicted.step_seconds)}" for c, s in ranked if s > 0][:4]
        found.append(f"A step of {seconds_text(predicted.step_seconds)} goes to {', '.join(told)}.")
    found += regions
    found += _next(plan)
    return found


def _next(plan: Plan) -> list[str]:
    from .figures import percent_text, seconds_text

    told = []
    for record in plan.runners_up[:NEXT]:
        if record.step_seconds is not None:
            slower = record.step_seconds / plan.predicted.step_seconds - 1
            mesh = " ".join(f"{k}={v}" for k, v in record.mesh.items())
            schedule = f", {record.schedule}" if record.schedule != "none" else ""
            told.append(
                f"Next shape: {mesh}{schedule}, {_cut(record)}: "
                f"{seconds_text(record.step_seconds)}, {percent_text(slower)} slower."
            )
    if plan.search.gap is not None and not plan.edited:
        told.append(
            f"No plan of the space takes less than {seconds_text(plan.search.bound_seconds)}: this one is within "
            f"{percent_text(plan.search.gap)} of that."
        )
    return told


def _cut(record: ShapeRecord) -> str:
    """ "2 microbatches of 4 samples"."""
    count, size = record.microbatches, record.micro_batch
    found = "1 microbatch" if count == 1 else f"{count} microbatches"
    return f"{found} of {size} {'sample' if size == 1 else 'samples'}" if size else found


def answer(plan: Plan, why_not: str, tell: Any) -> dict[str, Any]:
    """The plan with one more pin, from a fresh search, against the plan: figures of both, or why there is none."""
    from ..again import asked_again, check_change
    from ..profiles.store import default_path
    from .figures import bytes_text, percent_text, seconds_text
    from .reasons import CAUSES
    from .simulate import shape_text

    key, equals, value = why_not.partition("=")
    if not equals or not key or not value:
        raise UsageError(f"--why-not {why_not}: expected K=V, such as tp=8")
    check_change(key, value)
    was = plan.predicted
    try:
        other = asked_again(plan, {key: value}, store=default_path(), say=tell)
    except (Infeasible, PinError) as error:
        return {"pin": why_not, "feasible": False, "why": str(error), "sentences": [f"With {why_not}: {error}"]}
    now = other.predicted
    ratio = now.step_seconds / was.step_seconds - 1
    changed = {c: now.seconds.get(c, 0.0) - was.seconds.get(c, 0.0) for c in {**was.seconds, **now.seconds}}
    worst = [c for c in sorted(changed, key=lambda c: -abs(changed[c])) if changed[c]][:3]
    lines = [
        f"With {why_not}: {shape_text(other)}, instead of {shape_text(plan)}.",
        f"A step takes {seconds_text(now.step_seconds)} instead of {seconds_text(was.step_seconds)} "
        f"({'+' if ratio >= 0 else ''}{percent_text(ratio)}), and {bytes_text(now.peak_bytes_per_device)} per device instead of "
        f"{bytes_text(was.peak_bytes_per_device)}.",
        *(
            f"{CAUSES.get(c, c).capitalize()}: {'+' if changed[c] >= 0 else '-'}{seconds_text(abs(changed[c]))}."
            for c in worst
        ),
    ]
    return {
        "pin": why_not, "feasible": True, "step_seconds": now.step_seconds, "plan_step_seconds": was.step_seconds,
        "peak_bytes_per_device": now.peak_bytes_per_device, "plan_peak_bytes_per_device": was.peak_bytes_per_device,
        "seconds_change": changed, "shape": shape_text(other), "sentences": lines,
    }  # fmt: skip

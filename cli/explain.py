"""`shardwright explain PLAN [--why-not K=V]`: why a plan is as it is, in sentences, and what another choice would cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import Infeasible, PinError, UsageError
from .options import json_option

if TYPE_CHECKING:
    from ..planner.plan import Plan

TIGHT = 0.95
"""Share of the memory limit from which on it binds."""
NEXT = 3
"""Shapes that came next, told."""
CAUSES = {
    "compute": "computing", "activation_communication": "communicating activations",
    "parameter_communication": "communicating parameters and gradients", "recompute": "running ops again",
    "offload": "copying to and from the host", "optimizer": "the optimizer", "bubble": "waiting in the pipeline",
}  # fmt: skip


@click.command("explain")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--why-not", metavar="K=V", help="Search again with this pin (or devices, batch, seq, memory, link) and compare."
)
@json_option
def command(plan: Path, why_not: str | None, as_json: bool) -> None:
    """Say what binds a plan, what came next, and what one other choice would cost."""
    from ..garbage import held_back, leave_unswept
    from ..planner.planfile import load_plan
    from .edited import is_stale
    from .tables import print_json, progress, show

    loaded = load_plan(plan)
    if is_stale(loaded):
        raise UsageError(
            f"{plan} was edited: `shardwright report` or `run` price it again; explain a plan as it was made"
        )
    if why_not is None:
        found: dict[str, Any] = {"sentences": sentences(loaded)}
    else:
        leave_unswept()
        with held_back(), progress() as tell:
            found = answer(loaded, why_not, tell)
    if as_json:
        print_json(found)
        return
    show(*found["sentences"])


def sentences(plan: Plan) -> list[str]:
    """What binds, where the time goes, what every kind of layer does, what came next."""
    from .figures import bytes_text, percent_text, seconds_text

    predicted = plan.predicted
    share = predicted.peak_bytes_per_device / plan.memory_limit_bytes
    most = max(predicted.memory, key=lambda c: predicted.memory[c])
    binds = "Memory binds" if share >= TIGHT else "Memory does not bind"
    found = [
        f"{binds}: {bytes_text(predicted.peak_bytes_per_device)} of {bytes_text(plan.memory_limit_bytes)} per device "
        f"({percent_text(share)}), most of it {most} ({bytes_text(predicted.memory[most])})."
    ]
    if predicted.step_seconds:
        ranked = sorted(predicted.seconds.items(), key=lambda item: -item[1])
        told = [f"{CAUSES.get(c, c)} {percent_text(s / predicted.step_seconds)}" for c, s in ranked if s > 0][:4]
        found.append(f"A step of {seconds_text(predicted.step_seconds)} goes to {', '.join(told)}.")
    found += _regions(plan)
    found += _next(plan)
    return found


def _regions(plan: Plan) -> list[str]:
    from .figures import count_text

    told = []
    for region in plan.regions:
        stored = sorted({p.zero for p in region.parameters})
        parts = [f"layout {region.style}"] if region.style not in ("", "single") else []
        parts += [f"parameters {' and '.join(f'in ZeRO-{n}' if n else 'whole' for n in stored)}"] if stored else []
        parts += [f"{count_text(len(region.recompute))} ops run again ({region.policy})"] if region.recompute else []
        parts += [f"off the device: {', '.join(region.offload)}"] if region.offload else []
        told.append(f"Region {region.name} (x {region.repeats}): {'; '.join(parts) or 'nothing to decide'}.")
    return told


def _next(plan: Plan) -> list[str]:
    from .figures import percent_text, seconds_text

    told = []
    for record in plan.runners_up[:NEXT]:
        if record.step_seconds is not None:
            slower = record.step_seconds / plan.predicted.step_seconds - 1
            mesh = " ".join(f"{k}={v}" for k, v in record.mesh.items())
            schedule = f", {record.schedule}" if record.schedule != "none" else ""
            told.append(
                f"Next: {mesh}{schedule}, {record.microbatches} microbatches of {record.micro_batch}: "
                f"{seconds_text(record.step_seconds)}, {percent_text(slower)} slower."
            )
    if plan.search.gap is not None and not plan.edited:
        told.append(
            f"No plan of the space takes less than {seconds_text(plan.search.bound_seconds)}: this one is within "
            f"{percent_text(plan.search.gap)} of that."
        )
    return told


def answer(plan: Plan, why_not: str, tell: Any) -> dict[str, Any]:
    """The plan with one more pin, from a fresh search, against the plan: figures of both, or why there is none."""
    from ..again import asked_again, check_change
    from ..profiles.store import default_path
    from .figures import bytes_text, percent_text, seconds_text
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

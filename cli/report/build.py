"""A plan as one HTML page (page.py): template.html filled from the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...planner.plan import OpPlan, Plan, RegionPlan
from ...planner.planfile import dump_plan, write_whole
from ...planner.updates import BACKWARD
from ..candidates import NUMBERS, candidates, searched
from ..figures import (
    behind_texts,
    bytes_text,
    calibration_texts,
    interval_text,
    memory_text,
    percent_text,
    seconds_text,
    time_text,
)
from ..goals import NUMBERS as GOAL_NUMBERS
from ..goals import POINTS, TRIALS, goal_text, point_rows, trial_rows
from ..ledger import RUNS, run_rows
from ..placements import RegionSummary, alike, summaries, word
from ..reasons import modules_text
from ..results import comparison, verify_rows
from ..stages import mesh_rows, microbatch_text, pipeline_text, stage_rows, variant_rows
from ..tables import optimum_text
from .chartdata import chart_data
from .headline import headline, how, why
from .page import page
from .replayed import Replayed

if TYPE_CHECKING:
    from ...profiles.ledger import Entry

_COLOURS = 8
SECTIONS = (
    ("placements", "Model"), ("mesh", "Mesh"), ("timeline", "Timeline"), ("time", "Time"), ("memory", "Memory"),
    ("traffic", "Links"), ("offload", "Offload"), ("waterline", "Waterline"), ("search", "What else"),
    ("measured", "Measured"), ("origin", "Origin"),
)  # fmt: skip
"""(anchor, name) of what the page can be entered at."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One cause: its figure as text, its share of the whole, and which colour of the palette it has."""

    name: str
    value: float
    text: str
    share: str
    colour: int


Runs = Sequence["Entry"]
"""Runs of the ledger (profiles/ledger.py)."""


def write_report(
    plan: Plan, path: Path, result: Mapping[str, Any] | None = None, runs: Runs = (), seen: Replayed | None = None
) -> None:
    """Write the page of `plan` to `path`, whole or not at all."""
    write_whole(path, build(plan, result, runs, seen))


def build(plan: Plan, result: Mapping[str, Any] | None = None, runs: Runs = (), seen: Replayed | None = None) -> str:
    """The page of a plan; `result` is what a run measured, `runs` what the ledger has, `seen` its model captured anew."""
    seen = seen or Replayed()
    charts = {**chart_data(plan, runs, seen.ops), **seen.charts}
    time, memory = cause_bars(plan)
    return page(
        "template.html",
        charts,
        heights=_heights(charts),
        missing=seen.missing,
        facts_of=seen.ops,
        sections=SECTIONS,
        headline=headline(plan),
        how=how(plan),
        why=why(plan),
        plan=plan,
        title=plan.source.model,
        kind="Parallelism plan",
        what="shardwright plan",
        facts=_facts(plan),
        figures=key_figures(plan),
        regions=list(zip(plan.regions, summaries(plan), strict=True)),
        alike=alike(plan),
        modules=modules_text,
        parameters=_parameters,
        ops=_ops,
        counted=_counted,
        memory=memory,
        time=time,
        bytes_text=bytes_text,
        behind_texts=behind_texts,
        seconds_text=seconds_text,
        searched=searched(plan),
        runners_up=candidates(plan, plan.runners_up),
        numbers=NUMBERS | GOAL_NUMBERS,
        axes=mesh_rows(plan),
        pipeline=pipeline_text(plan),
        stages=stage_rows(plan),
        variants=variant_rows(plan),
        again=_again,
        microbatches=microbatch_text(plan),
        goal=goal_text(plan),
        trials=trial_rows(plan),
        trial_columns=TRIALS,
        points=point_rows(plan),
        point_columns=POINTS,
        optimum=optimum_text(plan),
        behind=behind_texts(plan),
        comparison=comparison(plan, result) if result and "step_seconds" in result else [],
        verified=verify_rows(result["verify"]) if result and result.get("verify") else [],
        losses=_losses(result),
        calibrations=calibration_texts(plan),
        runs=run_rows(runs),
        run_columns=RUNS,
        text=dump_plan(plan),
    )


def _facts(plan: Plan) -> list[tuple[str, str]]:
    """One line under the title: what is trained, how, and where."""
    source, precision = plan.source, plan.precision
    found = [("batch", str(source.batch))]
    if source.seq:
        found.append(("sequence", str(source.seq)))
    pipeline = pipeline_text(plan)
    where = str(plan.cluster.get("spec") or plan.cluster.get("name") or "")
    found += [("cluster", where), ("precision", precision.recipe)]
    found += [("inference", plan.phase)] if plan.phase else [("optimizer", plan.optimizer)]
    found += [("update", "in the backward pass")] if plan.update == BACKWARD else []
    found += [("pipeline", pipeline)] if pipeline else []
    return found + [("pinned", pin) for pin in plan.pins]


def key_figures(plan: Plan) -> list[tuple[str, str, str]]:
    """(name, figure, remark): what everybody asks first."""
    predicted, limit = plan.predicted, plan.memory_limit_bytes
    tokens = f"{predicted.tokens_per_second_per_device:,.0f}"
    return [
        (
            "Step",
            seconds_text(predicted.step_seconds),
            f"predicted; nine of ten {interval_text(predicted) or 'unknown'}",
        ),
        ("Throughput", tokens, "tokens per second and device"),
        ("Utilisation", percent_text(predicted.mfu), "model FLOPs over dense peak"),
        ("Peak memory", bytes_text(predicted.peak_bytes_per_device), f"per device, of {bytes_text(limit)}"),
        ("Optimality", "none" if plan.edited else percent_text(plan.search.gap), _gap_remark(plan)),
    ]


def _gap_remark(plan: Plan) -> str:
    if plan.edited:
        return "edited: no certificate"
    return "gap to the proven bound" + (", search interrupted" if plan.search.interrupted else "")


def _parameters(summary: RegionSummary, plan: Plan) -> list[str]:
    axes = tuple(axis.name for axis in plan.mesh)
    return [group.text(axes) for group in summary.parameters]


def _ops(region: RegionPlan, plan: Plan) -> list[tuple[OpPlan, list[tuple[str, str, str]]]]:
    """Each op with (word, choice, result) along every axis."""
    rows = []
    for op in region.ops:
        states = op.result or ("",) * len(plan.mesh)
        axes = [(word(op, i, plan.mesh), op.choice[i], states[i]) for i in range(len(plan.mesh))]
        rows.append((op, axes))
    return rows


def _again(region: RegionPlan) -> list[tuple[str, list[str]]]:
    """What runs again in the backward pass, by kind: names of ops, and copies that are gathered once more."""
    gathers = [name for name in region.recompute if " -> " in name]
    ops = [name for name in region.recompute if " -> " not in name]
    return [(kind, names) for kind, names in (("Ops", ops), ("Copies gathered", gathers)) if names]


def _counted(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}" if len(things) == 1 else f"{len(things)} {name}s"


def _heights(charts: Mapping[str, Any]) -> dict[str, int]:
    """Pixels of the charts whose height goes with what is in them."""
    mesh, ops, links = (charts.get(name, {}) for name in ("mesh", "placements", "links"))
    lines = -(-len(charts["regions"]["nodes"]) // 5)
    curves = len(charts.get("memory_time", {}).get("curves", ()))
    return {
        "regions": 20 + 90 * max(lines, 1),
        "placements": 90 + 34 * (len(ops.get("axes", ())) + 1),
        "mesh": 70 + 30 * (len(mesh.get("axes", ())) + len(mesh.get("levels", ()))),
        "timeline": 110 + 22 * len(charts.get("timeline", {}).get("rows", ())),
        "memory_time": 40 + 230 * -(-curves // 2) if curves > 1 else 280,
        "links": 70 + 46 * max(len(links.get("links", ())), 1),
    }


def cause_bars(plan: Plan) -> tuple[list[Bar], list[Bar]]:
    """Seconds of a step and bytes at the peak by cause, large first; shares are of the whole step and of the limit."""
    time, memory = _large_first(plan.predicted.seconds), _large_first(plan.predicted.memory)
    whole = max(sum(value for _, value in time), plan.predicted.step_seconds) or 1.0
    return (
        [Bar(time_text(k), v, seconds_text(v), percent_text(v / whole), i % _COLOURS) for i, (k, v) in enumerate(time)],
        [
            Bar(memory_text(k), v, bytes_text(v), percent_text(v / plan.memory_limit_bytes), i % _COLOURS)
            for i, (k, v) in enumerate(memory)
        ],
    )


def _large_first(causes: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(((k, v) for k, v in causes.items() if v > 0), key=lambda item: -item[1])


def _losses(result: Mapping[str, Any] | None) -> Sequence[str]:
    return [f"{value:.4f}" for value in result.get("losses", ())] if result else []

"""What a person sees in the terminal: the tables of a plan, and where things are printed (result: stdout, progress: stderr)."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ..planner.plan import Plan
from ..planner.updates import BACKWARD
from .candidates import NUMBERS, searched
from .figures import (
    behind_texts,
    bytes_text,
    calibration_texts,
    count_text,
    interval_text,
    memory_text,
    percent_text,
    seconds_text,
    time_text,
)
from .goals import NUMBERS as GOAL_NUMBERS
from .goals import POINTS, TRIALS, goal_text, point_rows, trial_rows
from .placements import alike, summaries
from .sheet import Prose, Sheet
from .stages import mesh_rows, microbatch_text, pipeline_text, stage_rows, variant_rows

_WIDTH = 120
_BAR = 24
_MOST_STAGES = 24
SPINNER = 3
"""Columns that the sign of progress and the end of its line take."""


def console(*, error: bool = False) -> Console:
    """A console that takes every string literally (a model's name is never markup)."""
    made = Console(stderr=error, markup=False, highlight=False, emoji=False, soft_wrap=False)
    return made if made.is_terminal else Console(
        stderr=error, markup=False, highlight=False, emoji=False, width=_WIDTH
    )  # fmt: skip


def show(*parts: RenderableType) -> None:
    """Print to stdout, texts wrapped between words."""
    out = console()
    for part in parts:
        out.print(Prose(part) if isinstance(part, str) else part)


def aside(text: str) -> None:
    """Print a line beside the result, to stderr."""
    console(error=True).print(Prose(text))


def print_json(value: Any) -> None:
    """Print one JSON value to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class Teller:
    """Shows what is going on, on stderr: one live line on a terminal, one line each elsewhere."""

    def __init__(self, out: Console, status: Status | None) -> None:
        self._out, self._status = out, status

    def __call__(self, phase: str) -> None:
        """Enter a phase."""
        if self._status is not None:
            line = Text(phase)
            line.truncate(self._out.width - SPINNER, overflow="ellipsis")
            self._status.update(line)
        else:
            self._out.print(f"... {phase}")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._out.print(Prose(text))


@contextmanager
def progress() -> Iterator[Teller]:
    """Show progress while the block runs."""
    out = console(error=True)
    if not out.is_terminal:
        yield Teller(out, None)
        return
    with out.status(Text("starting")) as status:
        yield Teller(out, status)


def table(*columns: str, title: str | None = None, right: tuple[int, ...] = (), gap: int = 3) -> Table:
    """An empty table, `gap` spaces between columns where there is room; the columns of `right` hold numbers."""
    made = Sheet(title=title, box=None, padding=(0, gap, 0, 0))
    for i, name in enumerate(columns):
        made.add_column(Text(name), justify="right" if i in right else "left")
    return made


def estimate_line(estimate: Mapping[str, float]) -> str:
    """What is known before the search: parameters, bytes by cause if nothing were sharded, batch, devices and their limit."""
    frozen = estimate["parameters"] - estimate["trainable"]
    counted = f"{count_text(estimate['parameters'])} parameters" + (f" ({count_text(frozen)} frozen)" if frozen else "")
    causes = (("parameters", "parameter_bytes"), ("gradients", "gradient_bytes"), ("optimizer", "optimizer_bytes"))
    kept = ", ".join(f"{name} {bytes_text(estimate[key])}" for name, key in causes)
    asked = f"batch {estimate['batch']:.0f} ({count_text(estimate['tokens'])} tokens)"
    where = f"{estimate['devices']:.0f} x {bytes_text(estimate['limit_bytes'])}"
    return f"{counted}; unsharded: {kept}; {asked} on {where}"


def plan_tables(plan: Plan, seconds: Mapping[str, float] | None = None) -> Group:
    """The whole plan on a page."""
    parts: list[RenderableType] = [
        _summary(plan), _mesh(plan), *_stages(plan), _regions(plan), *_variants(plan), _memory(plan), _time(plan)
    ]  # fmt: skip
    if plan.predicted.traffic:
        parts.append(_traffic(plan))
    parts += [*_goals(plan), _search(plan, seconds or {}), *_notes(plan)]
    return Group(*(each for part in parts for each in (part, Text())))


def headline(plan: Plan) -> dict[str, str]:
    """The few figures everybody asks for first, by name."""
    source, predicted = plan.source, plan.predicted
    pipeline = pipeline_text(plan)
    devices = plan.pipeline.ranks * math.prod(axis.size for axis in plan.mesh)
    shape = f"batch {source.batch}" + (f", sequence {source.seq}" if source.seq else "")
    found = {
        "model": f"{source.model} ({shape})",
        "cluster": f"{plan.cluster.get('spec') or plan.cluster.get('name')}, {devices} devices",
        **kind_text(plan),
        **({"pipeline": pipeline} if pipeline else {}),
        "step": f"{seconds_text(predicted.step_seconds)} predicted; nine of ten runs {interval_text(predicted) or 'unknown'}",
        "throughput": f"{predicted.tokens_per_second_per_device:,.0f} tokens per second and device",
        "mfu": percent_text(predicted.mfu),
        "memory": f"{bytes_text(predicted.peak_bytes_per_device)} of {bytes_text(plan.memory_limit_bytes)} per device",
        "semantics": plan.semantics + (", edited: no certificate" if plan.edited else ""),
        "optimum": optimum_text(plan),
        **({"objective": goal} if (goal := goal_text(plan)) else {}),
    }
    if plan.lowerings:
        found["lowerings"] = ", ".join(f"{target} by {name}" for target, name in plan.lowerings.items())
    return found | ({"pins": " ".join(plan.pins)} if plan.pins else {})


def kind_text(plan: Plan) -> dict[str, str]:
    """What is planned: training with its optimizer, or a phase of inference."""
    precision = f"{plan.precision.recipe} ({plan.precision.compute})"
    if plan.phase:
        return {"inference": f"{plan.phase}, {precision}"}
    when = ", updates in the backward pass" if plan.update == BACKWARD else ""
    return {"training": f"{precision}, {plan.optimizer}{when}"}


def optimum_text(plan: Plan) -> str:
    """What was proven: the gap to the best bound under the cost model."""
    if plan.edited:
        return "no certificate: the plan was edited"
    if plan.search.gap < 5e-5:
        proven = f"proven: no plan of the space is faster ({seconds_text(plan.search.bound_seconds)})"
    else:
        proven = (
            f"within {percent_text(plan.search.gap)} of the proven bound ({seconds_text(plan.search.bound_seconds)})"
        )
    if plan.objective == "memory":
        known = plan.search.bound_seconds > 0.0
        proven = f"{proven}, of those that need no more memory" if known else "nothing is proven of its seconds"
    return f"{proven}, search interrupted" if plan.search.interrupted else proven


def _summary(plan: Plan) -> Table:
    made = Sheet(box=None, show_header=False, padding=(0, 3, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column()
    for name, value in headline(plan).items():
        made.add_row(Text(name), Text(value))
    return made


def _mesh(plan: Plan) -> Table:
    title = f"Mesh: {microbatch_text(plan)}"
    made = table("axis", "ranks", "role", "crosses", title=title, right=(1,))
    for name, size, role, link in mesh_rows(plan):
        made.add_row(Text(name), str(size), Text(role), Text(link))
    return made


def _stages(plan: Plan) -> list[RenderableType]:
    rows = stage_rows(plan, _MOST_STAGES)
    if not rows:
        return []
    title = "Stages: seconds of one microbatch, peak of the rank"
    pools = ("devices",) if plan.pools else ()
    right = tuple(k + len(pools) for k in (3, 4, 5))
    made = table("stage", "rank", *pools, "runs", "forward", "backward", "peak", title=title, right=right)
    for row in rows[:_MOST_STAGES]:
        where = [Text(row.pool) for _ in pools]
        made.add_row(row.stages, row.ranks, *where, Text(row.runs), row.forward, row.backward, row.peak)
    left = len(rows) - _MOST_STAGES
    return [Group(made, Text(f"{left} more rows of stages (the report has all)")) if left > 0 else made]


def _variants(plan: Plan) -> list[RenderableType]:
    """What is not simply kept on the device; a column only where a region has something to say in it."""
    rows = variant_rows(plan)
    names = {"again": "runs again", "policy": "recompute", "away": "off the device", "layout": "between layers"}
    used = [name for name in names if any(getattr(row, name) for row in rows if name != "policy" or row.again)]
    made = table("region", *(names[name] for name in used), title="Recompute, offload and layouts")
    for row in rows:
        made.add_row(Text(row.name), *(Text(getattr(row, name)) for name in used))
    return [made] if rows else []


def _regions(plan: Plan) -> Table:
    axes = tuple(axis.name for axis in plan.mesh)
    made = table("region", "repeats", "ops", *axes, "parameters", title="Regions", right=(1, 2))
    for region, like in zip(summaries(plan), alike(plan), strict=True):
        cells = (Text(region.name), str(region.repeats), str(region.ops))
        if like:
            made.add_row(*cells, Text(f"as {like}"))
            continue
        stored = "\n".join(group.text(axes) for group in region.parameters)
        made.add_row(*cells, *map(Text, region.axes), Text(stored or "none"))
    return made


def _memory(plan: Plan) -> Table:
    predicted, limit = plan.predicted, plan.memory_limit_bytes
    made = table("cause", "bytes", "of limit", "", title="Memory per device at the peak", right=(1, 2))
    for cause, size in predicted.memory.items():
        if size:
            made.add_row(memory_text(cause), bytes_text(size), percent_text(size / limit), _bar(size / limit))
    peak = predicted.peak_bytes_per_device
    made.add_row("peak", bytes_text(peak), percent_text(peak / limit), _bar(peak / limit), style="bold")
    made.add_row("limit", bytes_text(limit), "", "")
    for where, told in behind_texts(plan):
        made.add_row(where, told, "", "")
    return made


def _time(plan: Plan) -> Table:
    predicted = plan.predicted
    made = table("cause", "seconds", "of step", "", title="Predicted time of a step", right=(1, 2))
    for cause, value in predicted.seconds.items():
        if value:
            share = value / predicted.step_seconds if predicted.step_seconds else 0.0
            made.add_row(time_text(cause), seconds_text(value), percent_text(share), _bar(share))
    made.add_row("step", seconds_text(predicted.step_seconds), "", "", style="bold")
    return made


def _traffic(plan: Plan) -> Table:
    made = table(
        "collective", "axis", "calls", "bytes", "seconds", title="Collectives per rank and step", right=(2, 3, 4)
    )
    for row in plan.predicted.traffic:
        made.add_row(row.collective, row.axis, str(row.count), bytes_text(row.bytes), seconds_text(row.seconds))
    return made


def _search(plan: Plan, seconds: Mapping[str, float]) -> RenderableType:
    found = searched(plan)
    right = tuple(i for i, name in enumerate(found.columns) if name in NUMBERS)
    made = table(*(name.replace("outcome", "") for name in found.columns), title="Search", right=right, gap=2)
    for cells in found.rows:
        made.add_row(*map(Text, cells))
    lines: list[RenderableType] = [made, *([Prose(found.more)] if found.more else [])]
    if seconds:
        spent = ", ".join(f"{name} {seconds_text(value)}" for name, value in seconds.items())
        lines.append(Text(f"took {seconds_text(sum(seconds.values()))}: {spent}", style="dim"))
    return Group(*lines)


def _goals(plan: Plan) -> list[RenderableType]:
    """The numbers of devices looked at, and the frontier, where they were asked for."""
    found: list[RenderableType] = []
    for title, columns, rows in (
        ("Numbers of devices", TRIALS, trial_rows(plan)), ("Frontier: time, memory, devices", POINTS, point_rows(plan)),
    ):  # fmt: skip
        right = tuple(i for i, name in enumerate(columns) if name in GOAL_NUMBERS)
        made = table(*columns, title=title, right=right, gap=2)
        for cells in rows:
            made.add_row(*map(Text, cells))
        if rows:
            found.append(made)
    return found


def _notes(plan: Plan) -> list[RenderableType]:
    sources = (f"{cause} prices: {source}" for cause, source in plan.predicted.sources.items())
    lines = [*plan.notes, *sources, *calibration_texts(plan), *(f"given up: {text}" for text in plan.search.given_up)]
    return [Group(Text("Notes", style="bold"), Prose(*lines, first="- "))] if lines else []


def _bar(fraction: float) -> Text:
    filled = max(0, min(_BAR, round(fraction * _BAR)))
    return Text("█" * filled, style="cyan" if fraction <= 1 else "red")

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

from ..planner.plan import Plan, ShapeRecord
from .figures import bytes_text, count_text, memory_text, mesh_text, percent_text, seconds_text, time_text
from .placements import summaries

_WIDTH = 120
_BAR = 30


def console(*, error: bool = False) -> Console:
    """A console that takes every string literally (a model's name is never markup)."""
    made = Console(stderr=error, markup=False, highlight=False, emoji=False, soft_wrap=False)
    return made if made.is_terminal else Console(
        stderr=error, markup=False, highlight=False, emoji=False, width=_WIDTH
    )  # fmt: skip


def show(*parts: RenderableType) -> None:
    """Print to stdout."""
    out = console()
    for part in parts:
        out.print(part)


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
            self._status.update(Text(phase))
        else:
            self._out.print(f"... {phase}")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._out.print(text)


@contextmanager
def progress() -> Iterator[Teller]:
    """Show progress while the block runs."""
    out = console(error=True)
    if not out.is_terminal:
        yield Teller(out, None)
        return
    with out.status(Text("starting")) as status:
        yield Teller(out, status)


def table(*columns: str, title: str | None = None, right: tuple[int, ...] = ()) -> Table:
    """An empty table without a box; the columns of `right` hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    made.min_width = len(title or "")
    for i, name in enumerate(columns):
        made.add_column(Text(name), justify="right" if i in right else "left", style=None, overflow="fold")
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
    parts: list[RenderableType] = [_summary(plan), _mesh(plan), _regions(plan), _memory(plan), _time(plan)]
    if plan.predicted.traffic:
        parts.append(_traffic(plan))
    parts += [_search(plan, seconds or {}), *_notes(plan)]
    return Group(*(each for part in parts for each in (part, Text())))


def headline(plan: Plan) -> dict[str, str]:
    """The few figures everybody asks for first, by name."""
    source, predicted = plan.source, plan.predicted
    shape = f"batch {source.batch}" + (f", sequence {source.seq}" if source.seq else "")
    found = {
        "model": f"{source.model} ({shape})",
        "cluster": f"{plan.cluster.get('spec') or plan.cluster.get('name')}, {math.prod(a.size for a in plan.mesh)} devices",
        "training": f"{plan.precision.recipe} ({plan.precision.compute}), {plan.optimizer}",
        "step": f"{seconds_text(predicted.step_seconds)} predicted, give or take {percent_text(predicted.error)}",
        "throughput": f"{predicted.tokens_per_second_per_device:,.0f} tokens per second and device",
        "mfu": percent_text(predicted.mfu),
        "memory": f"{bytes_text(predicted.peak_bytes_per_device)} of {bytes_text(plan.memory_limit_bytes)} per device",
        "semantics": plan.semantics + (", edited: no certificate" if plan.edited else ""),
        "optimum": optimum_text(plan),
    }
    return found | ({"pins": " ".join(plan.pins)} if plan.pins else {})


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
    return f"{proven}, search interrupted" if plan.search.interrupted else proven


def _summary(plan: Plan) -> Table:
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in headline(plan).items():
        made.add_row(Text(name), Text(value))
    return made


def _mesh(plan: Plan) -> Table:
    title = f"Mesh: {microbatch_text(plan)}"
    made = table("axis", "ranks", "role", "crosses", title=title, right=(1,))
    for axis in plan.mesh:
        made.add_row(axis.name, str(axis.size), axis.role, axis.link)
    return made


def _regions(plan: Plan) -> Table:
    axes = tuple(axis.name for axis in plan.mesh)
    made = table("region", "repeats", "ops", *axes, "parameters", title="Regions", right=(1, 2))
    for region in summaries(plan):
        stored = "\n".join(group.text(axes) for group in region.parameters)
        made.add_row(
            Text(region.name), str(region.repeats), str(region.ops), *map(Text, region.axes), Text(stored or "none")
        )
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
    made = table("mesh", "microbatches", "bound", "step", "peak", "", title="Search", right=(1, 2, 3, 4))
    for cells in shape_rows(plan):
        made.add_row(*map(Text, cells))
    lines: list[RenderableType] = [made]
    if seconds:
        spent = ", ".join(f"{name} {seconds_text(value)}" for name, value in seconds.items())
        lines.append(Text(f"took {seconds_text(sum(seconds.values()))}: {spent}", style="dim"))
    return Group(*lines)


def microbatch_text(plan: Plan) -> str:
    """ "2 microbatches of 4 samples per data-parallel rank"."""
    count, size = plan.pipeline.microbatches, plan.pipeline.micro_batch
    parts = f"{count} microbatches of {_samples(size)}" if count > 1 else _samples(size)
    return f"{parts} per data-parallel rank"


def _samples(count: int) -> str:
    return "1 sample" if count == 1 else f"{count} samples"


def shape_rows(plan: Plan) -> list[tuple[str, str, str, str, str, str]]:
    """The candidates of the search as text, the plan's own called "chosen"; those without figures share a line per mesh."""
    mine = {axis.name: axis.size for axis in plan.mesh}
    rows: list[tuple[str, str, str, str, str, str]] = []
    bare: dict[tuple[str, str], list[str]] = {}
    for record in plan.search.shapes:
        cells = shape_cells(record)
        if not any(cells[2:5]):
            bare.setdefault((cells[0], cells[5]), []).append(cells[1])
            continue
        own = (
            record.mesh == mine
            and record.microbatches == plan.pipeline.microbatches
            and record.step_seconds is not None
        )
        rows.append((*cells[:5], "chosen") if own and not plan.edited else cells)
    return rows + [(mesh, ", ".join(counts), "", "", "", outcome) for (mesh, outcome), counts in bare.items()]


def shape_cells(record: ShapeRecord) -> tuple[str, str, str, str, str, str]:
    """A candidate of the search as text: mesh, microbatches, bound, step, peak, and what became of it."""
    return (
        mesh_text(list(record.mesh), list(record.mesh.values())),
        str(record.microbatches),
        seconds_text(record.bound_seconds) if record.bound_seconds is not None else "",
        seconds_text(record.step_seconds) if record.step_seconds is not None else "",
        bytes_text(record.peak_bytes) if record.peak_bytes is not None else "",
        f"{record.status}: {record.reason}" if record.reason else record.status,
    )


def _notes(plan: Plan) -> list[RenderableType]:
    sources = (f"{cause} prices: {source}" for cause, source in plan.predicted.sources.items())
    lines = [*plan.notes, *sources, *(f"given up: {text}" for text in plan.search.given_up)]
    return [Group(Text("Notes", style="bold"), *(Text(f"- {line}") for line in lines))] if lines else []


def _bar(fraction: float) -> Text:
    filled = max(0, min(_BAR, round(fraction * _BAR)))
    return Text("█" * filled, style="cyan" if fraction <= 1 else "red")

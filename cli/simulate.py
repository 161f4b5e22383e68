"""`shardwright simulate PLAN`: the step of a plan rank by rank and as a trace; with `--sweep` plans over a grid, with `--largest`
the largest size that has one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import Infeasible, PinError, UsageError
from .options import json_option, output_option

if TYPE_CHECKING:
    from ..planner.plan import Plan
    from ..planner.replay import Replay

GROWING = ("micro_batch", "seq")
"""What `--largest` can be asked of."""
MOST = 64
"""Points of a sweep."""


@click.command("simulate")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--sweep", "sweeps", multiple=True, metavar="K=V,V,..",
    help="devices, batch, seq, memory, link (a factor on the outermost link), or any pin; several make a grid.",
)  # fmt: skip
@click.option(
    "--largest",
    type=click.Choice(GROWING),
    help="Find the largest that fits, the other decisions searched again each time.",
)
@output_option("--trace", help="Trace of the predicted step to write (Chrome, Perfetto).")
@output_option("--report", help="With --sweep: HTML page with charts to write.")
@json_option
def command(
    plan: Path, sweeps: tuple[str, ...], largest: str | None, trace: Path | None, report: Path | None, as_json: bool
) -> None:  # fmt: skip
    """Play the step of PLAN: what every pipeline rank does, how long it waits, and its most bytes.

    With --sweep, plan PLAN's model again at every point of a grid instead, with its pins, precision and objective; a point
    where nothing fits says what the least is that any plan needs.

    With --largest micro_batch (samples per data-parallel rank and microbatch; the batch grows with it) or seq, find the largest
    of it that still has a plan: doubled until nothing fits, then halved between, exact up to a sixteenth.
    """
    from ..planner.planfile import load_plan

    if largest is not None:
        from .largest import answer_largest

        if sweeps or trace is not None or report is not None:
            raise UsageError("--largest goes alone: leave out --sweep, --trace and --report")
        answer_largest(load_plan(plan), plan, largest, as_json)
        return
    if sweeps and trace is not None:
        raise UsageError("--trace is of the plan itself; leave out --sweep")
    if not sweeps and report is not None:
        raise UsageError("--report draws a --sweep; `shardwright report` draws the plan itself")
    if not sweeps:
        _play(load_plan(plan), plan, trace, as_json)
        return
    from ..again import check_change
    from ..garbage import held_back, leave_unswept
    from .tables import aside, print_json, progress, show

    points = grid(sweeps)
    for changes in points:
        for key, value in changes.items():
            check_change(key, value)
    loaded = load_plan(plan)
    leave_unswept()
    with held_back(), progress() as tell:
        rows = []
        for i, changes in enumerate(points):
            tell(f"point {i + 1} of {len(points)}: {_text(changes)}")
            rows.append(point(loaded, changes))
    if report is not None:
        from .report.sweep import write_sweep

        write_sweep(loaded, rows, report)
    if as_json:
        print_json({"plan": str(plan), "points": rows})
        return
    show(sweep_table(rows))
    if report is not None:
        aside(f"wrote {report}")


def _play(plan: Plan, path: Path, trace: Path | None, as_json: bool) -> None:
    """Show the step of a plan, and write its trace."""
    import json

    from ..planner.planfile import write_whole
    from ..planner.replay import replay
    from ..planner.trace import trace_events
    from .edited import captured, priced_again
    from .tables import aside, print_json, progress, show

    with progress() as tell:
        plan = priced_again(plan, path, tell)
        found = replay(plan, *captured(plan, tell))
    rows = rank_rows(found)
    if trace is not None:
        write_whole(trace, json.dumps(trace_events(found)))
    if as_json:
        print_json({"plan": str(path), "step_seconds": found.timeline.step_seconds, "ranks": rows})
        return
    show(rank_table(rows, found.timeline.step_seconds))
    if trace is not None:
        aside(f"wrote {trace}")


def rank_rows(found: Replay) -> list[dict[str, Any]]:
    """By pipeline rank: seconds it computes, sends and waits, the share of waiting, and its most bytes."""
    rows = []
    for rank, (tasks, memory) in enumerate(zip(found.timeline.tasks, found.memory, strict=True)):
        sends = sum(t.seconds for t in tasks if t.lane.startswith("send"))
        busy = found.timeline.busy_seconds[rank]
        rows.append({
            "rank": rank, "devices": found.alike, "busy_seconds": busy, "send_seconds": sends,
            "waiting_seconds": found.timeline.step_seconds - busy, "bubble": found.timeline.bubble[rank],
            "peak_bytes": round(memory.peak_bytes),
        })  # fmt: skip
    return rows


def rank_table(rows: Sequence[Mapping[str, Any]], step_seconds: float) -> Any:
    """A row per pipeline rank."""
    from rich.text import Text

    from .figures import bytes_text, percent_text, seconds_text
    from .tables import table

    made = table(
        "rank", "devices", "works", "waits", "of step", "sends", "peak", title=f"A step of {seconds_text(step_seconds)}",
        right=(0, 1, 2, 3, 4, 5, 6),
    )  # fmt: skip
    for row in rows:
        cells = (
            str(row["rank"]), str(row["devices"]), seconds_text(row["busy_seconds"]), seconds_text(row["waiting_seconds"]),
            percent_text(row["bubble"]), seconds_text(row["send_seconds"]), bytes_text(row["peak_bytes"]),
        )  # fmt: skip
        made.add_row(*map(Text, cells))
    return made


def grid(sweeps: Sequence[str]) -> list[dict[str, str]]:
    """The points of a sweep, the last key fastest; raises UsageError for what is no `K=V,V`."""
    axes = []
    for text in sweeps:
        key, equals, values = text.partition("=")
        if not equals or not all(values.split(",")):
            raise UsageError(f"--sweep {text}: expected K=V,V,.. such as devices=8,16,32")
        axes.append([(key, value) for value in values.split(",")])
    keys = [axis[0][0] for axis in axes]
    if len(set(keys)) < len(keys):
        raise UsageError(f"--sweep {keys[-1]}: the key stands twice; give all its values at once")
    points = [dict(each) for each in itertools.product(*axes)]
    if len(points) > MOST:
        raise UsageError(f"--sweep: {len(points)} points; at most {MOST} at a time")
    return points


def point(plan: Plan, changes: Mapping[str, str]) -> dict[str, Any]:
    """The plan of one point in figures, or why there is none."""
    from ..again import asked_again
    from ..profiles.store import default_path

    try:
        found = asked_again(plan, changes, store=default_path())
    except (Infeasible, PinError) as error:
        return {"changes": dict(changes), "why": str(error).splitlines()[0]}
    predicted, source = found.predicted, found.source
    return {
        "changes": dict(changes), "step_seconds": predicted.step_seconds,
        "step_seconds_low": predicted.step_seconds_low, "step_seconds_high": predicted.step_seconds_high,
        "samples_per_second": source.batch / predicted.step_seconds,
        "tokens_per_second_per_device": predicted.tokens_per_second_per_device,
        "peak_bytes_per_device": predicted.peak_bytes_per_device, "memory_limit_bytes": found.memory_limit_bytes,
        "gap": found.search.gap, "shape": shape_text(found),
    }  # fmt: skip


def shape_text(plan: Plan) -> str:
    """Degrees, schedule and microbatches in a few words."""
    p = plan.pipeline
    sizes = [f"pp={p.ranks}"] if p.ranks > 1 else []
    sizes += [f"{axis.name}={axis.size}" for axis in plan.mesh if axis.size > 1]
    schedule = (f" {p.schedule}" + (f" x {p.chunks}" if p.chunks > 1 else "")) if p.schedule != "none" else ""
    cut = "1 microbatch" if p.microbatches == 1 else f"{p.microbatches} microbatches"
    return f"{' '.join(sizes) or 'one device'}{schedule}, {cut} of {p.micro_batch}"


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A row per point."""
    from rich.text import Text

    from .figures import bytes_text, seconds_text
    from .tables import table

    made = table("point", "step", "samples/s", "peak", "shape", right=(1, 2, 3), gap=2)
    for row in rows:
        cells = [_text(row["changes"])]
        if "why" in row:
            cells += ["", "", "", row["why"]]
        else:
            rate = f"{row['samples_per_second']:,.{0 if row['samples_per_second'] >= 100 else 2}f}"
            cells += [
                seconds_text(row["step_seconds"]), rate, bytes_text(row["peak_bytes_per_device"]), row["shape"]
            ]  # fmt: skip
        made.add_row(*(Text(cell) for cell in cells))
    return made


def _text(changes: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items())

"""`shardwright simulate PLAN --sweep K=V,V`: what the same model would take with other devices, batches, memory or links."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import Infeasible, PinError, UsageError
from .options import json_option

if TYPE_CHECKING:
    from ..planner.plan import Plan

MOST = 64
"""Points of a sweep."""


@click.command("simulate")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--sweep", "sweeps", multiple=True, required=True, metavar="K=V,V,..",
    help="devices, batch, seq, memory, link (a factor on the outermost link), or any pin; several make a grid.",
)  # fmt: skip
@json_option
def command(plan: Path, sweeps: tuple[str, ...], as_json: bool) -> None:
    """Plan PLAN's model again at every point of a grid, with its pins, precision and objective.

    Every point is a search of its own; one where nothing fits says what the least is that any plan needs.
    """
    from ..again import check_change
    from ..garbage import held_back, leave_unswept
    from ..planner.planfile import load_plan
    from .tables import print_json, progress, show

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
    if as_json:
        print_json({"plan": str(plan), "points": rows})
    else:
        show(sweep_table(rows))


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
    sizes = [f"pp={plan.pipeline.stages}"] if plan.pipeline.stages > 1 else []
    sizes += [f"{axis.name}={axis.size}" for axis in plan.mesh if axis.size > 1]
    schedule = f" {plan.pipeline.schedule}" if plan.pipeline.schedule != "none" else ""
    return f"{' '.join(sizes) or 'one device'}{schedule}, {plan.pipeline.microbatches} x {plan.pipeline.micro_batch}"


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

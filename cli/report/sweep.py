"""Plans over a grid (`simulate --sweep --report`) as one HTML page (page.py): step, throughput and memory at every point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...planner.plan import Plan
from ...planner.planfile import write_whole
from ..figures import bytes_text, interval_text, seconds_text
from .page import page

Point = Mapping[str, Any]
"""A point of a sweep as `simulate --sweep --json` has it."""

HEIGHT = 300
"""Pixels of a chart."""


def write_sweep(plan: Plan, points: Sequence[Point], path: Path) -> None:
    """Write the page of a sweep of a plan to `path`, whole or not at all."""
    write_whole(path, build_sweep(plan, points))


def build_sweep(plan: Plan, points: Sequence[Point]) -> str:
    """The page."""
    fitting = [point for point in points if "why" not in point]
    return page(
        "sweep.html",
        {"sweep_step": chart(points, "step_seconds"), "sweep_rate": chart(points, "samples_per_second"),
         "sweep_peak": chart(points, "peak_bytes_per_device")} if fitting else {},
        title=plan.source.model,
        kind="What if",
        what="shardwright simulate --sweep",
        facts=[
            ("plan", f"batch {plan.source.batch}" + (f", sequence {plan.source.seq}" if plan.source.seq else "")),
            ("cluster", str(plan.cluster.get("spec") or plan.cluster.get("name"))),
            ("step of the plan", seconds_text(plan.predicted.step_seconds)),
            ("nine of ten runs", interval_text(plan.predicted) or "unknown"),
        ],
        rows=[_row(point) for point in points],
        keys=list(points[0]["changes"]),
        height=HEIGHT,
    )  # fmt: skip


def chart(points: Sequence[Point], figure: str) -> dict[str, Any]:
    """What one chart draws: along the last key of the sweep, a line for each setting of the others under which
    anything fits, with None where nothing does."""
    *others, last = points[0]["changes"]
    along = list(dict.fromkeys(point["changes"][last] for point in points))
    lines: dict[str, dict[str, Point]] = {}
    for point in points:
        name = " ".join(f"{key}={point['changes'][key]}" for key in others) or last
        lines.setdefault(name, {})[point["changes"][last]] = point
    return {
        "key": last,
        "along": along,
        "lines": [
            [name, [_drawn(own[value], figure) for value in along]]
            for name, own in lines.items() if any("why" not in point for point in own.values())
        ],
    }  # fmt: skip


def _drawn(point: Point, figure: str) -> list[Any] | None:
    """[figure, low, high, what its tooltip says]; the interval is of the step alone, the limit of the bytes."""
    if "why" in point:
        return None
    low = high = None
    if figure == "step_seconds":
        low, high = point["step_seconds_low"] or None, point["step_seconds_high"] or None
    elif figure == "peak_bytes_per_device":
        high = point["memory_limit_bytes"]
    return [point[figure], low, high, point["shape"]]


def _row(point: Point) -> tuple[list[str], str, str, str, str, str]:
    """(values of the keys, step, samples a second, peak, limit, shape or why there is none)."""
    values = list(point["changes"].values())
    if "why" in point:
        return values, "", "", "", "", point["why"]
    return (
        values, seconds_text(point["step_seconds"]), f"{point['samples_per_second']:,.2f}",
        bytes_text(point["peak_bytes_per_device"]), bytes_text(point["memory_limit_bytes"]), point["shape"],
    )  # fmt: skip

"""What passes do to a model as one HTML page (page.py): waterline and efficiency gap before and after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...planner.planfile import write_whole
from ...planner.waterline import PARTS, Totals, Waterline, by_target
from ..figures import bytes_text, change_text, count_text, percent_text, seconds_text
from ..listings import signed
from . import gapplot, waterplot
from .page import page

NAMES: Mapping[str, str] = {
    "compute": "Ideal: FLOPs at peak", "memory": "Bound by memory bandwidth", "launch": "Starting kernels",
    "shortfall": "Kernels below peak and bandwidth",
}  # fmt: skip
"""Parts of seconds as people read them."""

LARGEST = 15
"""Kinds of ops in the table of gaps."""

Lines = tuple[Waterline, Waterline]


def write_passes(path: Path, model: str, found: Mapping[str, Any], lines: Lines) -> None:
    """Write the page of what `check --passes` found to `path`, whole or not at all."""
    write_whole(path, build_passes(model, found, lines))


def build_passes(model: str, found: Mapping[str, Any], lines: Lines) -> str:
    """The page; `lines` are the waterlines before and after. Raises UsageError where no op takes time."""
    before, after = lines
    longest = max(line.totals.seconds for line in lines)
    if min(line.totals.seconds for line in lines) <= 0.0:
        raise UsageError(f"{model}: no op of it takes time by price, so there is nothing to draw; leave out --report")
    return page(
        "passes.html",
        title=model,
        kind="Graph passes",
        what="shardwright passes",
        facts=_facts(found, before),
        figures=_figures(*(line.totals for line in lines)),
        parts=tuple(NAMES.items()),
        water=waterplot,
        waters=[
            waterplot.water_plot(f"{name} the passes", line, longest)
            for name, line in zip(("Before", "After"), lines, strict=True)
        ],
        sums=_sums(before.totals, after.totals),
        gap=gapplot,
        plot=gapplot.gap_plot(before, after),
        largest=_largest(before, after),
        passes=_passes(found["passes"]),
    )


def _facts(found: Mapping[str, Any], line: Waterline) -> list[tuple[str, str]]:
    return [
        ("device", str(found["cluster"])),
        ("computes in", str(found["dtype"])),
        ("peak", f"{count_text(line.peak_flops)}FLOP/s"),
        ("bandwidth", f"{line.bytes_per_second / 1e9:,.0f} GB/s"),
        *((name, str(found[name])) for name in ("batch", "sequence") if found.get(name)),
    ]


def _figures(before: Totals, after: Totals) -> list[tuple[str, str, str]]:
    """(name, figure, remark): after the passes, and what was there before."""

    def remark(name: str, was: float, now: float) -> str:
        return f"{name} before" + (f"; {change_text(now / was - 1)}" if was else "")

    return [
        ("Step", seconds_text(after.seconds), remark(seconds_text(before.seconds), before.seconds, after.seconds)),
        ("Ideal", seconds_text(after.ideal_seconds), f"{seconds_text(before.ideal_seconds)} before; FLOPs at peak"),
        ("Efficiency", percent_text(after.efficiency), f"{percent_text(before.efficiency)} before; ideal over predicted"),
        ("Memory traffic", bytes_text(after.bytes), remark(bytes_text(before.bytes), before.bytes, after.bytes)),
        ("Ops", f"{after.calls:,}", remark(f"{before.calls:,}", before.calls, after.calls)),
    ]  # fmt: skip


def _sums(before: Totals, after: Totals) -> list[list[str]]:
    rows = [
        (NAMES[part], was, now) for part, was, now in zip(PARTS, before.parts, after.parts, strict=True)
    ] + [("All", before.seconds, after.seconds)]  # fmt: skip
    return [
        [
            name,
            seconds_text(was), percent_text(was / before.seconds), seconds_text(now), percent_text(now / after.seconds),
        ]
        for name, was, now in rows
    ]  # fmt: skip


def _largest(before: Waterline, after: Waterline) -> list[list[str]]:
    """The kinds of ops with the largest gaps on either side."""
    was, now = by_target(before.moments), by_target(after.moments)
    gaps = {name: max(own[name].gap_seconds for own in (was, now) if name in own) for name in was | now}
    order = sorted(gaps, key=lambda name: (-gaps[name], name))[:LARGEST]
    return [[name, *_cells(was.get(name)), *_cells(now.get(name))] for name in order]


def _cells(one: Totals | None) -> list[str]:
    if one is None:
        return ["", "", "", ""]
    return [str(one.calls), seconds_text(one.seconds), seconds_text(one.gap_seconds), percent_text(one.efficiency)]


def _passes(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """(name, nodes, seconds, saved bytes, remark) of optional passes."""
    made = []
    for row in rows:
        if "applied" not in row:
            continue
        if not row["applied"]:
            made.append((row["name"], "", "", "", f"not applied: {row['why_not']}"))
            continue
        nodes = f"{row['nodes_after'] - row['nodes_before']:+d}"
        gains = signed(row["gain_seconds"], seconds_text), signed(row["gain_saved_bytes"], bytes_text)
        made.append(
            (row["name"], nodes, *gains, f"verified: {row['verified']}" if "verified" in row else "not verified")
        )
    return made

"""What the charts of a plan's report draw, as plain data: cli/report/charts.js turns each entry into a chart of that name.

Texts are made here (figures.py), so that charts, tables and terminal say the same. A chart with nothing to draw is absent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ...planner.plan import Plan, RegionPlan, ShapeRecord
from ..candidates import is_own
from ..figures import bytes_text, memory_text, percent_text, seconds_text, time_text
from ..placements import word
from ..reasons import modules_text
from ..stages import mesh_rows

if TYPE_CHECKING:
    from ...profiles.ledger import Entry

MOST_DEVICES = 1024
"""Devices that the mesh is drawn with; a larger one repeats what these show."""

MOST_SHAPES = 400
"""Shapes of the search that are drawn, best first."""

Chart = dict[str, Any]
_NONE: Mapping[str, Sequence[str]] = MappingProxyType({})


def chart_data(plan: Plan, runs: Sequence[Entry] = (), facts: Mapping[str, Sequence[str]] = _NONE) -> dict[str, Chart]:
    """Chart by name, of what the plan file and the ledger hold; `facts` are lines of text by op (opfacts.py)."""
    words = _words(plan)
    found = {
        "time": _causes(plan.predicted.seconds, time_text, seconds_text, plan.predicted.step_seconds),
        "memory": _memory(plan),
        "mesh": _mesh(plan),
        "regions": _regions(plan, words),
        "placements": _placements(plan, words, facts),
        "links": _links(plan),
        "shapes": _shapes(plan),
        "frontier": _frontier(plan),
        "measured": _measured(plan, runs),
    }
    return {name: chart for name, chart in found.items() if chart}


def _causes(causes: Mapping[str, float], named: Any, text: Any, whole: float) -> Chart:
    rows = sorted(((k, v) for k, v in causes.items() if v > 0), key=lambda row: -row[1])
    total = max(sum(v for _, v in rows), whole) or 1.0
    return {"rows": [[named(k), v, f"{text(v)}, {percent_text(v / total)}"] for k, v in rows]} if rows else {}


def _memory(plan: Plan) -> Chart:
    limit = plan.memory_limit_bytes
    chart = _causes(plan.predicted.memory, memory_text, bytes_text, limit)
    return {**chart, "limit": limit, "limitText": f"limit {bytes_text(limit)}"} if chart else {}


def _mesh(plan: Plan) -> Chart:
    """Axes with their strides in the numbering of devices (outermost first), and the levels of links with their spans."""
    rows = [row for row in mesh_rows(plan) if row[3] or row[0] != "ep"]
    devices = math.prod(row[1] for row in rows)
    if devices < 2:
        return {}
    stride, axes = devices, []
    for name, size, role, link in rows:
        stride //= size
        axes.append({"name": name, "size": size, "role": role, "link": link, "stride": stride})
    levels = [_level(level) for level in plan.cluster.get("levels") or ()]
    return {"devices": devices, "shown": min(devices, MOST_DEVICES), "axes": axes, "levels": levels}


def _level(level: Mapping[str, Any]) -> Chart:
    rate = level.get("bytes_per_second")
    return {"name": str(level.get("name", "")), "ranks": int(level.get("ranks", 0)),
            "text": f"{rate / 1e9:,.0f} GB/s a device" if rate else ""}  # fmt: skip


def _words(plan: Plan) -> list[str]:
    """The words of placements, "whole" last, the most frequent first: their places are their colours."""
    counts = Counter(word(op, i, plan.mesh) for r in plan.regions for op in r.ops for i in range(len(plan.mesh)))
    return sorted(counts, key=lambda name: (name == "whole", -counts[name], name))


def _regions(plan: Plan, words: Sequence[str]) -> Chart:
    """Regions in the order in which the stages run them, and what follows what."""
    order = [run.use for stage in plan.stages for run in stage.runs] or [region.name for region in plan.regions]
    kept = [use for i, use in enumerate(order) if i == 0 or order[i - 1] != use]
    nodes = list(dict.fromkeys(kept))
    edges = list(dict.fromkeys(pairwise(kept)))
    known = {region.name: region for region in plan.regions}
    return {
        "axes": [axis.name for axis in plan.mesh],
        "words": words,
        "nodes": [_region(known[name], plan, words) for name in nodes],
        "edges": [[nodes.index(a), nodes.index(b)] for a, b in edges],
    }


def _region(region: RegionPlan, plan: Plan, words: Sequence[str]) -> Chart:
    """A region with, per axis, the most frequent word of its ops that are not whole."""
    mostly = []
    for i in range(len(plan.mesh)):
        counts = Counter(word(op, i, plan.mesh) for op in region.ops)
        mostly.append(words.index(max(counts, key=lambda name: (name != "whole", counts[name], name))) if counts else 0)
    return {
        "name": region.name,
        "modules": modules_text(region),
        "repeats": region.repeats,
        "ops": len(region.ops),
        "words": mostly if region.ops else [],
    }


def _placements(plan: Plan, words: Sequence[str], facts: Mapping[str, Sequence[str]]) -> Chart:
    """Every op of every region with the word (its place in `words`) of its placement on each axis."""
    at = {name: i for i, name in enumerate(words)}
    ops: list[list[Any]] = []
    for number, region in enumerate(plan.regions):
        again = {name for name in region.recompute if " -> " not in name}
        for op in region.ops:
            own = [at[word(op, i, plan.mesh)] for i in range(len(plan.mesh))]
            ops.append(
                [
                    op.op,
                    op.target,
                    number,
                    own,
                    list(op.choice),
                    list(op.result),
                    op.op in again,
                    list(facts.get(op.op, ())),
                ]
            )
    if not ops or not plan.mesh:
        return {}
    return {
        "axes": [f"{axis.name} = {axis.size}" for axis in plan.mesh],
        "regions": [f"{r.name} × {r.repeats}" if r.repeats > 1 else r.name for r in plan.regions],
        "words": words,
        "ops": ops,
    }


def _links(plan: Plan) -> Chart:
    """Bytes and seconds of collectives by the link that their axis crosses."""
    crossed = {name: link for name, _, _, link in mesh_rows(plan)}
    rows = [
        [crossed.get(row.axis) or row.axis, f"{row.collective.replace('_', '-')} on {row.axis}", row.bytes,
         f"{bytes_text(row.bytes)} in {row.count} calls, {seconds_text(row.seconds)}"]
        for row in plan.predicted.traffic
        if row.bytes
    ]  # fmt: skip
    return {"links": list(dict.fromkeys(str(row[0]) for row in rows)), "rows": rows} if rows else {}


def _shapes(plan: Plan) -> Chart:
    """Shapes of the search by bound, with what each came to."""
    found = [r for r in plan.search.shapes if r.bound_seconds is not None or r.step_seconds is not None]
    ordered = sorted(found, key=lambda r: (r.step_seconds is None, r.step_seconds or r.bound_seconds or 0.0))[
        :MOST_SHAPES
    ]
    rows = [
        [r.bound_seconds, r.step_seconds, "chosen" if is_own(plan, r) else r.status, _shape_text(r), r.reason]
        for r in ordered
    ]
    return {"rows": rows, "left": len(found) - len(ordered)} if rows else {}


def _shape_text(record: ShapeRecord) -> str:
    mesh = " ".join(f"{k}={v}" for k, v in record.mesh.items() if v > 1) or "one device"
    schedule = "" if record.schedule == "none" else f", {record.schedule}"
    chunks = f" x {record.chunks}" if record.chunks > 1 else ""
    return f"{mesh}{schedule}{chunks}, {record.microbatches} microbatches of {record.micro_batch or '?'}"


def _frontier(plan: Plan) -> Chart:
    rows = [
        [p.seconds, p.peak_bytes, p.devices, p.status,
         f"{' '.join(f'{k}={v}' for k, v in p.mesh.items())}: {seconds_text(p.seconds)}, {bytes_text(p.peak_bytes)}, "
         f"{p.devices} devices"]
        for p in plan.frontier
    ]  # fmt: skip
    own = [plan.predicted.step_seconds, plan.predicted.peak_bytes_per_device]
    return {"rows": rows, "own": own, "limit": plan.memory_limit_bytes} if rows else {}


def _measured(plan: Plan, runs: Sequence[Entry]) -> Chart:
    """Runs of the ledger beside the prediction and its interval; the prediction is each run's own."""
    low, high = plan.predicted.step_seconds_low, plan.predicted.step_seconds_high
    step = plan.predicted.step_seconds or 1.0
    rows = [
        [run.date[:16].replace("T", " "), run.predicted_seconds, run.own_seconds,
         run.predicted_seconds * low / step, run.predicted_seconds * high / step]
        for run in runs
        if run.predicted_seconds
    ]  # fmt: skip
    return {"rows": rows} if rows else {}

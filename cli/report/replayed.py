"""What a report shows beyond the plan file, from the model captured anew: facts of every op, lanes and bytes over a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import ShardwrightError
from ...planner.plan import Plan
from ...planner.playback import Curve, Playback, playback
from ..figures import bytes_text, memory_text
from .replaycharts import memory_chart, timeline_chart

MOST_CURVES = 4
"""Pipeline ranks whose bytes are drawn over time."""

MOST_ALIVE = 12
"""Rows of what is there at the peak."""

if TYPE_CHECKING:
    from ...job import Say


@dataclass(frozen=True)
class Replayed:
    """`ops` has lines of text by op, `charts` the data of charts by name; `missing` says why there are none, "" where there are."""

    ops: dict[str, list[str]] = field(default_factory=dict)
    charts: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: str = "this page was made from the plan file alone"


def replayed(plan: Plan, say: Say) -> Replayed:
    """Capture the model of a plan and look at it again; where its source is not there as it was, `missing` says so."""
    if plan.source.kind == "module":
        return Replayed(missing="the plan was made from a live module, which its file does not hold")
    from ..edited import captured
    from .opfacts import op_lines, waterline_chart

    try:
        outline, cluster, prices = captured(plan, say)
        charts = {"waterline": waterline_chart(outline, prices)}
        if plan.stages and outline.training:
            charts |= _played(plan, playback(plan, outline, cluster, prices))
        return Replayed(op_lines(plan, outline, prices), {name: c for name, c in charts.items() if c}, "")
    except ShardwrightError as error:
        return Replayed(missing=str(error))


def _played(plan: Plan, step: Playback) -> dict[str, dict[str, Any]]:
    """The charts of a step played again; of more pipeline ranks than `MOST_CURVES` those with most bytes and the ends."""
    peaks = [max(map(sum, zip(*curve.bytes.values(), strict=True))) for curve in step.curves]
    fullest = sorted(range(len(peaks)), key=lambda rank: (-peaks[rank], rank))
    shown = sorted(list(dict.fromkeys([fullest[0], 0, len(peaks) - 1, *fullest]))[:MOST_CURVES])
    curves = [
        {
            "name": f"pipeline rank {rank}" if len(peaks) > 1 else "every device", "seconds": step.curves[rank].seconds,
            "causes": {memory_text(cause): values for cause, values in step.curves[rank].bytes.items()},
        }
        for rank in shown
    ]  # fmt: skip
    memory = memory_chart(curves, plan.memory_limit_bytes)
    memory["alive"] = [[name, bytes_text(size)] for name, size in _named(step.curves[fullest[0]])][:MOST_ALIVE]
    memory["fullest"] = f"pipeline rank {fullest[0]}" if len(peaks) > 1 else "every device"
    memory["left"] = len(peaks) - len(shown)
    alike = plan.ranks // plan.pipeline.ranks
    return {"timeline": timeline_chart(step.tasks, step.seconds, alike), "memory_time": memory}


def _named(curve: Curve) -> list[tuple[str, float]]:
    return [(memory_text(name), size) for name, size in curve.alive]

"""What a report shows beyond the plan file, from the model captured anew: facts of every op, lanes and bytes over a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import ShardwrightError
from ...planner.alive import Alive
from ...planner.plan import Plan
from ...planner.replay import Replay, replay
from ...planner.template import retyped
from ..figures import bytes_text, memory_text
from .replaycharts import memory_chart, timeline_chart

MOST_CURVES = 4
"""Pipeline ranks whose bytes are drawn over time."""

MOST_REGIONS = 12
"""Regions of the table of what is alive at the peak."""

if TYPE_CHECKING:
    from ...job import Say
    from ...planner.cluster import Cluster
    from ...planner.outline import Outline
    from ...planner.prices import Prices


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

    try:
        return looked_at(plan, *captured(plan, say))
    except ShardwrightError as error:
        return Replayed(missing=str(error))


def looked_at(plan: Plan, outline: Outline, cluster: Cluster, prices: Prices) -> Replayed:
    """What is seen of a plan by the outline of its model; raises PlanError where it is not of this model."""
    from .opfacts import op_lines, waterline_chart

    charts = {"waterline": waterline_chart(outline, prices)}
    if plan.stages and outline.training:
        charts |= _played(plan, replay(plan, retyped(outline, plan.precision.compute), cluster, prices))
    return Replayed(op_lines(plan, outline, prices), {name: c for name, c in charts.items() if c}, "")


def _played(plan: Plan, step: Replay) -> dict[str, dict[str, Any]]:
    """The charts of a step played again; of more pipeline ranks than `MOST_CURVES` those with most bytes and the ends."""
    peaks = [curve.peak_bytes for curve in step.memory]
    fullest = sorted(range(len(peaks)), key=lambda rank: (-peaks[rank], rank))
    shown = sorted(list(dict.fromkeys([fullest[0], 0, len(peaks) - 1, *fullest]))[:MOST_CURVES])
    names = [f"pipeline rank {rank}" if len(peaks) > 1 else "every device" for rank in range(len(peaks))]
    curves = [
        {
            "name": names[rank], "seconds": step.memory[rank].seconds,
            "causes": {memory_text(cause): values for cause, values in step.memory[rank].causes.items()},
        }
        for rank in shown
    ]  # fmt: skip
    memory = memory_chart(curves, plan.memory_limit_bytes) | {
        "alive": _alive(step.alive[fullest[0]]),
        "fullest": names[fullest[0]],
        "left": len(peaks) - len(shown),
    }
    line = step.timeline
    return {"timeline": timeline_chart(line.tasks, line.step_seconds, step.alike, step.spans), "memory_time": memory}


def _alive(alive: Alive) -> dict[str, Any]:
    """What is there at the fullest moment: a column for every cause, a row for every region, the most first, and their sum."""
    total: dict[str, float] = {}
    for own in alive.values():
        for cause, size in own.items():
            total[cause] = total.get(cause, 0.0) + size
    causes = sorted(total, key=lambda cause: (-total[cause], cause))
    names = sorted(
        (name for name in alive if alive[name]), key=lambda name: (not name, -sum(alive[name].values()), name)
    )
    shown, left = names[:MOST_REGIONS], names[MOST_REGIONS:]
    rows = [(name or "no region", alive[name]) for name in shown]
    if left:
        rest = {cause: sum(alive[name].get(cause, 0.0) for name in left) for cause in causes}
        rows.append((f"{len(left)} more", rest))
    return {
        "causes": [memory_text(cause) for cause in causes],
        "rows": [_row(name, own, causes) for name, own in (*rows, ("all", total))],
    }


def _row(name: str, own: Mapping[str, float], causes: Sequence[str]) -> list[str]:
    cells = [bytes_text(own[cause]) if own.get(cause) else "" for cause in causes]
    return [name, *cells, bytes_text(sum(own.values()))]

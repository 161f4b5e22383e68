"""What a report shows beyond the plan file: facts of every op and where its seconds go, from the model captured anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import ShardwrightError
from ...planner.plan import Plan

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
        outline, _, prices = captured(plan, say)
        charts = {"waterline": waterline_chart(outline, prices)}
        return Replayed(op_lines(plan, outline, prices), {name: c for name, c in charts.items() if c}, "")
    except ShardwrightError as error:
        return Replayed(missing=str(error))

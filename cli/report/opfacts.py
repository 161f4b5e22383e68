"""What an op of a plan is, beyond its placement: shapes, bytes, seconds and source line, from the captured model and its prices."""

from __future__ import annotations

import math
from typing import Any

from ...planner.outline import Op, Outline, Tensor, Use
from ...planner.placement import shape_of
from ...planner.plan import OpPlan, Plan
from ...planner.prices import Prices
from ...planner.template import build, retyped
from ...planner.waterline import Moment, waterline
from ..figures import bytes_text, percent_text, seconds_text
from .passes import NAMES

MOST_MOMENTS = 900
"""Passes of ops that a waterline is drawn with: repeats of a region beyond its first are left out where there are more."""

Chart = dict[str, Any]


def op_lines(plan: Plan, outline: Outline, prices: Prices) -> dict[str, list[str]]:
    """By op of the plan's regions what is known of it: of one microbatch on one device, under the plan's choices."""
    cut = build(retyped(outline, plan.precision.compute), plan.pipeline.microbatches).cut.outline
    ops, found = cut.by_name, dict[str, list[str]]()
    for region in plan.regions:
        for own in region.ops:
            if own.op in ops and own.op not in found:
                found[own.op] = _lines(plan, own, ops[own.op], cut, prices)
    return found


def _lines(plan: Plan, own: OpPlan, op: Op, cut: Outline, prices: Prices) -> list[str]:
    sizes = _local(plan, own, op)
    ahead, back = prices.op(op, sizes, cut.tensors)
    made = sum(_elements(op, use, sizes) * _width(cut.tensors[use.tensor]) for use in op.results)
    read = ", ".join(_shape(cut.tensors[use.tensor]) for use in op.operands)
    gave = ", ".join(_shape(cut.tensors[use.tensor]) for use in op.results)
    lines = [f"{read} makes {gave} (one microbatch, unsplit)", f"{bytes_text(made)} made on a device"]
    paid = f"{seconds_text(ahead.seconds)} forward"
    lines.append(paid + (f", {seconds_text(back.seconds)} backward" if cut.training and back.seconds else ""))
    return [*lines, op.source] if op.source else lines


def _local(plan: Plan, own: OpPlan, op: Op) -> tuple[float, ...]:
    """Sizes of an op's loops on one rank: each axis divides the loop that it splits."""
    return tuple(
        f.size / math.prod(axis.size for axis, choice in zip(plan.mesh, own.choice, strict=True) if choice == f.name)
        for f in op.factors
    )


def _elements(op: Op, use: Use, sizes: tuple[float, ...]) -> float:
    return math.prod(sizes[i] for dim in use.factors for i in dim)


def _width(tensor: Tensor) -> float:
    return tensor.bytes / tensor.elements if tensor.elements else 0.0


def _shape(tensor: Tensor) -> str:
    return f"{tensor.dtype}[{', '.join(map(str, shape_of(tensor.dims)))}]"


def waterline_chart(outline: Outline, prices: Prices) -> Chart:
    """Every pass of every op with its seconds and their parts; repeats are drawn once where there are many, and counted."""
    line = waterline(outline, prices)
    moments, told = list(line.moments), ""
    if len(moments) > MOST_MOMENTS:
        first = {name for region in outline.regions for name in region.instances[0]}
        others = {name for region in outline.regions for instance in region.instances[1:] for name in instance}
        moments = [m for m in moments if m.op in first or m.op not in others]
        told = "Repeats of a region are drawn once."
    if not moments or len(moments) > 4 * MOST_MOMENTS:
        return {}
    return {
        "parts": list(NAMES.values()), "told": told, "moments": [_moment(m) for m in moments],
        "efficiency": percent_text(line.totals.efficiency),
        "gap": seconds_text(line.totals.gap_seconds), "whole": seconds_text(line.totals.seconds),
    }  # fmt: skip


def _moment(moment: Moment) -> list[Any]:
    lines = [f"{seconds_text(moment.seconds)}, of it {seconds_text(max(moment.gap_seconds, 0.0))} above its ideal",
             f"{percent_text(moment.efficiency)} of peak", moment.source]  # fmt: skip
    name = f"{moment.op}, {moment.phase} ({moment.target})"
    return [name, float(f"{moment.seconds:.4g}"), [float(f"{part:.4g}") for part in moment.parts], lines]

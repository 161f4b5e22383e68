"""Lowering, second pass: one body for every virtual stage of a pipeline, with what crosses between stages as inputs and results.

Sender and receiver have the same inner mesh, so a tensor crosses in its local placement and the ranks of two stages pair up one to
one. On the data axes that is the placement it is made in; on the model axis the layout that the plan gives the border: positions
split ("S") where they divide, else whole. The gradient comes back in the dual of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import UsageError
from ..planner.assign import Assignment
from ..planner.choices import states
from ..planner.front import crossing_placement
from ..planner.outline import Op
from ..planner.placement import Placement, R, V, local_dims, shape_of
from ..planner.plan import MeshAxis
from ..planner.staging import Crossing, StagePart, Staging
from .lowered import Emit, Lowered, Share
from .shard import lower
from .summarize import Summary


@dataclass(frozen=True)
class Border:
    """A tensor as it crosses: local shape and dtype on one rank, of one microbatch; whether a gradient comes back."""

    tensor: str
    placement: Placement
    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool

    @property
    def bytes(self) -> int:
        """Bytes that one rank sends."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Borders:
    """Everything that crosses between the stages of one program, by tensor, and by (source, target) stage."""

    tensors: Mapping[str, Border]
    edges: Mapping[tuple[int, int], tuple[Border, ...]]

    def returning(self, source: int, target: int) -> tuple[Border, ...]:
        """Those of an edge whose gradients come back."""
        return tuple(b for b in self.edges[source, target] if b.differentiable)


def borders(
    summary: Summary, assignment: Assignment, staging: Staging, axes: Sequence[MeshAxis], layouts: Sequence[str], *,
    microbatches: int,
) -> Borders:  # fmt: skip
    """What crosses, and how. `layouts` has the layout ("R" or "S") of what leaves each stage."""
    makers = {r.tensor: op for op in summary.outline.ops for r in op.results}
    found: dict[str, Border] = {}
    edges: dict[tuple[int, int], list[Border]] = {}
    for crossing in staging.crossings:
        if crossing.tensor not in found:
            maker = makers[crossing.tensor]
            layout = layouts[crossing.source]
            found[crossing.tensor] = _border(summary, assignment, crossing, maker, axes, layout, microbatches)
        edges.setdefault((crossing.source, crossing.target), []).append(found[crossing.tensor])
    return Borders(found, {edge: tuple(held) for edge, held in sorted(edges.items())})


def lower_stage(
    summary: Summary, assignment: Assignment, staging: Staging, stage: int, crossing: Borders, axis_sizes: tuple[int, ...],
    emit: Emit, *, microbatches: int, looped: bool, local_batch: bool,
) -> Lowered:  # fmt: skip
    """The graphs of one virtual stage. Its body returns what it gives, the loss if it has it (with `looped`), then its results."""
    part, outline = staging.parts[stage], summary.outline
    loss = outline.loss if outline.loss in part.results and looped else ""
    results = tuple(name for name in part.results if name != loss)
    gives = tuple(dict.fromkeys(c.tensor for c in part.gives))
    share = Share(
        tuple((c.tensor, crossing.tensors[c.tensor].placement) for c in part.takes),
        tuple((name, crossing.tensors[name].placement) for name in gives),
        {op.name: i for i, op in enumerate(outline.ops)},
        looped,
    )
    return lower(
        _of_stage(summary, part, loss), _with(assignment, part), axis_sizes, emit.apart(),
        microbatches=microbatches, outputs=results, local_batch=local_batch, share=share,
    )  # fmt: skip


def _of_stage(summary: Summary, part: StagePart, loss: str) -> Summary:
    mine = frozenset(part.ops)
    ops = tuple(op for op in summary.outline.ops if op.name in mine)
    return replace(summary, outline=replace(summary.outline, ops=ops, loss=loss))


def _with(assignment: Assignment, part: StagePart) -> Assignment:
    """The assignment with the parameters of one stage: buckets hold no others."""
    mine = frozenset(part.parameters)
    groups = (tuple(name for name in group if name in mine) for group in assignment.groups)
    return replace(assignment, groups=tuple(group for group in groups if group))


def _border(
    summary: Summary,
    assignment: Assignment,
    crossing: Crossing,
    maker: Op,
    axes: Sequence[MeshAxis],
    layout: str,
    m: int,
) -> Border:
    tensors = dict(summary.outline.tensors)
    tensor = tensors[crossing.tensor]
    choice = assignment.choices[maker.name]
    placement = crossing_placement(maker, crossing.tensor, tensors, choice, axes, layout)
    index = next(i for i, use in enumerate(maker.results) if use.tensor == crossing.tensor)
    micro = states(maker, tensors, summary.batch_cut.choice[maker.name])[1][index] if m > 1 else R
    micro = R if micro == V else micro
    sizes = (*(axis.size for axis in axes), m)
    try:
        shape = shape_of(local_dims(tensor.dims, (*placement, micro), sizes))
    except ValueError as error:
        raise UsageError(
            f"{crossing.tensor}, which crosses from stage {crossing.source} to stage {crossing.target}: {error}"
        ) from None
    return Border(crossing.tensor, (*placement, micro), shape, getattr(torch, tensor.dtype), tensor.differentiable)

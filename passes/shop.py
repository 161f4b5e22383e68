"""What the graphs of one lowering share: placements of operands and results, where inputs come from, how parameters are wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..planner.assign import Assignment
from ..planner.choices import placed, states
from ..planner.outline import Op
from ..planner.placement import Placement, R, State, V, local_dims, reduced_over, split, steps
from .lowered import Emit, Emitted
from .summarize import Summary


class Shop:
    """What all graphs of one lowering share."""

    def __init__(self, summary: Summary, assignment: Assignment, sizes: tuple[int, ...], emit: Emit, m: int) -> None:
        self.summary, self.assignment, self.sizes, self.emit, self.m = summary, assignment, sizes, emit, m
        self.tensors = dict(summary.outline.tensors)
        self.data_axes: tuple[int, ...] = ()
        self.wants = self._parameter_wants()
        self.group_of = {name: group for group in assignment.groups for name in group}
        self.order = {op.name: i for i, op in enumerate(summary.outline.ops)}
        self.trainable = {p.tensor: p.trainable for p in summary.outline.parameters}

    def micro_states(self, op: Op) -> tuple[tuple[State, ...], tuple[State, ...]]:
        """States along the microbatch axis; V is R there: gradients accumulate over the loop."""
        if self.m == 1:
            return (R,) * len(op.operands), (R,) * len(op.results)
        sides = states(op, self.tensors, self.summary.batch_cut.choice[op.name])
        operands, results = (tuple(R if s == V else s for s in side) for side in sides)
        return operands, results

    def home(self, tensor: str) -> Placement:
        """How a tensor from outside arrives: whole, or already cut over the data axes (local batches)."""
        inputs = self.summary.inputs
        place = inputs.get(tensor)
        return tuple(split(*place) if place is not None and a in self.data_axes else R for a in range(len(self.sizes)))

    def cut_of(self, placement: Placement) -> Placement:
        """A tensor that is cut into microbatches, before it is: they are cuts of the data-parallel shard, and a model axis that
        splits the same factor cuts the microbatch."""
        return tuple(
            R if s == placement[-1] and a not in self.assignment.data_axes else s for a, s in enumerate(placement[:-1])
        )

    def place(self, tensor: str, placement: Placement) -> tuple[int, int]:
        """Where microbatches of a tensor are cut from its local value: the dim, and the blocks of it (`Feed`)."""
        cut = placement[-1]
        local = local_dims(self.tensors[tensor].dims, placement[:-1], self.sizes)
        return cut.dim, math.prod(local[cut.dim][: cut.factor])

    def wholes(self, tensor: str, placement: Placement) -> tuple[Emitted, ...]:
        """The changes that make a tensor whole on every rank."""
        dims, whole = self.tensors[tensor].dims, (R,) * len(self.sizes)
        return tuple(self.emit.transition(step, dims) for step in steps(dims, placement, whole, self.sizes))

    def placed(self, op: Op) -> tuple[list[Placement], list[Placement]]:
        """Wanted operand placements and produced result placements, microbatch axis last."""
        sides = zip(placed(op, self.tensors, self.assignment.choices[op.name]), self.micro_states(op), strict=True)
        operands, results = ([(*p, s) for p, s in zip(*side, strict=True)] for side in sides)
        return operands, results

    def reductions(self, pairs: Sequence[tuple[Placement, Placement]]) -> list[tuple[int, ...]]:
        """Sets of axes over which gradients are summed together: data and context axes in one, every other axis alone."""
        shared = self.assignment.shared_axes
        found = {axes for at, want in pairs for axes in reduced_over(at, want, shared)}
        return sorted(found)

    def reduced(self, at: Placement, want: Placement, axes: tuple[int, ...]) -> bool:
        """Whether a tensor's gradient is summed over exactly these axes, as `reductions` puts them together."""
        return axes in reduced_over(at, want, self.assignment.shared_axes)

    def _parameter_wants(self) -> dict[str, list[Placement]]:
        found: dict[str, list[Placement]] = {}
        for op in self.summary.outline.ops:
            operands, _ = self.placed(op)
            for use, placement in zip(op.operands, operands, strict=True):
                if self.tensors[use.tensor].role == "parameter":
                    known = found.setdefault(use.tensor, [])
                    if placement[:-1] not in known:
                        known.append(placement[:-1])
        return found

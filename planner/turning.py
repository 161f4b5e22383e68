"""What changes of placement take in the backward pass, where every one of them runs between two ops.

The gradient that came in lives until the change is through. Collectives write into memory of their own; pieces of a dim that is
not the outermost are copied into one stretch before they are sent, and what arrives in pieces is joined (runtime/transitions.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from .memory import Facts, local_bytes, operand_gradients
from .outline import DTYPE_BYTES, Op, Tensor
from .placement import Placement, R, State, Step, local_elements, replaced, row, steps
from .uses import Uses

TAKES: Mapping[str, tuple[float, float]] = {
    "none": (0.0, 0.0),
    "scale": (0.0, 1.0),
    "slice": (0.0, 1.0),
    "pad": (0.0, 1.0),
    "all_reduce": (0.0, 1.0),
    "all_gather": (0.0, 1.0),
    "reduce_scatter": (0.0, 1.0),
    "all_to_all": (0.0, 2.0),
}
"""What a change holds at once beside the gradient it is given: that gradient, and the one it yields, so many times."""

INNER: Mapping[str, tuple[float, float]] = {"all_gather": (0.0, 1.0), "reduce_scatter": (1.0, 0.0)}
"""What comes to it where the dim that is split or joined is not the outermost."""


def turning_bytes(tensor: Tensor, source: Placement, target: Placement, sizes: tuple[int, ...]) -> float:
    """The most bytes at once while the gradient of `tensor` goes from a use as `target` back to `source`."""
    width = DTYPE_BYTES[tensor.dtype]
    most = local_bytes(tensor, target, sizes)
    for step in steps(tensor.dims, source, target, sizes):
        if sizes[step.axis] > 1:
            given, made = (
                width * local_elements(tensor.dims, replaced(step.before, step.axis, state), sizes)
                for state in (step.target, step.source)
            )
            name = row(step.source, step.target).backward
            more = INNER.get(name, (0.0, 0.0)) if _inner(step) else (0.0, 0.0)
            (g, m), (more_given, more_made) = TAKES[name], more
            most = max(most, given * (1 + g + more_given) + made * (m + more_made))
    return most


def _inner(step: Step) -> bool:
    """Whether pieces of the dim that is split lie apart."""
    found = next((s for s in (step.target, step.source) if s.is_split), State("R"))
    return found.is_split and (found.dim, found.factor) != (0, 0)


def turning(op: Op, tensors: Mapping[str, Tensor], found: Facts, uses: Uses, sizes: tuple[int, ...]) -> float:
    """The most bytes by which gradients grow while those of the operands of `op` change their placements; 0 where none does.

    Those of its results are gone by then, unless they are what is passed on.
    """
    whole = (R,) * len(sizes)
    new = {
        op.operands[j].tensor: local_bytes(tensors[op.operands[j].tensor], uses.wanted[op.name][j], sizes)
        for j in operand_gradients(op, tensors)
    }
    results = sum(
        local_bytes(tensors[use.tensor], uses.produced[use.tensor], sizes)
        for use in op.results if found.aliases[use.tensor].root == use.tensor and tensors[use.tensor].differentiable
    )  # fmt: skip
    most = 0.0
    for use, want in zip(op.operands, uses.wanted[op.name], strict=True):
        tensor, source = tensors[use.tensor], uses.produced.get(use.tensor, whole)
        root = tensors[found.aliases[use.tensor].root]
        if not tensor.differentiable or root.role == "parameter" or source == want:
            continue
        there = turning_bytes(tensor, source, want, sizes) - local_bytes(tensor, want, sizes)
        most = max(most, sum(new.values()) + there - (results if use.tensor in new else 0.0))
    return most

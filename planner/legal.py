"""Are the choices of an assignment legal for the sizes of an outline? Names the first that is not, and what would be."""

from __future__ import annotations

import math

from ..errors import PlanError
from .assign import Assignment
from .choices import states
from .outline import Op, Outline
from .placement import local_dims
from .ring import RING, ring_of, split_by


def check_choices(outline: Outline, assignment: Assignment, axis_sizes: tuple[int, ...]) -> None:
    """Raise PlanError naming the first op whose choice it does not have or whose split does not divide."""
    tensors = dict(outline.tensors)
    for op in outline.ops:
        chosen = assignment.choices[op.name]
        if len(chosen) != len(axis_sizes):
            raise PlanError(f"op {op.name}: needs one choice per mesh axis ({len(axis_sizes)}), has {len(chosen)}")
        for choice in chosen:
            try:
                states(op, tensors, choice)
            except ValueError as error:
                raise PlanError(f"op {op.name}: {error}") from None
        _check_division(op, chosen, axis_sizes)
    for name, storage in assignment.storage.items():
        try:
            local_dims(tensors[name].dims, storage.home, axis_sizes)
        except ValueError as error:
            raise PlanError(f"parameter {name}: {error}") from None


def _check_division(op: Op, chosen: tuple[str, ...], axis_sizes: tuple[int, ...]) -> None:
    divided = [split_by(op, c) for c in chosen]
    for i, factor in enumerate(op.factors):
        parts = math.prod(n for own, n in zip(divided, axis_sizes, strict=True) if i in own)
        if parts == 1:
            continue
        if factor.split == "never" and factor.name in chosen:
            raise PlanError(f"op {op.name} ({op.target}): factor {factor.name} may not be split")
        if factor.size % parts:
            up = -(-factor.size // parts) * parts
            what = "the batch" if factor.batch else f"factor {factor.name} of {op.name} ({op.target})"
            nearest = f"{up - parts} or {up}" if up > parts else f"{up}"
            raise PlanError(
                f"{what} has size {factor.size}, which does not divide by {parts}; nearest legal size: {nearest}"
            )
    for choice, n in zip(chosen, axis_sizes, strict=True):
        ring = ring_of(op) if choice == RING else None
        if ring is None:
            continue
        for i in (ring.query, ring.key):
            if op.factors[i].size % ring.divisor(n):
                raise PlanError(
                    f"op {op.name} ({op.target}): {op.factors[i].size} positions do not divide by {ring.divisor(n)}, as a "
                    f"ring of {n} ranks needs"
                )

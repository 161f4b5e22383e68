"""Are the choices of an assignment legal for the sizes of an outline? Names the first that is not, and what would be."""

from __future__ import annotations

import math

from ..errors import PlanError
from .assign import Assignment
from .choices import states
from .outline import Op, Outline
from .placement import local_dims
from .plan import Plan


def check_executed(plan: Plan) -> None:
    """Raise PlanError naming the first thing in a plan that the runtime does not execute."""
    said = {
        "pipeline stages": plan.pipeline.ranks > 1, "context parallelism": any(a.role == "context" for a in plan.mesh),
        "expert parallelism": plan.pipeline.experts > 1, "recompute": any(r.recompute for r in plan.regions),
        "offload": any(r.offload for r in plan.regions), f"a phase of inference ({plan.phase})": bool(plan.phase),
    }  # fmt: skip
    for what, there in said.items():
        if there:
            raise PlanError(
                f"the plan uses {what}, which is not supported yet where a plan is run; plan with --cluster local[:N] for a "
                "plan that runs here"
            )


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
    for factor in op.factors:
        parts = math.prod(n for c, n in zip(chosen, axis_sizes, strict=True) if c == factor.name)
        if parts == 1:
            continue
        if factor.split == "never":
            raise PlanError(f"op {op.name} ({op.target}): factor {factor.name} may not be split")
        if factor.size % parts:
            up = -(-factor.size // parts) * parts
            what = "the batch" if factor.batch else f"factor {factor.name} of {op.name} ({op.target})"
            nearest = f"{up - parts} or {up}" if up > parts else f"{up}"
            raise PlanError(
                f"{what} has size {factor.size}, which does not divide by {parts}; nearest legal size: {nearest}"
            )

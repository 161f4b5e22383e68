"""A plan held against the model it is for: the placements it states must be those its choices make."""

from __future__ import annotations

from ..errors import PlanError
from .assign import assign, placements
from .outline import Outline
from .plan import Plan


def check_results(plan: Plan, outline: Outline) -> None:
    """Raise PlanError naming the first op whose stated result is not what its choice makes.

    A choice decides the placement of an op's result; the plan states both so that it can be read. Raises what
    `planner.assign.assign` raises where plan and model differ, ValueError for a choice that the op does not have.
    """
    made = placements(outline, assign(plan, outline).choices)
    by_name = outline.by_name
    for i, (region, found) in enumerate(zip(plan.regions, outline.regions, strict=True)):
        for j, (op, name) in enumerate(zip(region.ops, found.instances[0], strict=True)):
            uses = by_name[name].results
            wanted = tuple(str(state) for state in made[uses[0].tensor]) if uses else ()
            if op.result != wanted:
                raise PlanError(
                    f"regions[{i}].ops[{j}].result: {op.op} with choice {list(op.choice)} makes {list(wanted)}, "
                    f"the plan says {list(op.result)}; change the choice, or the result to match it"
                )

"""The capability mask of the runtime: what it executes of what can be planned, for pins and for plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import PinError, PlanError
from .pins import Pins, Value, spelled
from .plan import Plan


@dataclass(frozen=True, slots=True)
class Executed:
    """A key of which the runtime executes only `values`. `of` reads a plan's value; `name` is what other values are.

    Without `of`, a plan does not say. A plan that was made for a named cluster may have the values `named` besides, or any where
    that is None.
    """

    key: str
    values: tuple[Value, ...]
    name: str
    of: Callable[[Plan], Value] | None = None
    named: tuple[Value, ...] | None = ()

    def executes(self, value: Value) -> bool:
        """Whether a plan with this value is executed."""
        return value in self.values or self.named is None or value in self.named


MASK = (
    Executed("pp", (1,), "pipeline stages", lambda plan: plan.pipeline.ranks),
    Executed("cp", (1,), "context parallelism", lambda plan: math.prod(a.size for a in plan.mesh if a.role == "context"), None),
    Executed("ep", (1,), "expert parallelism", lambda plan: plan.pipeline.experts, None),
    Executed("vpp", (1,), "chunks of stages", lambda plan: plan.pipeline.chunks),
    Executed("schedule", ("none", "gpipe", "1f1b"), "a pipeline schedule", lambda plan: plan.pipeline.schedule),
    Executed("recompute", ("none",), "recompute", lambda plan: _said(any(r.recompute for r in plan.regions))),
    Executed("offload", ("none",), "offload", lambda plan: _said(any(r.offload for r in plan.regions))),
    Executed("phase", ("",), "a phase of inference", lambda plan: plan.phase),
    Executed("attention", ("flash",), "attention as separate kernels"),
    Executed("kernels", ("eager",), "fused kernels"),
    Executed("loss", ("float",), "another form of the loss"),
)  # fmt: skip
"""Keys that are not here are executed whatever their value."""


def check_pins(pins: Pins) -> None:
    """Raise PinError for a pinned value that the runtime does not execute."""
    for one in MASK:
        wanted = getattr(pins, one.key, None)  # what is no pin cannot be pinned
        if wanted is not None and wanted not in one.values:
            raise PinError(
                f"{one.key}={spelled(wanted)} is not supported yet where a plan is to run here; "
                f"{one.key}={spelled(one.values[0])} is the only value planned for this machine (plan for a named cluster, such "
                "as h100-sxm:8x1, for others)"
            )


def check_plan(plan: Plan) -> None:
    """Raise PlanError naming the first thing in a plan that the runtime does not execute."""
    for one in MASK:
        if one.of is not None and not one.executes(one.of(plan)):
            raise PlanError(
                f"the plan uses {one.name}, which is not supported yet where a plan is run; plan with --cluster local[:N] "
                "for a plan that runs here"
            )


def _said(used: bool) -> str:
    return "some" if used else "none"

"""The capability mask of the runtime: what it executes of what can be planned, for pins and for plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import PinError, PlanError
from .away import read_offload
from .pins import Pins, Value, spelled
from .plan import Plan


@dataclass(frozen=True, slots=True)
class Executed:
    """A key of which the runtime executes only `values`. `of` reads a plan's value; `name` is what other values are.

    Without `of`, a plan does not say. A plan that was made for a named cluster may have the values `named` besides, or any where
    that is None; only planning for this machine keeps to `values`.
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
    Executed("pp", (1,), "pipeline stages", lambda plan: plan.pipeline.ranks, None),
    Executed("cp", (1,), "context parallelism", lambda plan: math.prod(a.size for a in plan.mesh if a.role == "context"), None),
    Executed("ep", (1,), "expert parallelism", lambda plan: plan.pipeline.experts, None),
    Executed("vpp", (1,), "chunks of stages on one rank", lambda plan: plan.pipeline.chunks if plan.pipeline.ranks == 1 else 1),
    Executed("schedule", ("none", "gpipe", "1f1b"), "a schedule without backward passes",
             lambda plan: plan.pipeline.schedule, ("interleaved", "zb-h1", "zbv", "dualpipev")),
    Executed("pools", ("one",), "several kinds of devices", lambda plan: "several" if len(plan.pools) > 1 else "one"),
    Executed("offload", ("none",), "an offload that is not executed", lambda plan: unexecuted_offload(plan) or "none"),
    Executed("phase", ("",), "a phase of inference", lambda plan: plan.phase),
    Executed("attention", ("flash",), "attention as separate kernels"),
    Executed("kernels", ("eager",), "fused kernels"),
    Executed("loss", ("float",), "another form of the loss"),
    Executed("tp_overlap", (False,), "tensor-parallel collectives piece by piece with their products"),
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
            said = f": {one.of(plan)}" if one.key == "offload" else ""
            better = ", ".join(str(v) for v in (*one.values, *one.named) if v != "none") if one.named else ""
            fix = (
                f"pin {one.key} to one of {better}"
                if better
                else "plan with --cluster local[:N] for a plan that runs here"
            )
            raise PlanError(f"the plan uses {one.name}{said}, which is not supported yet where a plan is run; {fix}")


def unexecuted_offload(plan: Plan) -> str:
    """The first thing a plan offloads in a way that the runtime does not execute; "" where it executes all of it."""
    for entry in plan.regions:
        away, _ = read_offload(entry.offload, f"region {entry.name}")
        trained = [p for p in entry.parameters if p.trainable]
        shared = any(p.zero in (1, 2) and p.zero_axes for p in entry.parameters)
        whole = any(not p.zero for p in entry.parameters) and any(a.role == "data" and a.size > 1 for a in plan.mesh)
        if entry.offload and plan.pipeline.ranks > 1:
            return f"region {entry.name}: anything off the device in a pipeline (pp=1 is executed)"
        if away.activations and entry.recompute:
            return f"region {entry.name}: activations off the device beside others that run again (recompute=none is executed)"
        if away.parameters and shared:
            return f"region {entry.name}: parameters off the device with ZeRO 1 or 2 (zero=3 is executed)"
        if away.parameters and whole and plan.pipeline.microbatches > 1:
            return f"region {entry.name}: whole parameters off the device over several data ranks and microbatches (zero=3 is)"
        if away.parameters and trained and not away.optimizer:
            return f"region {entry.name}: parameters off the device whose optimizer states are on it (params with optimizer is)"
        if away.activations and entry.recompute:
            return f"region {entry.name}: activations of a unit that runs part of itself again (either alone is)"
    return ""


def _said(used: bool) -> str:
    return "some" if used else "none"

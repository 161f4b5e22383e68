"""The capability mask of the runtime: what it executes of what can be planned, for pins and for plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from ..errors import PinError, PlanError
from .away import HERE, Away, read_offload
from .pins import Pins, Value, spelled
from .plan import Plan
from .schedules import SCHEDULES


@dataclass(frozen=True, slots=True)
class Executed:
    """A key of which the runtime executes only `values`. `of` reads a plan's value; `name` is what other values are.

    Without `of`, a plan does not say.
    """

    key: str
    values: tuple[Value, ...]
    name: str
    of: Callable[[Plan], Value] | None = None


MASK = (
    Executed("chunks", (1,), "chunks of stages on one rank", lambda plan: plan.pipeline.chunks if plan.pipeline.ranks == 1 else 1),
    Executed("schedule", ("none", "gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev", "branches"),
             "a schedule without backward passes", lambda plan: plan.pipeline.schedule),
    Executed("pools", ("one",), "several kinds of devices", lambda plan: "several" if len(plan.pools) > 1 else "one"),
    Executed("phase", ("",), "a phase of inference", lambda plan: plan.phase),
    Executed("attention", ("flash",), "attention as separate kernels"),
    Executed("kernels", ("eager",), "fused kernels"),
    Executed("loss", ("float",), "another form of the loss"),
    Executed("tp_overlap", (False,), "tensor-parallel collectives piece by piece with their products"),
)  # fmt: skip
"""Keys that are not here are executed whatever their value; of offload, what no row of `UNEXECUTED` forbids."""


def check_pins(pins: Pins) -> None:
    """Raise PinError for a pinned value that the runtime does not execute."""
    for one in MASK:
        wanted = getattr(pins, one.key, None)  # what is no pin cannot be pinned
        if wanted is not None and wanted not in one.values:
            runs = [spelled(v) for v in one.values if v != "none"]
            raise PinError(
                f"{one.key}={spelled(wanted)} is not supported yet where a plan is to run here; use "
                f"{one.key}={'|'.join(runs)} (or plan for a named cluster, such as h100-sxm:8x1, where it is priced)"
            )


def executed_pins(pins: Pins) -> Pins:
    """The pins, with what the runtime does not execute forbidden."""
    fixed = {one.key: one.values[0] for one in MASK if len(one.values) == 1 and one.key in _PINNABLE}
    fixed = {key: value for key, value in fixed.items() if getattr(pins, key) is None}
    played = next((one.values for one in MASK if one.key == "schedule"), tuple(SCHEDULES))
    others = tuple(("schedule", name) for name in SCHEDULES if name not in played)
    return replace(pins, **fixed, forbidden=(*pins.forbidden, *others))  # type: ignore[arg-type]


_PINNABLE = frozenset(f.name for f in fields(Pins))


def check_plan(plan: Plan, *, training: bool = True) -> None:
    """Raise PlanError naming the first thing in a plan that the runtime does not execute.

    Some of it is executed where the plan is one of inference, which its graph says and the plan does not (`training`).
    """
    for one in MASK:
        if one.of is not None and one.of(plan) not in one.values:
            better = ", ".join(str(v) for v in one.values if v != "none") if len(one.values) > 1 else ""
            fix = (
                f"pin {one.key} to one of {better}"
                if better
                else "plan with --cluster local[:N] for a plan that runs here"
            )
            raise PlanError(f"the plan uses {one.name}, which is not supported yet where a plan is run; {fix}")
    if problem := unexecuted_offload(plan, training=training):
        raise PlanError(
            f"the plan uses an offload that is not executed: {problem}, which is not supported yet where a plan is run; "
            "plan with --cluster local[:N] for a plan that runs here"
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """What decides whether an offload is executed.

    `levels`: ZeRO levels of shared parameters; `whole`: some parameters are whole on several data ranks; `splits`: the schedule
    splits the backward pass, or may; `trains`: the unit has a parameter that trains.
    """

    away: Away
    levels: frozenset[int]
    whole: bool
    microbatches: int
    splits: bool
    trains: bool


UNEXECUTED: tuple[tuple[str, Callable[[Kept], bool]], ...] = (
    ("anything off the device under a schedule that splits the backward pass (schedule=1f1b is executed)",
     lambda k: k.away != HERE and k.splits),
    ("parameters off the device with ZeRO 1 or 2 (zero=3 is executed)", lambda k: bool(k.away.parameters and k.levels & {1, 2})),
    ("whole parameters off the device over several data ranks and microbatches (zero=3 is)",
     lambda k: bool(k.away.parameters) and k.whole and k.microbatches > 1),
    ("parameters off the device whose optimizer states are on it (params with optimizer is)",
     lambda k: bool(k.away.parameters) and k.trains and not k.away.optimizer),
)  # fmt: skip
"""Offloads that the runtime does not execute, and what is executed instead."""


def why_kept_here(kept: Kept) -> str:
    """The first thing about an offload that the runtime does not execute; "" where it executes all of it."""
    return next((text for text, holds in UNEXECUTED if holds(kept)), "")


def unexecuted_offload(plan: Plan, *, training: bool = True) -> str:
    """The first thing a plan offloads in a way that the runtime does not execute; "" where it executes all of it."""
    splits = plan.pipeline.schedule in SCHEDULES and SCHEDULES[plan.pipeline.schedule].splits_backward
    several = any(axis.role == "data" and axis.size > 1 for axis in plan.mesh)
    for entry in plan.regions:
        away, _ = read_offload(entry.offload, f"region {entry.name}")
        levels = frozenset(p.zero for p in entry.parameters if p.zero_axes)
        whole = several and any(not p.zero for p in entry.parameters)
        trains = training and any(p.trainable for p in entry.parameters)
        kept = Kept(away, levels, whole, plan.pipeline.microbatches, splits, trains)
        if problem := why_kept_here(kept):
            return f"region {entry.name}: {problem}"
    return ""

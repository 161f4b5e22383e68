"""The offload of a plan on one rank: who lies where, and the ops that lowered graphs call to reach it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PlanError, PlanMismatch, UsageError
from ...passes.lowered import Emitted, Lowered
from ...passes.offload import mark_units
from ...planner.assign import Assignment, Storage, entries_of
from ...planner.away import Away, read_offload
from ...planner.offload import Traffic
from ...planner.outline import Outline
from ...planner.plan import Plan
from ..mesh import Mesh
from ..regather import active_regather
from .activations import Leaving, marks
from .lanes import Lanes
from .memory import HostMemory
from .places import Group, Keeper, Place, fetched, gathered
from .rounds import adopt
from .update import HostStep


def offloader(
    plan: Plan, planned: Outline, outline: Outline, assignment: Assignment, mesh: Mesh, folder: Path | None, *,
    compile: bool,
) -> Offloader | None:  # fmt: skip
    """The offload of a plan; None where all of it is on the device. Raises UsageError for a compiled body.

    `planned` is the outline that the plan is for, `outline` and `assignment` what is executed, maybe in another dtype.
    """
    if not any(region.offload for region in plan.regions):
        return None
    if compile:
        raise UsageError(
            "compile=True is not supported with offload; apply the plan without it, or plan with --pin offload=none"
        )
    storage = {p.names[0]: at for p in outline.parameters if (at := assignment.storage.get(p.tensor)) is not None}
    return Offloader(plan, planned, storage, mesh, folder)


class Offloader:
    """What of a module's parameters and activations lies behind the device. Made where a plan offloads anything.

    `places` has a parameter by its first name; `units` says of every op of the plan's graph which unit it is in, and `leaving`
    which units' activations leave.
    """

    def __init__(
        self, plan: Plan, outline: Outline, storage: Mapping[str, Storage], mesh: Mesh, folder: Path | None = None
    ) -> None:
        """`outline` is the plan's, `storage` of parameters by their first name."""
        self.memory, self.lanes = HostMemory(mesh.device), Lanes(mesh.device)
        self.keeper = Keeper(mesh.device, self.memory, self.lanes)
        self.plan, self.places, self._resident = plan, dict[str, Place](), False
        compute = getattr(torch, plan.precision.compute)
        names = {p.tensor: p for p in outline.parameters}
        for entries, region in zip(entries_of(plan, outline), outline.regions, strict=True):
            for entry, members in zip(entries, region.parameters, strict=True):
                away, stride = read_offload(entry.offload, f"region {entry.name}")
                for tensor in members:
                    zero = storage[names[tensor].names[0]].zero
                    place = _place(away, stride, names[tensor], zero, compute, mesh)
                    if place is not None:
                        place.again = bool(entry.recompute)
                        self.places[place.name] = place
        self.step = HostStep(self.places, self.keeper, folder)
        weakref.finalize(self, _close, self.lanes, self.step.close)

    @property
    def moved(self) -> Mapping[str, Traffic]:
        """Bytes by class since the module was made: `optimizer`, `params`, `gradients`, `activations`, `states`."""
        return dict(self.lanes.moved)

    @property
    def steps_on_host(self) -> bool:
        """Whether whatever parameters an optimizer has, it updates them where the host has them."""
        return bool(self.places) and not self._resident

    def copies(self) -> list[Tensor]:
        """What the device keeps of parameters that lie elsewhere."""
        return [p.copy for p in self.places.values() if p.copy is not None]

    def layer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """How this rank's slice of a parameter is put where it lies; None for one on the device."""
        place = self.places.get(name)
        if place is not None and place.on_disk and self.step.files is not None:
            return partial(self.step.files.put, f"{name}.parameter")
        return self.memory.holding if place is not None else None

    def written(self, name: str) -> None:
        """A parameter was given other values in place: one on disk goes to its file, so that memory keeps nothing of it."""
        place = self.places.get(name)
        if place is not None and place.on_disk and place.filed != place.changes:
            assert self.step.files is not None
            adopt(place, self.step.files.put(f"{name}.parameter", place.host))

    def adopt(self, name: str, parameter: nn.Parameter) -> None:
        """The parameter made of that slice."""
        if name in self.places:
            place = self.places[name]
            place.parameter = parameter
            place.filed = place.changes
        else:
            self._resident |= parameter.requires_grad

    def emitter(self, outline: Outline, *, deferred: bool) -> OffloadEmit:
        """The ops of one lowered graph. `deferred`: its gradients go straight to the module's parameters."""
        return OffloadEmit(self, outline, deferred, leaving_units(self.plan, outline))


def leaving_units(plan: Plan, outline: Outline) -> frozenset[int]:
    """Units of a graph whose activations leave; none of one that the plan does not know."""
    try:
        entries = [entry for region in entries_of(plan, outline) for entry in region]
    except (PlanError, PlanMismatch):
        return frozenset()
    return frozenset(
        u for u, entry in enumerate(entries) if read_offload(entry.offload, f"region {entry.name}")[0].activations
    )


def _leaving_now() -> Leaving | None:
    found = active_regather()
    return found.leaving if found is not None else None


def _place(away: Away, stride: float, parameter: Any, zero: int, compute: torch.dtype, mesh: Mesh) -> Place | None:
    """Where a parameter lies; None for one that is on the device whole."""
    trained = parameter.trainable and bool(away.optimizer)
    if not trained and not away.parameters:
        return None
    name = parameter.names[0]
    return Place(name, away, stride, not away.parameters and zero in (0, 3), compute, trained)


def _close(lanes: Lanes, step: Callable[[], None]) -> None:
    lanes.close()
    step()


@dataclass
class OffloadEmit:
    """The offload's part of `passes.lowered.Emit`: groups in the order in which one graph first uses them."""

    engine: Offloader
    outline: Outline
    deferred: bool
    units: frozenset[int]
    order: list[Group] = field(default_factory=list)

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Parameters by their tensor in the graph."""
        return {p.tensor: p.names[0] for p in self.outline.parameters}

    def mark(self, lowered: Lowered) -> None:
        """Let the body say where units begin, where any of them leaves."""
        if self.units:
            mark_units(lowered, self.outline, *marks(_leaving_now))

    def apart(self) -> OffloadEmit:
        """The same for another graph of the program."""
        return replace(self, order=[])

    def begin(self) -> None:
        """A step of several microbatches begins."""
        for place in self.engine.places.values():
            place.held = None

    def is_away(self, tensor: str) -> bool:
        """Whether the gradients of a parameter leave the device."""
        return self.names[tensor] in self.engine.places

    def summed(self, tensor: str, gradient: Tensor | None, total: Callable[[Tensor], Tensor]) -> None:
        """`total` of a gradient that leaves, or has left: the device computes it, and keeps it until `end`."""
        place = self.engine.places[self.names[tensor]]
        place.held = total(self.engine.keeper.on_device(place, gradient))

    def end(self, tensor: str, gradient: Tensor | None) -> Tensor | None:
        """The gradient of a parameter at the end of such a step; one that was held on the device leaves now."""
        place = self.engine.places.get(self.names[tensor])
        if place is None or place.held is None:
            return gradient
        held, place.held = place.held, None
        return self.engine.keeper.leave(place, held, deferred=False)

    def leaving(self) -> Leaving | None:
        """The activations that leave in one forward pass."""
        return Leaving(self.units, self.engine.memory, self.engine.lanes) if self.units else None

    def streams(self, group: Sequence[str]) -> bool:
        """Whether the parameters of a group pass through the device, so that every pass fetches them."""
        places = self._places(group)
        return bool(places) and places[0].away.parameters

    def every(self, group: Sequence[str]) -> bool:
        """Whether the gradients of a group leave as every microbatch makes them."""
        places = self._places(group)
        return bool(places) and places[0].away.gradients

    def fetched(self, group: Sequence[str], gather: Emitted | None) -> Emitted | None:
        """The op that brings in a group, in place of `gather` (None: the parameters themselves); `gather` where it is here."""
        places = self._places(group)
        if not places:
            return gather
        holds = not self.deferred and bool(places[0].away.optimizer) and not places[0].away.gradients
        made = Group(
            self.engine.keeper, places, self.order, len(self.order), deferred=self.deferred, holds=holds,
            gathers=gather is not None,
        )  # fmt: skip
        self.order.append(made)
        if gather is None:
            return fetched(made), ()
        return gathered(made), gather[1]

    def _places(self, group: Sequence[str]) -> tuple[Place, ...]:
        found = [self.engine.places.get(self.names[name]) for name in group]
        away = tuple(p for p in found if p is not None)
        if away and len(away) < len(found):
            name = next(n for n, p in zip(group, found, strict=True) if p is None)
            raise PlanError(
                f"parameter {self.names[name]} is on the device and {away[0].name}, which the same collective brings in, is not: "
                "these inputs divide the model otherwise than the plan's; plan for them"
            )
        return away

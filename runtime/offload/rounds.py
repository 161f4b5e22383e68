"""The updates of one optimizer step over states behind the device, subgroup by subgroup, as planner/hostupdate.py prices them.

    device   states and gradient come in, are updated there and leave; the next such subgroup comes in meanwhile (`SLOTS` at most)
    disk     parameter and states are read ahead, updated in host memory, and written while others are updated
    memory   updated where they lie; the device's copy is brought up to date while the next subgroup is updated

With stride k every k-th subgroup is a visit of the device: its copies run while the host updates those between (Deep Optimizer
States, Maurya et al. 2024). Every update is the `step` of the optimizer's own class over the members of one subgroup, which is
exact for optimizers that treat each element alone (planner/precision.py has no others).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ...planner.hostupdate import SLOTS
from ...planner.offload import Traffic
from ..allocations import ON_DEVICE
from ..torch_compat import like_dtensor
from .files import Files
from .lanes import Copy
from .memory import is_host
from .places import Keeper, Place

STATES = "states"
"""The class under which bytes of moments and masters are counted that visit the device, or are read and written."""

DEVICE, DISK, MEMORY = "device", "disk", "memory"
WAITING = {DEVICE: SLOTS - 1, DISK: SLOTS}
"""Subgroups on their way back while another one of their kind is updated: on the device they take its slots."""


@dataclass(eq=False)
class Member:
    """A parameter that is updated apart from the user's step, with what moves for it.

    `twin` and `states` are the copies that are updated, `coming` and `going` what is on its way (`going` by name, ""
    for the parameter).
    """

    group: dict[str, Any]
    parameter: nn.Parameter
    place: Place
    own: dict[str, Any]
    twin: Tensor | None = None
    states: dict[str, Any] = field(default_factory=dict)
    coming: list[Copy | Future[object]] = field(default_factory=list)
    going: dict[str, Going] = field(default_factory=dict)


@dataclass
class Going:
    """A new value on its way to `target` in host memory, and from there to a file."""

    target: Tensor
    copy: Copy | None = None
    write: Future[Tensor] | None = None

    def home(self) -> Tensor:
        """Wait for it; the tensor as it lies there."""
        found = self.target if self.write is None else self.write.result()
        if self.copy is not None:
            self.copy.arrived()
        return found


@dataclass(eq=False)
class Subgroup:
    """Members that are updated together, in one way."""

    kind: str
    members: list[Member]


@dataclass
class Rounds:
    """Runs the subgroups of one rank."""

    keeper: Keeper
    files: Files | None
    waiting: dict[str, deque[Subgroup]] = field(default_factory=lambda: {DEVICE: deque(), DISK: deque()})

    def run(self, optimizer: Optimizer, subgroups: Sequence[Subgroup]) -> None:
        """Update all of them, in order; what still is on its way when this returns, `finish` waits for."""
        ahead = {kind: deque(s for s in subgroups if s.kind == kind) for kind in WAITING}
        for subgroup in subgroups:
            if subgroup.kind == MEMORY:
                self._in_place(optimizer, subgroup)
                continue
            coming, waiting = ahead[subgroup.kind], self.waiting[subgroup.kind]
            with _range(subgroup.kind):
                if coming and coming[0] is subgroup:
                    self._bring(coming.popleft())
                while len(waiting) >= WAITING[subgroup.kind]:
                    self._home(waiting.popleft())
                if coming:
                    self._bring(coming.popleft())
                self._update(optimizer, subgroup)
                self._leave(subgroup)
            waiting.append(subgroup)

    def finish(self) -> None:
        """Wait until everything is where it lies."""
        for kind, waiting in self.waiting.items():
            with _range(kind):
                while waiting:
                    self._home(waiting.popleft())

    def _in_place(self, optimizer: Optimizer, subgroup: Subgroup) -> None:
        step_apart(optimizer, [(m.group, m.parameter) for m in subgroup.members], optimizer.state)
        for member in subgroup.members:
            settle(member.own, member.parameter, self.keeper)
            self.keeper.refresh(member.place)

    def _bring(self, subgroup: Subgroup) -> None:
        """Start what an update needs on its way."""
        for m in subgroup.members:
            assert m.parameter.grad is not None
            gradient = local(m.parameter.grad)
            m.twin = nn.Parameter(self._copy(m, m.place.host, subgroup.kind))
            m.twin.grad = self._copy(m, gradient, subgroup.kind) if subgroup.kind == DEVICE else gradient
            m.states = {
                name: self._copy(m, local(v), subgroup.kind) if large(v, m.parameter) else v
                for name, v in m.own.items()
            }
            if m.place.on_disk:
                moved = m.twin.nbytes + sum(v.nbytes for v in m.states.values() if large(v, m.twin))
                self.keeper.lanes.count(STATES, Traffic(read_bytes=moved))

    def _copy(self, member: Member, source: Tensor, kind: str) -> Tensor:
        """A copy of `source` on its way, to the device or into host memory."""
        keeper, source = self.keeper, source.detach()
        if kind == DEVICE:
            target = torch.empty(source.shape, dtype=source.dtype, device=keeper.device)
            member.coming.append(keeper.lanes.into(source, target, STATES))
        else:
            target = keeper.memory.empty(source.shape, source.dtype)
            member.coming.append(keeper.lanes.run("read", lambda: target.copy_(source)))
        return target

    def _update(self, optimizer: Optimizer, subgroup: Subgroup) -> None:
        for m in subgroup.members:
            for coming in m.coming:
                coming.result() if isinstance(coming, Future) else coming.wait()
            m.coming.clear()
        twins = [(m.group, m.twin) for m in subgroup.members if m.twin is not None]
        state = defaultdict(dict, {m.twin: m.states for m in subgroup.members if m.states})
        step_apart(optimizer, twins, state)
        for m in subgroup.members:
            assert m.twin is not None
            m.states, m.twin.grad = state[m.twin], None

    def _leave(self, subgroup: Subgroup) -> None:
        """Start new values on their way to where they lie."""
        for m in subgroup.members:
            assert m.twin is not None
            for name, value in {"": m.twin, **m.states}.items():
                if large(value, m.twin):
                    m.going[name] = self._out(m, name, value.detach(), subgroup.kind)
                else:
                    m.own[name] = value
            if subgroup.kind == DEVICE:
                self.keeper.updated(m.place, m.twin)
            m.twin, m.states = None, {}

    def _out(self, member: Member, name: str, value: Tensor, kind: str) -> Going:
        keeper, place, known = self.keeper, member.place, member.own.get(name)
        if place.on_disk and kind == DISK:
            return Going(value, write=self._write(place, name, value, None))
        if not name and not place.on_disk:
            target = place.host
        elif known is not None and not place.on_disk:
            target = local(known)
        else:
            target = keeper.memory.empty(value.shape, value.dtype)
        copy = keeper.lanes.out(value, target, STATES, bounded=False)
        return Going(target, copy, self._write(place, name, target, copy) if place.on_disk else None)

    def _write(self, place: Place, name: str, value: Tensor, after: Copy | None) -> Future[Tensor]:
        files, at = self.files, f"{place.name}.{name or 'parameter'}"
        assert files is not None

        def write() -> Tensor:
            if after is not None:
                after.ended()
            return files.put(at, value)

        self.keeper.lanes.count(STATES, Traffic(write_bytes=value.nbytes))
        return self.keeper.lanes.run("write", write)

    def _home(self, subgroup: Subgroup) -> None:
        """Wait for what is on its way, and put it where the optimizer and the module find it."""
        for m in subgroup.members:
            for name, going in m.going.items():
                found = going.home()
                if not name and m.place.on_disk:
                    adopt(m.place, found)
                elif name and (m.place.on_disk or name not in m.own):
                    m.own[name] = like(found, m.parameter)
            m.going.clear()
            if subgroup.kind == DEVICE and m.place.copy is not None:
                m.place.version = m.place.changes
            self.keeper.refresh(m.place)


def step_apart(optimizer: Optimizer, members: Sequence[tuple[dict[str, Any], Tensor]], state: Any) -> None:
    """The optimizer's step over some parameters alone, with the options of the groups they are in."""
    apart = object.__new__(type(optimizer))
    apart.__dict__.update(optimizer.__dict__)
    counts = ((p, state[p].get("step")) for _, p in members if p in state)
    apart_from = any(isinstance(count, Tensor) and count.device != p.device for p, count in counts)
    away = {"fused": None} if apart_from else {}  # a fused kernel wants step counts beside the parameters
    groups = {id(group): {**group, **away, "params": []} for group, _ in members}
    for group, parameter in members:
        groups[id(group)]["params"].append(parameter)
    apart.param_groups, apart.state = list(groups.values()), state
    apart.__dict__.update(_optimizer_step_pre_hooks={}, _optimizer_step_post_hooks={})
    type(optimizer).step(apart)
    for group, parameter in members:
        changed(group, parameter)


def changed(group: Mapping[str, Any], parameter: Tensor) -> None:
    """Count a step as a change of its parameter: torch's fused kernels do not (tried: 2.13), and copies are renewed by that."""
    if group.get("fused"):
        torch.autograd.graph.increment_version(parameter)


def settle(own: dict[str, Any], parameter: nn.Parameter, keeper: Keeper) -> None:
    """Move the states that an optimizer has made of a parameter in host memory to memory of the offload's own."""
    for name, value in own.items():
        if large(value, parameter) and not is_host(value):
            own[name] = like(keeper.memory.holding(local(value)), value)


def adopt(place: Place, there: Tensor) -> None:
    """`there` is a parameter from now on, as it lies in its file."""
    assert place.parameter is not None
    if isinstance(place.parameter, DTensor):
        place.parameter._local_tensor = there
    else:
        place.parameter.data = there
    place.version, place.filed = -1, place.changes


def local(value: Tensor) -> Tensor:
    """This rank's part."""
    return value._local_tensor if isinstance(value, DTensor) else value.detach()


def like(value: Tensor, other: Tensor) -> Tensor:
    """`value` as the local part of a tensor placed as `other`."""
    return like_dtensor(value, other) if isinstance(other, DTensor) else value


def large(value: Any, parameter: Tensor) -> bool:
    """Whether a state has an element for every one of the parameter, unlike a count of steps."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _range(kind: str) -> torch.profiler.record_function:
    """What is allocated and freed for a visit is the device's."""
    return torch.profiler.record_function(ON_DEVICE if kind == DEVICE else "shardwright::update_from_disk")

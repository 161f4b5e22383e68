"""The optimizer's step over states behind the device, under the user's own torch optimizer.

Parameters whose states are in host memory are host tensors, so torch's optimizer updates them where they lie, and nothing of it is
changed. What is added hangs on torch's step hooks:

    states are moved to memory of the offload's own after they are made, and new parameters set out for the device at once
    of states on disk, one parameter after the other is read, updated and written (planner/hostupdate.py: read, cpu, write)
    with stride k, every k-th subgroup visits the device: its states come in, are updated there, and leave again

A visit runs the same `step` of the same class over that one parameter, which is exact for optimizers that treat each element alone
(planner/precision.py has no others); the user's optimizer then finds no gradient there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ...errors import UsageError
from ...planner.away import updated_on_device
from ...planner.offload import Traffic
from ..allocations import ON_DEVICE
from ..torch_compat import like_dtensor
from .files import Files
from .memory import is_host
from .places import Keeper, Place

STATES = "states"
"""The class under which bytes of moments and masters are counted that visit the device, or are read and written."""


class HostStep:
    """Follows the steps of whatever optimizers have parameters of `places`."""

    def __init__(self, places: Mapping[str, Place], keeper: Keeper, folder: Path | None) -> None:
        self.places, self.keeper = places, keeper
        self.files = Files(folder) if any(p.away.optimizer == "disk" for p in places.values()) else None
        self._visiting = False
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks = [
            register_optimizer_step_pre_hook(self._before), register_optimizer_step_post_hook(self._after),
        ]  # fmt: skip

    def close(self) -> None:
        """Take the hooks back and remove the files."""
        for hook in self._hooks:
            hook.remove()
        if self.files is not None:
            self.files.close()

    def _mine(self, optimizer: Optimizer) -> list[tuple[dict[str, Any], nn.Parameter, Place]]:
        known = {id(p.parameter): p for p in self.places.values()}
        return [
            (group, parameter, known[id(parameter)])
            for group in optimizer.param_groups
            for parameter in group["params"] if id(parameter) in known
        ]  # fmt: skip

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._visiting:
            return
        self._hidden.clear()
        mine = self._mine(optimizer)
        visits = self._visits([place for _, _, place in mine])
        if all(on_device is None for on_device in visits):
            return
        if any(callable(value) for value in (*args[1:], *kwargs.values())):
            raise UsageError(
                "optimizer.step(closure) is not supported with states on disk or updates on the device: call the closure first"
            )
        with torch.no_grad():
            for (group, parameter, place), on_device in zip(mine, visits, strict=True):
                if on_device is not None and parameter.grad is not None:
                    self._visit(optimizer, group, parameter, place, on_device=on_device)
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._visiting:
            return
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()
        for _, parameter, place in self._mine(optimizer):
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if _large(value, parameter) and not is_host(value):
                    state[name] = _like(self.keeper.memory.holding(_local(value)), value)
            self.keeper.refresh(place)

    def _visits(self, places: list[Place]) -> list[bool | None]:
        """Of every parameter: None where the user's optimizer updates it, else whether it is updated on the device."""
        on_device = updated_on_device([p.host.numel() for p in places], [p.stride for p in places])
        return [
            here or (False if place.away.optimizer == "disk" else None)
            for place, here in zip(places, on_device, strict=True)
        ]  # fmt: skip

    def _visit(
        self, optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter, place: Place, *, on_device: bool
    ) -> None:
        """Update one parameter apart, with copies of it, its gradient and its states."""
        bring = self._onto_device if on_device else self.keeper.memory.holding
        own = optimizer.state[parameter]
        assert parameter.grad is not None
        with torch.profiler.record_function(ON_DEVICE if on_device else "shardwright::update_from_disk"):
            twin = nn.Parameter(bring(place.host))
            twin.grad = bring(_local(parameter.grad)) if on_device else _local(parameter.grad)
            states = {name: bring(_local(v)) if _large(v, parameter) else v for name, v in own.items()}
            apart = object.__new__(type(optimizer))
            apart.__dict__.update(optimizer.__dict__)
            apart.param_groups = [{**group, "params": [twin]}]
            apart.state = defaultdict(dict, {twin: states} if states else {})
            self._visiting = True
            try:
                type(optimizer).step(apart)
            finally:
                self._visiting = False
            self._put_back(own, parameter, place, twin, apart.state[twin], on_device=on_device)

    def _put_back(
        self,
        own: dict[str, Any],
        parameter: nn.Parameter,
        place: Place,
        twin: Tensor,
        states: dict[str, Any],
        *,
        on_device: bool,
    ) -> None:
        """New parameter and states to where they lie."""
        moved = _bytes(twin)
        self._replace(parameter, place, twin)
        for name, value in states.items():
            if not _large(value, twin):
                own[name] = value
                continue
            moved += _bytes(value)
            known = own.get(name)
            if self.files is not None and place.away.optimizer == "disk":
                own[name] = _like(self.files.put(f"{place.name}.{name}", value.cpu()), parameter)
            elif known is None:
                own[name] = _like(self.keeper.memory.holding(value), parameter)
            else:
                _local(known).copy_(value)
        if place.away.optimizer == "disk":
            self.keeper.lanes.count(STATES, Traffic(read_bytes=moved, write_bytes=moved))
        if on_device:
            self.keeper.lanes.count(STATES, Traffic(in_bytes=moved + _bytes(twin), out_bytes=moved))
            self.keeper.updated(place, twin)

    def _replace(self, parameter: nn.Parameter, place: Place, value: Tensor) -> None:
        if self.files is None or place.away.optimizer != "disk":
            place.host.copy_(value)
            return
        there = self.files.put(f"{place.name}.parameter", value.detach().cpu())
        if isinstance(parameter, DTensor):
            parameter._local_tensor = there
        else:
            parameter.data = there
        place.version = -1

    def _onto_device(self, value: Tensor) -> Tensor:
        return value.detach().to(self.keeper.device, copy=True)


def _local(value: Tensor) -> Tensor:
    return value._local_tensor if isinstance(value, DTensor) else value.detach()


def _like(value: Tensor, other: Tensor) -> Tensor:
    """`value` as the local part of a tensor placed as `other`."""
    return like_dtensor(value, other) if isinstance(other, DTensor) else value


def _large(value: Any, parameter: Tensor) -> bool:
    """Whether a state has an element for every one of the parameter, unlike a count of steps."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()

"""The optimizer's step over states behind the device, under the user's own torch optimizer.

Parameters whose states are in host memory are host tensors, so torch's optimizer updates them where they lie, and nothing of it is
changed. What is added hangs on torch's step hooks:

    states are moved to memory of the offload's own after they are made, and new parameters set out for the device at once
    states on disk, and those of which the device updates every k-th subgroup, are updated before (runtime/offload/rounds.py); the
    user's optimizer then finds no gradient there
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ...errors import UsageError
from ...planner.away import subgroups, updated_on_device
from .files import Files
from .places import Keeper, Place
from .rounds import DEVICE, DISK, MEMORY, Member, Rounds, Subgroup, changed, settle


class HostStep:
    """Follows the steps of whatever optimizers have parameters of `places`."""

    def __init__(self, places: Mapping[str, Place], keeper: Keeper, folder: Path | None) -> None:
        self.places, self.keeper = places, keeper
        self.files = Files(folder) if any(p.on_disk for p in places.values()) else None
        self.rounds = Rounds(keeper, self.files)
        self._running = False
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
        if self._running:
            return
        self._hidden.clear()
        mine = self._mine(optimizer)
        kinds = self._kinds([place for _, _, place in mine])
        if not any(kinds):
            return
        if any(callable(value) for value in (*args[1:], *kwargs.values())):
            raise UsageError(
                "optimizer.step(closure) is not supported with states on disk or updates on the device: call the closure first"
            )
        apart = [
            (kind, Member(group, parameter, place, optimizer.state[parameter]))
            for (group, parameter, place), kind in zip(mine, kinds, strict=True)
            if kind is not None and parameter.grad is not None
        ]
        parts = [Subgroup(kind, [m for _, m in found]) for (_, kind), found in groupby(apart, lambda pair: pair[0])]
        self._running = True
        try:
            with torch.no_grad():
                self.rounds.run(optimizer, parts)
        finally:
            self._running = False
        self._hide([member.parameter for _, member in apart])

    def _hide(self, parameters: list[nn.Parameter]) -> None:
        """The user's optimizer is to find no gradient of what has been updated."""
        for parameter in parameters:
            assert parameter.grad is not None
            self._hidden.append((parameter, parameter.grad))
            parameter.grad = None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._running:
            return
        self.rounds.finish()
        for group, parameter, _ in self._mine(optimizer):
            if parameter.grad is not None:
                changed(group, parameter)
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()
        for _, parameter, place in self._mine(optimizer):
            if parameter in optimizer.state:
                settle(optimizer.state[parameter], parameter, self.keeper)
            self.keeper.refresh(place)

    def _kinds(self, places: list[Place]) -> list[tuple[int, str] | None]:
        """Of every parameter its subgroup and how that is updated; None where the user's optimizer does."""
        sizes, strides = [p.host.numel() for p in places], [p.stride for p in places]
        found: list[tuple[int, str] | None] = []
        for place, number, here in zip(places, subgroups(sizes), updated_on_device(sizes, strides), strict=True):
            if here:
                found.append((number, DEVICE))
            elif place.away.optimizer == "disk":
                found.append((number, DISK))
            else:
                found.append((number, MEMORY) if math.isfinite(place.stride) else None)
        return found

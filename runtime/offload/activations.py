"""Saved activations of chosen units, kept behind the device between a unit's forward pass and its backward pass.

The hooks copy every storage that a unit saves once, whole, and hand out its views again in the backward pass. The first one that
is asked for brings in all of its unit, and the unit before it ahead. `Regather` (ZeRO-3) owns the one pair of hooks that torch
calls and passes on what is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..torch_compat import StorageRef, when_backward_ends
from .lanes import Copy, Lanes
from .memory import HostMemory, is_host

ACTIVATIONS = "activations"
"""The class that bytes are counted under."""


@dataclass(eq=False)
class _Left:
    """A storage that left: its bytes in host memory, and those on the device while its backward pass runs."""

    ref: StorageRef
    unit: _Unit
    host: Tensor
    leaving: Copy
    coming: Copy | None = None
    handles: int = 0
    resolved: int = 0


@dataclass(eq=False)
class _Unit:
    """One pass through a unit, with what it saved by the address of the storage."""

    at: int
    leaves: bool
    left: dict[int, _Left] = field(default_factory=dict)


@dataclass(frozen=True)
class _Handle:
    """A tensor within a storage that left."""

    left: _Left
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Leaving:
    """What leaves in one forward pass. `units` are those whose activations do."""

    def __init__(self, units: frozenset[int], memory: HostMemory, lanes: Lanes) -> None:
        self.units, self.memory, self.lanes = units, memory, lanes
        self._passes: list[_Unit] = []
        self._stay: dict[int, StorageRef] = {}
        self._ending = False

    def enter(self, unit: int) -> None:
        """The ops of a unit follow."""
        leaves = unit in self.units
        self._passes.append(_Unit(len(self._passes), leaves))

    def exempt(self, value: Any) -> None:
        """Tensors that stay on the device whoever saves them."""
        self._stay = {key: ref for key, ref in self._stay.items() if not ref.expired()}
        for x in tree_leaves(value):
            if isinstance(x, Tensor) and not is_host(x):
                ref = StorageRef(x.untyped_storage())
                self._stay[ref.cdata] = ref

    def pack(self, x: Tensor) -> Any:
        """What autograd keeps in place of `x`."""
        here = self._passes[-1] if self._passes else None
        if here is None or not here.leaves or x.layout != torch.strided or is_host(x):
            return x
        storage = x.untyped_storage()
        ref = StorageRef(storage)
        stays = self._stay.get(ref.cdata)
        if not x.dim() or not storage.nbytes() or (stays is not None and not stays.expired()):
            return x
        known = here.left.get(ref.cdata)
        if known is None or known.ref.expired():
            whole = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage, 0, (storage.nbytes(),), (1,))
            host = self.memory.empty((storage.nbytes(),), torch.uint8)
            known = _Left(ref, here, host, self.lanes.out(whole, host, ACTIVATIONS))
            here.left[ref.cdata] = known
        known.handles += 1
        return _Handle(known, x.dtype, x.storage_offset(), tuple(x.shape), x.stride())

    def unpack(self, saved: _Handle) -> Tensor:
        """The tensor again, on the device."""
        left = saved.left
        if left.coming is None:
            self._bring(left.unit, [left])
        if left.resolved == 0:
            self._bring(left.unit)
            before = next((u for u in reversed(self._passes[: left.unit.at]) if u.leaves), None)
            if before is not None:
                self._bring(before)
        assert left.coming is not None
        here = left.coming.wait()
        left.resolved += 1
        if left.resolved % left.handles == 0:
            left.coming = None
        found = torch.empty(0, dtype=saved.dtype, device=here.device)
        return found.set_(here.untyped_storage(), saved.offset, saved.size, saved.stride)

    def _bring(self, unit: _Unit, only: Sequence[_Left] = ()) -> None:
        """Start bringing in what has not been asked for yet (or `only` some, again)."""
        for left in only or [x for x in unit.left.values() if not x.resolved]:
            if left.coming is None:
                left.leaving.arrived()
                target = torch.empty_like(left.host, device=self.lanes.device, pin_memory=False)
                left.coming = self.lanes.into(left.host, target, ACTIVATIONS)
        self._ending = self._ending or when_backward_ends(self._end)

    def _end(self) -> None:
        """Nothing that came in outlives the backward pass."""
        self._ending = False
        for unit in self._passes:
            for left in unit.left.values():
                left.coming = None


def marks(active: Callable[[], Leaving | None]) -> tuple[Callable[[int], Callable[[], None]], Callable[[Any], None]]:
    """(enter, exempt) as a graph calls them, for the pass that runs."""

    def enter(unit: int) -> Callable[[], None]:
        def enter_unit() -> None:
            found = active()
            if found is not None:
                found.enter(unit)

        return enter_unit

    def exempt(value: Any) -> None:
        found = active()
        if found is not None:
            found.exempt(value)

    return enter, exempt

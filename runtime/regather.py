"""Gathered parameters that are freed after forward and gathered again in backward (ZeRO-3).

    regather = Regather()
    with regather:
        loss = forward()       # groups.gather(..., regather=True) inside
    loss.backward()

Inside the block autograd saves, instead of a tensor that lies in a gathered one, a handle (recipe, index, offset, size, stride).
Backward resolves it by gathering the group again into a small cache, which the group leaves when the last handle has been
resolved, when its gradients are scattered, when others need the room, or when the backward pass ends.
"""

from __future__ import annotations

import contextvars
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from . import collectives
from .offload.activations import Leaving
from .torch_compat import StorageRef, when_backward_ends


class Recipe:
    """How to gather one group again: `make()` returns its wholes, from shards that must not have changed."""

    def __init__(
        self, make: Callable[[], Sequence[Tensor]], shards: Sequence[Tensor], ledger: collectives.CommLedger | None
    ) -> None:
        self._make = make
        self._shards = tuple(shards)
        self._versions = tuple(s._version for s in shards)
        self._ledger = ledger
        self.handles = 0
        self.resolved = 0

    def gather(self) -> Sequence[Tensor]:
        """The group's wholes again; raises UsageError where a parameter was written to since the forward pass."""
        if self._versions != tuple(s._version for s in self._shards):
            raise UsageError("a parameter was modified between the forward pass and its backward; step after backward")
        with torch.no_grad(), collectives.backward_phase(self._ledger):
            return self._make()


@dataclass(frozen=True)
class _Handle:
    """A tensor within the gathered one at `index`."""

    recipe: Recipe
    index: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Regather:
    """Saved-tensor hooks of one forward pass and the cache of its backward; holds at most `groups` gathered groups.

    `leaving` takes what lies in no gathered group (torch calls one pair of hooks only).
    """

    def __init__(self, groups: int = 2, leaving: Leaving | None = None) -> None:
        self.groups, self.leaving = groups, leaving
        self._buffers: dict[int, tuple[StorageRef, Recipe, int]] = {}
        self._cache: OrderedDict[Recipe, Sequence[Tensor]] = OrderedDict()
        self._hooks: list[tuple[torch.autograd.graph.saved_tensors_hooks, contextvars.Token[Regather | None]]] = []
        self._ending = False

    def __enter__(self) -> Regather:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._hooks.append((hooks, _active.set(self)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooks, token = self._hooks.pop()
        _active.reset(token)
        hooks.__exit__(kind, error, trace)

    def register(self, wholes: Sequence[Tensor], recipe: Recipe) -> None:
        """Tensors that lie in one of `wholes` are saved as handles from now on."""
        self._buffers = {key: entry for key, entry in self._buffers.items() if not entry[0].expired()}
        for i, whole in enumerate(wholes):
            ref = StorageRef(whole.untyped_storage())
            self._buffers[ref.cdata] = ref, recipe, i

    def release(self, recipe: Recipe) -> None:
        """Forget the gathered buffer of a group (its gradients are complete)."""
        self._cache.pop(recipe, None)

    def clear(self) -> None:
        """Forget every gathered buffer."""
        self._cache.clear()
        self._ending = False

    def _pack(self, x: Tensor) -> Any:
        entry = self._buffers.get(StorageRef(x.untyped_storage()).cdata) if self._buffers else None
        if entry is None or entry[0].expired():
            return x if self.leaving is None else self.leaving.pack(x)
        entry[1].handles += 1
        return _Handle(entry[1], entry[2], x.storage_offset(), tuple(x.shape), x.stride())

    def _unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if not isinstance(saved, _Handle):
            assert self.leaving is not None
            return self.leaving.unpack(saved)
        recipe = saved.recipe
        wholes = self._cache.get(recipe)
        if wholes is None:
            while len(self._cache) >= self.groups:
                self._cache.popitem(last=False)
            wholes = self._cache[recipe] = recipe.gather()
            self._end_with_backward()
        self._cache.move_to_end(recipe)
        recipe.resolved += 1
        if recipe.resolved % recipe.handles == 0:
            self.release(recipe)
        return wholes[saved.index].as_strided(saved.size, saved.stride, saved.offset)

    def _end_with_backward(self) -> None:
        if not self._ending:
            self._ending = when_backward_ends(self.clear)


_active: contextvars.ContextVar[Regather | None] = contextvars.ContextVar("shardwright_regather", default=None)


def active_regather() -> Regather | None:
    """The `Regather` whose block is running."""
    return _active.get()

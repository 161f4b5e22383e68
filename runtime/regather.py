"""Tensors that autograd does not keep, because the backward pass makes them again: gathered parameters (ZeRO-3), and what a
plan recomputes (runtime/again.py).

    regather = Regather()
    with regather:
        loss = forward()       # groups.gather(..., regather=True) and ops that run again inside
    loss.backward()

Inside the block autograd saves, instead of a tensor whose storage a *recipe* can make again, a handle (recipe, slot, offset,
size, stride). Backward resolves it by following the recipe and keeps what that made in a small cache. A slot of it goes when its
last handle has been resolved; gathered groups also when their gradients are scattered or when others need the room; everything
when the backward pass ends. While one group is used, the gather of the one that was used before it in the forward pass is under
way (`prefetch`), and counts as one that is there.
"""

from __future__ import annotations

import contextvars
from collections import Counter, OrderedDict
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

CHANGED = "a parameter was modified between the forward pass and its backward; step after backward"


class Recipe:
    """How to gather one group again: `start()` launches, and returns what waits for its wholes; the shards must not have changed.

    `handles` counts the handles of each slot, `resolved` those that the running backward pass has resolved. `ahead`: it may be
    launched before it is asked for.
    """

    crowded = True
    """Whether what it makes goes when others of its kind need the room."""

    def __init__(
        self, start: Callable[[], Callable[[], Sequence[Tensor]]], shards: Sequence[Tensor],
        ledger: collectives.CommLedger | None, *, ahead: bool = True,
    ) -> None:  # fmt: skip
        self._start, self.ahead = start, ahead
        self._coming: Callable[[], Sequence[Tensor]] | None = None
        self._shards = tuple(shards)
        self._versions = tuple(s._version for s in shards)
        self._ledger = ledger
        self.handles: Counter[int] = Counter()
        self.resolved: Counter[int] = Counter()

    def launch(self) -> None:
        """Start gathering; raises UsageError where a parameter was written to since the forward pass."""
        if self._versions != tuple(s._version for s in self._shards):
            raise UsageError(CHANGED)
        with torch.no_grad(), collectives.backward_phase(self._ledger):
            self._coming = self._start()

    def follow(self, regather: Regather) -> Sequence[Tensor]:
        """The group's wholes again, launched before or now."""
        if self._coming is None:
            self.launch()
        assert self._coming is not None
        coming, self._coming = self._coming, None
        with torch.no_grad(), collectives.backward_phase(self._ledger):
            return coming()


@dataclass(frozen=True)
class Handle:
    """A tensor within the one that a recipe makes for `slot` (negative: from the end); without a size, that one itself."""

    recipe: Recipe
    slot: int
    offset: int = 0
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()


class Regather:
    """Saved-tensor hooks of one forward pass and the cache of its backward; holds at most `groups` gathered groups.

    `prefetch` groups are gathered ahead, as far as there is room for them. `leaving` takes what lies in no gathered group (torch
    calls one pair of hooks only).
    """

    def __init__(self, groups: int = 2, leaving: Leaving | None = None, prefetch: int = 0) -> None:
        self.groups, self.leaving, self.prefetch = groups, leaving, prefetch
        self.running: Any = None
        """The recipe of the op that runs now, if it is one that runs again (runtime/again.py)."""
        self._buffers: dict[int, tuple[StorageRef, Recipe, int]] = {}
        self._cache: OrderedDict[Recipe, list[Tensor | None]] = OrderedDict()
        self._order: list[Recipe] = []
        self._index: dict[Recipe, int] = {}
        self._followed: set[Recipe] = set()
        self._coming: list[Recipe] = []
        self._at = 0
        self._hooks: list[tuple[torch.autograd.graph.saved_tensors_hooks, contextvars.Token[Regather | None]]] = []
        self._ending = False

    def __enter__(self) -> Regather:
        hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        hooks.__enter__()
        self._hooks.append((hooks, _active.set(self)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooks, token = self._hooks.pop()
        self._buffers.clear()  # they hold recipes, and those operands
        _active.reset(token)
        hooks.__exit__(kind, error, trace)

    def register(self, wholes: Sequence[Tensor], recipe: Recipe) -> None:
        """Tensors that lie in one of `wholes`, the recipe's slots in order, are saved as handles from now on."""
        self._buffers = {key: entry for key, entry in self._buffers.items() if not entry[0].expired()}
        self._index[recipe] = len(self._order)
        self._order.append(recipe)
        for i, whole in enumerate(wholes):
            self.know(whole, recipe, i)

    def know(self, x: Tensor, recipe: Recipe, slot: int) -> None:
        """Tensors that lie in the storage of `x` are saved as handles from now on."""
        ref = StorageRef(x.untyped_storage())
        self._buffers[ref.cdata] = ref, recipe, slot

    def handle(self, x: Tensor) -> Handle | None:
        """A handle instead of `x`, where a recipe makes its storage; it is to be resolved once in a backward pass."""
        entry = self._buffers.get(StorageRef(x.untyped_storage()).cdata) if self._buffers else None
        if entry is None or entry[0].expired():
            return None
        _, recipe, slot = entry
        recipe.handles[slot] += 1
        return Handle(recipe, slot, x.storage_offset(), tuple(x.shape), x.stride())

    def resolve(self, handle: Handle) -> Tensor:
        """The tensor behind a handle, made again where it is not there."""
        recipe, slot = handle.recipe, handle.slot
        made = self._cache.get(recipe)
        found = made[slot] if made is not None else None
        if found is None:
            found = self._follow(recipe)[slot]
            assert found is not None
        recipe.resolved[slot] += 1
        if recipe.resolved[slot] % recipe.handles[slot] == 0:
            self._drop(recipe, slot)
        if handle.size is None:
            return found
        return found.as_strided(handle.size, handle.stride, handle.offset)

    def _follow(self, recipe: Recipe) -> list[Tensor | None]:
        self._end_with_backward()
        if recipe.crowded:
            self._followed.add(recipe)
            self._at = self._index.get(recipe, 0)
            self._coming = [other for other in self._coming if other is not recipe]
            while self._cache_crowd() >= max(self.groups - len(self._coming), 1):
                self._cache.pop(next(other for other in self._cache if other.crowded))
        made: list[Tensor | None] = list(recipe.follow(self))
        wanted = {slot % len(made) for slot in recipe.handles}
        self._cache[recipe] = [x if slot in wanted else None for slot, x in enumerate(made)]
        found = self._cache[recipe]
        self._launch_ahead()
        return found

    def _cache_crowd(self) -> int:
        return sum(other.crowded for other in self._cache)

    def _launch_ahead(self) -> None:
        """Launch the groups that the backward pass comes to next, as far as `prefetch` and the room go."""
        at = self._at
        while self._ending and at and len(self._coming) < self.prefetch:
            at -= 1
            recipe = self._order[at]
            if not recipe.handles or recipe in self._followed or recipe in self._coming:
                continue
            if not recipe.ahead or self._cache_crowd() + len(self._coming) >= self.groups:
                return
            recipe.launch()
            self._coming.append(recipe)

    def _drop(self, recipe: Recipe, slot: int) -> None:
        made = self._cache.get(recipe)
        if made is None:
            return
        made[slot] = None
        if all(x is None for x in made):
            del self._cache[recipe]
            self._launch_ahead()

    def wants(self, recipe: Recipe) -> bool:
        """Whether the running backward pass still has to make what a recipe makes."""
        return recipe not in self._cache and recipe.resolved < recipe.handles

    def release(self, recipe: Recipe) -> None:
        """Forget the gathered buffer of a group (its gradients are complete)."""
        if self._cache.pop(recipe, None) is not None:
            self._launch_ahead()

    def clear(self) -> None:
        """Forget everything that was made again."""
        for recipe in self._cache:
            recipe.resolved.clear()  # a backward pass over a part of the graph leaves handles unresolved
        for recipe in self._coming:
            recipe.follow(self)  # launched, and asked for by nobody
        self._coming.clear()
        self._cache.clear()
        self._followed.clear()
        self._ending = False

    def pack(self, x: Tensor) -> Any:
        """What autograd saves instead of `x`."""
        found = self.handle(x)
        if found is None and self.running is not None:
            found = self.running.inner(x)
        if found is None:
            return x if self.leaving is None else self.leaving.pack(x)
        return found

    def unpack(self, saved: Any) -> Tensor:
        """The tensor again, in a backward pass."""
        if isinstance(saved, Tensor):
            return saved
        if not isinstance(saved, Handle):
            assert self.leaving is not None
            return self.leaving.unpack(saved)
        if torch.is_grad_enabled():
            raise UsageError(
                "backward(create_graph=True) is not supported where parameters are gathered again or activations recomputed"
            )
        self._buffers.clear()
        found = self.resolve(saved)
        if saved.recipe in self._cache:
            self._cache.move_to_end(saved.recipe)
        return found

    def _end_with_backward(self) -> None:
        if not self._ending:
            self._ending = when_backward_ends(self.clear)


_active: contextvars.ContextVar[Regather | None] = contextvars.ContextVar("shardwright_regather", default=None)


def active_regather() -> Regather | None:
    """The `Regather` whose block is running."""
    return _active.get()

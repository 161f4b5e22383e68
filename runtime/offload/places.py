"""Parameters whose master copy lies behind the device: what the device holds of them, and how both are kept equal.

The optimizer's parameter is the host tensor: its gradients, its moments and its update are the host's, by torch's own rule that
an op runs where its tensors lie. The device computes with a copy, kept (the optimizer's states alone are away) or fetched for
every pass and dropped (the parameters are away too). A copy is fetched when the host tensor has changed since.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...planner.away import Away
from ...planner.offload import Traffic
from .. import collectives
from ..groups import Bucket, gather_wholes, scatter_gradients, views
from ..regather import Recipe, Regather, active_regather
from ..torch_compat import when_backward_ends
from .lanes import Copy, Lanes
from .memory import HostMemory, is_host

OPTIMIZER, PARAMS, GRADIENTS = "optimizer", "params", "gradients"
"""Classes that bytes are counted under."""


@dataclass
class Place:
    """One parameter. `stays`: the device keeps its copy between passes. `dtype` is what the device computes with.

    `again`: ops of its unit run again in the backward pass. `version` and `filed` are those of the host's values that the device's
    copy was made of and that the file on disk has.
    """

    name: str
    away: Away
    stride: float
    stays: bool
    dtype: torch.dtype
    trained: bool = True
    again: bool = False
    filed: int = -1
    parameter: nn.Parameter | None = None
    copy: Tensor | None = None
    version: int = -1
    coming: Copy | None = None
    cast: Tensor | None = None
    held: Tensor | None = None

    @property
    def what(self) -> str:
        """The class its copies onto the device belong to."""
        return PARAMS if self.away.parameters else OPTIMIZER

    @property
    def on_disk(self) -> bool:
        """Whether it lies in a file."""
        return self.away.tier(trained=self.trained) == "disk"

    @property
    def host(self) -> Tensor:
        """This rank's slice, in the memory that the optimizer updates."""
        assert self.parameter is not None
        return self.parameter._local_tensor if isinstance(self.parameter, DTensor) else self.parameter.detach()

    @property
    def changes(self) -> int:
        """Grows with every change in place; a DTensor counts its own, not its local part."""
        assert self.parameter is not None
        return self.parameter._version + self.host._version


@dataclass
class Keeper:
    """Moves the parameters of one rank between the tiers."""

    device: torch.device
    memory: HostMemory
    lanes: Lanes

    def fetch(self, place: Place) -> Tensor:
        """The device's copy, on its way or made now; `stays` or not, it has the values that the host has."""
        if not place.stays:
            if place.version != place.changes:  # brought in ahead of a change
                self.drop(place)
            self.ahead(place)
            coming, place.coming = place.coming, None
            assert coming is not None
            return coming.wait()
        self.refresh(place)
        if place.coming is not None:
            place.coming.wait()
            place.coming = None
        assert place.copy is not None
        return place.copy

    def ahead(self, place: Place) -> None:
        """Start bringing in one that does not stay."""
        if place.coming is None:
            place.version = place.changes
            target = torch.empty(place.host.shape, dtype=place.dtype, device=self.device)
            if place.on_disk:
                self.lanes.count(place.what, Traffic(read_bytes=place.host.nbytes))
            place.coming = self.lanes.into(self._computed(place), target, place.what)

    def refresh(self, place: Place) -> None:
        """Bring a copy that stays up to date, where the host tensor has changed."""
        if not place.stays or place.version == place.changes:
            return
        if place.coming is not None:
            place.coming.wait()
        if place.copy is None:
            place.copy = torch.empty(place.host.shape, dtype=place.dtype, device=self.device)
        place.version = place.changes
        place.coming = self.lanes.into(self._computed(place), place.copy, place.what)

    def updated(self, place: Place, value: Tensor) -> None:
        """The device has made the new value itself: a copy that stays takes it without coming from the host."""
        if place.stays and place.copy is not None:
            if place.coming is not None:
                place.coming.wait()
                place.coming = None
            place.copy.copy_(value)
            place.version = place.changes

    def drop(self, place: Place) -> None:
        """Forget what was brought in ahead and is not wanted."""
        if place.coming is not None and not place.stays:
            place.coming.wait()
            place.coming = None

    def leave(self, place: Place, gradient: Tensor | None, *, deferred: bool) -> Tensor | None:
        """A gradient in host memory, in the parameter's dtype; one that is there already as it is.

        `deferred`: it may arrive as late as the end of the backward pass, where nobody reads it before.
        """
        if gradient is None or is_host(gradient):
            return gradient
        target = self.memory.empty(gradient.shape, place.host.dtype)
        on_its_way = self.lanes.out(gradient.to(target.dtype), target, GRADIENTS)
        p = place.parameter
        read = p is None or p.grad is not None or p._backward_hooks or p._post_accumulate_grad_hooks
        if read or not deferred or not self._settle_after_backward():
            on_its_way.arrived()
        return target

    def on_device(self, place: Place, gradient: Tensor | None) -> Tensor:
        """The gradient of a step, in the parameter's dtype: held here, brought back, or zeros where there is none."""
        held, place.held = place.held, None
        if held is None and gradient is None:
            return torch.zeros(place.host.shape, dtype=place.host.dtype, device=self.device)
        if held is None and gradient is not None:
            held = gradient
            if is_host(gradient):
                target = torch.empty(gradient.shape, dtype=gradient.dtype, device=self.device)
                held = self.lanes.into(gradient, target, GRADIENTS).wait()
        assert held is not None
        return held.to(place.host.dtype)

    def _settle_after_backward(self) -> bool:
        return when_backward_ends(self.lanes.settle)

    def _computed(self, place: Place) -> Tensor:
        """The host's values in the dtype of the device; a cast is made in a buffer of its own, which those on disk do not keep."""
        if place.host.dtype == place.dtype:
            return place.host
        if place.on_disk:
            made = self.memory.empty(place.host.shape, place.dtype)
            made.copy_(place.host)
            return made
        if place.coming is not None:
            place.coming.arrived()
        if place.cast is None:
            place.cast = self.memory.empty(place.host.shape, place.dtype)
        place.cast.copy_(place.host)
        return place.cast


@dataclass(eq=False)
class Group:
    """Parameters of one region instance, in a program. `order` are all groups of the program, as they are first used.

    `deferred`: gradients go straight to the module's parameters, which nobody reads before the backward pass ends. `holds`: the
    device adds them up over the microbatches of a step, and they leave at its end. `gathers`: wholes are made of all its chunks.
    """

    keeper: Keeper
    places: tuple[Place, ...]
    order: list[Group]
    at: int
    deferred: bool = True
    holds: bool = False
    gathers: bool = False
    recipes: weakref.WeakKeyDictionary[Regather, Recipe] = field(default_factory=weakref.WeakKeyDictionary, repr=False)

    @property
    def passes(self) -> bool:
        """Whether it is dropped after use."""
        return self.places[0].away.parameters

    def fetch(self) -> list[Tensor]:
        """Device tensors, and those of the next group ahead."""
        found = [self.keeper.fetch(p) for p in self.places]
        if self.at + 1 < len(self.order) and self.order[self.at + 1].passes:
            for place in self.order[self.at + 1].places:
                self.keeper.ahead(place)
        return found

    def again(self, manager: Regather | None) -> list[Tensor | None]:
        """Device tensors that the backward pass of a forward pass needs, and those of the group before ahead."""
        found = [self.keeper.fetch(p) if wanted else None for p, wanted in self._wanted(manager)]
        if manager is not None and self.at and self.order[self.at - 1].passes:
            self.order[self.at - 1]._come(manager)
        return found

    def _come(self, manager: Regather) -> None:
        """Bring in ahead what the running backward pass still has to make of this group."""
        recipe = self.recipes.get(manager)
        for place, wanted in self._wanted(manager) if recipe is not None and manager.wants(recipe) else ():
            if wanted:
                self.keeper.ahead(place)

    def _wanted(self, manager: Regather | None) -> list[tuple[Place, bool]]:
        """Which parameters a backward pass needs: all of those gathered from chunks, and where ops run again."""
        recipe = self.recipes.get(manager) if manager is not None else None
        every = recipe is None or self.gathers or any(p.again for p in self.places)
        return [(p, every or k in recipe.handles) for k, p in enumerate(self.places)]

    def remember(
        self, wholes: Sequence[Tensor], make: Callable[[list[Any]], list[Any]], ctx: Any, ledger: Any
    ) -> None:  # fmt: skip
        """Let the backward pass make `wholes`, of what is fetched once more, instead of saving them."""
        manager = active_regather()
        if manager is not None:
            here = weakref.ref(manager)
            parameters = [p.parameter for p in self.places if p.parameter is not None]
            ctx.recipe = self.recipes[manager] = Recipe(
                lambda: lambda: make(self.again(here())), parameters, ledger, ahead=False
            )
            ctx.manager = manager
            manager.register(wholes, ctx.recipe)

    def leave(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients in host memory; None for those that are held."""
        if self.holds:
            for place, gradient in zip(self.places, gradients, strict=True):
                if gradient is not None:
                    place.held = gradient if place.held is None else place.held + gradient  # others may read the first
            return [None] * len(self.places)
        return [self.keeper.leave(p, g, deferred=self.deferred) for p, g in zip(self.places, gradients, strict=True)]


def _released(ctx: Any) -> None:
    recipe, manager = getattr(ctx, "recipe", None), getattr(ctx, "manager", None)
    if recipe is not None and isinstance(manager, Regather):
        manager.release(recipe)


class Fetch(torch.autograd.Function):
    """Host tensors -> device tensors; gradients go the other way."""

    @staticmethod
    def forward(ctx, group, *hosts):  # type: ignore[no-untyped-def,override]
        ctx.group = group
        ctx.set_materialize_grads(False)
        found = group.fetch()
        if group.passes:
            group.remember(found, list, ctx, collectives.active_ledger())
        return tuple(f if group.passes else f.view_as(f) for f in found)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def,override]
        _released(ctx)
        return (None, *ctx.group.leave(grads))


class FetchGather(torch.autograd.Function):
    """Host chunks -> wholes on the device (runtime/groups.py): fetched and gathered; gradients are scattered and leave."""

    @staticmethod
    def forward(ctx, group, bucket, name, dtype, sum_dtype, regather, *hosts):  # type: ignore[no-untyped-def,override]
        ctx.home = group, bucket, name, sum_dtype
        ctx.shapes = [h.shape for h in hosts]
        ctx.ledger = collectives.active_ledger()
        found = gather_wholes(group.fetch(), bucket, name, dtype)
        if regather:
            group.remember(found, lambda chunks: gather_wholes(chunks, bucket, name, dtype), ctx, ctx.ledger)
        return tuple(found)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def,override]
        group, bucket, name, sum_dtype = ctx.home
        _released(ctx)
        with collectives.backward_phase(ctx.ledger):
            mine = scatter_gradients(grads, bucket, name, sum_dtype or grads[0].dtype)
        used = sum(s.numel() for s in ctx.shapes)
        return (None, None, None, None, None, None, *group.leave(views(mine[:used], ctx.shapes)))


def fetched(group: Group) -> Callable[[list[Tensor]], list[Tensor]]:
    """The op of a graph that brings in a group that is whole on every rank."""

    def fetch(hosts: list[Tensor]) -> list[Tensor]:
        return list(Fetch.apply(group, *hosts))

    return fetch


def gathered(group: Group) -> Callable[..., list[Tensor]]:
    """The op of a graph that brings in a group stored in chunks, with the arguments of `groups.gather`."""

    def fetch_and_gather(
        hosts: list[Tensor], rows: list[int], positions: list[int], name: str, dtype: torch.dtype | None,
        sum_dtype: torch.dtype | None, regather: bool, sizes: list[int],
    ) -> list[Tensor]:  # fmt: skip
        if not name:
            return list(Fetch.apply(group, *hosts))
        shapes = tuple(torch.Size((r, *h.shape[1:]) if h.dim() else ()) for r, h in zip(rows, hosts, strict=True))
        bucket = Bucket(shapes, tuple(sizes), tuple(positions))
        wanted = dtype or hosts[0].dtype
        return list(FetchGather.apply(group, bucket, name, wanted, sum_dtype, regather, *hosts))

    return fetch_and_gather

"""Run lowered graphs: one microbatch under autograd, or the whole microbatch loop inside the call.

With one microbatch the body runs under ordinary autograd and the user's `backward()` walks it. With more, forward and
backward of all microbatches run inside the call; the gradients are held, and the user's `backward()` adds them times the
incoming gradient, so loss scaling, division and accumulation work as they do on the original module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..errors import UsageError
from ..passes.lowered import After, Feed, Lowered
from ..planner.placement import V
from .early import Late
from .offload.engine import OffloadEmit

Body = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Values:
    """Where feeds come from: local parameters and whole tensors by outline name, and the seed of this call."""

    parameters: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    seed: Tensor

    def of(self, feed: Feed, microbatch: int = 0) -> Tensor:
        """The value of a "chunk", "whole" or "seed" feed."""
        if feed.kind == "chunk":
            return self.parameters[feed.tensor]
        if feed.kind == "seed":
            return self.seed + microbatch
        return self.whole[feed.tensor]


def run_once(
    lowered: Lowered, body: Body, values: Values, regather: contextlib.AbstractContextManager[Any]
) -> Sequence[Any]:
    """One pass over the whole local batch; differentiable when grad mode is on. Returns the body's outputs."""
    with regather:
        return body(*[values.of(feed) for feed in lowered.body_feeds])


@dataclass(frozen=True)
class Buckets:
    """Parameters by group, and those groups whose gradients are reduced every microbatch (ZeRO-2); the rest once per step."""

    groups: tuple[tuple[str, ...], ...]
    every_microbatch: tuple[tuple[str, ...], ...]


def run_microbatches(
    lowered: Lowered, body: Body, values: Values, microbatches: int, buckets: Buckets, axis_sizes: tuple[int, ...],
    regather: Callable[[], contextlib.AbstractContextManager[Any]], offload: OffloadEmit | None = None,
) -> Sequence[Any]:  # fmt: skip
    """Forward and backward of all microbatches; returns the whole loss, differentiable in `values.parameters`.

    After it come the body's other outputs, of the whole batch.
    """
    if offload is not None:
        offload.begin()
    names = list(values.parameters)
    leaves = {n: p.detach().requires_grad_(p.requires_grad) for n, p in values.parameters.items()}
    with torch.enable_grad():
        loop = Loop(lowered, Values(leaves, values.whole, values.seed), microbatches, buckets)
        seed = loss_gradient(lowered, axis_sizes)
        results = Results(lowered)
        with loop:
            for i in range(microbatches):
                with regather():
                    loss, *others = body(*loop.feeds(i))
                    torch.autograd.backward(loss, torch.full_like(loss, seed))
                results.add(i, [loss, *others])
                del loss, others  # their graph has the gathered parameters
        loop.close()
        loop.finish()
    found = results.wholes()
    held = [leaves[n].grad if offload is None else offload.end(n, leaves[n].grad) for n in names]
    result: Tensor = Held.apply(found[lowered.loss], held, *[values.parameters[n] for n in names])
    return [result, *[found[name] for name in lowered.outputs]]


class Results:
    """What microbatches make of the loss of a graph, if it has one, and of its outputs."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.names = (*([lowered.loss] if lowered.loss else []), *lowered.outputs)
        self._found: dict[str, dict[int, Tensor]] = {}

    def add(self, microbatch: int, values: Sequence[Tensor]) -> None:
        """One microbatch's: added up at once where they are to be, the last ones kept where all are equal."""
        for name, value in zip(self.names, values, strict=True):
            known, after = self._found.setdefault(name, {}), self.lowered.after.get(name)
            if after is not None and after.place is not None:
                known[microbatch] = value.detach()
            else:
                known[0] = value.detach() if after is None or not known else known[0] + value.detach()

    def wholes(self) -> dict[str, Tensor]:
        """All by name, whole on every rank of the mesh."""
        found = {}
        with torch.no_grad():
            for name, parts in self._found.items():
                after = self.lowered.after.get(name, After(()))
                values = [parts[i] for i in sorted(parts)]
                value = values[0] if after.place is None else _joined(values, after.place)
                for target, rest in after.steps:
                    value = target(value, *rest)
                found[name] = value
        return found


def loss_gradient(lowered: Lowered, axis_sizes: tuple[int, ...]) -> float:
    """Gradient of the partial loss when that of the whole loss is one: V -> R scales it, P -> R does not."""
    scale = 1.0
    for state, n in zip(lowered.loss_placement, axis_sizes, strict=True):
        scale /= n if state == V else 1
    return scale


class Loop:
    """The step's tensors outside the loop: what entry makes of the parameters, what prologue makes of the inputs."""

    def __init__(self, lowered: Lowered, values: Values, microbatches: int, buckets: Buckets) -> None:
        assert lowered.entry is not None
        assert lowered.prologue is not None
        self.lowered, self.values, self.m = lowered, values, microbatches
        with torch.no_grad():
            cuts = lowered.prologue(*[values.of(f) for f in lowered.prologue_feeds])
        self.accumulated: dict[int, Tensor] = {}
        self.late = Late()
        with self.late:
            outputs = lowered.entry(*[values.of(f) for f in lowered.entry_feeds])
        self.leaves = [o.detach().requires_grad_(o.requires_grad) for o in outputs]
        cut_feeds = [f for f in lowered.body_feeds if f.kind == "cut"]
        self.cut_values = dict(zip([f.node for f in cut_feeds], cuts, strict=True))
        step_feeds = [f for f in lowered.body_feeds if f.kind == "step"]
        self.step_values = dict(zip([f.node for f in step_feeds], self.leaves, strict=True))
        self.buckets = buckets
        self.hooks: list[RemovableHandle] = []
        index: dict[str, list[int]] = {}
        for i, (name, _) in enumerate(lowered.entry_outputs):
            index.setdefault(name, []).append(i)
        self.members = {
            group: [i for name in group for i in index.get(name, ()) if self.leaves[i].requires_grad]
            for group in buckets.groups
        }
        self.doors = {members[0]: Door([outputs[i] for i in members]) for members in self.members.values() if members}

    def __enter__(self) -> None:
        """Reduce a ZeRO-2 group as soon as all its gradients of this microbatch have come."""
        for group in self.buckets.every_microbatch:
            members = self.members[group]
            hook = _when_all(_Count(members), self._reduce)
            self.hooks += [self.leaves[i].register_post_accumulate_grad_hook(hook) for i in members]

    def __exit__(self, *error: object) -> None:
        """The hooks hold the loop, and the loop what they hang on: a cycle that would keep the gathered parameters."""
        for handle in self.hooks:
            handle.remove()
        self.hooks.clear()

    def feeds(self, microbatch: int, taken: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Body arguments of one microbatch; `taken` is what other stages made of it."""
        found = []
        for feed in self.lowered.body_feeds:
            if feed.kind == "step":
                found.append(self.step_values[feed.node])
            elif feed.kind == "cut":
                found.append(_cut(self.cut_values[feed.node], feed, self.m, microbatch))
            elif feed.kind == "taken":
                assert taken is not None
                found.append(taken[feed.tensor])
            else:
                found.append(self.values.of(feed, microbatch))
        return found

    def _reduce(self, members: Sequence[int]) -> None:
        found = [self.leaves[i].grad for i in members]
        for i in members:
            self.leaves[i].grad = None
        self.doors[members[0]].enter(found)

    def close(self) -> None:
        """After the last microbatch: inputs and gathered parameters go, what has accumulated stays."""
        self.cut_values.clear()
        self.step_values.clear()
        self.accumulated = {i: leaf.grad for i, leaf in enumerate(self.leaves) if leaf.grad is not None}
        for leaf in self.leaves:
            leaf.grad = None  # a leaf that something still holds would keep it: what is handed on would be copied
        self.leaves.clear()

    def finish(self) -> None:
        """Reduce what is reduced once per step; the loop is closed.

        Group after group, the one that is used last first; the gradients of a group go when the next one's turn comes.
        """
        for members in sorted(filter(None, self.members.values()), key=min, reverse=True):
            self.doors[members[0]].enter([self.accumulated.pop(i, None) for i in members])
        self.late.settle()


def _when_all(state: _Count, then: Callable[[Sequence[int]], None]) -> Callable[[Tensor], None]:
    """A hook that calls `then` when every member of the group has its gradient of this microbatch."""

    def hook(_: Tensor) -> None:
        state.seen += 1
        if state.seen == len(state):
            state.seen = 0
            then(list(state))

    return hook


class _Count(list[int]):
    """Members of a group and how many gradients have come."""

    seen = 0


def _cut(tensor: Tensor, feed: Feed, parts: int, index: int) -> Tensor:
    """Microbatch `index` of a tensor: its dim seen as (blocks, parts, rest)."""
    if feed.place is None:
        return tensor
    dim, blocks = feed.place
    if blocks == 1:
        return tensor.chunk(parts, dim)[index]
    size = tensor.shape[dim]
    opened = tensor.unflatten(dim, (blocks, parts, size // (blocks * parts))).select(dim + 1, index)
    return opened.flatten(dim, dim + 1)


def _joined(parts: Sequence[Tensor], place: tuple[int, int]) -> Tensor:
    """The tensor whose microbatches, as `_cut` makes them, are `parts`."""
    dim, blocks = place
    if blocks == 1:
        return torch.cat(list(parts), dim)
    opened = [x.unflatten(dim, (blocks, x.shape[dim] // blocks)) for x in parts]
    return torch.cat(opened, dim + 1).flatten(dim, dim + 1)


class Door:
    """Where gradients enter the graph of `tensors`. Nothing but the backward pass holds them from there on, as if they came
    from an op: roots that are handed to `torch.autograd.backward` would live until it is through."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._gradients: list[Tensor | None] = []
        with torch.enable_grad():
            self._root: Tensor = _Entering.apply(self._gradients, *tensors)

    def enter(self, gradients: list[Tensor | None]) -> None:
        """Run the backward pass from there. The list is emptied."""
        if any(g is not None for g in gradients):
            self._gradients[:] = gradients
            gradients.clear()
            torch.autograd.backward(self._root, retain_graph=True)


class _Entering(torch.autograd.Function):
    """A scalar whose backward yields what then is in a list."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], *tensors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        found = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *found


class Held(torch.autograd.Function):
    """The loss of a finished schedule: backward hands out the held gradients times the incoming one."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, held: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.held = held
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        held = ctx.held
        if held is None:
            raise UsageError("backward was called twice on the loss of one call: its gradients were handed out")
        ctx.held = None
        return (None, None, *[None if h is None else (h if _is_one(grad) else _times(h, grad)) for h in held])


def _times(held: Tensor, grad: Tensor) -> Tensor:
    """A held gradient times the incoming one, in its memory, wherever that is: it is handed out once."""
    return held.mul_(grad.to(held.device))


def _is_one(grad: Tensor) -> bool:
    return grad.device.type == "cpu" and grad.item() == 1.0

"""Collectives that are launched early and waited for late, in eager lowered graphs (passes/overlap.py places them).

A collective stands in such a graph as two nodes or three, which share a `Flight`:

    begun = begin(tensors)             tensors pass through; the backward pass waits here for their gradients
    begun = launch_gather(begun, ...)  a gather is launched here, ahead of its use
    values = end_gather(begun, ...)    and waited for here; the backward pass launches the reduction here

Autograd runs nodes in the reverse order of the forward pass, so what stands between `begin` and the end runs, in the backward
pass, between launch and wait. `begin` of stored parameters stands before everything else: their gradients are reduced while the
rest of the backward pass runs, and are complete before anything outside the graph sees them.
"""

from __future__ import annotations

import contextvars
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

Wait = Callable[[], Sequence[Tensor | None]]
"""Waits for a collective, or computes what was put off; returns what that made."""


class Landing:
    """Gradients under way: `wait()` may be called several times."""

    def __init__(self, wait: Wait) -> None:
        self._wait: Wait | None = wait
        self._found: Sequence[Tensor | None] = ()

    def wait(self) -> Sequence[Tensor | None]:
        """The gradients, complete."""
        if self._wait is not None:
            self._found, self._wait = self._wait(), None
        return self._found


class Window:
    """At most `limit` reductions under way that hold memory beside their results (packed gradients); 0: none of any kind."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._flying: deque[weakref.ref[Landing]] = deque()

    def room(self) -> None:
        """Before another is launched: wait until one less is under way."""
        while len(self._flying) >= max(self.limit, 1):
            found = self._flying.popleft()()
            if found is not None:
                found.wait()

    def add(self, landing: Landing) -> None:
        """One was launched."""
        self._flying.append(weakref.ref(landing))


@dataclass(eq=False)
class Flight:
    """What the nodes of one collective share: `coming` forward, `back` backward."""

    window: Window
    coming: Callable[[], list[Tensor]] | None = None
    back: Landing | None = None
    late: Late | None = None
    leaves: tuple[Tensor, ...] = field(default=(), repr=False)

    def arrived(self) -> list[Tensor] | None:
        """What was launched ahead, if anything was."""
        coming, self.coming = self.coming, None
        return None if coming is None else coming()

    def returning(self, wait: Wait, *, packed: bool) -> None:
        """The gradients are under way. `packed`: a copy of them lives until they have come."""
        self.back = Landing(wait)
        if not self.window.limit:
            self.back.wait()
        elif packed:
            self.window.add(self.back)

    def landed(self, came: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients; those that `came` where none were left under way."""
        back, self.back = self.back, None
        return came if back is None else back.wait()


class Begun(NamedTuple):
    """What `begin` hands to the nodes after it."""

    flight: Flight
    tensors: tuple[Tensor, ...]


class Begin:
    """The op `begin` of one graph; `window` bounds what its backward pass has under way."""

    __name__, __module__ = "begin", "shardwright"

    def __init__(self, window: Window) -> None:
        self.window = window

    def __call__(self, tensors: Sequence[Tensor]) -> Begun:
        """The tensors, whose gradients will have been launched when they are asked for here."""
        flight = Flight(self.window)
        late = _late.get()
        if late is not None and all(t.is_leaf for t in tensors):
            flight.late, flight.leaves = late, tuple(tensors)
        return Begun(flight, _Begin.apply(flight, *tensors))


class _Begin(torch.autograd.Function):
    """Forward identity; backward waits."""

    @staticmethod
    def forward(ctx, flight, *tensors):  # type: ignore[no-untyped-def,override]
        ctx.flight = flight
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *came):  # type: ignore[no-untyped-def,override]
        flight = ctx.flight
        if flight.late is not None and flight.back is not None:
            flight.late.add(flight)
            return (None, *[None for _ in came])
        return (None, *flight.landed(came))


def owed(like: Sequence[Tensor]) -> list[Tensor]:
    """Stand-ins, without memory of their own, for gradients that `begin` will have."""
    return [torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape) for t in like]


class Late:
    """Gradients of leaves that are added when they have come.

    Graphs that run in its block leave them here, in as many backward passes as there are, and `settle` adds them.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Landing, tuple[Tensor, ...]]] = deque()
        self._token: contextvars.Token[Late | None] | None = None

    def __enter__(self) -> Late:
        self._token = _late.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _late.reset(self._token)

    def add(self, flight: Flight) -> None:
        """Gradients were launched; as many stay under way as the graph's window lets."""
        assert flight.back is not None
        self.settle(flight.window.limit)
        self._waiting.append((flight.back, flight.leaves))
        flight.back = None

    def settle(self, left: int = 0) -> None:
        """Wait until `left` are under way, and add the others to their leaves."""
        while len(self._waiting) > left:
            landing, leaves = self._waiting.popleft()
            for leaf, gradient in zip(leaves, landing.wait(), strict=True):
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)


_late: contextvars.ContextVar[Late | None] = contextvars.ContextVar("shardwright_late", default=None)

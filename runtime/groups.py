"""Bucketed collectives of parameter groups: one collective for all tensors of a group.

    gather    shards -> wholes: one all_gather forward, one reduce_scatter of the gradients backward (ZeRO-1 and 3)
    attach    (shards, cached wholes) -> wholes: nothing forward, one reduce_scatter backward (ZeRO-2 with microbatches)
    reduce    tensors -> tensors: nothing forward, one all_reduce of the gradients backward (data parallel)

A whole is chunked on dim 0 by the rule of `torch.chunk`: with n ranks and c = ceil(rows / n), chunk i is rows
[i c, (i + 1) c), the last ones shorter or empty. Over several axes (`sizes`, major to minor) every chunk is chunked again, as
DTensors do. All chunks travel padded to chunk 0, the longest. `positions[g]` is the chunk that rank g of
the process group holds (`Mesh.members`), since a group over two mesh axes may be numbered along either.
Gathered chunks arrive where the whole is to stand, its padding behind it; only chunks of several axes are copied once more.
A 0-dim tensor is whole on every rank. Tensors of one group have one dtype.

All three are library ops, composite over autograd functions as in transitions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from . import collectives
from .early import Begun, Flight, owed
from .regather import Recipe, active_regather

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


def chunk_rows(rows: int, n: int) -> list[tuple[int, int]]:
    """[start, stop) of each of n chunks of `rows` rows, as `torch.chunk` cuts them, empty ones included."""
    step = -(-rows // n) if rows else 0
    return [(min(i * step, rows), min((i + 1) * step, rows)) for i in range(n)]


def nested_rows(rows: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """[start, stop) of each chunk after chunking over axes of `sizes` ranks, one after the other."""
    spans = [(0, rows)]
    for n in sizes:
        spans = [(a + i, a + j) for a, b in spans for i, j in chunk_rows(b - a, n)]
    return spans


@dataclass(frozen=True)
class Bucket:
    """Flat layout of a group: wholes of `shapes`, chunked over `sizes`, chunk `positions[g]` on rank g."""

    shapes: tuple[torch.Size, ...]
    sizes: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return len(self.positions)

    def spans(self, position: int) -> list[tuple[int, int]]:
        """[start, stop) within each flattened whole of the chunk at `position`."""
        return [self._span(s, position) for s in self.shapes]

    def _span(self, shape: torch.Size, position: int) -> tuple[int, int]:
        if not shape:
            return 0, 1
        start, stop = nested_rows(shape[0], self.sizes)[position]
        return start * shape[1:].numel(), stop * shape[1:].numel()

    @property
    def longest(self) -> int:
        """Elements of one rank's flat buffer."""
        return sum(b - a for a, b in self.spans(0))


def gather_wholes(shards: Sequence[Tensor], bucket: Bucket, group: str, dtype: torch.dtype) -> list[Tensor]:
    """The wholes, gathered from every rank's shards by one collective, each in memory of its own (no autograd)."""
    return start_gather(shards, bucket, group, dtype)()


def start_gather(
    shards: Sequence[Tensor], bucket: Bucket, group: str, dtype: torch.dtype
) -> Callable[[], list[Tensor]]:
    """`gather_wholes`, launched."""
    longest = [b - a for a, b in bucket.spans(0)]
    mine = [_padded(s.reshape(-1).to(dtype), n) for s, n in zip(shards, longest, strict=True)]
    arriving = collectives.start_all_gather_each(mine, bucket.ranks, group)

    def wait() -> list[Tensor]:
        spans = [bucket.spans(p) for p in bucket.positions]
        return [
            _joined(x, shape, [s[i] for s in spans])
            for i, (x, shape) in enumerate(zip(arriving(), bucket.shapes, strict=True))
        ]

    return wait


def _joined(received: Tensor, shape: torch.Size, spans: Sequence[tuple[int, int]]) -> Tensor:
    """A whole from its padded chunks, rank after rank, where `spans` says what each rank's chunk is of it."""
    length, used = received.numel() // len(spans), shape.numel()
    if not shape or all(a == min(i * length, used) for i, (a, _) in enumerate(spans)):
        return received[:used].view(shape)
    chunks = received.view(len(spans), length)
    order = sorted(range(len(spans)), key=lambda i: spans[i])
    whole = torch.cat([chunks[i, : spans[i][1] - spans[i][0]] for i in order]).view(shape)
    collectives.release(received)
    return whole


def _padded(x: Tensor, length: int) -> Tensor:
    """x with zeros up to `length`; itself where it is as long."""
    return torch.cat([x, x.new_zeros(length - x.numel())]) if x.numel() < length else x


def views(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Consecutive parts of a flat tensor in the given shapes (views)."""
    sizes = [torch.Size(s).numel() for s in shapes]
    return [part.view(s) for part, s in zip(flat.split(sizes), shapes, strict=True)]


def scatter_gradients(grads: Sequence[Tensor], bucket: Bucket, group: str, dtype: torch.dtype) -> Tensor:
    """Flat sum over the group of the wholes' gradients, each rank its chunk (one reduce_scatter in `dtype`; no autograd)."""
    return start_scatter(grads, bucket, group, dtype)()


def start_scatter(grads: Sequence[Tensor], bucket: Bucket, group: str, dtype: torch.dtype) -> collectives.Arriving:
    """`scatter_gradients`, launched."""
    flat = [g.reshape(-1) for g in grads]
    parts: list[Tensor] = []
    for position in bucket.positions:
        own = [f[a:b].to(dtype) for f, (a, b) in zip(flat, bucket.spans(position), strict=True)]
        missing = bucket.longest - sum(o.numel() for o in own)
        parts += [*own, own[0].new_zeros(missing)] if missing else own
    packed = torch.cat(parts).view(bucket.ranks, bucket.longest)
    return collectives.start_reduce_scatter(packed, bucket.ranks, group)


class _Gather(torch.autograd.Function):
    """Forward all_gather (or the given wholes), backward reduce_scatter; with a flight, what its nodes have launched."""

    @staticmethod
    def forward(ctx, flight, wholes, bucket, group, dtype, sum_dtype, regather, *shards):  # type: ignore[no-untyped-def,override]
        ctx.flight, ctx.owed = flight, owed(shards) if flight is not None else []
        ctx.shapes = [s.shape for s in shards]
        ctx.home = bucket, group, sum_dtype, shards[0].dtype
        ctx.ledger = collectives.active_ledger()
        ctx.recipe = None
        if wholes is not None:
            return tuple(w.view_as(w) for w in wholes)
        dtype = dtype or shards[0].dtype
        found = flight.arrived() if flight is not None else None
        if found is None:
            found = gather_wholes(shards, bucket, group, dtype)
        manager = active_regather() if regather else None
        if manager is not None:
            again = [s.detach() for s in shards]
            ctx.recipe = Recipe(lambda: start_gather(again, bucket, group, dtype), again, ctx.ledger)
            ctx.manager = manager
            manager.register(found, ctx.recipe)
        return tuple(found)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def,override]
        bucket, group, sum_dtype, own = ctx.home
        shapes, flight = ctx.shapes, ctx.flight
        if ctx.recipe is not None:
            ctx.manager.release(ctx.recipe)
        if flight is not None:
            flight.window.room()
        with collectives.backward_phase(ctx.ledger):
            arriving = start_scatter(grads, bucket, group, sum_dtype or grads[0].dtype)

        def wait() -> list[Tensor]:
            return views(arriving().to(own)[: sum(s.numel() for s in shapes)], shapes)

        if flight is None:
            return (None, None, None, None, None, None, None, *wait())
        flight.returning(wait, packed=True)
        return (None, None, None, None, None, None, None, *ctx.owed)


class _Reduce(torch.autograd.Function):
    """Forward identity, backward one flat all_reduce; with a flight, waited for where that began."""

    @staticmethod
    def forward(ctx, flight, group, dtype, sum_dtype, *tensors):  # type: ignore[no-untyped-def,override]
        ctx.flight, ctx.owed = flight, owed(tensors) if flight is not None else []
        ctx.home = group, sum_dtype, tensors[0].dtype
        ctx.ledger = collectives.active_ledger()
        return tuple(t.view_as(t) if dtype in (None, t.dtype) else t.to(dtype) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def,override]
        group, sum_dtype, own = ctx.home
        if not group:
            return (None, None, None, None, *(g.to(own) for g in grads))
        shapes = [g.shape for g in grads]
        flat = torch.cat([g.reshape(-1).to(sum_dtype or g.dtype) for g in grads])
        with collectives.backward_phase(ctx.ledger):
            arriving = collectives.start_all_reduce(flat, group, own=True)

        def wait() -> list[Tensor]:
            return [g.to(own) for g in views(arriving(), shapes)]

        if ctx.flight is None:
            return (None, None, None, None, *wait())
        ctx.flight.returning(wait, packed=False)
        return (None, None, None, None, *ctx.owed)


def _one_dtype(tensors: Sequence[Tensor]) -> None:
    found = sorted({str(t.dtype) for t in tensors})
    if len(found) != 1:
        raise UsageError(f"a parameter group has one dtype; this one has {', '.join(found) or 'no tensors'}")


def _gather(
    shards: Sequence[Tensor],
    rows: list[int],
    positions: list[int],
    group: str,
    dtype: torch.dtype | None = None,
    sum_dtype: torch.dtype | None = None,
    regather: bool = False,
    sizes: list[int] | None = None,
    flight: Flight | None = None,
) -> list[Tensor]:
    _one_dtype(shards)
    if not group:
        return _reduce(shards, group, dtype, sum_dtype, flight)
    bucket = _bucket(shards, rows, positions, sizes)
    return list(_Gather.apply(flight, None, bucket, group, dtype, sum_dtype, regather, *shards))


def _bucket(shards: Sequence[Tensor], rows: list[int], positions: list[int], sizes: list[int] | None) -> Bucket:
    shapes = tuple(torch.Size((r, *s.shape[1:]) if s.dim() else ()) for r, s in zip(rows, shards, strict=True))
    return Bucket(shapes, tuple(sizes or [len(positions)]), tuple(positions))


def _attach(
    shards: list[Tensor],
    wholes: list[Tensor],
    positions: list[int],
    group: str,
    sum_dtype: torch.dtype | None = None,
    sizes: list[int] | None = None,
) -> list[Tensor]:
    _one_dtype(shards)
    bucket = Bucket(tuple(w.shape for w in wholes), tuple(sizes or [len(positions)]), tuple(positions))
    return list(_Gather.apply(None, [w.detach() for w in wholes], bucket, group, None, sum_dtype, False, *shards))


def _reduce(
    tensors: Sequence[Tensor], group: str, dtype: torch.dtype | None = None, sum_dtype: torch.dtype | None = None,
    flight: Flight | None = None,
) -> list[Tensor]:  # fmt: skip
    _one_dtype(tensors)
    return list(_Reduce.apply(flight, group, dtype, sum_dtype, *tensors))


def launch_gather(begun: Begun, rows: list[int], positions: list[int], group: str, *rest: Any) -> Begun:
    """Launch the `gather` of tensors that have begun (runtime/early.py); takes the arguments of `gather`."""
    shards = [t.detach() for t in begun.tensors]
    _one_dtype(shards)
    dtype, sizes = (*rest, None)[0] or shards[0].dtype, rest[3] if len(rest) > 3 else None
    begun.flight.coming = start_gather(shards, _bucket(shards, rows, positions, sizes), group, dtype)
    return begun


def end_gather(begun: Begun, *rest: Any) -> list[Tensor]:
    """`gather` of tensors that have begun: what was launched ahead, and gradients that are waited for where it began."""
    return _gather(begun.tensors, *rest, flight=begun.flight)


def end_reduce(begun: Begun, *rest: Any) -> list[Tensor]:
    """`reduce` of tensors that have begun: their gradients are waited for where it began."""
    return _reduce(begun.tensors, *rest, flight=begun.flight)


_LIBRARY.define(
    "gather(Tensor[] shards, int[] rows, int[] positions, str group, ScalarType? dtype=None, "
    "ScalarType? sum_dtype=None, bool regather=False, int[]? sizes=None) -> Tensor[]"
)
_LIBRARY.impl("gather", _gather, "CompositeImplicitAutograd")
_LIBRARY.define(
    "attach(Tensor[] shards, Tensor[] wholes, int[] positions, str group, "
    "ScalarType? sum_dtype=None, int[]? sizes=None) -> Tensor[]"
)
_LIBRARY.impl("attach", _attach, "CompositeImplicitAutograd")
_LIBRARY.define("reduce(Tensor[] tensors, str group, ScalarType? dtype=None, ScalarType? sum_dtype=None) -> Tensor[]")
_LIBRARY.impl("reduce", _reduce, "CompositeImplicitAutograd")

gather = torch.ops.shardwright.gather.default
"""Wholes of a group from its shards. `rows`: dim 0 of each whole (ignored for a 0-dim one). `sizes`: of the axes, major to
minor (default: one axis). `dtype`: cast before gathering (computation in low
precision). `sum_dtype`: the gradients are summed in it (default: as they come); they return in the shards' dtype.
`regather`: inside a `Regather` block, free the wholes after forward and gather them again in backward."""
attach = torch.ops.shardwright.attach.default
"""The given wholes (a cache without gradient), whose gradients are scattered to `shards`."""
reduce = torch.ops.shardwright.reduce.default
"""The tensors themselves (cast to `dtype`), whose gradients are summed over the group."""

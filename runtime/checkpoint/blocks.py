"""Which boxes of a global tensor a rank holds: what checkpoints and files of weights are cut by.

A DTensor's placements, read from left to right, each take part of what the ones before left (parameters.py). Along one dim that
leaves a few intervals of the global tensor, one behind the other in the local one; a rank's slice is the product of its
dims' intervals. Uneven chunks, chunks of chunks and splits of a minor factor (several intervals) all come out as boxes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ...errors import UsageError
from ..groups import chunk_rows
from ..torch_compat import is_strided

Spans = list[tuple[int, int]]
"""(start in the global dim, length) of the intervals that stand one behind the other in the local dim."""


@dataclass(frozen=True)
class Block:
    """A box of the global tensor, `sizes` elements from `offsets` on, and where it begins in the local tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: tuple[int, ...]

    def of(self, local: Tensor) -> Tensor:
        """The box within the local tensor (a view)."""
        for dim, (start, size) in enumerate(zip(self.start, self.sizes, strict=True)):
            local = local.narrow(dim, start, size)
        return local


class Held:
    """What this rank holds of one named tensor: its local memory and the boxes in it, and the whole's shape.

    torch's checkpoint planners ask such an object what to write and what to read (their protocol for tensor types).
    """

    def __init__(self, local: Tensor, shape: Sequence[int], blocks: Sequence[Block]) -> None:
        self.local, self.shape, self.blocks = local, torch.Size(shape), tuple(blocks)
        self._at = {block.offsets: block for block in self.blocks}

    @classmethod
    def of(cls, value: Tensor) -> Held:
        """What this rank holds of a tensor or DTensor; a plain tensor counts as whole and equal on all ranks."""
        with torch.no_grad():
            local = value.to_local() if isinstance(value, DTensor) else value.detach()
        if not value.numel():
            local = local.new_empty(value.shape)  # there is nothing to cut
        return cls(local, value.shape, blocks_of(value))

    def like(self, local: Tensor) -> Held:
        """The same boxes of another tensor, of which this rank holds `local`."""
        return Held(local, self.shape, self.blocks)

    def on_host(self) -> Held:
        """A copy in host memory, which later changes of the tensor do not reach."""
        return self.like(self.local.detach().to("cpu", copy=True))

    def piece(self, offsets: Sequence[int]) -> Tensor:
        """The box at `offsets` within the local memory (a view)."""
        return self._at[tuple(offsets)].of(self.local)

    def size(self) -> torch.Size:
        """Shape of the whole, by the name torch's load planner asks for."""
        return self.shape


def blocks_of(value: Tensor) -> tuple[Block, ...]:
    """The boxes of the whole tensor that this rank holds, in order; none where its slice is empty.

    Raises UsageError for placements that hold no slice (a pending sum).
    """
    spans: list[Spans] = [[(0, size)] for size in value.shape]
    if isinstance(value, DTensor) and value.numel():
        where = value.device_mesh.get_coordinate()
        if where is None:
            return ()
        for i, placement in enumerate(value.placements):
            if not isinstance(placement, Replicate):
                dim = _dim(placement, value.ndim)
                spans[dim] = _taken(spans[dim], placement, value.device_mesh.size(i), where[i])
    return tuple(_boxes(spans))


def _dim(placement: Placement, dims: int) -> int:
    if is_strided(placement) or isinstance(placement, Shard):
        return int(placement.dim) % dims  # type: ignore[attr-defined]
    raise UsageError(f"a tensor placed as {placement} holds no slice of its value and cannot be saved or loaded")


def _taken(spans: Spans, placement: Placement, n: int, index: int) -> Spans:
    """What a placement over n ranks leaves of a dim to rank `index`."""
    length = sum(size for _, size in spans)
    if is_strided(placement):
        outer = placement.split_factor  # type: ignore[attr-defined]
        inner = length // (outer * n)
        ranges = [((o * n + index) * inner, (o * n + index + 1) * inner) for o in range(outer)]
    else:
        ranges = [chunk_rows(length, n)[index]]
    return _merged([piece for start, stop in ranges for piece in _cut(spans, start, stop)])


def _cut(spans: Spans, start: int, stop: int) -> Spans:
    """The part [start, stop) of intervals laid end to end."""
    found, at = [], 0
    for first, size in spans:
        low, high = max(start, at), min(stop, at + size)
        if low < high:
            found.append((first + low - at, high - low))
        at += size
    return found


def _merged(spans: Spans) -> Spans:
    """Neighbours that touch as one."""
    found: Spans = []
    for start, size in spans:
        if found and found[-1][0] + found[-1][1] == start:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((start, size))
    return found


def _boxes(spans: Sequence[Spans]) -> list[Block]:
    located = []
    if not all(spans):
        return []  # nothing of some dim is here
    for dim in spans:
        starts = itertools.accumulate([size for _, size in dim[:-1]], initial=0)
        located.append([(first, size, at) for (first, size), at in zip(dim, starts, strict=True)])
    return [
        Block(tuple(f for f, _, _ in each), tuple(s for _, s, _ in each), tuple(a for _, _, a in each))
        for each in itertools.product(*located)
    ]

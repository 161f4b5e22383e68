"""Single-process meaning of placements, for tests: what every rank must hold of a global tensor, and checks of it.

R and V hold the whole value, S a slice, P a share (the shares of the axis sum to the value). Shares are seeded and equal on
all ranks, so each rank can compute every other rank's local value.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from shardwright.planner.placement import Dims, Placement, shape_of
from torch import Tensor


def coordinates(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Mesh coordinates by rank (row-major)."""
    return list(itertools.product(*(range(n) for n in sizes)))


def sliced(x: Tensor, dims: Dims, placement: Placement, sizes: Sequence[int], where: Sequence[int]) -> Tensor:
    """The slice of global x at mesh coordinate `where`; P, R and V slice nothing."""
    for d in range(len(dims) - 1, -1, -1):
        index = torch.arange(x.shape[d]).reshape(dims[d] or (1,))
        for f in range(len(dims[d])):
            for state, n, i in zip(placement, sizes, where, strict=True):
                if state.is_split and (state.dim, state.factor) == (d, f):
                    index = index.chunk(n, f)[i]
        x = x.index_select(d, index.reshape(-1))
    return x


def shares(shape: Sequence[int], n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """n random tensors that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.rand((n, *shape), generator=generator, dtype=dtype)
    parts[-1] = 1 - parts[:-1].sum(0)
    return parts


def place(
    x: Tensor, dims: Dims, placement: Placement, sizes: Sequence[int], where: Sequence[int], seed: int = 0
) -> Tensor:
    """The local value of global x (float) at `where`."""
    assert tuple(x.shape) == shape_of(dims)
    for axis, state in enumerate(placement):
        if state.kind == "P":
            x = x * shares(x.shape, sizes[axis], seed + axis, x.dtype)[where[axis]]
    return sliced(x, dims, placement, sizes, where)


def error(local: Tensor, x: Tensor, dims: Dims, placement: Placement, sizes: Sequence[int]) -> float:
    """Deviation of this rank's `local` value from "global x in `placement`" (a collective over all ranks)."""
    everywhere = [torch.empty_like(local) for _ in coordinates(sizes)]
    dist.all_gather(everywhere, local.contiguous())
    held = dict(zip(coordinates(sizes), everywhere, strict=True))
    where = coordinates(sizes)[dist.get_rank()]
    over = [range(n) if s.kind == "P" else [i] for s, n, i in zip(placement, sizes, where, strict=True)]
    total = sum(held[c] for c in itertools.product(*over))
    wanted = sliced(x, dims, placement, sizes, where)
    if total.shape != wanted.shape:
        return float("inf")
    return float((total - wanted).abs().max()) if wanted.numel() else 0.0

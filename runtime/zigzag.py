"""Zig-zag order: what a causal ring needs positions to be held in, as a property of every change of placement on its axis.

On an axis of n ranks whose attention is a causal ring, rank r holds the r-th and the (2n - 1 - r)-th of 2n equal stretches
(planner/ring.py), so that all ranks have equal work. Every tensor that is split there is held so, ids, labels and tables of
positions alike: a slice takes the two stretches, a gather puts them back in order. Ops on parts never see the difference, as
they treat all positions alike; attention knows which it holds (kernels/ring.py). Sizes that 2n does not divide belong to
sequences without a causal ring, and are split in one stretch.

`shardwright::zigzag_transition` is a transition between two reorderings, so that its backward is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..planner.placement import Dims, Step, local_dims
from ..planner.placement import R as WHOLE
from ..planner.ring import stretches
from .transitions import transition

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


def order(ways: int) -> list[int]:
    """The 2 `ways` stretches as the ranks hold them, rank after rank."""
    return [part for rank in range(ways) for part in stretches(rank, ways)]


def held(x: Tensor, dim: int, outer: int, ways: int, *, back: bool = False) -> Tensor:
    """x with dim `dim`, seen as (outer, 2 ways, inner), in the order of the ranks; `back` undoes it."""
    index = torch.tensor(order(ways), device=x.device)
    if back:
        index = index.argsort()
    inner = x.shape[dim] // (outer * 2 * ways)
    opened = x.reshape(*x.shape[:dim], outer, 2 * ways, inner, *x.shape[dim + 1 :])
    return opened.index_select(dim + 1, index).reshape(x.shape)


def _zigzag(
    x: Tensor, source: str, target: str, outer: list[int], size: int, index: int, group: str,
    before: list[int], after: list[int],
) -> Tensor:  # fmt: skip
    if before:
        x = held(x, before[0], before[1], size)
    x = transition(x, source, target, outer, size, index, group)
    return held(x, after[0], after[1], size, back=True) if after else x


_LIBRARY.define(
    "zigzag_transition(Tensor x, str source, str target, int[] outer, int size, int index, str group, int[] before, "
    "int[] after) -> Tensor"
)
_LIBRARY.impl("zigzag_transition", _zigzag, "CompositeImplicitAutograd")

zigzag_transition = torch.ops.shardwright.zigzag_transition.default
"""`transition` on an axis in zig-zag order. `before` and `after`: (dim, outer) that is brought into the order of the ranks before,
or out of it after; empty where nothing is."""


def orders(step: Step, dims: Dims, axis_sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """`before` and `after` of one planner step of a tensor with global factor sizes `dims`."""
    n = axis_sizes[step.axis]
    sizes = local_dims(dims, tuple(WHOLE if a == step.axis else s for a, s in enumerate(step.before)), axis_sizes)
    source, target = step.source, step.target
    same = source.is_split and target.is_split and source.dim == target.dim
    before, after = list[int](), list[int]()
    if target.is_split and n > 1 and sizes[target.dim][target.factor] % (2 * n) == 0:
        outer = math.prod(sizes[target.dim][: target.factor])
        before = [target.dim, outer // n if same and source.factor < target.factor else outer]
    if source.is_split and n > 1 and sizes[source.dim][source.factor] % (2 * n) == 0:
        outer = math.prod(sizes[source.dim][: source.factor])
        after = [source.dim, outer // n if same and target.factor < source.factor else outer]
    return before, after

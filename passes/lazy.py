"""Elements of a known value, computed by walking its expression backwards with indices instead of making it.

`Lazy.at(node, grid)` is `node[grid]` for one broadcastable integer index per dim; the result broadcasts to the grid's
shape but is smaller where the value does not depend on some dim (that is what keeps it cheap). Ops it cannot walk
through raise Unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .base import fake
from .constants import Known
from .torch_compat import name_of

aten = torch.ops.aten
Grid = list[torch.Tensor]


class Unknown(Exception):
    """An op that cannot be evaluated element by element."""


class Lazy:
    """Evaluates elements of input-independent nodes; small values come whole from `known`."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self._repeated: dict[fx.Node, tuple[bool, ...]] = {}

    def at(self, node: fx.Node, grid: Grid) -> torch.Tensor:
        """`node[grid]`; raises Unknown."""
        whole = self.known.value(node)
        if whole is not None:
            return whole[tuple(self._first(node, whole, grid))] if grid else whole
        if not self.known.independent(node) or node.op != "call_function":
            raise Unknown(str(node))
        walk = _WALKS.get(name_of(node))
        if walk is not None:
            return walk(self, node, grid)
        if torch.Tag.pointwise in node.target.tags or name_of(node) in _POINTWISE:  # type: ignore[union-attr]
            return self._pointwise(node, grid)
        raise Unknown(str(node.target))

    def _first(self, node: fx.Node, whole: torch.Tensor, grid: Grid) -> Grid:
        """The grid without the dims along which a value repeats itself (the same positions in every sample, say)."""
        if node not in self._repeated:
            self._repeated[node] = tuple(
                size > 0 and bool((whole == whole.narrow(dim, 0, 1)).all()) for dim, size in enumerate(whole.shape)
            )
        zero = torch.zeros((), dtype=torch.long)
        return [zero if same else index for same, index in zip(self._repeated[node], grid, strict=True)]

    def _pointwise(self, node: fx.Node, grid: Grid) -> torch.Tensor:
        def element(arg: fx.Node) -> torch.Tensor:
            shape = fake(arg).shape
            return self.at(arg, _broadcast(grid[len(grid) - len(shape) :], shape))

        # Elements that depend on no dim have rank 0, which promotes differently: the dtype is the node's own.
        value = node.target(*fx.map_arg(node.args, element), **fx.map_arg(node.kwargs, element))  # type: ignore[operator]
        return value.to(fake(node).dtype)  # type: ignore[no-any-return]


def _broadcast(grid: Grid, shape: Any) -> Grid:
    """The grid of an operand of `shape` under a grid of the broadcast result."""
    return [torch.zeros((), dtype=torch.long) if size == 1 else index for index, size in zip(grid, shape, strict=True)]


def _source(node: fx.Node) -> fx.Node:
    found = node.args[0]
    if not isinstance(found, fx.Node):
        raise Unknown(str(node.target))
    return found


def _expand(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    shape = fake(_source(node)).shape
    return lazy.at(_source(node), _broadcast(grid[len(grid) - len(shape) :], shape))


def _unsqueeze(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    dim = node.args[1] % len(grid)  # type: ignore[operator]
    return lazy.at(_source(node), [*grid[:dim], *grid[dim + 1 :]])  # type: ignore[misc]


def _reshape(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    """Sizes of 1 come and go; any other reshape goes through flat positions."""
    old, new = list(fake(_source(node)).shape), list(fake(node).shape)
    if [n for n in old if n > 1] == [n for n in new if n > 1]:
        long = iter([g for g, n in zip(grid, new, strict=True) if n > 1])
        return lazy.at(_source(node), [next(long) if n > 1 else torch.zeros((), dtype=torch.long) for n in old])
    flat = torch.zeros((), dtype=torch.long)
    for index, size in zip(grid, new, strict=True):
        flat = flat * size + index
    back: Grid = []
    for size in reversed(old):
        back.insert(0, flat % size)
        flat = flat // size
    return lazy.at(_source(node), back)


def _squeeze(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    return _reshape(lazy, node, grid)


def _transpose(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    a, b = (d % len(grid) for d in node.args[1:3]) if len(node.args) > 1 else (0, 1)  # type: ignore[operator]
    swapped = list(grid)
    swapped[a], swapped[b] = grid[b], grid[a]
    return lazy.at(_source(node), swapped)


def _permute(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    back: Grid = [torch.empty(0)] * len(grid)
    for position, dim in enumerate(node.args[1]):  # type: ignore[arg-type]
        back[dim % len(grid)] = grid[position]
    return lazy.at(_source(node), back)


def _slice(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    dim, start, end, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    dim = dim % len(grid)  # type: ignore[operator]
    start, _, step = slice(start, end, step).indices(fake(_source(node)).shape[dim])
    moved = list(grid)
    moved[dim] = start + step * grid[dim]
    return lazy.at(_source(node), moved)


def _select(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    rank = len(grid) + 1
    dim, index = node.args[1] % rank, node.args[2] % fake(_source(node)).shape[node.args[1]]  # type: ignore[operator, index]
    return lazy.at(_source(node), [*grid[:dim], torch.tensor(index), *grid[dim:]])


def _index(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    """Integer lookups on the leading dims, together in one block."""
    source, indices = _source(node), list(node.args[1])  # type: ignore[arg-type]
    if any(not isinstance(i, fx.Node) or fake(i).dtype is torch.bool for i in indices):
        raise Unknown("index")
    width = max(fake(i).dim() for i in indices)
    block, rest = grid[:width], grid[width:]
    sizes = fake(source).shape
    found = []
    for size, index in zip(sizes, indices, strict=False):
        shape = fake(index).shape
        value = lazy.at(index, _broadcast(block[width - len(shape) :], shape))
        found.append(torch.where(value < 0, value + size, value))
    return lazy.at(source, [*found, *rest])


def _full(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    return torch.tensor(node.args[1], dtype=fake(node).dtype)


def _arange(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    numbers = [*node.args]
    start, step = (numbers[0] if len(numbers) > 1 else 0), (numbers[2] if len(numbers) > 2 else 1)
    return (start + step * grid[0]).to(fake(node).dtype)  # type: ignore[operator, no-any-return]


def _triangle(keep: Callable[[torch.Tensor, Any], torch.Tensor]) -> Callable[[Lazy, fx.Node, Grid], torch.Tensor]:
    def walk(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
        diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
        value = lazy.at(_source(node), grid)
        return torch.where(keep(grid[-1] - grid[-2], diagonal), value, torch.zeros((), dtype=value.dtype))

    return walk


def _cast(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    return lazy.at(_source(node), grid).to(fake(node).dtype)


def _diff(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    """First differences with one element prepended, as packed-sequence code makes them."""
    source = _source(node)
    order, dim, prepend, append = (*node.args[1:], *(1, -1, None, None)[len(node.args) - 1 :])
    dim = dim % len(grid)  # type: ignore[operator]
    if order != 1 or append is not None or (prepend is not None and fake(prepend).shape[dim] != 1):
        raise Unknown("diff")
    shift = 0 if prepend is not None else 1
    here, before = list(grid), list(grid)
    here[dim] = grid[dim] + shift
    before[dim] = (here[dim] - 1).clamp(min=0)
    previous = lazy.at(source, before)
    if prepend is not None:
        at_start = list(grid)
        at_start[dim] = torch.zeros((), dtype=torch.long)
        previous = torch.where(here[dim] == 0, lazy.at(prepend, at_start), previous)  # type: ignore[arg-type]
    value = lazy.at(source, here)
    return value ^ previous if value.dtype is torch.bool else value - previous


def _cumsum(lazy: Lazy, node: fx.Node, grid: Grid) -> torch.Tensor:
    """Whole lines along the summed dim, for the other indices of the grid only."""
    source = _source(node)
    dim = node.args[1] % len(grid)  # type: ignore[operator]
    size = fake(source).shape[dim]
    rank = max(g.dim() for g in grid)
    line = torch.arange(size).view(-1, *(1 for _ in range(rank)))
    others = [line if d == dim else g.unsqueeze(0) if g.dim() else g for d, g in enumerate(grid)]
    values = lazy.at(source, others)
    values = values.expand(size, *values.shape[1:]) if values.dim() else values.expand(size)
    sums = values.cumsum(0, dtype=fake(node).dtype)
    sums = sums.view(size, *(1 for _ in range(rank + 1 - sums.dim())), *sums.shape[1:])
    places = [torch.arange(n).view(-1, *(1 for _ in range(rank - 1 - d))) for d, n in enumerate(sums.shape[1:])]
    return sums[(grid[dim], *places)]


_POINTWISE = frozenset({"masked_fill", "where", "logical_and", "logical_or", "logical_not"})
"""Pointwise ops that torch does not tag as such in every overload."""

_WALKS: dict[str, Callable[[Lazy, fx.Node, Grid], torch.Tensor]] = {
    "expand": _expand,
    "unsqueeze": _unsqueeze,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "t": _transpose,
    "permute": _permute,
    "slice": _slice,
    "select": _select,
    "index": _index,
    "full": _full,
    "arange": _arange,
    "tril": _triangle(torch.le),
    "triu": _triangle(torch.ge),
    "to": _cast,
    "diff": _diff,
    "cumsum": _cumsum,
}

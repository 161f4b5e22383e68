"""`shardwright::transition`: one change of placement along one mesh axis, with the backward of the table.

    transition(x, source, target, outer, size, index, group)

`source` and `target` are states in the plan's spelling ("S(1)", "S(0.1)", "R", "V", "P"). `outer` has two entries: for a
split source (target) of dim d, the product of the local sizes of the dim's more major factors, of the tensor that is
whole along this axis; 1 elsewhere. A split of dim d then means d viewed as (outer, size, inner), the slice being
`[:, index]`. `size` is the number of ranks on the axis and `index` this rank's coordinate.

The op is composite over an autograd function: one node in a lowered graph, which opens into functional collectives in the
joint graph of a compiler, where the backward is ours (`torch._c10d_functional`'s own all_reduce backward is not Megatron's).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..passes.torch_compat import is_tracing
from ..planner.placement import Dims, State, Step, dual, local_dims, parse_state, row
from ..planner.placement import R as WHOLE
from . import collectives
from .early import Begun, Flight, owed

SCHEMA = "transition(Tensor x, str source, str target, int[] outer, int size, int index, str group) -> Tensor"
_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


def pieces(x: Tensor, dim: int, outer: int, n: int) -> Tensor:
    """View of x with dim `dim` (outer, n, inner) opened and n brought to the front: (n, ..., outer * inner, ...).

    Piece i is contiguous only where outer is 1 and dim is 0; a reshape copies otherwise.
    """
    shape = x.shape
    inner = shape[dim] // (outer * n)
    opened = x.reshape(*shape[:dim], outer, n, inner, *shape[dim + 1 :]).movedim(dim + 1, 0)
    return opened.reshape(n, *shape[:dim], outer * inner, *shape[dim + 1 :])


def joined(stack: Tensor, dim: int, outer: int) -> Tensor:
    """Inverse of `pieces`: (n, ..., outer * inner, ...) -> (..., outer * n * inner, ...), contiguous."""
    n, shape = stack.shape[0], stack.shape[1:]
    opened = stack.reshape(n, *shape[:dim], outer, shape[dim] // outer, *shape[dim + 1 :]).movedim(0, dim + 1)
    return opened.reshape(*shape[:dim], shape[dim] * n, *shape[dim + 1 :])


def own_slice(x: Tensor, dim: int, outer: int, n: int, index: int) -> Tensor:
    """The slice of rank `index`, contiguous and in memory of its own (the whole tensor can then be freed)."""
    shape = x.shape
    inner = shape[dim] // (outer * n)
    opened = x.reshape(*shape[:dim], outer, n, inner, *shape[dim + 1 :]).select(dim + 1, index)
    return opened.reshape(*shape[:dim], outer * inner, *shape[dim + 1 :]).clone(memory_format=torch.contiguous_format)


def zero_pad(x: Tensor, dim: int, outer: int, n: int, index: int) -> Tensor:
    """Transpose of `own_slice`: zeros everywhere but in the slice of rank `index`."""
    shape = x.shape
    inner = shape[dim] // outer
    opened = x.reshape(*shape[:dim], outer, 1, inner, *shape[dim + 1 :])
    around = [0, 0] * (len(shape) - dim) + [index, n - 1 - index]
    padded = torch.nn.functional.pad(opened, around)
    return padded.reshape(*shape[:dim], shape[dim] * n, *shape[dim + 1 :])


def change(x: Tensor, source: State, target: State, outer: Sequence[int], size: int, index: int, group: str) -> Tensor:
    """The forward half of one transition on local values, gradients included (through `dual`)."""
    return start_change(x, source, target, outer, size, index, group)()


def start_change(
    x: Tensor, source: State, target: State, outer: Sequence[int], size: int, index: int, group: str
) -> Callable[[], Tensor]:
    """`change` with its collective, if it has one, launched: the call that is returned waits for the result."""
    name = "none" if size == 1 or source == target else row(source, target).forward
    if name in LOCAL:
        result = LOCAL[name](x, source, target, outer, size, index)
        return lambda: result
    if name == "all_reduce":
        return collectives.start_all_reduce(x, group)
    if name == "all_gather":
        arriving = collectives.start_all_gather(x, size, group)

        def gathered() -> Tensor:
            stack = arriving()
            return _without(stack, joined(stack, source.dim, outer[0]), x)

        return gathered
    if name == "reduce_scatter":
        return collectives.start_reduce_scatter(pieces(x, target.dim, outer[1], size).contiguous(), size, group)
    return _exchange(x, source, target, outer, size, group)


def _scaled(x: Tensor, size: int, index: int) -> Tensor:
    """A share of x such that the shares of all ranks sum to x; what cannot be divided stays with the first rank."""
    if x.is_floating_point() or x.is_complex():
        return x / size
    return x.clone() if index == 0 else torch.zeros_like(x)


Local = Callable[[Tensor, State, State, Sequence[int], int, int], Tensor]
LOCAL: dict[str, Local] = {
    "none": lambda x, source, target, outer, size, index: x.view_as(x),
    "scale": lambda x, source, target, outer, size, index: _scaled(x, size, index),
    "slice": lambda x, source, target, outer, size, index: own_slice(x, target.dim, outer[1], size, index),
    "pad": lambda x, source, target, outer, size, index: zero_pad(x, source.dim, outer[0], size, index),
}
"""Changes without communication, by their name in the table."""


def _exchange(
    x: Tensor, source: State, target: State, outer: Sequence[int], n: int, group: str
) -> Callable[[], Tensor]:
    """all_to_all from one split factor to another, of the same dim or not.

    `outer` counts in the tensor whole along the axis; where both factors share the dim, the minor one's count shrinks by n
    while the major one is split.
    """
    before, after = outer[1], outer[0]
    if source.dim == target.dim:
        before, after = (before // n, after) if source.factor < target.factor else (before, after // n)
    arriving = collectives.start_all_to_all(pieces(x, target.dim, before, n).contiguous(), n, group)

    def exchanged() -> Tensor:
        received = arriving()
        return _without(received, joined(received, source.dim, after), x)

    return exchanged


def _without(buffer: Tensor, result: Tensor, operand: Tensor) -> Tensor:
    """`result`, the memory of `buffer` given back unless one of the others lies in it."""
    kept = {t.untyped_storage()._cdata for t in (result, operand)}
    if not is_tracing() and buffer.untyped_storage()._cdata not in kept:
        collectives.release(buffer)
    return result


class _Transition(torch.autograd.Function):
    """Forward `source -> target`; backward `dual(target) -> dual(source)`, with a flight waited for where that began."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        flight: Flight | None,
        x: Tensor,
        source: str,
        target: str,
        outer: list[int],
        size: int,
        index: int,
        group: str,
    ) -> Tensor:
        ctx.args = source, target, outer, size, index, group  # type: ignore[attr-defined]
        ctx.flight, ctx.owed = flight, owed([x]) if flight is not None else []  # type: ignore[attr-defined]
        ctx.ledger = collectives.active_ledger()  # type: ignore[attr-defined]
        return change(x, parse_state(source), parse_state(target), outer, size, index, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        source, target, outer, size, index, group = ctx.args
        back, front = dual(parse_state(target)), dual(parse_state(source))
        with collectives.backward_phase(ctx.ledger):
            arriving = start_change(grad, back, front, outer[::-1], size, index, group)
        if ctx.flight is None:
            return None, arriving(), None, None, None, None, None, None
        ctx.flight.returning(lambda: [arriving()], packed=False)
        return None, *ctx.owed, None, None, None, None, None, None


def _transition(x: Tensor, source: str, target: str, outer: list[int], size: int, index: int, group: str) -> Tensor:
    return _Transition.apply(None, x, source, target, outer, size, index, group)


def end_transition(begun: Begun, *args: Any) -> Tensor:
    """`transition` of a tensor that has begun (runtime/early.py); takes its arguments after the tensor."""
    return _Transition.apply(begun.flight, *begun.tensors, *args)


def returns(source: str, target: str) -> bool:
    """Whether the backward pass of a change communicates."""
    return row(parse_state(source), parse_state(target)).backward not in LOCAL


_LIBRARY.define(SCHEMA)
_LIBRARY.impl("transition", _transition, "CompositeImplicitAutograd")

transition = torch.ops.shardwright.transition.default
"""The op, to be called or put into a graph."""


def emit_args(
    step: Step, dims: Dims, axis_sizes: Sequence[int], coordinate: Sequence[int], group_name: str
) -> tuple[str, str, list[int], int, int, str]:
    """Arguments after `x` of the op for one planner step.

    `dims` are global factor sizes; `axis_sizes` and `coordinate` have one entry per mesh axis; `group_name` is the group of
    `step.axis`. Raises ValueError where a split does not divide.
    """
    whole = tuple(WHOLE if a == step.axis else s for a, s in enumerate(step.before))
    sizes = local_dims(dims, whole, axis_sizes)
    local_dims(dims, tuple(step.target if a == step.axis else s for a, s in enumerate(step.before)), axis_sizes)
    outer = [math.prod(sizes[s.dim][: s.factor]) if s.is_split else 1 for s in (step.source, step.target)]
    return str(step.source), str(step.target), outer, axis_sizes[step.axis], coordinate[step.axis], group_name

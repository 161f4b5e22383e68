"""`shardwright::by_result`: an activation whose gradient is told by its result, which is what it keeps.

    hardtanh (ReLU6)    y = min(max(x, a), b)        dx = dy where a < y < b, else 0        (a < b)
    leaky_relu          y = x where x > 0, else a x    dx = dy where y > 0, else a dy         (a > 0)

A layer behind it mostly keeps y anyway. x and y have one shape and dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten
_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


@dataclass(frozen=True)
class Act:
    """An activation of (input, numbers), and its backward: (incoming gradient, result, numbers) -> gradient of the input."""

    forward: Callable[[Tensor, Sequence[float]], Tensor]
    backward: Callable[[Tensor, Tensor, Sequence[float]], Tensor]


ACTS = {
    "hardtanh": Act(
        lambda x, given: aten.hardtanh(x, *given), lambda grad, y, given: aten.hardtanh_backward(grad, y, *given)
    ),
    "leaky_relu": Act(
        lambda x, given: aten.leaky_relu(x, *given),
        lambda grad, y, given: aten.leaky_relu_backward(grad, y, *given, True),
    ),
}
"""By the name that the op takes."""


class _ByResult(torch.autograd.Function):
    """Keeps the result."""

    @staticmethod
    def forward(ctx, x, act, given):  # type: ignore[no-untyped-def,override]
        result = ACTS[act].forward(x, given)
        ctx.save_for_backward(result)
        ctx.act, ctx.given = act, given
        return result

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        (result,) = ctx.saved_tensors
        return ACTS[ctx.act].backward(grad, result, ctx.given), None, None


def _by_result(x: Tensor, act: str, given: Sequence[float]) -> Tensor:
    return _ByResult.apply(x, act, given)


_LIBRARY.define("by_result(Tensor x, str act, float[] given) -> Tensor")
_LIBRARY.impl("by_result", _by_result, "CompositeImplicitAutograd")

by_result = torch.ops.shardwright.by_result.default

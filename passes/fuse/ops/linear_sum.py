"""`shardwright::linear_sum`: linear maps of one input, added, as one product with the sum of their weights.

    y = x W^T with W = sum_i w_i        dx = dy W        dw_i = dy^T x, the same for all

Shapes: x [*, k]; weights [n, k], or [k, n] where `transposed` (y = x W); the result is [*, n]. It keeps x and the weights and adds
these again in the backward pass; sums are worked out in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


class _LinearSum(torch.autograd.Function):
    """`ctx.half` says which gradients the backward is to make (runtime/meetings.py): of x, or of the weights."""

    @staticmethod
    def forward(ctx, transposed, x, *weights):  # type: ignore[no-untyped-def,override]
        wants = ctx.needs_input_grad
        ctx.save_for_backward(x if any(wants[2:]) else None, *(weights if wants[1] else ()))
        ctx.transposed, ctx.half = transposed, None
        return x @ _total(weights, not transposed)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        x, *weights = ctx.saved_tensors
        d_x = d_weight = None
        wants = ctx.needs_input_grad
        if wants[1] and ctx.half != "weight":
            d_x = grad @ _total(weights, ctx.transposed)
        if x is not None and ctx.half != "input":
            rows, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            d_weight = rows.t() @ out if ctx.transposed else out.t() @ rows
        return None, d_x, *(d_weight if want else None for want in wants[2:])


def _total(weights: Sequence[Tensor], turned: bool) -> Tensor:
    """The sum of the weights, rounded once."""
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    total = sum((w.to(wide) for w in weights[1:]), weights[0].to(wide)).to(weights[0].dtype)
    return total.t() if turned else total


def _linear_sum(x: Tensor, weights: Sequence[Tensor], transposed: bool = False) -> Tensor:
    return _LinearSum.apply(transposed, x, *weights)


_LIBRARY.define("linear_sum(Tensor x, Tensor[] weights, bool transposed=False) -> Tensor")
_LIBRARY.impl("linear_sum", _linear_sum, "CompositeImplicitAutograd")

linear_sum = torch.ops.shardwright.linear_sum.default

"""`shardwright::rotary`: rotary position embedding of queries or keys as one op.

    y = x cos + turn(x) sin        dx = dy cos + turn^T(dy sin)

Su et al. 2021, "RoFormer", section 3.4.2. turn(x) is (-x2, x1) of the halves (x1, x2) of the last dim or, `interleaved`, of its
even and odd elements; turn^T is its opposite. x [.., d], cos and sin [.., d] or, each angle once, [.., d / 2] broadcast over
heads and batch. It keeps cos and sin, and x only where those take gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inplace import minus

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


def _turned(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        pairs = x.unflatten(-1, (-1, 2))
        return torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _wide(table: Tensor, width: int, interleaved: bool) -> Tensor:
    """A table with an angle for every element of x."""
    if table.shape[-1] == width:
        return table
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)


def _narrow(grad: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """The gradient of a table that was widened and broadcast."""
    if table.shape[-1] != grad.shape[-1]:
        pairs = grad.unflatten(-1, (-1, 2) if interleaved else (2, -1))
        grad = pairs.sum(-1 if interleaved else -2)
    return grad.sum_to_size(table.shape).to(table.dtype)


class _Rotary(torch.autograd.Function):
    """Keeps the tables, and x where they take gradients."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):  # type: ignore[no-untyped-def,override]
        tables = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(cos, sin, x if tables else None)
        ctx.home = interleaved, x.dtype
        near, far = (_wide(table, x.shape[-1], interleaved) for table in (cos, sin))
        return x * near + _turned(x, interleaved) * far

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        cos, sin, x = ctx.saved_tensors
        interleaved, dtype = ctx.home
        d_x = d_cos = d_sin = None
        if ctx.needs_input_grad[0]:
            near, far = (_wide(table, grad.shape[-1], interleaved) for table in (cos, sin))
            turned = _turned(grad * far, interleaved)
            d_x = minus(grad * near, turned).to(dtype)
        if ctx.needs_input_grad[1]:
            d_cos = _narrow(grad * x, cos, interleaved)
        if ctx.needs_input_grad[2]:
            d_sin = _narrow(grad * _turned(x, interleaved), sin, interleaved)
        return d_x, d_cos, d_sin, None


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    return _Rotary.apply(x, cos, sin, interleaved)


_LIBRARY.define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor")
_LIBRARY.impl("rotary", _rotary, "CompositeImplicitAutograd")

rotary = torch.ops.shardwright.rotary.default

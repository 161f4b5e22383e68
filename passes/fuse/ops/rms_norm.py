"""`shardwright::rms_norm`: root mean square norm over the last dim, with its casts, as one op.

    r = (mean(x^2) + eps)^(-1/2)        h = x r        y = h s,  s = w or offset + w        dh = dy s
    dx = r (dh - h mean(dh h))          dw = sum(dy h) over all rows

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization". x [.., n], weight [n], y [.., n]. Where models in half precision
cast, the op does too, each None being no cast: x to `compute` before, h to `normed` before the weight, y to `out` after it. With
an offset the weight is first cast to the dtype that it is multiplied in. It keeps x as it came and r [.., 1], no more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inplace import minus, times

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype)


def _scale(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """What h, of `dtype`, is multiplied by."""
    return weight.to(dtype) + offset if offset else weight


class _RmsNorm(torch.autograd.Function):
    """Keeps x, the reciprocal root and the weight; where only the weight takes a gradient, what it was multiplied with."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, compute, normed, out):  # type: ignore[no-untyped-def,override]
        wide = _cast(x, compute)
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        seen = _cast(wide * root, normed)
        ctx.save_for_backward(*((x, root, weight) if ctx.needs_input_grad[0] else (seen, None, None)))
        ctx.home = offset, compute, normed, None if weight is None else weight.dtype
        return _cast(seen if weight is None else seen * _scale(weight, offset, seen.dtype), out)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        x, root, weight = ctx.saved_tensors
        offset, compute, normed, weight_dtype = ctx.home
        h = x if root is None else _cast(x, compute) * root
        seen = _cast(h, normed)
        d_x = d_weight = None
        if weight_dtype is not None:
            grad = grad.to(torch.promote_types(seen.dtype, seen.dtype if offset else weight_dtype))
        if ctx.needs_input_grad[1]:
            d_weight = (grad * seen).reshape(-1, x.shape[-1]).sum(0).to(weight_dtype)
        if ctx.needs_input_grad[0]:
            d_h = grad if weight is None else grad * _scale(weight, offset, seen.dtype)
            d_h = d_h.to(seen.dtype).to(h.dtype)
            mean = (d_h * h).mean(-1, keepdim=True)
            away = times(h, mean)
            d_x = times(d_h - away if weight is None else minus(d_h, away), root).to(x.dtype)
        return d_x, d_weight, None, None, None, None, None


def _rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, compute: torch.dtype | None = None,
    normed: torch.dtype | None = None, out: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    return _RmsNorm.apply(x, weight, eps, offset, compute, normed, out)


_LIBRARY.define(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset=0.0, ScalarType? compute=None, ScalarType? normed=None, "
    "ScalarType? out=None) -> Tensor"
)
_LIBRARY.impl("rms_norm", _rms_norm, "CompositeImplicitAutograd")

rms_norm = torch.ops.shardwright.rms_norm.default

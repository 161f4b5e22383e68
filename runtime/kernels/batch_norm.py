"""Batch norm on the statistics of a batch whose samples are split over ranks: the statistics of all of them.

    y, mean, invstd, new running mean, new running variance

as `aten._native_batch_norm_legit_functional` has them. Every rank has equally many samples, so per axis one all_gather of
(mean, sum of squares around it) of every rank combines exactly (Chan et al. 1983, eq. 2.1); backward one all_reduce of the two
sums that the gradient of the operand needs (Ioffe and Szegedy 2015, section 3). Gradients of weight and bias stay sums over this
rank's samples. A library op, composite over an autograd function as in transitions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import collectives

CallForm = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
_SCHEMA = (
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float momentum, float eps, "
    "int[] size, str[] groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _per_channel(x: Tensor, like: Tensor) -> Tensor:
    """[c] as [1, c, 1, ..] of the rank of `like`."""
    return x.view(1, -1, *[1] * (like.dim() - 2))


def _statistics(x: Tensor, size: list[int], groups: list[str]) -> tuple[Tensor, Tensor, int]:
    """Mean and sum of squares around it per channel, over the samples of all ranks; and how many values that is."""
    over = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(over)
    squares = (x - _per_channel(mean, x)).square_().sum(over)
    count = x.numel() // x.shape[1]
    for n, group in zip(size, groups, strict=True):
        means, parts = collectives.all_gather(torch.stack([mean, squares]), n, group).unbind(1)
        mean = means.mean(0)
        squares = parts.sum(0) + count * (means - mean).square().sum(0)
        count *= n
    return mean, squares, count


class _BatchNorm(torch.autograd.Function):
    """Saves the operand, weight, mean and inverse deviation."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, size, groups):  # type: ignore[no-untyped-def,override]
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        mean, squares, count = _statistics(x.to(wide), size, groups)
        invstd = (squares / count + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.home = count, groups, bias is not None, collectives.active_ledger()
        y = (x - _per_channel(mean, x)) * _per_channel(invstd if weight is None else invstd * weight, x)
        if bias is not None:
            y = y + _per_channel(bias, x)
        unbiased = squares / max(count - 1, 1)
        new = (
            torch.lerp(old, value.to(old.dtype), momentum)
            for old, value in ((running_mean, mean), (running_var, unbiased))
        )
        results = (y.to(x.dtype), mean.clone(), invstd.clone(), *new)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def,override]
        x, weight, mean, invstd = ctx.saved_tensors
        count, groups, biased, ledger = ctx.home
        over = [d for d in range(x.dim()) if d != 1]
        wide = grad.to(mean.dtype)
        normal = (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(invstd, x)
        own = sums = torch.stack([wide.sum(over), (wide * normal).sum(over)])
        with collectives.backward_phase(ledger):
            for group in groups:
                sums = collectives.all_reduce(sums, group)
        shared, along = (_per_channel(s / count, x) for s in sums)
        scale = _per_channel(invstd if weight is None else invstd * weight, x)
        result = (wide - shared - normal * along) * scale
        d_weight = None if weight is None else own[1].to(weight.dtype)
        d_bias = own[0].to(x.dtype if weight is None else weight.dtype) if biased else None
        return (result.to(x.dtype), d_weight, d_bias, *[None] * 6)


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, momentum: float,
    eps: float, size: list[int], groups: list[str],
) -> tuple[Tensor, ...]:  # fmt: skip
    live = [(n, group) for n, group in zip(size, groups, strict=True) if n > 1]
    found: tuple[Tensor, ...] = _BatchNorm.apply(
        x, weight, bias, running_mean, running_var, momentum, eps, [n for n, _ in live], [g for _, g in live]
    )
    return found


_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("batch_norm", _batch_norm, "CompositeImplicitAutograd")

batch_norm = torch.ops.shardwright.batch_norm.default


def batch_norm_form(form: CallForm, group: str, index: int, size: int) -> CallForm:
    """`aten._native_batch_norm_legit_functional` on samples split over an axis (applied once per axis)."""
    target, args, _ = form
    if target is batch_norm:
        return target, (*args[:7], [*args[7], size], [*args[8], group]), {}
    x, weight, bias, mean, var, _, momentum, eps = args
    return batch_norm, (x, weight, bias, mean, var, momentum, eps, [size], [group]), {}

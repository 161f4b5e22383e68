"""Matrix products whose weight's gradient is computed late: beside the collective that their input's gradient goes into.

The backward pass of a column-parallel layer sums the gradient of its input over the ranks; the gradients of its weights do not wait
for that (Megatron-LM, Shoeybi et al. 2019, and its asynchronous all-reduce since). `end_linear` and `end_addmm` return the
gradient of the input at once, and leave that of weight and bias to where the weight began (runtime/early.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .early import Begun, Flight, owed

aten = torch.ops.aten


class _Product(torch.autograd.Function):
    """x @ w (or its transpose, for `linear`) plus a bias if there is one."""

    @staticmethod
    def forward(ctx, flight: Flight, linear: bool, x: Tensor, weight: Tensor, *bias: Tensor):  # type: ignore[no-untyped-def,override]
        ctx.flight, ctx.linear, ctx.owed = flight, linear, owed([weight, *bias])
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[3] else None, weight if needs[2] else None)
        if linear:
            return aten.linear.default(x, weight, *bias)
        return aten.addmm.default(bias[0], x, weight) if bias else aten.mm.default(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        x, weight = ctx.saved_tensors
        linear, needs = ctx.linear, ctx.needs_input_grad[3:]
        back = None if weight is None else grad @ (weight if linear else weight.t())

        def late() -> list[Tensor | None]:
            g = grad.reshape(-1, grad.shape[-1])
            found: list[Tensor | None] = [g.sum(0) if needed else None for needed in needs[1:]]
            if x is None:
                return [None, *found]
            rows = x.reshape(-1, x.shape[-1])
            return [g.t() @ rows if linear else rows.t() @ g, *found]

        if any(needs):
            ctx.flight.returning(late, packed=False)
        return None, None, back, *(o if needed else None for o, needed in zip(ctx.owed, needs, strict=True))


def end_linear(begun: Begun, x: Tensor) -> Tensor:
    """`aten.linear(x, weight, bias)` of a weight (n, k), and maybe a bias (n), that have begun."""
    weight, *bias = begun.tensors
    plain = weight.dim() != 2 or any(b.dim() != 1 for b in bias)
    return aten.linear.default(x, weight, *bias) if plain else _applied(begun, True, x)


def end_addmm(begun: Begun, x: Tensor) -> Tensor:
    """`aten.addmm(bias, x, weight)` or `aten.mm(x, weight)` of a weight (k, n), and maybe a bias (n), that have begun."""
    weight, *bias = begun.tensors
    if any(b.dim() != 1 for b in bias):
        return aten.addmm.default(bias[0], x, weight)
    return _applied(begun, False, x)


def _applied(begun: Begun, linear: bool, x: Tensor) -> Tensor:
    product: Any = _Product.apply(begun.flight, linear, x, *begun.tensors)
    return product

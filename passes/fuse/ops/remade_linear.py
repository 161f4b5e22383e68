"""`shardwright::remade_linear`: a linear map that keeps, in the place of its input, what its input was made of.

    y = x W^T        dx = dy W        dW = dy^T x,  x = a(s) made again from one source, a(g) u from two

Shapes: x and every source [*, k], weight [n, k]; the result is [*, n]. It is for inputs whose sources wait for the backward pass
anyway, as those of an activation do, and that nothing else keeps: the inputs of adapters (LoRA: Hu et al. 2021, section 4.1) beside
a frozen product. The result does not depend on the sources, so no gradient goes to them but by way of x, and second derivatives are
refused. To keep what wanted gradients need and no more is the backward pruning of FlexLLM (Oliaro et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....errors import UsageError
from .gated import ACTS
from .inplace import times

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


class _RemadeLinear(torch.autograd.Function):
    """`ctx.half` says which gradients the backward is to make (runtime/meetings.py): of x, or of the weight."""

    @staticmethod
    def forward(ctx, act, x, weight, *sources):  # type: ignore[no-untyped-def,override]
        of_x, of_weight = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(weight if of_x else None, *(sources if of_weight else ()))
        ctx.act, ctx.half = act, None
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        if torch.is_grad_enabled():  # what is made again here is no function of x
            raise UsageError("remade_linear has no second derivative: backward(create_graph=True) is not supported")
        weight, *sources = ctx.saved_tensors
        d_x = d_weight = None
        if sources and ctx.half != "input":
            d_weight = _by_weight(grad, _made(ctx.act, sources))
        if weight is not None and ctx.half != "weight":  # when the input that was made again is gone
            d_x = grad @ weight
        return None, d_x, d_weight, *(None for _ in ctx.needs_input_grad[3:])


def _made(act: str, sources: Sequence[Tensor]) -> Tensor:
    """The input, as the ops that made it rounded it."""
    first = ACTS[act].forward(sources[0])
    return first if len(sources) == 1 else times(first, sources[1])


def _by_weight(grad: Tensor, x: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _remade_linear(x: Tensor, weight: Tensor, sources: Sequence[Tensor], act: str) -> Tensor:
    return _RemadeLinear.apply(act, x, weight, *sources)


_LIBRARY.define("remade_linear(Tensor x, Tensor weight, Tensor[] sources, str act) -> Tensor")
_LIBRARY.impl("remade_linear", _remade_linear, "CompositeImplicitAutograd")

remade_linear = torch.ops.shardwright.remade_linear.default

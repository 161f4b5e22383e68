"""`shardwright::gated`: act(gate) * up, the gate of SwiGLU, GeGLU and ReGLU as one op.

    y = a(g) u        dg = a'(g) (dy u)        du = dy a(g)

Shazeer 2020, "GLU Variants Improve Transformer". Gate, up and result have one shape and one dtype. It keeps gate and up; what
else the backward pass needs is worked out again from them. Torch's own ops do the arithmetic in the order in which autograd
would, so that half precision rounds as it did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .inplace import times

aten = torch.ops.aten
_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
QUICK = 1.702
"""The slope of the sigmoid in CLIP's approximation of GELU (Hendrycks and Gimpel 2016, section 2)."""


@dataclass(frozen=True)
class Act:
    """An activation, and its backward: (incoming gradient, input) -> gradient of the input."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _quick_backward(grad: Tensor, x: Tensor) -> Tensor:
    soft = torch.sigmoid(x * QUICK)
    return grad * soft + aten.sigmoid_backward(grad * x, soft) * QUICK


ACTS = {
    "silu": Act(aten.silu, aten.silu_backward),
    "gelu": Act(aten.gelu, aten.gelu_backward),
    "gelu_tanh": Act(
        lambda x: aten.gelu(x, approximate="tanh"), lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh")
    ),
    "quick_gelu": Act(lambda x: x * torch.sigmoid(x * QUICK), _quick_backward),
    "relu": Act(torch.relu, lambda grad, x: aten.threshold_backward(grad, x, 0)),
    "sigmoid": Act(torch.sigmoid, lambda grad, x: aten.sigmoid_backward(grad, torch.sigmoid(x))),
    "tanh": Act(torch.tanh, lambda grad, x: aten.tanh_backward(grad, torch.tanh(x))),
}
"""By the name that the op takes."""


class _Gated(torch.autograd.Function):
    """Keeps gate and up, or gate alone where only up takes a gradient."""

    @staticmethod
    def forward(ctx, gate, up, act):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(gate, up if ctx.needs_input_grad[0] else None)
        ctx.act = act
        return ACTS[act].forward(gate) * up

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        gate, up = ctx.saved_tensors
        act, wants = ACTS[ctx.act], ctx.needs_input_grad
        d_gate = act.backward(grad * up, gate) if wants[0] else None
        d_up = times(act.forward(gate), grad) if wants[1] else None
        return d_gate, d_up, None


def _gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return _Gated.apply(gate, up, act)


_LIBRARY.define("gated(Tensor gate, Tensor up, str act) -> Tensor")
_LIBRARY.impl("gated", _gated, "CompositeImplicitAutograd")

gated = torch.ops.shardwright.gated.default

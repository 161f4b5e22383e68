"""Composite ops by the Triton kernels of Liger (Hsu et al. 2024, arXiv 2410.10989), as overloads named `liger`.

An overload takes what the op takes and computes what it computes: where attributes or dtypes are none that the kernels treat as
the op does (`rms_mode`, `gate_kernels`), or there are no elements, it is the op itself. The kernels are opaque ops, so a compiler
leaves them as they are. Liger is an optional extra, imported when a kernel first runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gated import gated
from .rms_norm import rms_norm

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 1 << 16
"""Elements of a row that one program of a kernel takes."""


def _taken(x: Tensor) -> bool:
    return x.dtype in _FLOATS and x.dim() > 0 and 0 < x.shape[-1] <= WIDEST


def rms_mode(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, compute: torch.dtype | None = None,
    normed: torch.dtype | None = None, out: torch.dtype | None = None,
) -> str:  # fmt: skip
    """Liger's name for the casts of a call of `rms_norm`; "" where it has none.

    Both normalise in float32 and return the dtype of x. "gemma" multiplies with the weight in float32, "llama" in the dtype of x,
    where an offset would be rounded otherwise. The last dim is normalised; x [.., n], weight [n].
    """
    wide = compute or x.dtype
    seen = normed or wide
    own = x.dtype if weight is None else weight.dtype
    result = out or (seen if weight is None or offset else torch.promote_types(seen, own))
    if not _taken(x) or own not in _FLOATS or wide != torch.float32 or result != x.dtype:
        return ""
    if seen == torch.float32:
        return "gemma"
    return "llama" if seen == own == x.dtype and (weight is None or not offset) else ""


@torch.library.custom_op("shardwright::liger_rms_norm", mutates_args=())
def _rms_forward(x: Tensor, weight: Tensor | None, eps: float, offset: float, mode: str) -> tuple[Tensor, Tensor]:
    """(y, the reciprocal root of every row in float32)."""
    from liger_kernel.ops.rms_norm import rms_norm_forward

    made = rms_norm_forward(x.contiguous(), _contiguous(weight), eps, offset, mode, None)
    return made[0], made[2]


@_rms_forward.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, offset: float, mode: str) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("shardwright::liger_rms_norm_backward", mutates_args=())
def _rms_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, root: Tensor, offset: float, mode: str, wanted: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight, the latter empty where it is not `wanted`."""
    from liger_kernel.ops.rms_norm import _str_to_casting_mode, rms_norm_backward
    from liger_kernel.ops.utils import calculate_settings

    block, warps = calculate_settings(x.shape[-1])
    casts = _str_to_casting_mode[mode]
    rows = x.contiguous().view(-1, x.shape[-1])  # the kernel goes from row to row by the first stride
    d_x, d_weight = rms_norm_backward(
        grad.contiguous(), rows, _contiguous(weight), root, offset, casts, block, warps, False, None, wanted
    )
    return d_x, x.new_empty(0) if d_weight is None else d_weight


@_rms_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor | None, root: Tensor, offset: float, mode: str, wanted: bool
) -> tuple[Tensor, Tensor]:
    d_weight = x.new_empty(0) if weight is None or not wanted else weight.new_empty(weight.shape)
    return torch.empty_like(x, memory_format=torch.contiguous_format), d_weight


class _RmsNorm(torch.autograd.Function):
    """Keeps x, the weight and the reciprocal root, as the op does."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, mode):  # type: ignore[no-untyped-def,override]
        y, root = _rms_forward(x, weight, eps, offset, mode)
        ctx.save_for_backward(x, weight, root)
        ctx.home = offset, mode
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        x, weight, root = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_x, d_weight = _rms_backward(grad, x, weight, root, *ctx.home, wanted[1])
        return d_x if wanted[0] else None, d_weight if wanted[1] else None, None, None, None


def _rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, compute: torch.dtype | None = None,
    normed: torch.dtype | None = None, out: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    mode = rms_mode(x, weight, eps, offset, compute, normed, out)
    if not mode or not x.numel():
        return rms_norm(x, weight, eps, offset, compute, normed, out)
    return _RmsNorm.apply(x, weight, eps, offset, mode)


def gate_kernels(gate: Tensor, up: Tensor, act: str) -> str:
    """The module of Liger with the kernels of a call of `gated`; "" where it has none."""
    same = gate.dtype == up.dtype and gate.shape == up.shape
    return {"silu": "swiglu", "gelu_tanh": "geglu"}.get(act, "") if same and _taken(gate) else ""


@torch.library.custom_op("shardwright::liger_gated", mutates_args=())
def _gate_forward(gate: Tensor, up: Tensor, kernels: str) -> Tensor:
    from liger_kernel.ops import geglu, swiglu

    forward = {"swiglu": swiglu.swiglu_forward, "geglu": geglu.geglu_forward}[kernels]
    return forward(gate.contiguous(), up.contiguous())[2]


@_gate_forward.register_fake
def _(gate: Tensor, up: Tensor, kernels: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("shardwright::liger_gated_backward", mutates_args=())
def _gate_backward(grad: Tensor, gate: Tensor, up: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up. The kernels write them over what they are given; others may hold it, so they get copies."""
    from liger_kernel.ops import geglu, swiglu

    backward = {"swiglu": swiglu.swiglu_backward, "geglu": geglu.geglu_backward}[kernels]
    return backward(*(t.clone(memory_format=torch.contiguous_format) for t in (gate, up)), grad.contiguous())


@_gate_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    first, second = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
    return first, second


class _Gated(torch.autograd.Function):
    """Keeps gate and up, as the op does."""

    @staticmethod
    def forward(ctx, gate, up, kernels):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return _gate_forward(gate, up, kernels)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        made = _gate_backward(grad, *ctx.saved_tensors, ctx.kernels)
        return *(g if wanted else None for g, wanted in zip(made, ctx.needs_input_grad, strict=False)), None


def _gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    kernels = gate_kernels(gate, up, act)
    if not kernels or not gate.numel():
        return gated(gate, up, act)
    return _Gated.apply(gate, up, kernels)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


_LIBRARY.define(
    "rms_norm.liger(Tensor x, Tensor? weight, float eps, float offset=0.0, ScalarType? compute=None, "
    "ScalarType? normed=None, ScalarType? out=None) -> Tensor"
)
_LIBRARY.impl("rms_norm.liger", _rms_norm, "CompositeImplicitAutograd")
_LIBRARY.define("gated.liger(Tensor gate, Tensor up, str act) -> Tensor")
_LIBRARY.impl("gated.liger", _gated, "CompositeImplicitAutograd")

"""`shardwright::experts`: every token through the experts it is routed to, and their outputs combined. One op.

    y[t] = sum_j scale[t, j] * (gate(x[t] @ up[e]^T + up_bias[e]) @ down[e]^T + down_bias[e])   with e = index[t, j]

Shapes: x [t, h], index [t, k] (int64), scale [t, k], up [e, c f, h] and down [e, h, f] (`transposed`: [e, h, c f] and
[e, f, h]), biases [e, c f] and [e, h]; the result is [t, h] in the dtype of x. `gate` is a program (gates.py) from [.., c f]
to [.., f]. Slots (t, j) whose index is no local expert contribute zeros: with experts split over axes, `place` and `parts`
are this rank's coordinates and the ranks of each axis, major first, and the results of all ranks sum to the whole.
`shared` False leaves `down_bias` out: with f split, one rank adds it.

Nothing depends on the data but how many rows each product has: all t k slots are sorted by expert. The op is composite over
an autograd function which keeps the operands, the slots' gate inputs and their order, and computes the rest again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .gates import run_gate

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


@torch.library.custom_op("shardwright::grouped_mm", mutates_args=())
def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows [s, i], sorted by group, times the weights [e, i, o] of their group -> [s, o].

    Group g has the rows from `ends[g - 1]` to `ends[g]`; rows after the last end give zeros.
    """
    if _fused(rows, weights):
        found = torch.nn.functional.grouped_mm(rows, weights, offs=ends)
        tail = torch.arange(rows.shape[0], device=rows.device) >= ends[-1]
        return found.masked_fill_(tail.unsqueeze(-1), 0)
    found = rows.new_zeros(rows.shape[0], weights.shape[2])
    for group, (start, end) in enumerate(_bounds(ends)):
        if end > start:
            torch.mm(rows[start:end], weights[group], out=found[start:end])
    return found


@grouped_mm.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


@torch.library.custom_op("shardwright::grouped_outer", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Per group, left [s, i] transposed times right [s, o] over the rows of the group -> [e, i, o]: weight gradients."""
    if _fused(left, right):
        found = torch.nn.functional.grouped_mm(left.t(), right, offs=ends)
        empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0  # the kernel writes nothing for them
        return found.masked_fill_(empty[:, None, None], 0)
    found = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
    for group, (start, end) in enumerate(_bounds(ends)):
        if end > start:
            torch.mm(left[start:end].t(), right[start:end], out=found[group])
    return found


@grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _bounds(ends: Tensor) -> list[tuple[int, int]]:
    """(first row, end) of every group; waits for the device."""
    stops = ends.tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _fused(*operands: Tensor) -> bool:
    """Whether torch's grouped kernel takes these: bfloat16 on GPUs of Ampere or later, rows aligned to 16 bytes."""
    if any(x.dtype != torch.bfloat16 or x.device.type != "cuda" for x in operands):
        return False
    aligned = all(n % 8 == 0 for x in operands for n in x.shape[-2 if x.dim() == 3 else -1 :])
    return aligned and torch.version.hip is None and torch.cuda.get_device_capability(operands[0].device) >= (8, 0)


class _Experts(torch.autograd.Function):
    """Forward and backward by sorted slots; `slots` in comments is t k rows in the order of their experts.

    `ctx.half` says which gradients the backward is to make (runtime/meetings.py); what "weight" needs stays from "input" on.
    """

    @staticmethod
    def forward(ctx, x, index, scale, up, down, up_bias, down_bias, gate, transposed, first):  # type: ignore[no-untyped-def,override]
        owner, order, ends = _sorted(index, first, up.shape[0])
        rows = order // index.shape[1]
        inner = grouped_mm(x[rows].to(up.dtype), _inward(up, transposed), ends)
        if up_bias is not None:
            inner = inner + _rows(up_bias, owner)
        outer = grouped_mm(run_gate(gate, inner), _inward(down, transposed), ends)
        if down_bias is not None:
            outer = outer + _rows(down_bias, owner)
        ctx.save_for_backward(x, index, scale, up, down, up_bias, down_bias, inner, order)
        ctx.home = gate, transposed, first
        ctx.half = ctx.kept = None
        weighted = outer * scale.reshape(-1)[order].unsqueeze(-1)
        return _combined(weighted, order, index.shape).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        saved = ctx.saved_tensors  # once: every look makes again what was not kept
        flowing, kept = ((None, None), ctx.kept) if ctx.half == "weight" else _Experts._flowing(ctx, saved, grad)
        ctx.kept = kept if ctx.half == "input" else None
        weights = (None,) * 4 if ctx.half == "input" else _Experts._weights(ctx, saved, *kept)
        d_x, d_scale = flowing
        return d_x, None, d_scale, *weights, None, None, None

    @staticmethod
    def _flowing(ctx, saved, grad):  # type: ignore[no-untyped-def]
        """Gradients of x and scale, and what those of the weights are products of."""
        x, index, scale, up, down, _, down_bias, inner, order = saved
        gate, transposed, first = ctx.home
        owner, ends = _again(index, order, first, up.shape[0])
        factor = scale.reshape(-1)[order].unsqueeze(-1)
        with torch.enable_grad():
            leaf = inner.detach().requires_grad_()
            middle = run_gate(gate, leaf)
        incoming = grad[order // index.shape[1]].to(down.dtype)
        back = grouped_mm(incoming, _inward(down, transposed).transpose(1, 2), ends)  # d(slot output) @ down, unscaled
        per_slot = (middle.detach() * back).sum(-1)
        if down_bias is not None:
            per_slot = per_slot + (incoming * _rows(down_bias, owner)).sum(-1)
        d_scale = _unsorted(per_slot, order).reshape(scale.shape).to(scale.dtype)
        weighted = (incoming * factor).to(down.dtype)
        (d_inner,) = torch.autograd.grad(middle, leaf, (back * factor).to(middle.dtype))
        d_x = None
        if ctx.needs_input_grad[0]:
            d_rows = grouped_mm(d_inner, _inward(up, transposed).transpose(1, 2), ends)
            d_x = _combined(d_rows, order, index.shape).to(x.dtype)
        return (d_x, d_scale), (weighted, middle.detach(), d_inner)

    @staticmethod
    def _weights(ctx, saved, weighted, middle, d_inner):  # type: ignore[no-untyped-def]
        """Gradients of up, down and their biases."""
        x, index, _, up, _, up_bias, down_bias, _, order = saved
        _, transposed, first = ctx.home
        owner, ends = _again(index, order, first, up.shape[0])
        d_up = d_down = None
        if ctx.needs_input_grad[4]:
            d_down = _outward(weighted, middle, ends, transposed)
        if ctx.needs_input_grad[3]:
            d_up = _outward(d_inner, x[order // index.shape[1]].to(up.dtype), ends, transposed)
        return d_up, d_down, _by_owner(d_inner, owner, up_bias), _by_owner(weighted, owner, down_bias)


def _sorted(index: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(local expert of every slot in sorted order, which slot stands there, where each expert's slots end).

    Slots of no local expert come last, owned by expert `count`.
    """
    local = index.reshape(-1) - first
    local = torch.where((local < 0) | (local >= count), count, local)
    owner, order = torch.sort(local, stable=True)
    return owner, order, _ends(owner, count)


def _again(index: Tensor, order: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Owner and ends of `_sorted` from the order that was kept."""
    local = index.reshape(-1)[order] - first
    owner = torch.where((local < 0) | (local >= count), count, local)
    return owner, _ends(owner, count)


def _ends(owner: Tensor, count: int) -> Tensor:
    return torch.searchsorted(owner, torch.arange(count, device=owner.device), right=True).to(torch.int32)


def _inward(weight: Tensor, transposed: bool) -> Tensor:
    """A stack of weights as [e, in, out]."""
    return weight if transposed else weight.transpose(1, 2)


def _outward(grad: Tensor, rows: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """The gradient of a stack of weights, in its layout."""
    return grouped_outer(rows, grad, ends) if transposed else grouped_outer(grad, rows, ends)


def _rows(bias: Tensor, owner: Tensor) -> Tensor:
    """The bias of every slot, zeros for slots of no local expert."""
    return torch.cat([bias, torch.zeros_like(bias[:1])])[owner]


def _by_owner(grad: Tensor, owner: Tensor, bias: Tensor | None) -> Tensor | None:
    """The gradient of a bias: slots summed by expert."""
    if bias is None:
        return None
    return grad.new_zeros(bias.shape[0] + 1, bias.shape[1]).index_add(0, owner, grad)[:-1].to(bias.dtype)


def _unsorted(slots: Tensor, order: Tensor) -> Tensor:
    """Slots back in the order of tokens."""
    inverse = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    return slots[inverse]


def _combined(slots: Tensor, order: Tensor, shape: Sequence[int]) -> Tensor:
    """The sum of the slots of every token."""
    return _unsorted(slots, order).view(shape[0], shape[1], slots.shape[1]).sum(1)


def _experts(
    x: Tensor, index: Tensor, scale: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
    gate: str, transposed: bool, place: Sequence[int] = (), parts: Sequence[int] = (), shared: bool = True,
) -> Tensor:  # fmt: skip
    flat = 0
    for i, n in zip(place, parts, strict=True):
        flat = flat * n + i
    bias = down_bias if shared or down_bias is None else down_bias * 0  # its gradient is the other rank's
    return _Experts.apply(x, index, scale, up, down, up_bias, bias, gate, transposed, flat * up.shape[0])


_LIBRARY.define(
    "experts(Tensor x, Tensor index, Tensor scale, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, str gate, "
    "bool transposed, int[] place=[], int[] parts=[], bool shared=True) -> Tensor"
)
_LIBRARY.impl("experts", _experts, "CompositeImplicitAutograd")

experts = torch.ops.shardwright.experts.default

CallForm = tuple[Any, tuple[Any, ...], dict[str, Any]]


def split_experts(form: CallForm, group: str, index: int, size: int) -> CallForm:
    """The op with its experts split over one more axis (major axes first): this rank's experts for all its tokens."""
    target, args, kwargs = form
    place, parts = kwargs.get("place", ()), kwargs.get("parts", ())
    return target, args, {**kwargs, "place": [*place, index], "parts": [*parts, size]}


def split_width(form: CallForm, group: str, index: int, size: int) -> CallForm:
    """The op with the inner width of every expert split: the first rank alone adds the output bias."""
    target, args, kwargs = form
    return target, args, {**kwargs, "shared": kwargs.get("shared", True) and index == 0}

"""Vocabulary-parallel embedding and cross-entropy: the ops that may be split over classes.

The rows of an embedding (classes of the logits) are split over one or more axes, major to minor; `size` are the ranks of each
axis and `index` this rank's coordinates, so that with n local rows it holds rows [n i, n (i + 1)) where i counts the shards.

    vocab_embedding       ids whole -> a partial sum of the result (P); no communication
    vocab_cross_entropy   logits split on classes, labels whole -> the whole loss on every rank (R); per axis one all_reduce of
                          the row maxima and one of (sum of exponentials, target logit); the backward is local

Both are library ops, composite over autograd functions as in transitions.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedOp
from .. import collectives

CallForm = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
NONE, MEAN = 0, 1  # torch's codes for the reduction of a loss; 2 is sum
LOW_PRECISION = (torch.float16, torch.bfloat16)


def start_of(rows: int, index: Sequence[int], size: Sequence[int]) -> int:
    """First global row of this rank."""
    flat = 0
    for i, n in zip(index, size, strict=True):
        flat = flat * n + i
    return flat * rows


class _Embedding(torch.autograd.Function):
    """Rows of the local table, zeros for ids that other ranks hold."""

    @staticmethod
    def forward(ctx, weight, ids, padding_idx, by_frequency, start):  # type: ignore[no-untyped-def,override]
        rows = weight.shape[0]
        local = ids - start
        outside = (local < 0) | (local >= rows)
        ctx.save_for_backward(local.masked_fill(outside, rows))
        ctx.home = rows, padding_idx - start if 0 <= padding_idx - start < rows else -1, by_frequency
        return torch.nn.functional.embedding(local.masked_fill(outside, 0), weight).masked_fill_(
            outside.unsqueeze(-1), 0
        )

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        (local,) = ctx.saved_tensors
        rows, padding, by_frequency = ctx.home
        # One row more takes the gradients of the ids held elsewhere.
        table = torch.ops.aten.embedding_dense_backward(grad.contiguous(), local, rows + 1, padding, by_frequency)
        return table[:rows], None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    """Loss per row from class-split logits, in float32 for low precision; saves the logits and their log-sum-exp."""

    @staticmethod
    def forward(ctx, logits, target, ignore_index, smoothing, start, classes, groups):  # type: ignore[no-untyped-def,override]
        dim = 1 if logits.dim() > 1 else 0
        values = logits.float() if logits.dtype in LOW_PRECISION else logits
        local = (target - start).unsqueeze(dim)
        outside = (local < 0) | (local >= logits.shape[dim])
        local = local.masked_fill(outside, 0)
        top = values.amax(dim)
        for group in groups:
            top = collectives.all_reduce(top, group, "max")
        sums = torch.stack([
            (values - top.unsqueeze(dim)).exp_().sum(dim),
            values.gather(dim, local).masked_fill(outside, 0).squeeze(dim),
            *([values.sum(dim)] if smoothing else []),
        ])  # fmt: skip
        for group in groups:
            sums = collectives.all_reduce(sums, group)
        spread = sums[0].log() + top
        loss = spread - (1 - smoothing) * sums[1] - (smoothing / classes * sums[2] if smoothing else 0)
        ignored = target == ignore_index
        ctx.save_for_backward(logits, spread, local, outside, ignored)
        ctx.home = dim, smoothing, classes
        return loss.masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        logits, spread, local, outside, ignored = ctx.saved_tensors
        dim, smoothing, classes = ctx.home
        result = (logits - spread.unsqueeze(dim)).exp_()
        if smoothing:
            result -= smoothing / classes
        hit = (~outside).to(result.dtype) * (smoothing - 1)
        result.scatter_add_(dim, local, hit)
        result *= grad.masked_fill(ignored, 0).unsqueeze(dim)
        return result.to(logits.dtype), None, None, None, None, None, None


def _embedding(
    weight: Tensor, ids: Tensor, padding_idx: int, by_frequency: bool, index: list[int], size: list[int]
) -> Tensor:
    return _Embedding.apply(weight, ids, padding_idx, by_frequency, start_of(weight.shape[0], index, size))


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    index: list[int],
    size: list[int],
    groups: list[str],
) -> Tensor:
    own = logits.shape[1 if logits.dim() > 1 else 0]
    classes, start = own * math.prod(size), start_of(own, index, size)
    live = [group for group, n in zip(groups, size, strict=True) if n > 1]
    rows = _CrossEntropy.apply(logits, target, ignore_index, label_smoothing, start, classes, live)
    if reduction != NONE:
        rows = rows.sum()
    if reduction == MEAN:
        rows = rows / (target != ignore_index).sum()
    return rows.to(logits.dtype)


_LIBRARY.define(
    "vocab_embedding(Tensor weight, Tensor ids, int padding_idx, bool by_frequency, int[] index, int[] size) -> Tensor"
)
_LIBRARY.impl("vocab_embedding", _embedding, "CompositeImplicitAutograd")
_LIBRARY.define(
    "vocab_cross_entropy(Tensor logits, Tensor target, int reduction, int ignore_index, float label_smoothing, "
    "int[] index, int[] size, str[] groups) -> Tensor"
)
_LIBRARY.impl("vocab_cross_entropy", _cross_entropy, "CompositeImplicitAutograd")

vocab_embedding = torch.ops.shardwright.vocab_embedding.default
vocab_cross_entropy = torch.ops.shardwright.vocab_cross_entropy.default


def bound(form: CallForm, names: Mapping[str, Any]) -> list[Any]:
    """Arguments of a call by position, the missing ones from `names` (name -> default)."""
    _, args, kwargs = form
    return [args[i] if i < len(args) else kwargs.get(name, default) for i, (name, default) in enumerate(names.items())]


def embedding_form(form: CallForm, group: str, index: int, size: int) -> CallForm:
    """`aten.embedding` on a table split over an axis (applied once per axis, major axis first)."""
    target, args, _ = form
    if target is vocab_embedding:
        return target, (*args[:4], [*args[4], index], [*args[5], size]), {}
    names = {"weight": None, "indices": None, "padding_idx": -1, "scale_grad_by_freq": False}
    return vocab_embedding, (*bound(form, names), [index], [size]), {}


def loss_form(form: CallForm, group: str, index: int, size: int) -> CallForm:
    """`aten.cross_entropy_loss` on logits split on classes over an axis; raises UnsupportedOp for class weights."""
    target, args, _ = form
    if target is vocab_cross_entropy:
        return target, (*args[:5], [*args[5], index], [*args[6], size], [*args[7], group]), {}
    names = {"self": None, "target": None, "weight": None, "reduction": 1, "ignore_index": -100, "label_smoothing": 0.0}
    logits, labels, weight, *rest = bound(form, names)
    if weight is not None:
        raise UnsupportedOp("cross_entropy_loss with class weights cannot split its classes; keep them whole")
    return vocab_cross_entropy, (logits, labels, *rest, [index], [size], [group]), {}

"""`shardwright::linear_cross_entropy`: the summed cross-entropy of rows projected to classes, whose logits never are whole.

    loss = sum_i cross_entropy(steps(x[i] @ weight^T), target[i])        over rows i whose target is not `ignore_index`

Shapes: x [rows, k], weight [classes, k], target [rows] (int64), bias [classes] (what the step "bias" adds; steps.py); the result is
0-dim, in the dtype that the steps leave, float32 for half precision. Labels are smoothed as torch's `cross_entropy` does.

Rows go through `chunk` at a time; 0 means as many as `planner.rule_heads.chunk_rows` says of this rank's sizes: at least 16 MiB of
normalised logits, 256 rows and k / 4 of them (1024 and k in half precision), and a 32nd of all rows. The loss is a number, so every
gradient is one multiplication away when a chunk's logits are at hand: they are made there (the idea of the fused linear
cross-entropy in Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989), kept as large as x, weight and bias, and scaled by what comes
in backward. That is three products in all, of which only those run whose gradient is wanted; without gradients the loss alone is
computed.

A compiler gets a loss whose classes are all here as one call, `shardwright::whole_head`: left to Inductor, chunks run side by side
(seven at once and two of the weight's gradient, measured with torch 2.13), which is the memory that chunks are there to save.

The weight's gradient is summed over chunks in float32 at least. It is kept in the weight's dtype, but that of float16 in float32,
since a sum over rows that is not yet divided by their number may be too large for it. Second derivatives are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...planner.rule_heads import chunk_rows
from ..torch_compat import is_graphed, keeps_graph
from .steps import NARROW, Step, apply_steps, dtypes, parsed, spelled, undo_steps, wide_dtype

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")

Reduce = Callable[[Tensor], Tensor]
Grads = list[Tensor | None]


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Head:
    """What is done to a chunk. `start` is the first class of this rank's weight, of all `classes`; `top` and `total` are the
    maximum and the sum over the ranks that have the others."""

    steps: tuple[Step, ...]
    ignore_index: int
    smoothing: float
    chunk: int
    classes: int
    start: int = 0
    top: Reduce = _alone
    total: Reduce = _alone

    def rows(self, x: Tensor, weight: Tensor) -> int:
        """Rows of a chunk."""
        dtype = str(x.dtype).removeprefix("torch.")
        return self.chunk or chunk_rows(x.shape[0], *weight.shape, dtype)

    def place(self, target: Tensor, own: int) -> tuple[Tensor, Tensor, Tensor]:
        """(columns of the targets among `own` ones, 1 where that is the target, 1 where the row counts); all [rows, 1].

        Where all classes are here, a target that is none is left for `gather` to refuse.
        """
        counts = (target != self.ignore_index).unsqueeze(1)
        local = target.unsqueeze(1) - self.start
        inside = counts if own == self.classes else counts & (local >= 0) & (local < own)
        return local.masked_fill(~inside, 0), inside, counts

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss of a chunk, and the logarithms of its probabilities."""
        local, inside, counts = self.place(target, logits.shape[1])
        logs = torch.log_softmax(logits, 1, dtype=wide_dtype(logits.dtype))
        parts = [logs.gather(1, local), *([logs.sum(1, keepdim=True)] if self.smoothing else [])]
        if logits.shape[1] != self.classes:
            parts, shift = self._joined(logits, logs, parts, inside)
            logs.add_(shift)
        loss = (self.smoothing - 1) * parts[0]
        if self.smoothing:
            loss = loss - self.smoothing / self.classes * parts[1]
        return loss.masked_fill(~counts, 0).sum(), logs

    def _joined(self, logits: Tensor, logs: Tensor, parts: list[Tensor], inside: Tensor) -> tuple[list[Tensor], Tensor]:
        """From logarithms of probabilities among this rank's classes those among all: (of the target, their sum), [rows, 1] each,
        and what is to be added to every one of `logs`."""
        spread = logits.amax(1, keepdim=True).to(logs.dtype) - logs.amax(
            1, keepdim=True
        )  # log-sum-exp of this rank's logits
        above = spread - self.top(spread)
        lifted = [part + times * above for part, times in zip(parts, (1, logits.shape[1]), strict=False)]
        total = self.total(torch.stack([above.exp(), lifted[0].masked_fill(~inside, 0), *lifted[1:]]))
        rest = total[0].log()
        return [part - times * rest for part, times in zip(total[1:], (1, self.classes), strict=False)], above - rest

    def gradient(self, logs: Tensor, target: Tensor) -> Tensor:
        """The gradient by the logits, over `logs`, where rows count; that of others is left to be dropped."""
        local, inside, _ = self.place(target, logs.shape[1])
        grad = logs.exp_()
        if self.smoothing:
            grad.sub_(self.smoothing / self.classes)
        return grad.scatter_add_(1, local, inside.to(grad.dtype) * (self.smoothing - 1))


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss, with the gradients made and kept in the forward pass. `wanted`: of x, weight and bias."""

    @staticmethod
    def forward(ctx, x, weight, bias, target, head, wanted):  # type: ignore[no-untyped-def,override]
        made = _as_one_call if is_graphed() and head.classes == weight.shape[0] else _run
        loss, grads = made(x, weight, bias, target, head, wanted)
        ctx.save_for_backward(*(g for g in grads if g is not None))
        ctx.home = wanted, tuple(None if t is None else t.dtype for t in (x, weight, bias))
        return loss

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        if torch.is_grad_enabled():  # what was kept is no function of the operands any more
            raise UsageError(
                "linear_cross_entropy has no second derivative: backward(create_graph=True) is not supported"
            )
        wanted, dtypes = ctx.home
        kept = iter(ctx.saved_tensors)
        made = [
            _scaled(next(kept), grad).to(dtype) if want else None for want, dtype in zip(wanted, dtypes, strict=True)
        ]
        return *made, None, None, None


def _scaled(kept: Tensor, grad: Tensor) -> Tensor:
    """A kept gradient times the incoming one, written over it where nobody can ask for it again.

    One on a CPU is looked at, as that waits for nothing: times 1 it is the gradient itself.
    """
    if keeps_graph():
        return kept * grad
    if type(grad) is Tensor and grad.device.type == "cpu" and grad.item() == 1:
        return kept
    return kept.mul_(grad)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head, wanted: tuple[bool, ...]
) -> tuple[Tensor, Grads]:
    """The loss and the gradients that are `wanted` of x, weight and bias."""
    loss, d_x, d_weight, d_bias = x.new_zeros((), dtype=wide_dtype(dtypes(head.steps, x.dtype)[-1])), [], None, None
    size = head.rows(x, weight)
    several = x.shape[0] > size
    for first in range(0, x.shape[0], size):
        rows = x[first : first + size]
        labels = target[first : first + size]
        logits, kept = apply_steps(head.steps, torch.mm(rows, weight.t()), bias)
        part, logs = head.loss(logits, labels)
        loss = loss + part
        del logits  # as everything of a chunk, before the next tensor of its size
        if not any(wanted):
            continue
        counts = (labels != head.ignore_index).unsqueeze(1).to(x.dtype)
        grad, more = undo_steps(head.steps, head.gradient(logs, labels), kept, x.dtype, counts if wanted[2] else None)
        d_bias = more if d_bias is None else d_bias.add_(more)
        del logs, kept
        if wanted[0]:
            d_x.append(torch.mm(grad, weight).mul_(counts))
        if wanted[1]:
            d_weight = _added(d_weight, grad, rows * counts, several)
        del grad
    return loss, [
        _whole(d_x, x) if wanted[0] else None,
        _kept(d_weight, weight, wanted[1]),
        _kept(d_bias, bias, wanted[2]),
    ]


def _added(total: Tensor | None, grad: Tensor, rows: Tensor, several: bool) -> Tensor:
    """The weight's gradient with that of a chunk: [classes, k], in float32 at least where there are `several`."""
    if total is None:
        first = torch.mm(grad.t(), rows)
        return first.float() if several and first.dtype in NARROW else first
    if total.dtype == rows.dtype:
        return total.addmm_(grad.t(), rows)
    return total.add_(torch.mm(grad.t(), rows))


def _whole(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else torch.zeros_like(like)


def _kept(grad: Tensor | None, of: Tensor | None, wanted: bool) -> Tensor | None:
    """A gradient summed over chunks in the dtype that it waits in."""
    if not wanted or of is None:
        return None
    if grad is None:  # no rows, or no step that adds it
        return torch.zeros_like(of)
    return grad.to(torch.float32 if of.dtype == torch.float16 else of.dtype)


@torch.library.custom_op("shardwright::whole_head", mutates_args=())
def whole_head(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, steps: str, ignore_index: int, smoothing: float, chunk: int,
    wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The loss and the gradients that are `wanted` of x, weight and bias, as `_run` makes them."""
    head = Head(program_of(steps, bias), ignore_index, smoothing, chunk, weight.shape[0])
    loss, grads = _run(x, weight, bias, target, head, tuple(wanted))
    return [loss, *(g for g in grads if g is not None)]


@whole_head.register_fake
def _(x, weight, bias, target, steps, ignore_index, smoothing, chunk, wanted):  # type: ignore[no-untyped-def]
    loss = x.new_empty((), dtype=wide_dtype(dtypes(program_of(steps, bias), x.dtype)[-1]))
    found = [x.new_empty(x.shape)] if wanted[0] else []
    sums = [_kept(of.new_empty(of.shape), of, True) for of, want in ((weight, wanted[1]), (bias, wanted[2])) if want]
    return [loss, *found, *(each for each in sums if each is not None)]


def _as_one_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, head: Head, wanted: tuple[bool, ...]
) -> tuple[Tensor, Grads]:
    """What `_run` makes, for a graph."""
    steps = spelled(head.steps)
    loss, *grads = whole_head(
        x, weight, bias, target, steps, head.ignore_index, head.smoothing, head.chunk, list(wanted)
    )
    found = iter(grads)
    return loss, [next(found) if want else None for want in wanted]


def program_of(steps: str, bias: Tensor | None) -> tuple[Step, ...]:
    """The steps of a call; raises UsageError where they do not fit it."""
    program = parsed(steps)
    if [step.name for step in program].count("bias") != (bias is not None):
        raise UsageError("linear_cross_entropy takes a bias if and only if one step adds it")
    return program


def linear_loss(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """The op on what a rank has of it."""
    on = torch.is_grad_enabled()
    wanted = tuple(on and t is not None and t.requires_grad for t in (x, weight, bias))
    return _LinearCrossEntropy.apply(x, weight, bias, target, head, wanted)


def _linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, steps: str = "", ignore_index: int = -100,
    label_smoothing: float = 0.0, chunk: int = 0,
) -> Tensor:  # fmt: skip
    head = Head(program_of(steps, bias), ignore_index, label_smoothing, chunk, weight.shape[0])
    return linear_loss(x, weight, target, bias, head)


_LIBRARY.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, Tensor? bias=None, str steps='', int ignore_index=-100, "
    "float label_smoothing=0.0, int chunk=0) -> Tensor"
)
_LIBRARY.impl("linear_cross_entropy", _linear_cross_entropy, "CompositeImplicitAutograd")

linear_cross_entropy: Any = torch.ops.shardwright.linear_cross_entropy.default

"""What a model does to logits between projection and loss, as a short program: "mul 0.0625", "bias", "div 30.0;tanh;to float32".

Steps work on a chunk of logits [rows, classes] in place where they can. Each knows its derivative from its result: with y the
result and g the gradient of it, the gradient of the step's operand is

    bias        y = z + bias       g          (and the sum of g over rows for the bias)
    mul c       y = c z            c g
    div c       y = z / c          g / c
    tanh        y = tanh(z)        g (1 - y^2)
    to dtype    y = z.to(dtype)    g in the dtype of z
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError

NARROW = (torch.float16, torch.bfloat16)
DTYPES = {str(d).removeprefix("torch."): d for d in (*NARROW, torch.float32, torch.float64)}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What rows of a dtype are normalised in."""
    return torch.float32 if dtype in NARROW else dtype


@dataclass(frozen=True)
class Step:
    """One step of a program, with its number or its dtype where it has one."""

    name: str
    number: float = 0.0
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        if self.dtype is not None:
            return f"{self.name} {str(self.dtype).removeprefix('torch.')}"
        return f"{self.name} {self.number!r}" if self.name in ("mul", "div") else self.name


@dataclass(frozen=True)
class Kind:
    """A step on (logits, step, bias), and from (gradient, result, step) the gradient before it, in place. `keeps`: it needs its
    result for that, and overwrites it."""

    ahead: Callable[[Tensor, Step, Tensor | None], Tensor]
    back: Callable[[Tensor, Tensor, Step], Tensor]
    keeps: bool = False


KINDS: Mapping[str, Kind] = {
    "bias": Kind(lambda z, _, bias: z if bias is None else z.add_(bias), lambda g, y, _: g),
    "mul": Kind(lambda z, step, _: z.mul_(step.number), lambda g, y, step: g.mul_(step.number)),
    "div": Kind(lambda z, step, _: z.div_(step.number), lambda g, y, step: g.div_(step.number)),
    "tanh": Kind(lambda z, *_: z.tanh_(), lambda g, y, _: g.addcmul_(g, y.square_(), value=-1), keeps=True),
    "to": Kind(lambda z, step, _: z.to(step.dtype), lambda g, y, _: g),
}


def spelled(steps: Sequence[Step]) -> str:
    """A program as text."""
    return ";".join(map(str, steps))


def parsed(text: str) -> tuple[Step, ...]:
    """The steps of a program; raises UsageError for one that is not in the table."""
    found = []
    for part in filter(None, text.split(";")):
        name, _, given = part.partition(" ")
        if name not in KINDS:
            raise UsageError(f"linear_cross_entropy has no step {name!r}; it has {', '.join(KINDS)}")
        found.append(Step(name, dtype=DTYPES[given]) if name == "to" else Step(name, float(given or 0.0)))
    return tuple(found)


def dtypes(steps: Sequence[Step], dtype: torch.dtype) -> list[torch.dtype]:
    """The dtype of logits before each step, and after all, where products are in `dtype`."""
    found = [dtype]
    for step in steps:
        found.append(step.dtype or found[-1])
    return found


def apply_steps(steps: Sequence[Step], logits: Tensor, bias: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Logits after all steps, and the results that derivatives need, in order. `logits` is overwritten."""
    kept: list[Tensor] = []
    for step in steps:
        kind = KINDS[step.name]
        logits = kind.ahead(logits, step, bias)
        if kind.keeps:
            kept.append(logits)
            logits = logits.clone()  # later steps write over it
    return logits, kept


def undo_steps(
    steps: Sequence[Step], grad: Tensor, kept: list[Tensor], dtype: torch.dtype, counts: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the product, in its `dtype`, and that of the bias over the rows that count ([rows, 1]) where it is wanted.

    `grad` is overwritten.
    """
    *before, last = dtypes(steps, dtype)
    grad, d_bias = grad.to(last), None
    for step, own in zip(reversed(steps), reversed(before), strict=True):
        kind = KINDS[step.name]
        if step.name == "bias" and counts is not None:
            d_bias = (grad * counts).sum(0, dtype=wide_dtype(grad.dtype))
        grad = kind.back(grad, kept.pop() if kind.keeps else grad, step).to(own)
    return grad, d_bias

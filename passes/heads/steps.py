"""What a model does to logits between projection and loss, as a short program: "mul 0.0625", "bias", "div 30.0;tanh;wide".

Steps work on a chunk of logits [rows, classes] in place where they can. Each knows its derivative from its result: with y the
result and g the gradient of it, the gradient of the step's operand is

    bias        y = z + bias       g          (and the sum of g over rows for the bias)
    mul c       y = c z            c g
    div c       y = z / c          g / c
    tanh        y = tanh(z)        g (1 - y^2)
    wide        y = float(z)       g in the dtype of the product

"wide" takes half precision to float32; where no step says so the softmax does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError

WIDE = "wide"
NARROW = (torch.float16, torch.bfloat16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What rows are normalised in."""
    return torch.float32 if dtype in NARROW else dtype


@dataclass(frozen=True)
class Kind:
    """A step on (logits, number or bias), and from (gradient, result, number) the gradient before it, in place. `keeps`: it needs
    its result for that, and overwrites it."""

    ahead: Callable[[Tensor, Tensor | float], Tensor]
    back: Callable[[Tensor, Tensor, float], Tensor]
    keeps: bool = False


KINDS: Mapping[str, Kind] = {
    "bias": Kind(lambda z, bias: z.add_(bias), lambda g, y, _: g),
    "mul": Kind(lambda z, c: z.mul_(c), lambda g, y, c: g.mul_(c)),
    "div": Kind(lambda z, c: z.div_(c), lambda g, y, c: g.div_(c)),
    WIDE: Kind(lambda z, _: z.to(wide_dtype(z.dtype)), lambda g, y, _: g),
    "tanh": Kind(lambda z, _: z.tanh_(), lambda g, y, _: g.addcmul_(g, y.square_(), value=-1), keeps=True),
}


@dataclass(frozen=True)
class Step:
    """One step of a program, with its number (0 where it has none)."""

    name: str
    number: float = 0.0

    def __str__(self) -> str:
        return f"{self.name} {self.number!r}" if self.name in ("mul", "div") else self.name


def spelled(steps: list[Step]) -> str:
    """A program as text."""
    return ";".join(map(str, steps[:-1] if steps and steps[-1].name == WIDE else steps))


def parsed(text: str) -> tuple[Step, ...]:
    """The steps of a program; raises UsageError for one that is not in the table."""
    found = []
    for part in filter(None, text.split(";")):
        name, _, number = part.partition(" ")
        if name not in KINDS:
            raise UsageError(f"linear_cross_entropy has no step {name!r}; it has {', '.join(KINDS)}")
        found.append(Step(name, float(number or 0.0)))
    return tuple(found)


def apply_steps(steps: tuple[Step, ...], logits: Tensor, bias: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Logits after all steps, and the results that derivatives need, in order. `logits` is overwritten."""
    kept: list[Tensor] = []
    for step in steps:
        kind = KINDS[step.name]
        given = bias.to(logits.dtype) if step.name == "bias" and bias is not None else step.number
        logits = kind.ahead(logits, given)
        if kind.keeps:
            kept.append(logits)
            logits = logits.clone()  # later steps, and the loss, write over it
    return logits, kept


def undo_steps(
    steps: tuple[Step, ...], grad: Tensor, kept: list[Tensor], dtype: torch.dtype, counts: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the product, in its `dtype`, and that of the bias over the rows that count ([rows, 1]) where it is wanted.

    `grad` is overwritten.
    """
    d_bias = None
    if all(step.name != WIDE for step in steps):
        grad = grad.to(dtype)
    for step in reversed(steps):
        kind = KINDS[step.name]
        if step.name == "bias" and counts is not None:
            d_bias = (grad * counts).sum(0, dtype=wide_dtype(dtype))
        if step.name == WIDE:
            grad = grad.to(dtype)
        grad = kind.back(grad, kept.pop() if kind.keeps else grad, step.number)
    return grad, d_bias

"""Vocabulary-parallel projection and cross-entropy in one: `shardwright::linear_cross_entropy` with its classes split.

    rows whole, weight (and bias) split on classes, labels whole -> the whole loss on every rank (R)

Per axis and chunk of rows there is one all_reduce of the row maxima and one of (sum of exponentials, logit of the target, with
smoothing the sum of logits); the backward is local. The gradient of the rows is a sum over this rank's classes alone: a partial sum
(P), as of any operand that lacks the split factor. Which rank has which classes is as in vocab.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...passes.heads.op import Head, linear_loss, program_of
from .. import collectives
from .vocab import CallForm, bound, start_of

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")


def _over(groups: Sequence[str], op: str, x: Tensor) -> Tensor:
    for group in groups:
        x = collectives.all_reduce(x, group, op)
    return x


def _head(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, steps: str, ignore_index: int, label_smoothing: float,
    chunk: int, index: list[int], size: list[int], groups: list[str],
) -> Tensor:  # fmt: skip
    own = weight.shape[0]
    live = [group for group, n in zip(groups, size, strict=True) if n > 1]
    top, total = (functools.partial(_over, live, op) for op in ("max", "sum"))
    program = program_of(steps, bias)
    head = Head(
        program, ignore_index, label_smoothing, chunk, own * math.prod(size), start_of(own, index, size), top, total
    )
    return linear_loss(x, weight, target, bias, head)


_LIBRARY.define(
    "vocab_linear_cross_entropy(Tensor x, Tensor weight, Tensor target, Tensor? bias, str steps, int ignore_index, "
    "float label_smoothing, int chunk, int[] index, int[] size, str[] groups) -> Tensor"
)
_LIBRARY.impl("vocab_linear_cross_entropy", _head, "CompositeImplicitAutograd")

vocab_linear_cross_entropy: Any = torch.ops.shardwright.vocab_linear_cross_entropy.default

NAMES = {
    "x": None, "weight": None, "target": None, "bias": None, "steps": "", "ignore_index": -100, "label_smoothing": 0.0, "chunk": 0,
}  # fmt: skip
"""Arguments of the op and what they are unsaid."""


def head_form(form: CallForm, group: str, index: int, size: int) -> CallForm:
    """The op on a weight split over an axis (applied once per axis, major axis first)."""
    target, args, _ = form
    if target is vocab_linear_cross_entropy:
        return target, (*args[:8], [*args[8], index], [*args[9], size], [*args[10], group]), {}
    return vocab_linear_cross_entropy, (*bound(form, NAMES), [index], [size], [group]), {}

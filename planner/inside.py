"""Collectives that run inside an op: of implementations that reduce over the ranks that split a factor of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .outline import DTYPE_BYTES, Op, Tensor


@dataclass(frozen=True, slots=True)
class Inside:
    """One collective that an implementation runs, of `bytes` full bytes."""

    collective: str
    bytes: float
    backward: bool = False


def _width(op: Op, tensors: Mapping[str, Tensor]) -> int:
    """Bytes of an element of what implementations reduce: at least float32."""
    return max(DTYPE_BYTES[tensors[op.operands[0].tensor].dtype], 4)


def _vocab_loss(op: Op, tensors: Mapping[str, Tensor], sizes: Sequence[int], n: int) -> list[Inside]:
    """Per row the maximum; then the sum of exponentials with the logit of the label (runtime/kernels/vocab.py)."""
    rows = math.prod(s for s, f in zip(sizes, op.factors, strict=True) if f.split != "vocab_loss")
    return [Inside("all_reduce", float(rows * _width(op, tensors) * values)) for values in (1, 2)]


def _batch_norm(op: Op, tensors: Mapping[str, Tensor], sizes: Sequence[int], n: int) -> list[Inside]:
    """Per channel mean and sum of squares of every rank; backward two sums (runtime/kernels/batch_norm.py)."""
    channels = math.prod(sizes[f] for f in op.operands[0].factors[1])
    pair = float(2 * channels * _width(op, tensors))
    return [Inside("all_gather", n * pair), Inside("all_reduce", pair, backward=True)]


INSIDE = {"vocab_loss": _vocab_loss, "batch_norm": _batch_norm}
"""Collectives of implementations that reduce inside, of an op on local `sizes` split over an axis of n ranks."""

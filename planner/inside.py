"""Collectives that run inside an op: of implementations that reduce over the ranks that split a factor of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .dispatch import DISPATCH
from .outline import DTYPE_BYTES, Op, Tensor
from .rule_experts import letters
from .rule_heads import chunk_rows


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


def _vocab_head(op: Op, tensors: Mapping[str, Tensor], sizes: Sequence[int], n: int) -> list[Inside]:
    """As of the loss on logits, chunk by chunk of rows (runtime/kernels/vocab_head.py)."""
    width = _width(op, tensors)
    rows, classes, wide = (math.ceil(math.prod(sizes[f] for f in letters(op.factors, name))) for name in "bvk")
    chunks = -(-rows // chunk_rows(rows, classes, wide, tensors[op.operands[0].tensor].dtype))
    return [Inside("all_reduce", rows / chunks * width * values) for values in (1, 2)] * chunks


def _batch_norm(op: Op, tensors: Mapping[str, Tensor], sizes: Sequence[int], n: int) -> list[Inside]:
    """Per channel mean and sum of squares of every rank; backward two sums (runtime/kernels/batch_norm.py)."""
    channels = math.prod(sizes[f] for f in op.operands[0].factors[1])
    pair = float(2 * channels * _width(op, tensors))
    return [Inside("all_gather", n * pair), Inside("all_reduce", pair, backward=True)]


def _exchanges(op: Op, tensors: Mapping[str, Tensor], sizes: Sequence[int], n: int) -> list[Inside]:
    """Counts, rows and weights of tokens to the ranks of their experts, outputs back, and gradients the other way.

    Bytes are those of the mean rank: where tokens go depends on the data (runtime/kernels/dispatch.py).
    """
    x, index, weight = (use for use in op.operands[:3])
    slots = [f for dim in index.factors for f in dim]
    width = math.prod(sizes[f] for dim in x.factors for f in dim if f not in slots)
    rows = n * math.prod(sizes[f] for f in slots)
    row_bytes = float(rows * width * DTYPE_BYTES[tensors[x.tensor].dtype])
    weight_bytes = float(rows * DTYPE_BYTES[tensors[weight.tensor].dtype])
    counts = float(n * 8 * math.prod(op.factors[f].size for f in letters(op.factors, "e")))
    back = [size for use, size in ((x, row_bytes), (weight, weight_bytes)) if tensors[use.tensor].differentiable]
    return [
        *(Inside("all_to_all", size) for size in (counts, row_bytes, weight_bytes, row_bytes)),
        *(Inside("all_to_all", size, backward=True) for size in (row_bytes, *back)),
    ]


INSIDE = {"vocab_loss": _vocab_loss, "vocab_head": _vocab_head, "batch_norm": _batch_norm, DISPATCH: _exchanges}
"""Collectives of implementations that reduce or exchange inside, of an op on local `sizes` split over an axis of n ranks: by what
the split factor is split by, or by the choice of an op that is not one factor."""

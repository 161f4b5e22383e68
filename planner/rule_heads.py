"""The rule of `shardwright::linear_cross_entropy`: a projection to classes and the cross-entropy of its rows, summed, as one op.

    x [b, k], weight [v, k], target [b], bias [v] -> []

    b   rows: free; the weight and the bias are V, the loss is P
    v   classes: implementation "vocab_head" reduces row by row; x is V (its gradient is a sum over classes), the loss is R
    k   never: softmax follows

Rows go through in chunks, so that logits never are whole; the gradients are made with the loss, while a chunk's logits are at
hand (three products in all, where recomputing logits takes four), and wait as large as x, weight and bias. The backward pass
scales them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .outline import DTYPE_BYTES, Op, Saved, Tensor, Use
from .placement import shape_of
from .rule_experts import letters
from .rule_types import Rule

TARGET, KIND, SPLIT = "shardwright.linear_cross_entropy", "head_loss", "vocab_head"
RULE = Rule(
    "b k!, v k!, b, v -> ",
    (),
    KIND,
    "contract",
    {"v": SPLIT},
    slots=((0, "x"), (1, "weight"), (2, "target"), (3, "bias")),
)
PROJECTED = (0, 1)
"""The operands that are multiplied: x and weight."""

CHUNK_BYTES = 16 * 2**20
"""Logits of a chunk, as wide as they are normalised, take at least this much: less only adds launches."""
LEAST_ROWS: Mapping[int, int] = {2: 1024}
LEAST_ROWS_ELSE = 256
"""A chunk has at least so many rows, by bytes of an element: every chunk reads the weight twice and adds to its gradient, some 16
bytes per element for 6 FLOPs a row. Accelerators do 300 FLOPs in half precision in the time of a byte, and some 20 in float32."""
MOST_CHUNKS = 32
"""More rows make larger chunks, not more: every chunk is some twenty calls of a compiled graph."""


def chunk_rows(rows: int, classes: int, dtype: str) -> int:
    """Rows of a chunk of logits [rows, classes] made in `dtype` on this rank: the largest of

        CHUNK_BYTES / (classes * bytes of a normalised element),  LEAST_ROWS of the dtype,  rows / MOST_CHUNKS

    evened out, so that the last chunk is about as long as the others.
    """
    wanted = max(_least_rows(classes, dtype), -(-rows // MOST_CHUNKS))
    chunks = max(1, -(-rows // wanted))
    return max(1, -(-rows // chunks))


def _least_rows(classes: int, dtype: str) -> int:
    """Rows that a chunk has at least, where there are as many."""
    least = LEAST_ROWS.get(DTYPE_BYTES[dtype], LEAST_ROWS_ELSE)
    return max(least, CHUNK_BYTES // max(classes * wide_bytes(dtype), 1))


def wide_bytes(dtype: str) -> int:
    """Bytes of an element as it is normalised: float32 for half precision, as torch does."""
    return max(DTYPE_BYTES[dtype], 4)


def products(differentiable: Sequence[bool]) -> tuple[int, ...]:
    """Products of the forward pass: 0 the logits, 1 the gradient of x, 2 that of the weight."""
    return (0, *(i + 1 for i in PROJECTED if differentiable[i]))


def saved(
    operands: Sequence[Use], tensors: Mapping[str, Tensor], seen: Sequence[tuple[Sequence[int], int]]
) -> tuple[Saved, ...]:
    """The gradients that wait, from their (shape, bytes) in the order of the operands that they are gradients of."""
    left = [use for use in operands if tensors[use.tensor].differentiable]
    found = []
    for shape, size in seen:
        use = next(u for u in left if shape_of(tensors[u.tensor].dims) == tuple(shape))
        left.remove(use)
        found.append(Saved("new", 0, tuple(f for dim in use.factors for f in dim), size))
    return tuple(found)


Term = tuple[float, tuple[int, ...]]
"""Bytes: a number times the local sizes of some factors."""


def moved(op: Op, differentiable: Sequence[bool], compute: str) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Bytes moved beside products, (forward, backward): passes over logits, and chunks' parts added to the weight's gradient.

    Per logit, with w the width normalised in and n that of products: written n, cast n + w where they differ, maximum w, shift and
    exponential 4 w, sum w; where gradients are wanted scaled 2 w, cast w + n where they differ, read n by each of their products.
    Per chunk after the first and element of the weight: read and written, in half precision through a temporary beside.
    """
    n, w = DTYPE_BYTES[compute], wide_bytes(compute)
    cast = n + w if n != w else 0
    made = products(differentiable)
    logits = n + cast + 6.0 * w + (2.0 * w + cast + n * (len(made) - 1) if len(made) > 1 else 0.0)
    rows, classes, wide = (letters(op.factors, names) for names in ("b", "v", "bvk"))
    terms = [(logits, (*rows, *classes))]
    if 2 in made:
        whole = math.prod(op.factors[f].size for f in classes)
        terms.append(((2.0 * w + (2.0 * n if cast else 0.0)) / _least_rows(whole, compute), wide))
    return tuple(terms), ()


def scratch_bytes(op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str], sizes: Sequence[int]) -> float:
    """Bytes inside the op under one choice per axis, beside the gradients that it keeps: logits of one chunk as products make them
    and as they are normalised, and in half precision the sum of the weight's gradient in float32. 0 for every other op."""
    if op.kind != KIND:
        return 0.0
    local = {name: float(math.prod(op.factors[f].size for f in letters(op.factors, name))) for name in "bvk"}
    for name, n in zip(choice, sizes, strict=True):
        if name[:1] in local and any(f.name == name for f in op.factors):
            local[name[:1]] /= n
    dtype = tensors[op.operands[0].tensor].dtype
    wide, narrow = wide_bytes(dtype), DTYPE_BYTES[dtype]
    rows = chunk_rows(math.ceil(local["b"]), math.ceil(local["v"]), dtype)
    summed = 0.0
    if narrow < wide and rows < local["b"] and tensors[op.operands[1].tensor].differentiable:
        summed = wide * local["v"] * local["k"]
    return rows * local["v"] * (wide + (narrow if narrow < wide else 0)) + summed


def product_groups(op: Op) -> tuple[tuple[int, ...], ...]:
    """Factor groups (batch, m, n, k) of the product."""
    return ((), *(letters(op.factors, name) for name in "bvk"))

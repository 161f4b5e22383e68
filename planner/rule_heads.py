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
LEAST_ROWS: Mapping[int, tuple[int, int]] = {2: (1024, 1)}
LEAST_ROWS_ELSE = 256, 4
"""(n, d) by bytes of an element: a chunk has at least n rows and k / d of them, where there are as many.

Every chunk reads the weight twice and adds to its gradient, some 16 bytes per element for 6 FLOPs a row; accelerators do 300
FLOPs in half precision in the time of a byte, and some 20 in float32. By k, because a pass over the weight's gradient [v, k] for
every c rows of logits costs k / c of a pass over them; and k rows of logits in half precision and in float32 take as much as that
gradient does beside its float32 sum.
"""
MOST_CHUNKS = 32
"""More rows make larger chunks, not more: every chunk is some twenty calls of a compiled graph."""


def chunk_rows(rows: int, classes: int, width: int, dtype: str) -> int:
    """Rows of a chunk of logits [rows, classes] made in `dtype` of x [rows, width] on this rank: the largest of

        CHUNK_BYTES / (classes * bytes of a normalised element),  LEAST_ROWS of dtype and width,  rows / MOST_CHUNKS

    evened out, so that the last chunk is about as long as the others.
    """
    wanted = max(_least_rows(classes, width, dtype), -(-rows // MOST_CHUNKS))
    chunks = max(1, -(-rows // wanted))
    return max(1, -(-rows // chunks))


def _least_rows(classes: int, width: int, dtype: str) -> int:
    """Rows that a chunk has at least, where there are as many."""
    least, part = LEAST_ROWS.get(DTYPE_BYTES[dtype], LEAST_ROWS_ELSE)
    return max(least, width // part, CHUNK_BYTES // max(classes * wide_bytes(dtype), 1))


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

    Logits are read and written as they are normalised, and where gradients are wanted once more for their exponentials and, in half
    precision, to be cast. Every chunk of c rows reads and writes the sum of the weight's gradient in float32 at least, in half
    precision beside the part that is added to it. Activations are counted at the compute dtype, as everywhere (planner/work.py).
    """
    n = DTYPE_BYTES[compute]
    half, made = n < wide_bytes(compute), products(differentiable)
    rows, classes, width = (letters(op.factors, name) for name in "bvk")
    terms = [((2.0 if len(made) == 1 else 6.0 if half else 4.0) * n, (*rows, *classes))]
    if 2 in made:
        many, wide = (math.prod(op.factors[f].size for f in group) for group in (classes, width))
        added = 2.0 * wide_bytes(compute) + (n if half else 0.0)
        terms.append((added / _least_rows(many, wide, compute), (*rows, *classes, *width)))
    return tuple(terms), ()


def scratch_bytes(
    op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str], sizes: Sequence[int], *, casts: bool
) -> float:
    """Bytes inside the op under one choice per axis, beside the gradients that it keeps; 0 for every other op.

    These are the logits of a chunk with the logarithms of their probabilities, and in half precision the sum of the weight's
    gradient in float32. Where all rows are one chunk no gradient is there yet as the logits are, and one of the two later.
    `casts`: logits in half precision are cast before they are normalised, as on a CPU.
    """
    if op.kind != KIND:
        return 0.0
    local = {name: float(math.prod(op.factors[f].size for f in letters(op.factors, name))) for name in "bvk"}
    for name, n in zip(choice, sizes, strict=True):
        if name[:1] in local and any(f.name == name for f in op.factors):
            local[name[:1]] /= n
    dtype = tensors[op.operands[0].tensor].dtype
    wide, narrow = wide_bytes(dtype), DTYPE_BYTES[dtype]
    rows = chunk_rows(math.ceil(local["b"]), math.ceil(local["v"]), math.ceil(local["k"]), dtype)
    summed = 0.0
    if narrow < wide and rows < local["b"] and tensors[op.operands[1].tensor].differentiable:
        summed = wide * local["v"] * local["k"]
    logits = rows * local["v"]
    first = wide + narrow + (wide if casts and narrow < wide else 0)
    if rows < local["b"]:
        return logits * first + summed
    sides = {0: local["b"], 1: local["v"]}
    made = sum(n * local["k"] * narrow for i, n in sides.items() if tensors[op.operands[i].tensor].differentiable)
    return max(logits * first - made, logits * narrow)


def product_groups(op: Op) -> tuple[tuple[int, ...], ...]:
    """Factor groups (batch, m, n, k) of the product."""
    return ((), *(letters(op.factors, name) for name in "bvk"))

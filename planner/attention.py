"""What attention keeps and moves, by the kernel it runs as, and dropout masks as accelerators keep them.

An outline is observed on a CPU, whose kernels keep other tensors than an accelerator's. `fused_attention` and `math_attention`
say what the two ways to run attention keep there; b, a, s and t are batch, heads, query and key positions, w the bytes of the
compute dtype:

    fused   queries, keys, values, the result, and one float32 per row (FlashAttention, Dao et al. 2022)
    math    queries, keys, values and the probabilities, w b a s t; with dropout also its mask, b a s t, and the probabilities it
            leaves, w b a s t: 5 b a s t bytes in half precision (Korthikanti et al. 2022, section 4.1)

The math form is priced as its separate kernels: two products over the whole square of scores, causal or not, and the same
square moved through memory, in elements (a mask is one read and one write; dropout's own mask one byte):

    forward     4         scores written; softmax reads and writes them; the second product reads
              + 2         masked
              + 2 + 1/w   dropout reads and writes
    backward    7         gradients written; softmax reads them and the probabilities, writes; three products read
              + 2 + 1/w   dropout reads and writes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import MappingProxyType

from .outline import DTYPE_BYTES, Op, Outline, Saved, Tensor
from .rule_experts import Term

MATH = "aten._scaled_dot_product_attention_math"
"""The target of attention as separate kernels."""

MATH_KIND = "attention_math"
"""The kind it is priced as: batched products, not a fused kernel."""

GENERATIONS: Mapping[str, str] = MappingProxyType(
    {"flash": "attention", "flash1": "attention_flash1", "flash3": "attention_flash3"}
)
"""Fused attention by the `attention=` pin: what PyTorch ships (FlashAttention-2), the first generation and Triton's ports of it,
and the third (cuDNN's on Hopper likewise), as the kind whose efficiency it reaches."""

DROPOUTS = frozenset({"aten.dropout", "aten.native_dropout"})


def fused_attention(outline: Outline) -> Outline:
    """Every attention op as one fused kernel."""
    return _each(outline, _fused) if outline.training else outline  # inference keeps what it keeps whatever the kernel


def math_attention(outline: Outline, dropping: Collection[str] = ()) -> Outline:
    """Every attention op as separate kernels; `dropping` names the ops that drop probabilities.

    For an outline at its compute dtype (planner/template.py `retyped`). Work is what the kernels do: the whole square of scores
    also under a causal mask, and twice that backward. Operands stay the same, and so do the ways to split them.
    """
    return _each(outline, lambda op: _math(op, outline.tensors, op.name in dropping))


def byte_masks(outline: Outline) -> Outline:
    """Dropout that keeps one byte per element, as accelerators do; a CPU keeps a mask in the compute dtype."""

    def narrow(op: Op) -> Op:
        if op.target not in DROPOUTS:
            return op
        elements = outline.tensors[op.results[0].tensor].elements
        saved = (replace(s, bytes=min(s.bytes, elements)) if s.source == "new" else s for s in op.saved)
        return replace(op, saved=tuple(saved))

    return replace(outline, ops=tuple(narrow(op) for op in outline.ops))


def _each(outline: Outline, change: Callable[[Op], Op]) -> Outline:
    ops = (change(op) if op.kind == "attention" and len(op.operands) > 2 else op for op in outline.ops)
    return replace(outline, ops=tuple(ops))


_OPERANDS = (Saved("operand", 0), Saved("operand", 1), Saved("operand", 2))


def _fused(op: Op) -> Op:
    rows = _rows(op)
    return replace(op, saved=(*_OPERANDS, Saved("result", 0), Saved("new", 0, rows, 4 * _size(op, rows))))


def _math(op: Op, tensors: Mapping[str, Tensor], drops: bool) -> Op:
    scores = (*_rows(op), *op.operands[1].factors[-2])
    whole = _size(op, scores)
    width = DTYPE_BYTES[tensors[op.operands[0].tensor].dtype]
    kept = [width * whole, whole, width * whole] if drops else [width * whole]
    saved = (*_OPERANDS, *(Saved("new", 0, scores, n) for n in kept))
    flops = op.flops * (2.0 if causal(op) else 1.0)
    backward = 2.0 * flops if op.backward_flops else 0.0
    return replace(op, target=MATH, saved=saved, flops=flops, backward_flops=backward)


def _rows(op: Op) -> tuple[int, ...]:
    """Factors of one number per query row: all of the queries' but the width of a head."""
    return tuple(f for dim in op.operands[0].factors[:-1] for f in dim)


def _size(op: Op, factors: Collection[int]) -> int:
    return math.prod(op.factors[f].size for f in factors)


def causal(op: Op) -> bool:
    """Whether queries see only the positions before them."""
    return any(op.factors[f].split == "never" for f in op.operands[0].factors[-2])


def price_kind(op: Op) -> str:
    """The kind that efficiencies are looked up by."""
    return MATH_KIND if op.target == MATH else op.kind


def moved(op: Op, compute: str, masks: bool = False) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Elements of scores that the separate kernels move, (forward, backward); none for any other op.

    With `masks` the mask costs nothing: it is applied where the scores are normalised.
    """
    if op.target != MATH:
        return (), ()
    scores = next(s.factors for s in op.saved if s.source == "new")
    dropping = 2.0 + 1.0 / DTYPE_BYTES[compute] if drops(op) else 0.0
    masked = 2.0 if not masks and (causal(op) or len(op.operands) > 3) else 0.0
    return ((4.0 + masked + dropping, scores),), ((7.0 + dropping, scores),)


def drops(op: Op) -> bool:
    """Whether separate kernels of attention drop probabilities."""
    return sum(s.source == "new" for s in op.saved) > 1


def math_kernels(op: Op, masks: bool = False) -> tuple[int, int]:
    """Kernels that attention starts as separate ones: products, softmax, mask and dropout; twice the products backward."""
    beside = 1 + int(drops(op)) + int(not masks and causal(op))
    return 2 + beside, 4 + beside

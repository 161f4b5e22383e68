"""What ops keep for their backward passes under the choices that make other kernels of them than the one that was observed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .dispatch import DISPATCH
from .outline import DTYPE_BYTES, Op, Saved, Tensor
from .ring import RING, SUMS
from .rule_experts import letters


def saves(op: Op, choice: Sequence[str], tensors: Mapping[str, Tensor]) -> tuple[Saved, ...]:
    """What `op` keeps under one choice per axis.

    A ring keeps its operands, its result and one sum per row. Experts whose tokens are sent to them keep the rows that came
    in place of the tokens.
    """
    if not op.saved:
        return ()
    width = DTYPE_BYTES[tensors[op.operands[0].tensor].dtype]
    if RING in choice:
        rows = tuple(f for dim in op.operands[0].factors[:-1] for f in dim)
        sums = _new(op, rows, max(width, SUMS))
        return (*(Saved("operand", i) for i in range(len(op.operands))), Saved("result", 0), sums)
    if DISPATCH in choice:
        rest = (s for s in op.saved if (s.source, s.index) != ("operand", 0))
        return (*rest, _new(op, letters(op.factors, "tkh"), width))
    return op.saved


def _new(op: Op, factors: tuple[int, ...], width: int) -> Saved:
    return Saved("new", factors=factors, bytes=math.prod(op.factors[f].size for f in factors) * width)

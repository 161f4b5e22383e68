"""Bytes that live inside one op alone: in its backward pass where it trains, beside operands, results and what is saved.

A convolution on a CPU is a product with its operand unfolded into columns, one for every position of the result, unless oneDNN
computes it. oneDNN has no float64 (ATen/native/Convolution.cpp, `ConvParams::use_mkldnn`); what it reorders by itself, about one
copy of what it reads or writes, is not counted. The columns of all samples are there at once, of one group of channels; of a
transposed convolution those of one sample. A dilated one unfolds sample after sample, which an outline does not tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from . import rule_experts, rule_heads, rule_patches
from .outline import DTYPE_BYTES, Op, Tensor
from .ring import split_by

UNFOLDED = frozenset({"float64"})
"""Dtypes in which convolutions on a CPU are unfolded, whatever their sizes."""
COPIES = {"shardwright.rms_norm": 3.0, "shardwright.rotary": 2.5}
"""How many tensors like the first operand the backward pass of a composite op holds at most, the gradient it makes included
(passes/fuse/ops; in half precision they are of float32)."""
COLUMNS, TRANSPOSED = "zikt", "oks"
"""The letters of a convolution (rule_variants.conv) that its columns run over."""


def inside_bytes(
    op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str], sizes: Sequence[int], *, training: bool, unfolds: bool
) -> float:
    """Bytes inside an op under one choice per axis. `unfolds`: the device is a CPU."""
    columns = column_bytes(op, tensors, choice, sizes) if unfolds else 0.0
    return columns + composite_bytes(op, tensors, choice, sizes, training, unfolds)


def composite_bytes(
    op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str], sizes: Sequence[int], training: bool, unfolds: bool
) -> float:
    """Bytes of what a composite op makes for itself: experts, the tiles of an image, a chunk of logits, copies."""
    if training and op.target in COPIES:
        return _copies(op, tensors, choice, sizes)
    experts = rule_experts.scratch_bytes(op, tensors, choice, sizes, training)
    logits = rule_heads.scratch_bytes(op, tensors, choice, sizes, casts=unfolds)
    return experts + logits + rule_patches.scratch_bytes(op, tensors, choice, sizes, training)


def _copies(op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str], sizes: Sequence[int]) -> float:
    """Bytes of the copies of the first operand that a backward pass holds beside the gradient."""
    use = op.operands[0]
    elements = float(math.prod(op.factors[f].size for dim in use.factors for f in dim))
    for name, n in zip(choice, sizes, strict=True):
        elements /= n if any(op.factors[f].name == name for dim in use.factors for f in dim) else 1
    dtype = tensors[use.tensor].dtype
    return elements * (COPIES[op.target] * rule_heads.wide_bytes(dtype) - DTYPE_BYTES[dtype])


def column_bytes(op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str], sizes: Sequence[int]) -> float:
    """Bytes of the columns of a convolution; 0 where there are none, as for a kernel of 1 that goes over every position."""
    if op.kind != "conv" or tensors[op.operands[0].tensor].dtype not in UNFOLDED or _direct(op):
        return 0.0
    letters = TRANSPOSED if "transpose" in op.target else COLUMNS
    local = [float(f.size) for f in op.factors]
    for name, n in zip(choice, sizes, strict=True):
        for i in split_by(op, name):
            local[i] /= n
    elements = math.prod(local[i] for i, f in enumerate(op.factors) if f.name[0] in letters)
    return elements * DTYPE_BYTES[tensors[op.operands[0].tensor].dtype]


def _direct(op: Op) -> bool:
    """Whether the operand's positions are the columns themselves."""
    positions = {side: [f.size for f in op.factors if f.name[0] == side] for side in "kst"}
    return not positions["k"] and positions["s"] == positions["t"]

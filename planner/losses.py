"""Cross-entropy as the software runs it (`loss=`): what it keeps per logit, which is most of the memory at large vocabularies.

With logits of w bytes (2 in half precision), per logit:

    float     as the model has it: most cast logits to float32, keep log-probabilities (4), and backward makes their gradient and
              that of the float32 logits (8)
    compute   at the compute dtype, without the cast: keeps w, backward makes 2 w (half-precision engines with models that do not
              cast, as Transformers' until 4.45)
    fused     one kernel that keeps the logits (w) and one float32 a row, and writes the gradient in their place (FlashAttention's,
              Apex's and Liger's; `cross_entropy_loss_fusion` of Megatron-Core)
"""

from __future__ import annotations

from dataclasses import replace

from .memory import FUSED_LOSS
from .outline import DTYPE_BYTES, Op, Outline, Saved, Tensor


def cast_loss(outline: Outline, form: str) -> Outline:
    """An outline at its compute dtype with its losses in one of the forms above."""
    losses = [op for op in outline.ops if op.kind == "loss" and len(op.operands) > 1]
    if form == "float" or not losses or not outline.training:
        return outline
    tensors = dict(outline.tensors)
    narrowed: dict[str, Op] = {}
    for op in losses:
        ratio = _narrow(outline, tensors, op)
        narrowed[op.name] = _fused(op) if form == "fused" else _lighter(op, ratio)
    return replace(outline, tensors=tensors, ops=tuple(narrowed.get(op.name, op) for op in outline.ops))


def _narrow(outline: Outline, tensors: dict[str, Tensor], loss: Op) -> float:
    """Give the logits the dtype they were cast from; returns by what their bytes shrink."""
    logits = tensors[loss.operands[0].tensor]
    maker = next((op for op in outline.ops if any(use.tensor == logits.storage for use in op.results)), None)
    if maker is None or maker.target != "aten.to":
        return 1.0
    before = tensors[maker.operands[0].tensor].dtype
    ratio = DTYPE_BYTES[before] / DTYPE_BYTES[logits.dtype]
    for name, tensor in list(tensors.items()):
        if tensor.storage == logits.storage:
            tensors[name] = replace(tensor, dtype=before)
    return ratio


def _lighter(op: Op, ratio: float) -> Op:
    saved = (replace(s, bytes=int(s.bytes * ratio)) if s.source == "new" else s for s in op.saved)
    return replace(op, saved=tuple(saved))


def _fused(op: Op) -> Op:
    """Logits kept as they are, one number a row beside them."""
    rows = tuple(f for dim in op.operands[0].factors[:-1] for f in dim)
    size = 4
    for f in rows:
        size *= op.factors[f].size
    kept = tuple(s for s in op.saved if s.source == "operand" and s.index != 0)
    return replace(op, target=FUSED_LOSS, saved=(Saved("operand", 0), *kept, Saved("new", 0, rows, size)))

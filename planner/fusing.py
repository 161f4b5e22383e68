"""Chains of element-wise kernels as one: what moves less memory where kernels are fused (`kernels=fused`).

A compiler such as Inductor, or a hand-written kernel (bias and GELU; bias, dropout and residual), runs neighbouring memory-bound
ops as one kernel. What such an op makes for others of its kind alone is neither written nor read again, unless the backward pass
needs it; the same holds for gradients. Views between them cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .attention import MATH
from .flow import Flow
from .outline import Op, Outline

FUSABLE = frozenset({"elementwise", "norm", "random", "copy", "fill"})
"""Kinds that a fusing compiler joins with their neighbours."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """What an op need not move: operands it need not read, results it need not write, gradients of either likewise.

    Indices of operands and results. `launched` says whether it still starts a kernel of its own, forward and backward; `masks`
    that attention as separate kernels masks its scores where it normalises them (scale, mask and softmax in one kernel).
    """

    reads: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()
    gradient_reads: frozenset[int] = frozenset()
    gradient_writes: frozenset[int] = frozenset()
    launched: tuple[bool, bool] = (True, True)
    masks: bool = False


def fusions(outline: Outline) -> Mapping[str, Fusion]:
    """By op name, for every op that is joined with a neighbour."""
    flow = Flow(outline)
    found = {op.name: _fusion(flow, op) for op in outline.ops if op.kind in FUSABLE}
    found |= {op.name: Fusion(masks=True) for op in outline.ops if op.target == MATH}
    return {name: fusion for name, fusion in found.items() if fusion != Fusion()}


def _fusion(flow: Flow, op: Op) -> Fusion:
    """What is left out of one op."""
    read, written = ([flow.storage(use.tensor) for use in uses] for uses in (op.operands, op.results))
    reads = {i for i, name in enumerate(read) if name in flow.maker and _beside(flow, flow.maker[name], op)}
    ends = {i for i, name in enumerate(written) if _passed_on(flow, name, op)}
    writes = {i for i in ends if written[i] not in flow.saved and written[i] not in flow.left}
    last = {i for i in reads if len(flow.readers.get(read[i], ())) == 1}
    return Fusion(
        frozenset(reads), frozenset(writes), frozenset(ends), frozenset(last), (len(ends) < len(op.results), not reads)
    )


def _beside(flow: Flow, other: Op, op: Op) -> bool:
    return other.kind in FUSABLE and flow.unit.get(other.name) == flow.unit.get(op.name)


def _passed_on(flow: Flow, name: str, op: Op) -> bool:
    readers = flow.readers.get(name, [])
    return bool(readers) and all(_beside(flow, reader, op) for reader in readers)

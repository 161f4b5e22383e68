"""Chains of element-wise kernels as one: what moves less memory where kernels are fused (`kernels=fused`).

A compiler such as Inductor, or a hand-written kernel (bias and GELU; bias, dropout and residual), runs neighbouring memory-bound
ops as one kernel. What such an op makes for others of its kind alone is neither written nor read again, unless the backward pass
needs it; the same holds for gradients. Views between them cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .attention import MATH
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
    flow = _Flow(outline)
    found = {op.name: flow.fusion(op) for op in outline.ops if op.kind in FUSABLE}
    found |= {op.name: Fusion(masks=True) for op in outline.ops if op.target == MATH}
    return {name: fusion for name, fusion in found.items() if fusion != Fusion()}


class _Flow:
    """Who makes and who uses every storage, views left out."""

    def __init__(self, outline: Outline) -> None:
        self.tensors = outline.tensors
        self.maker: dict[str, Op] = {}
        self.users: dict[str, list[Op]] = {}
        self.kept: set[str] = {self.tensors[n].storage for n in (*outline.outputs, outline.loss) if n in self.tensors}
        self.unit = {
            n: (r, k) for r, region in enumerate(outline.regions) for k, ops in enumerate(region.instances) for n in ops
        }
        for op in outline.ops:
            for use in op.results:
                self.maker.setdefault(self.tensors[use.tensor].storage, op)
            if op.kind != "view":
                for use in op.operands:
                    self.users.setdefault(self.tensors[use.tensor].storage, []).append(op)
            for item in op.saved:
                if item.source != "new":
                    side = op.operands if item.source == "operand" else op.results
                    self.kept.add(self.tensors[side[item.index].tensor].storage)

    def fusion(self, op: Op) -> Fusion:
        """What is left out of one op."""
        mine = self.unit.get(op.name)
        reads = {i for i, use in enumerate(op.operands) if self._beside(self._maker(use.tensor), mine)}
        ends = {i for i, use in enumerate(op.results) if self._passed_on(use.tensor, mine)}
        writes = {i for i in ends if self.tensors[op.results[i].tensor].storage not in self.kept}
        last = {i for i in reads if len(self.users.get(self.tensors[op.operands[i].tensor].storage, ())) == 1}
        return Fusion(
            frozenset(reads), frozenset(writes), frozenset(ends), frozenset(last),
            (len(ends) < len(op.results), not reads),
        )  # fmt: skip

    def _maker(self, tensor: str) -> Op | None:
        return self.maker.get(self.tensors[tensor].storage)

    def _beside(self, op: Op | None, unit: tuple[int, int] | None) -> bool:
        return op is not None and op.kind in FUSABLE and self.unit.get(op.name) == unit

    def _passed_on(self, tensor: str, unit: tuple[int, int] | None) -> bool:
        users = self.users.get(self.tensors[tensor].storage, [])
        return bool(users) and all(self._beside(op, unit) for op in users)

"""What an op does at local sizes: FLOPs and bytes, forward and backward, as functions of its factors' local sizes.

Bytes are those of operands and results, floats at the compute dtype. The backward pass reads the gradients of the results and
what was saved, and writes the gradients of the operands that take one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from . import rule_experts, rule_heads, rule_made, rule_packed, rule_patches
from .attention import MATH, MATH_KIND, causal, math_kernels, moved, price_kind
from .fusing import Fusion
from .outline import DTYPE_BYTES, Op, Saved, Tensor, Use

ALONE = Fusion()
"""No kernel beside it."""

PRODUCT_KINDS = frozenset({"matmul", "attention", MATH_KIND, "conv", "experts"})
"""Kinds whose backward pass computes products too, which may be divided into those of activations and of parameters."""

FLOPS_KINDS = PRODUCT_KINDS | {rule_heads.KIND, rule_patches.KIND, rule_packed.KIND}
"""Kinds priced by FLOP/s; all others move bytes."""

COMPOSITE = {
    rule_experts.TARGET: rule_experts.moved, rule_patches.TARGET: rule_patches.beside,
    rule_made.CONV: rule_made.moved, rule_made.LINEAR: rule_made.moved,
    rule_made.REMADE: rule_made.remade, rule_packed.TARGET: rule_packed.moved,
}  # fmt: skip
"""What composite ops move besides operands, results and what is saved, by target."""

OWN_LAUNCHES = {rule_patches.KIND: rule_patches.launched, rule_packed.KIND: rule_packed.launched}
"""Kernels started by ops that hold a program."""

FREE_KINDS = frozenset({"view"})
"""Kinds that launch no kernel."""

PASS_THROUGH = frozenset({"aten.add", "aten.sub", "aten.clone", "aten.contiguous"})
"""Their gradient is the incoming one: only operands that were broadcast need a sum."""


@dataclass(frozen=True, slots=True)
class OpKey:
    """What a measured op row is filed under. `operands` are (local shape, dtype, differentiable) in order.

    `arguments` is the canonical text of the plain arguments (profiles/ops.py makes it), "" when there are none.
    """

    target: str
    operands: tuple[tuple[tuple[int, ...], str, bool], ...]
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Term:
    """So many bytes times the local sizes of some factors."""

    scale: float
    factors: tuple[int, ...]

    def at(self, sizes: tuple[float, ...]) -> float:
        product = self.scale
        for f in self.factors:
            product *= sizes[f]
        return product


@dataclass(frozen=True, slots=True)
class Work:
    """An op made ready to be priced at any local sizes.

    `rows_shared` are the groups that share the rows of a grouped product; `beside` what a composite op moves besides.
    `launched` are the kernels it starts forward and backward (fewer where it is fused with others), `weighted` says that it
    multiplies by a parameter. `forward` lists terms of operands first. `keys` are the factors of the positions that attention
    looks at, `causal` says that it looks at those before its own only. `ahead` and `gradients` are the products of the forward
    and of the backward pass (0 the result, 1 and 2 the gradients of the first and the second operand).
    """

    target: str
    kind: str
    forward: tuple[Term, ...]
    backward: tuple[Term, ...]
    differentiable: bool
    kernels: int
    flops_global: tuple[float, float]
    global_sizes: tuple[int, ...]
    matmul: tuple[tuple[int, ...], ...]
    gradients: tuple[int, ...]
    shapes: tuple[tuple[tuple[tuple[int, ...], ...], str, bool], ...]
    arguments: str
    rows_shared: int = 1
    beside: tuple[tuple[Term, ...], tuple[Term, ...]] = ((), ())
    launched: tuple[int, int] = (1, 1)
    weighted: bool = False
    causal: bool = False
    keys: tuple[int, ...] = ()
    ahead: tuple[int, ...] = (0,)

    def forward_bytes(self, sizes: tuple[float, ...]) -> float:
        return sum(term.at(sizes) for term in self.forward)

    def backward_bytes(self, sizes: tuple[float, ...]) -> float:
        return sum(term.at(sizes) for term in self.backward)

    def flops(self, sizes: tuple[float, ...]) -> tuple[float, float]:
        share = 1.0
        for local, whole in zip(sizes, self.global_sizes, strict=True):
            share *= local / whole
        if self.kind == "experts":
            share *= rule_experts.imbalance(math.prod(sizes[f] for f in self.matmul[0]), self.rows_shared)
        return self.flops_global[0] * share, self.flops_global[1] * share

    def amounts(self, sizes: tuple[float, ...]) -> tuple[float, float]:
        """(forward, backward) in the unit of rates."""
        if self.kind in FLOPS_KINDS:
            return self.flops(sizes)
        return self.forward_bytes(sizes), self.backward_bytes(sizes)

    def shape(self, sizes: tuple[float, ...]) -> tuple[float, float, float, float] | None:
        """(batch, m, n, k) of a matmul (of the experts' first one), else None."""
        if not self.matmul:
            return None
        batch, m, n, k = (math.prod(sizes[f] for f in group) for group in self.matmul)
        return batch, m / self.rows_shared, n, k

    def key(self, sizes: tuple[float, ...]) -> OpKey:
        operands = tuple(
            (tuple(int(math.prod(sizes[f] for f in dim)) for dim in dims), dtype, grad)
            for dims, dtype, grad in self.shapes
        )
        return OpKey(self.target, operands, self.arguments)


def work_of(op: Op, tensors: Mapping[str, Tensor], compute: str, arguments: str = "", fusion: Fusion = ALONE) -> Work:
    """What `op` does; `fusion` is what it need not do because kernels beside it do it with it."""
    sides = [tensors[use.tensor] for use in op.operands]
    grads = tuple(t.differentiable for t in sides)
    outs = tuple(tensors[use.tensor].differentiable for use in op.results)
    differentiable = any(grads) and any(outs)
    reads = [_bytes(use, t.dtype, compute) for use, t in zip(op.operands, sides, strict=True)]
    writes = [_bytes(use, tensors[use.tensor].dtype, compute) for use in op.results]
    forward = [*_but(reads, fusion.reads), *_but(writes, fusion.writes)]
    if op.kind == "embedding":
        forward = [*reads[1:], *(_twice(w) for w in writes)]
    backward = _backward(op, reads, writes, grads, compute, fusion) if differentiable else []
    kernels = max(1, sum(grads)) if op.kind in FLOPS_KINDS else 1
    shapes = tuple(
        (use.factors, _dtype(t.dtype, compute), t.differentiable) for use, t in zip(op.operands, sides, strict=True)
    )
    experts, asked = op.kind == "experts", price_kind(op) == "attention" and len(op.operands) > 2
    gradients = tuple(i + 1 for i, grad in enumerate(grads[:2]) if grad) if not experts else (1, 2)
    ahead = rule_heads.products(grads) if op.kind == rule_heads.KIND else (0,)
    return Work(
        op.target, price_kind(op), tuple(forward), tuple(backward), differentiable, kernels, (op.flops, op.backward_flops),
        tuple(f.size for f in op.factors), _matmul(op), gradients, shapes, arguments,
        rule_experts.experts_of(op.factors) if experts else 1, _beside(op, compute, fusion.masks, grads),
        _launched(op, kernels, fusion), any(tensors[t.storage].role == "parameter" for t in sides),
        asked and causal(op), op.operands[1].factors[-2] if asked else (), ahead,
    )  # fmt: skip


def _launched(op: Op, kernels: int, fusion: Fusion) -> tuple[int, int]:
    """Kernels started forward and backward."""
    if op.target == MATH:
        return math_kernels(op, fusion.masks)
    if op.kind in OWN_LAUNCHES:
        return OWN_LAUNCHES[op.kind](op)
    return int(fusion.launched[0]), kernels * fusion.launched[1]


def _but(terms: Sequence[Term], left_out: Collection[int]) -> list[Term]:
    """The terms whose bytes are moved; what is left out counts nothing but keeps its place."""
    return [replace(t, scale=0.0) if i in left_out else t for i, t in enumerate(terms)]


def _backward(
    op: Op, reads: list[Term], writes: list[Term], grads: tuple[bool, ...], compute: str, fusion: Fusion
) -> list[Term]:
    """Bytes the backward pass moves: result gradients and saved tensors read, operand gradients written."""
    made = _but(reads, fusion.gradient_writes)
    wanted = [term for term, grad in zip(made, grads, strict=True) if grad]
    came = _but(writes, fusion.gradient_reads)
    if op.target in PASS_THROUGH:
        # An operand that lacks a factor of the result was broadcast: its gradient is a sum over the result's.
        summed = [t for t in wanted if len(t.factors) < len(writes[0].factors)]
        return [part for t in summed for part in (came[0], t)]
    if op.kind == "matmul":
        return [*(writes * len(wanted)), *reads, *wanted]
    if op.kind == "embedding":
        # Zeros for the whole table, then rows of the gradient read and added.
        return [*wanted, *(_twice(w) for w in writes)]
    saved = [_saved(s, op, reads, writes, compute) for s in op.saved if op.target != MATH or s.source != "new"]
    return [*came, *saved, *wanted]


def _saved(item: Saved, op: Op, reads: list[Term], writes: list[Term], compute: str) -> Term:
    if item.source == "operand":
        return reads[item.index]
    if item.source == "result":
        return writes[item.index]
    whole = math.prod(op.factors[f].size for f in item.factors)
    return Term(item.bytes / whole, item.factors)


def _bytes(use: Use, dtype: str, compute: str) -> Term:
    return Term(float(DTYPE_BYTES[_dtype(dtype, compute)]), tuple(f for dim in use.factors for f in dim))


def _beside(op: Op, compute: str, masks: bool, grads: tuple[bool, ...]) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Bytes a composite op moves besides its products, forward and backward."""
    if op.kind == rule_heads.KIND:
        ahead, back = (tuple(Term(n, f) for n, f in side) for side in rule_heads.moved(op, grads, compute))
        return ahead, back
    own = COMPOSITE.get(op.target)
    sides = own(op) if own is not None else moved(op, compute, masks)
    forward, backward = (tuple(Term(n * DTYPE_BYTES[compute], f) for n, f in side) for side in sides)
    return forward, backward


def _twice(term: Term) -> Term:
    return Term(2 * term.scale, term.factors)


def _dtype(dtype: str, compute: str) -> str:
    """Floating tensors of the graph run at the compute dtype; others stay."""
    return compute if "float" in dtype else dtype


def _matmul(op: Op) -> tuple[tuple[int, ...], ...]:
    """Factor groups (batch, m, n, k) of a product of the two operands with the most factors; () for other kinds."""
    if op.kind == "experts":
        return rule_experts.product_groups(op)
    if op.kind == rule_heads.KIND:
        return rule_heads.product_groups(op)
    if op.kind != "matmul":
        return ()
    uses = sorted(op.operands, key=lambda use: -sum(map(len, use.factors)))[:2]
    if len(uses) < 2 or not op.results:
        return ()
    first, second = sorted(uses, key=op.operands.index)
    left, right, out = (frozenset(f for dim in use.factors for f in dim) for use in (first, second, op.results[0]))
    groups = (left & right & out, (left & out) - right, (right & out) - left, (left & right) - out)
    return tuple(tuple(sorted(group)) for group in groups)

"""The rule of `shardwright::experts`: a mixture-of-experts region from routed tokens to combined outputs, as one op.

    x [t, h], index [t, k], scale [t, k], up [e, c f, h], down [e, h, f], biases [e, c f] and [e, h] -> [t, h]

    t   tokens: free; the weights are V
    e   experts: every rank runs its own for all its tokens, implementation "experts"; the result is P
    f   inner width of an expert: free; the result is P ("experts_width" where an output bias must be added once)
    h, o, k, c   never: contracted before the activation, or together with it

The sum over experts is exact under any routing, because a slot routed to another rank's expert contributes zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .outline import DTYPE_BYTES, Factor, Op, Tensor
from .rule_types import Call, Rule, Shape

TARGET = "shardwright.experts"
SLOTS = ((0, "x"), (1, "index"), (2, "scale"), (3, "up"), (4, "down"), (5, "up_bias"), (6, "down_bias"))
GATE, TRANSPOSED = 7, 8
"""Positions of the gate program (its text starts with the layout of the columns) and of the layout flag."""


def adapt(call: Call, rule: Rule) -> Rule | None:
    """The line for the layouts of one call; None where the experts are given in another form."""
    layout = str(call.arg(GATE, "gate", "")).partition("|")[0]
    if layout not in ("c f", "f c", "f") or len(call.operands) < 5:
        return None
    wide = "f" if layout == "f" else f"({layout.replace('c', 'c!')})"
    transposed = bool(call.arg(TRANSPOSED, "transposed", False))
    up, down = (f"e h! {wide}", "e f o!") if transposed else (f"e {wide} h!", "e o! f")
    line = f"t h!, t k!, t k!, {up}, {down}, e {wide}, e o! -> t o!"
    own = dict(rule.implementation)
    if call.has(6, "down_bias"):
        own["f"] = "experts_width"
    return replace(rule, line=line, implementation=own)


RULE = Rule(
    "t h!, t k!, t k!, e f h!, e o! f -> t o!",
    ((2,),),
    "experts",
    "experts",
    {"e": "experts"},
    slots=SLOTS,
    adapt=adapt,
)


def forward_flops(operands: Sequence[Shape]) -> float:
    """FLOPs of the products: every token through its k experts, not through all of them."""
    slots = math.prod(operands[1])
    return 2.0 * slots * sum(math.prod(stack[1:]) for stack in operands[3:5])


def backward_flops(operands: Sequence[Shape], differentiable: Sequence[bool]) -> float:
    """FLOPs of the backward: one product per stack that trains, one back through `down`, one through `up` for the tokens."""
    slots = math.prod(operands[1])
    up, down = (2.0 * slots * math.prod(stack[1:]) for stack in operands[3:5])
    return up * (differentiable[3] + differentiable[0]) + down * (differentiable[4] + 1)


def letters(factors: Sequence[Factor], names: str) -> tuple[int, ...]:
    """Factors of the op whose letter is in `names` (a letter of size 1 has none)."""
    return tuple(i for i, f in enumerate(factors) if f.name.partition(".")[0] in names)


def saved_factors(factors: Sequence[Factor], rank: int) -> tuple[int, ...]:
    """What a new tensor the op saves scales with: [slots, c f] gate inputs, or [slots] their order.

    Not with the experts: a rank keeps a row for every slot of its tokens, whether or not its own experts take it.
    """
    return letters(factors, "tkcf" if rank == 2 else "tk")


def product_groups(op: Op) -> tuple[tuple[int, ...], ...]:
    """Factor groups (batch, m, n, k) of the first product; its m is shared by the experts."""
    return tuple(letters(op.factors, names) for names in ("e", "tk", "cf", "h"))


IMBALANCE = 0.25
"""How far the load of the busiest expert is above the mean: the capacity factor of 1.25 that models trained with a balancing
loss get by with (Fedus, Zoph and Shazeer 2021, "Switch Transformers", section 2.2). A convention, not a measurement."""


def imbalance(local: float, experts: int) -> float:
    """Load of the busiest rank over the mean where each has `local` of `experts`: excesses of experts average out."""
    return 1.0 + IMBALANCE / math.sqrt(max(local, 1.0)) if local < experts else 1.0


def experts_of(factors: Sequence[Factor]) -> int:
    """All experts of the op, 1 where it has but one."""
    return math.prod(factors[i].size for i in letters(factors, "e"))


Term = tuple[float, tuple[int, ...]]
"""Elements: a number times the local sizes of some factors."""


def moved(op: Op) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Elements the op moves beside its products, (forward, backward): slots gathered, gated, weighted and combined.

    Per slot, read and written: forward 7 h (gather 2, weights 2, order 2, sum 1) and 5 f (activation 2, product 3); backward
    9 h (gathers 4, weights 2, order and sum 3) and 25 f (gate again 5, its backward 13, scalings 7). Kernels may fuse.
    """
    rows, wide = letters(op.factors, "tkh"), letters(op.factors, "tkf")
    return ((7.0, rows), (5.0, wide)), ((9.0, rows), (25.0, wide))


GATES = {"c f": 7.0, "f c": 9.0, "f": 4.0}
"""Tensors of an expert's width at the fullest moment of its gate's backward, by the layout of the columns.

The gate's result, its gradient before and after the weights, and the gradient of the columns (one width for every c), which is
put together from two parts ("c f", cut in halves) or from two as wide as itself ("f c", taken in turn).
"""


def scratch(op: Op, tensors: Mapping[str, Tensor], training: bool) -> tuple[tuple[Term, ...], ...]:
    """Elements alive at once inside the op, besides operands, results and what is saved, at each moment that may be the fullest.

    In the backward pass (passes/experts/op.py), where it trains, these are the gate's, beside the incoming gradient of the slots
    with and without their weights; that in which the gradient of the slots is put into the order of tokens; and the products that
    make the stacks' gradients. Those are counted with all gradients: before, they are not there yet.
    """
    rows, wide = letters(op.factors, "tkh"), letters(op.factors, "tkf")
    if not training:
        return (((4.0, rows), (4.0, wide)),)
    columns = math.prod(op.factors[i].size for i in letters(op.factors, "c"))
    later = tuple(
        (-1.0, tuple(i for dim in use.factors for i in dim))
        for use in op.operands[3:5]
        if tensors[use.tensor].differentiable
    )
    return (
        ((2.0, rows), (GATES[_layout(op)], wide), *later),
        ((4.0, rows), (2.0 + columns, wide), *later),
        ((2.0, rows), (1.0 + columns, wide)),
    )


def _layout(op: Op) -> str:
    """The layout of the columns of `up`, as a key of GATES."""
    names = [op.factors[i].name[0] for dim in op.operands[3].factors for i in dim]
    return " ".join(n for n in names if n in "cf") if "c" in names else "f"


def received_bytes(op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str], sizes: Sequence[int]) -> float:
    """Bytes of the gradient that comes back for the rows of a rank's experts, where tokens are sent to them."""
    return DTYPE_BYTES[tensors[op.operands[0].tensor].dtype] * _elements(
        (1.0, letters(op.factors, "tkh")), _local(op, choice, sizes)
    )


def scratch_bytes(
    op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str], sizes: Sequence[int], training: bool
) -> float:
    """Bytes of `scratch` at its fullest under one choice per axis; 0 for every other op."""
    if op.kind != "experts":
        return 0.0
    local, width = _local(op, choice, sizes), DTYPE_BYTES[tensors[op.operands[3].tensor].dtype]
    return width * max(sum(_elements(term, local) for term in moment) for moment in scratch(op, tensors, training))


def _local(op: Op, choice: Sequence[str], sizes: Sequence[int]) -> list[float]:
    """Sizes of the op's factors on one rank."""
    local, names = [float(f.size) for f in op.factors], [f.name for f in op.factors]
    for name, n in zip(choice, sizes, strict=True):
        if name in names:
            local[names.index(name)] /= n
    return local


def _elements(term: Term, local: Sequence[float]) -> float:
    scale, factors = term
    return scale * math.prod(local[i] for i in factors)

"""Rules of products whose weight is made of several parameters when they run: sums and folds of weights, one product.

    shardwright::folded_conv     convolutions of one input, added or side by side, with their batch norms (passes/fuse/ops)
    shardwright::linear_sum      linear maps of one input, added
    shardwright::remade_linear   a linear map whose input is made again from its sources

Samples, groups and channels may be split as in a convolution. What is added to the result is added once: with any of it the
contracted channels stay whole. An identity among the branches, and parts side by side, keep the channels of the result whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .outline import Op
from .rule_types import Call, Linear, Operand, Rule

CONV, LINEAR, REMADE = "shardwright.folded_conv", "shardwright.linear_sum", "shardwright.remade_linear"
WEIGHTS, VECTORS, GROUPS, TRANSPOSED, PARTS, KERNEL = 1, 2, 7, 8, 10, 11
"""Positions of arguments."""
Term = tuple[float, tuple[int, ...]]


def folded_conv(call: Call, rule: Rule) -> Rule:
    """The line for the branches of one call: x, weights in order, then vectors in order."""
    weights, parts = call.args[WEIGHTS], call.arg(PARTS, "parts", ()) or (len(call.args[WEIGHTS]),)
    identity, added = any(w is None for w in weights), any(isinstance(v, Operand) for v in call.args[VECTORS])
    inner = "i!" if identity or added else "i"
    outs = [
        f"a{p}!" if len(parts) > 1 else ("(g o!)" if identity else "(g o)")
        for p, n in enumerate(parts)
        for _ in range(n)
    ]
    runs = _runs(call, weights)
    if call.arg(TRANSPOSED, "transposed", False):
        sides = [f"(g {inner}) o *k!"]
    else:
        sides = [f"{out} {inner} *{run}!" for w, out, run in zip(weights, outs, runs, strict=True) if w is not None]
    each = len(call.args[VECTORS]) // len(weights)
    sides += [outs[i // each] for i, v in enumerate(call.args[VECTORS]) if isinstance(v, Operand)]
    result = "n!" if len(parts) > 1 else outs[0]
    groups = call.arg(GROUPS, "groups", 1)
    line = f"z (g {inner}) *s!, {', '.join(sides)} -> z {result} *t!"
    return replace(rule, line=line, linear=_linear(call), sizes={"g": groups})


def _runs(call: Call, weights: Sequence[Any]) -> list[str]:
    """The letters of the taps of each branch: k those of the largest, whose columns are unfolded (scratch.py)."""
    taps = [math.prod(call.operands[w.index][2:]) if isinstance(w, Operand) else 0 for w in weights]
    largest = taps.index(max(taps))
    return ["k" if i == largest else f"m{i}" for i in range(len(weights))]


def _linear(call: Call) -> Linear:
    """x or all weights together are P, all biases with either; what is normed is linear in neither."""
    branches, vectors = call.args[WEIGHTS], call.args[VECTORS]
    weights = tuple(w.index for w in branches if isinstance(w, Operand))
    biases = tuple(v.index for v in vectors if isinstance(v, Operand))
    each = len(vectors) // len(branches)
    if any(i % each and isinstance(v, Operand) for i, v in enumerate(vectors)):
        return ()
    return ((0, *biases),) if len(weights) < len(branches) else ((0, *biases), (*weights, *biases))


def linear_sum(call: Call, rule: Rule) -> Rule:
    """x [*, k] times the sum of weights [n, k], or [k, n] where transposed."""
    side = "k n" if call.arg(2, "transposed", False) else "n k"
    count = len(call.operands)
    line = f"*b k, {', '.join([side] * (count - 1))} -> *b n"
    return replace(rule, line=line, linear=((0,), tuple(range(1, count))))


def remade_linear(call: Call, rule: Rule) -> Rule:
    """x [*, k] times a weight [n, k], beside sources [*, k] split as x is. x may not be partial: it is made again whole."""
    return replace(rule, line=f"*b k, n k{', *b k' * (len(call.operands) - 2)} -> *b n")


def conv_flops(call: Call) -> float:
    """FLOPs of the one convolution."""
    weights = [call.operands[w.index] for w in call.args[WEIGHTS] if isinstance(w, Operand)]
    taps = math.prod(call.arg(KERNEL, "kernel", ()) or (weights[0][2:] if weights else ()))
    inner = weights[0][1] if weights else call.operands[0][1] // call.arg(GROUPS, "groups", 1)
    side = call.operands[0] if call.arg(TRANSPOSED, "transposed", False) else call.results[0]
    return 2.0 * math.prod(side) * inner * taps


def moved(op: Op) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Elements moved to make the weight, (forward, backward): each parameter's share of it is written and read, and in the
    backward pass again, and its gradient taken out of the whole."""
    rank = len(op.operands[0].factors) if op.target == CONV else 2
    weights = [use for use in op.operands[1:] if len(use.factors) == rank]
    terms = [tuple(f for dim in use.factors for f in dim) for use in weights]
    return tuple((2.0, t) for t in terms), tuple((4.0, t) for t in terms)


def remade(op: Op) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Elements moved: sources are not read in the forward pass; the input is written and read again in the backward pass."""
    rows = tuple(f for dim in op.operands[0].factors for f in dim)
    return ((2.0 - len(op.operands), rows),), ((2.0, rows),)

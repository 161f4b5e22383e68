"""Op rules made concrete: for one call of an op, its loops (letters), their sizes, and how each tensor dim is made of them.

The table is in `rule_lines` (one line per op), factor maps of views are in `views`. Splitting letter `f` along a mesh axis
makes every tensor that has `f` S on the dim of `f`, every operand that lacks it V and every result that lacks it P.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import rule_packed, rule_patches
from .rule_experts import forward_flops
from .rule_lines import LINES as RULES
from .rule_made import conv_flops
from .rule_pattern import Mismatch, match, parse
from .rule_types import Call, Factors, Linear, Operand, Rule, RuleInstance, Shape
from .rule_variants import dtype_name
from .views import VIEWS

__all__ = ["RULES", "VIEWS", "Operand", "Rule", "RuleInstance", "Shape", "instance_of", "instantiate", "packet"]


OWN_FLOPS = {rule_patches.KIND: rule_patches.call_flops, rule_packed.KIND: rule_packed.call_flops}
"""(forward, backward) FLOPs of ops that hold a program."""


def packet(target: str) -> str:
    """ "aten.linear" for "aten.linear", "aten.linear.default" or "aten::linear"."""
    namespace, _, rest = target.replace("::", ".").partition(".")
    return f"{namespace}.{rest.partition('.')[0]}"


def instantiate(
    target: str, args: Sequence[Any], kwargs: Mapping[str, Any],
    operand_shapes: Sequence[Sequence[int]], result_shapes: Sequence[Sequence[int]],
) -> RuleInstance | None:  # fmt: skip
    """The rule of one call, or None where the table has none for this op or form of call.

    `args` and `kwargs` are the call's, each tensor replaced by `Operand(i)`; `operand_shapes[i]` is its shape. Tensors count
    in order of appearance. `result_shapes` are those of all tensors the op returns.
    """
    operands = tuple(tuple(s) for s in operand_shapes)
    call = Call(packet(target), tuple(args), kwargs, operands, tuple(tuple(s) for s in result_shapes))
    if call.name in VIEWS:
        return _view(call)
    rule = RULES.get(call.name)
    return instance_of(rule, call) if rule is not None else None


def instance_of(rule: Rule, call: Call) -> RuleInstance | None:
    """`rule` made concrete for `call`; None where its shapes or flags do not fit."""
    if rule.adapt is not None:
        adapted = rule.adapt(call, rule)
        if adapted is None:
            return None
        rule = adapted
    line, linear = parse(rule.line), rule.linear
    if rule.slots:
        present = [i for i, (position, name) in enumerate(rule.slots) if call.has(position, name)]
        line = replace(line, operands=tuple(line.operands[i] for i in present))
        linear = tuple(tuple(present.index(i) for i in group if i in present) for group in linear)
    try:
        factors = match(line, call.operands, call.results, _dims(rule, call), rule.sizes)
    except Mismatch:
        return None
    count = len(call.operands)
    linear = tuple(group for group in linear if group and max(group) < count)
    return _instance(rule.kind, rule.flops, call, factors, linear, rule.implementation)


def _dims(rule: Rule, call: Call) -> tuple[int, ...]:
    """The dims `@` stands for, as positions in the first operand."""
    named = rule.dims
    if named is None or not call.operands:
        return ()
    rank = max(call.rank, 1)
    if len(named) < 2 or not isinstance(named[1], str):
        return tuple(d % rank for d in named if isinstance(d, int))
    value = call.arg(named[0], named[1], named[2] if len(named) > 2 else None)
    if value is None or isinstance(value, bool) or value == [] or value == ():
        return tuple(range(call.rank))
    if isinstance(value, int):
        return (value % rank,) if call.rank else ()
    return tuple(d % rank for d in value) if call.rank else ()


def _view(call: Call) -> RuleInstance | None:
    view = VIEWS[call.name]
    factors = view.factors(call)
    if factors is None:
        return None
    linear: Linear = ()
    if view.linear == "each" and call.operands:
        linear = ((0,),)
    elif view.linear == "joint":
        linear = (tuple(range(len(call.operands))),)
    constant = call.name in ("aten.pad", "aten.constant_pad_nd") and call.arg(
        3 if call.name == "aten.pad" else 2, "value"
    )
    if constant or any(dtype_name(a) for a in call.args[1:]):
        linear = ()
    return _instance(view.kind, "none", call, factors, linear, {})


def _instance(
    kind: str, formula: str, call: Call, factors: Factors, linear: Linear, implementation: Mapping[str, str]
) -> RuleInstance:
    forward, backward = _flops(formula, call, factors)
    own = {c: name for c, name in implementation.items() if c in factors.sizes and c not in factors.never}
    return RuleInstance(
        tuple(factors.sizes), factors.sizes, factors.never, own, factors.operands, factors.results, linear, kind,
        forward, backward,
    )  # fmt: skip


def _flops(formula: str, call: Call, factors: Factors) -> tuple[float, float]:
    """(forward, backward) FLOPs, a multiply-add as two; backward is for all operands differentiable.

    Attention counts its two matmuls, halved when causal, and 2.5 times that backward (it recomputes the scores).
    """
    if formula == "none":
        return 0.0, 0.0
    if formula == "contract":
        forward = 2.0 * math.prod(factors.sizes.values())
        return forward, 2.0 * forward
    if formula == "attention":
        query, key, value = call.operands[:3]
        half = 0.5 if call.arg(5, "is_causal", False) else 1.0
        forward = 2.0 * half * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
        return forward, 2.5 * forward
    if formula == "folded_conv":
        forward = conv_flops(call)
        return forward, 2.0 * forward
    if formula == "experts":
        forward = forward_flops(call.operands)
        return forward, 2.0 * forward
    if formula in OWN_FLOPS:
        return OWN_FLOPS[formula](call)
    if formula in ("conv", "conv_transpose"):
        side = call.results[0] if formula == "conv" else call.operands[0]
        forward = 2.0 * math.prod(side) * math.prod(call.operands[1][1:])
        return forward, 2.0 * forward
    shape = call.operands[0] if formula != "elements" else call.results[0]
    forward = math.prod(shape) * (5.0 if formula == "norm" else 1.0)
    return forward, 2.0 * forward

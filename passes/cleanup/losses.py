"""Turn mean losses into a sum and a count, so that split and microbatched losses stay exact.

    loss = cross_entropy(logits, labels, mean)    becomes    sum = cross_entropy(logits, labels, sum)
                                                             count = to(sum(ne(labels, ignore_index)), dtype)
                                                             loss = div(sum, count)

The count depends on the labels alone; where it is static the sum is divided by a number. Half-precision sums are made
in float32 (they would overflow), and the quotient is cast back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..base import Contract, Program, emit, fake, replace
from ..gradients import differentiable
from ..torch_compat import arguments

aten = torch.ops.aten
MEAN, SUM = 1, 2
"""torch's numbers for reductions (aten/src/ATen/core/Reduction.h)."""


@dataclass(frozen=True)
class SplitLosses(Contract):
    """Mean-reduced losses and means over the batch become a sum and a division."""

    name: str = "split-losses"
    requires: tuple[str, ...] = ("simple",)
    provides: tuple[str, ...] = ("summed losses",)

    def apply(self, program: Program) -> Program:
        for node in list(program.graph.nodes):
            rule = _RULES.get(node.target) if node.op == "call_function" else None
            if rule is None:
                continue
            make = _Emit(node)
            with node.graph.inserting_before(node):
                by = rule(node, make, program)
            if by is not None:
                replace(node, by)
        return program


@dataclass(frozen=True)
class _Emit:
    """Emits calls in the place of one node, with its provenance."""

    node: fx.Node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = emit(self.node.graph, target, args, kwargs, like=self.node)
        made.meta["differentiable"] = differentiable(made)
        return made

    def divided(self, total: fx.Node, count: fx.Node | float) -> fx.Node:
        quotient = self(aten.div.Tensor, total, count)
        dtype = fake(self.node).dtype
        return quotient if fake(quotient).dtype == dtype else self(aten.to.dtype, quotient, dtype)

    def wide(self, value: fx.Node) -> fx.Node:
        """`value` in float32 where its own dtype is too narrow for a sum."""
        narrow = fake(value).dtype in (torch.float16, torch.bfloat16)
        return self(aten.to.dtype, value, torch.float32) if narrow else value


def _bind(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name, defaults filled in."""
    schema = arguments(node.target)  # type: ignore[arg-type]
    positional = dict(zip((a.name for a in schema), node.args, strict=False))
    given = {**positional, **node.kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _cross_entropy(node: fx.Node, make: _Emit, program: Program) -> fx.Node | None:
    given = _bind(node)
    if given["reduction"] != MEAN:
        return None
    logits, target, weight = given["self"], given["target"], given["weight"]
    by_class = not fake(target).dtype.is_floating_point  # else probabilities: the mean is over samples
    smoothing = given.get("label_smoothing", 0.0)
    total = make(
        node.target, make.wide(logits), target, weight, SUM, given["ignore_index"], *([smoothing] if smoothing else [])
    )
    if not by_class:
        classes = fake(logits).shape[1 if fake(logits).dim() > 1 else 0]
        return make.divided(total, fake(logits).numel() // classes)
    kept = make(aten.ne.Scalar, target, given["ignore_index"])
    if weight is not None:  # the mean is over the weights of the targets
        weights = make(aten.index.Tensor, weight, [make(aten.mul.Tensor, target, kept)])
        return make.divided(total, make(aten.sum.default, make(aten.mul.Tensor, weights, kept)))
    return make.divided(total, make(aten.to.dtype, make(aten.sum.default, kept), fake(total).dtype))


def _elementwise(node: fx.Node, make: _Emit, program: Program) -> fx.Node | None:
    """A loss that is the mean over all elements of its broadcast arguments."""
    given = _bind(node)
    if given["reduction"] != MEAN:
        return None
    given["reduction"] = SUM
    shapes = [fake(v).shape for v in given.values() if isinstance(v, fx.Node)]
    count = math.prod(torch.broadcast_shapes(*shapes))
    first = next(iter(given))
    given[first] = make.wide(given[first])
    schema = arguments(node.target)  # type: ignore[arg-type]
    named = {a.name: given[a.name] for a in schema if a.kwarg_only}
    return make.divided(make(node.target, *[given[a.name] for a in schema if not a.kwarg_only], **named), count)


def _mean(node: fx.Node, make: _Emit, program: Program) -> fx.Node | None:
    """A mean over everything or over the first dim; others stay."""
    given = _bind(node)
    value = given["self"]
    rank = fake(value).dim()
    dims = given.get("dim")
    over = sorted(d % rank for d in dims) if dims else list(range(rank))
    if not rank or 0 not in over:
        return None
    count = math.prod(fake(value).shape[d] for d in over)
    value = make.wide(value)
    if given["dtype"] is not None and given["dtype"] != fake(value).dtype:
        value = make(aten.to.dtype, value, given["dtype"])
    if len(over) == rank and not given.get("keepdim", False):
        return make.divided(make(aten.sum.default, value), count)
    return make.divided(make(aten.sum.dim_IntList, value, over, given.get("keepdim", False)), count)


Rule = Callable[[fx.Node, _Emit, Program], fx.Node | None]
_RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default, aten.nll_loss2d.default), _cross_entropy
    ),
    **dict.fromkeys(
        (
            aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default,
            aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default, aten.soft_margin_loss.default,
            aten.kl_div.default, aten.poisson_nll_loss.default,
        ),
        _elementwise,
    ),
    **dict.fromkeys((aten.mean.default, aten.mean.dim), _mean),
}  # fmt: skip

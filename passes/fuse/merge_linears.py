"""Products of one tensor with several weights of one shape become one product.

    q = linear(x, a); k = linear(x, b)        becomes        y = linear(x, cat([a, b], 0))
                                                             q, k = split(y, n, -1)

x is read once and one kernel is better filled, but the weights are copied every step and the copy waits for the backward pass: only
prices can say where this pays (passes/gain.py). Weights of unlike shapes stay apart, as a dim that is put together of unlike parts
cannot be split over devices; so do trained and frozen ones.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..base import Contract, Program, emit, fake, replace
from ..gradients import differentiable

aten = torch.ops.aten
ALONG = {aten.linear.default: 0, aten.mm.default: 1}
"""The dim of the weight that the result has, by op."""


@dataclass(frozen=True)
class MergeLinears(Contract):
    """One product for those that share their left operand."""

    name: str = "merge_linears"
    requires: tuple[str, ...] = ("simple", "no fused bias")

    def apply(self, program: Program) -> Program:
        groups: dict[Any, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.target in ALONG and len(node.args) == 2 and _is_parameter(node.args[1]):
                x, weight = node.args
                key = (x, node.target, fake(weight).shape, fake(weight).dtype, weight.meta["differentiable"])
                groups.setdefault(key, []).append(node)
        for group in groups.values():
            if len({node.args[1] for node in group}) == len(group) > 1:
                _merge(group)
        return program


def _is_parameter(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.meta["role"] == "parameter"


def _merge(group: list[fx.Node]) -> None:
    """Put one product where the first one stands, and its parts in the places of all."""
    first = group[0]
    dim = ALONG[first.target]  # type: ignore[index]
    width, last = fake(first).shape[-1], fake(first).dim() - 1

    def make(target: Any, *args: Any) -> fx.Node:
        made = emit(first.graph, target, args, like=first)
        made.meta["differentiable"] = differentiable(made)
        return made

    with first.graph.inserting_before(first):
        weight = make(aten.cat.default, [node.args[1] for node in group], dim)
        parts = make(aten.split.Tensor, make(first.target, first.args[0], weight), width, last)
        pieces = [make(operator.getitem, parts, i) for i in range(len(group))]
    for node, piece in zip(group, pieces, strict=True):
        replace(node, piece)

"""Through which tensors of a graph a gradient flows.

A tensor is differentiable when it is floating point and depends on a trained parameter otherwise than through
`detach`. This is what eager autograd's `requires_grad` says; fake values made under other modes do not.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

NEVER = frozenset({
    aten.detach.default, aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.empty_like.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default, aten.new_ones.default,
    aten.new_full.default, aten.new_empty.default,
})  # fmt: skip
"""Ops whose floating results carry no gradient whatever they read."""

FIRST = frozenset({aten._native_batch_norm_legit_functional.default, aten.native_batch_norm.default})
"""Ops of whose results only the first carries a gradient; the others are statistics."""

Flags = bool | tuple[bool, ...]


def differentiable(node: fx.Node) -> Flags:
    """Flags of a call from those of its inputs (`meta["differentiable"]`); a tuple for an op with several results."""
    value = node.meta.get("val")
    if node.target is operator.getitem:
        source, index = node.args
        flags = source.meta["differentiable"]  # type: ignore[union-attr]
        return bool(flags[index]) if isinstance(flags, tuple) else bool(flags)  # type: ignore[index]
    through = node.target not in NEVER and any(flows(n) for n in node.all_input_nodes)
    if isinstance(value, tuple | list):
        return tuple(through and _floating(v) and (i == 0 or node.target not in FIRST) for i, v in enumerate(value))
    return through and _floating(value)


def mark(graph: fx.Graph) -> None:
    """Set `meta["differentiable"]` of every call; placeholders carry theirs."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta["differentiable"] = differentiable(node)


def flows(node: fx.Node) -> bool:
    """Whether a gradient flows through a result of a node."""
    flags = node.meta.get("differentiable", False)
    return any(flags) if isinstance(flags, tuple) else bool(flags)


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())

"""Batch norm on batch statistics as a function: what it makes of its running statistics becomes results and writes.

    y = batch_norm(x, w, b, mean, var, training)      becomes      n = _native_batch_norm_legit_functional(x, w, b, mean, var)
                                                                   y = n[0]; mean.copy_(n[3]); var.copy_(n[4])

torch's op changes its running statistics without saying so in its schema. One without any gets constants and writes nothing.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..base import emit, fake, replace

aten = torch.ops.aten
_TRAINING = 5
_FUNCTIONAL = aten._native_batch_norm_legit_functional.default
_NEW = (3, 4)
"""Results of the functional op that are the new running mean and variance."""


def open_batch_norms(graph: fx.Graph) -> None:
    """Rewrite every batch norm in training mode, in place."""
    for node in list(graph.nodes):
        if node.target is aten.batch_norm.default and node.args[_TRAINING]:
            with graph.inserting_before(node):
                _open(node)


def _open(node: fx.Node) -> None:
    graph = node.graph
    x, weight, bias, *running, _, momentum, eps = node.args[:8]
    dtype = fake(x if weight is None else weight).dtype  # type: ignore[arg-type]
    start = [_constant(node, i, dtype) if value is None else value for i, value in enumerate(running)]
    made = emit(graph, _FUNCTIONAL, (x, weight, bias, *start, True, momentum, eps), like=node)
    results = [emit(graph, operator.getitem, (made, i), like=node) for i in (0, *_NEW)]
    for buffer, new in zip(running, results[1:], strict=True):
        if buffer is not None:
            emit(graph, aten.copy_.default, (buffer, new), like=node)
    replace(node, results[0])


def _constant(node: fx.Node, value: int, dtype: torch.dtype) -> fx.Node:
    """Mean 0 or variance 1 of every channel."""
    channels = fake(node).shape[1]
    return emit(node.graph, aten.full.default, ([channels], value), {"dtype": dtype}, like=node)

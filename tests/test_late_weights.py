"""Which products leave their weights' gradients for later, in graphs written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from shardwright.passes.late_weights import LateOps, late_weights
from torch import fx

LINEAR, VIEW = torch.ops.aten.linear.default, torch.ops.aten.view.default


def _named(name: str) -> Callable[..., Any]:
    def op(*args: Any) -> Any:
        raise AssertionError(f"{name} is not run")

    op.__name__ = name
    return op


BEGIN, MOVE, END_MOVE, END_LINEAR = map(_named, ("begin", "move", "end_move", "end_linear"))
OPS = LateOps(BEGIN, MOVE, END_MOVE, lambda source, target: True, {LINEAR: (0, END_LINEAR, (1, 2))}, frozenset({VIEW}))


def _layer(graph: fx.Graph, x: fx.Node, *weights: fx.Node) -> list[fx.Node]:
    return [graph.call_function(LINEAR, (x, w)) for w in weights]


def _lowered(graph: fx.Graph, result: fx.Node) -> list[str]:
    graph.output(result)
    module = fx.GraphModule(torch.nn.Module(), graph)
    late_weights(module, OPS)
    module.graph.lint()
    return [getattr(n.target, "__name__", str(n.target)) for n in module.graph.nodes if n.op == "call_function"]


def test_products_of_one_sum_begin_together() -> None:
    graph = fx.Graph()
    x, a, b = map(graph.placeholder, ("x", "a", "b"))
    moved = graph.call_function(MOVE, (x, "R", "V"))
    _, last = _layer(graph, moved, a, b)
    assert _lowered(graph, last) == ["begin", "begin", "begin", "end_move", "end_linear", "end_linear"]


def test_products_behind_the_next_transition_are_left_as_they_are() -> None:
    graph = fx.Graph()
    x, y, a, b, c = map(graph.placeholder, ("x", "y", "a", "b", "c"))
    moved = graph.call_function(MOVE, (x, "R", "V"))
    (first,) = _layer(graph, moved, a)
    other = graph.call_function(MOVE, (y, "R", "V"))
    _layer(graph, other, b)
    (later,) = _layer(graph, moved, c)
    found = _lowered(graph, later)
    assert first not in graph.nodes
    assert found.count("end_linear") == 2, "those next to their own transition"
    assert found[-1] == LINEAR.__name__, "the one far behind its transition"

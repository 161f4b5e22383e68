"""Values of a graph that depend on no input: known without running the model.

Parameters and buffers never count as known, even where their values are at hand: one model gives one graph, on meta
or not.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from .base import fake, is_tensor
from .cleanup.check import is_random

aten = torch.ops.aten


class Known:
    """Evaluates input-independent nodes, each at most once; `limit` bounds the elements of every value computed."""

    def __init__(self, constants: dict[str, torch.Tensor], limit: int) -> None:
        self._constants = constants
        self._limit = limit
        self._independent: dict[fx.Node, bool] = {}
        self._value: dict[fx.Node, torch.Tensor | None] = {}

    def independent(self, node: fx.Node) -> bool:
        """Whether a node depends on constants only."""
        todo = [node]  # a stack of our own: graphs are deeper than Python's may be
        while todo and node not in self._independent:
            here = todo[-1]
            possible = self._foldable(here)
            inputs = here.all_input_nodes if possible else []
            unknown = next((n for n in inputs if n not in self._independent), None)
            if unknown is not None and all(self._independent.get(n, True) for n in inputs):
                todo.append(unknown)
                continue
            self._independent[here] = possible and all(self._independent.get(n, False) for n in inputs)
            todo.pop()
        return self._independent[node]

    def _foldable(self, node: fx.Node) -> bool:
        """Whether a node is known where its inputs are."""
        if node.op == "placeholder":
            return node.name in self._constants
        return node.op == "call_function" and is_tensor(fake(node)) and not is_random(node)

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a node; None where it depends on an input or it or something it needs exceeds the limit."""
        if node not in self._value:
            self._value[node] = self._compute(node) if self.independent(node) else None
        return self._value[node]

    def _compute(self, node: fx.Node) -> torch.Tensor | None:
        if math.prod(fake(node).shape) > self._limit:
            return None
        if node.op == "placeholder":
            return self._constants[node.name]
        inputs = {n: self.value(n) for n in node.all_input_nodes}
        if any(v is None for v in inputs.values()):
            return None
        with torch.no_grad():
            value = node.target(*fx.map_arg(node.args, inputs.get), **fx.map_arg(node.kwargs, inputs.get))  # type: ignore[operator, arg-type]
        return value.detach()  # type: ignore[no-any-return]

"""What ops beside some calls keep for the backward pass of the tensors that these read or make."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from .base import fake
from .observe import Observer
from .summarize import operands_of
from .torch_compat import OpOverload

HELD = ("parameter", "buffer", "constant")
"""Roles of tensors that are there anyway."""


@dataclass(frozen=True)
class Beside:
    """`calls` of a graph, with the views that they read through; `counted` are tensors that they keep themselves."""

    calls: Iterable[fx.Node]
    counted: Iterable[fx.Node]
    observer: Observer = field(default_factory=Observer)

    def bytes(self) -> int:
        """Of tensors that the calls touch, do not keep, and others keep."""
        inside = set(self.calls)
        touched = inside | {n for node in inside for n in node.all_input_nodes}
        left = [n for n in sorted(touched - set(self.counted)) if _is_whole(n) and not self._is_view(n)]
        return sum(fake(n).untyped_storage().nbytes() for n in left if self._kept(n, inside))

    def _is_view(self, node: fx.Node) -> bool:
        if node.target is operator.getitem:
            return True  # of a result that stands for itself, or of one kept with its op
        return isinstance(node.target, OpOverload) and self.observer.observe(node).alias is not None

    def _kept(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        """Whether an op that is not `inside` keeps a tensor or a view of it."""
        if isinstance(node.target, OpOverload) and node not in inside and self.observer.observe(node).results:
            return True
        queue = [node]
        while queue:
            here = queue.pop()
            for user in here.users:
                if user.target is operator.getitem:
                    queue.append(user)
                elif isinstance(user.target, OpOverload):
                    seen = self.observer.observe(user)
                    read = {i for i, name in enumerate(operands_of(user)[0]) if name in _names(here)}
                    if user not in inside and not read.isdisjoint(seen.operands):
                        return True
                    queue += [user] if seen.alias in read else []
        return False


def _names(node: fx.Node) -> tuple[str, ...]:
    if node.target is operator.getitem:
        parent, index = node.args
        return node.name, f"{parent}:{index}"
    return (node.name,)


def _is_whole(node: fx.Node) -> bool:
    """Whether a node is one tensor that the model does not hold anyway."""
    return isinstance(node.meta.get("val"), torch.Tensor) and node.meta.get("role") not in HELD

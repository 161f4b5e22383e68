"""Where parameters enter the autograd graph of one op, so that their gradients can be asked for later than the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node


@dataclass
class Meeting:
    """A node that parameters enter: the gradients that arrive there, and the nodes of the parameters beyond."""

    node: Node
    edges: tuple[GradientEdge, ...]
    beyond: tuple[Node, ...]
    arrived: tuple[Tensor | None, ...] = ()

    def want(self, half: str) -> None:
        """Tell a Python function which half is wanted."""
        if hasattr(self.node, "half"):
            self.node.half = half

    def settle(self) -> list[tuple[Node, Tensor | None]]:
        """(node, gradient) of its parameters, from what has arrived."""
        came = [(e, g) for e, g in zip(self.edges, self.arrived, strict=True) if g is not None]
        if not came:
            return [(node, None) for node in self.beyond]
        self.want("weight")
        edges, arrived = zip(*came, strict=True)
        return list(
            zip(self.beyond, torch.autograd.grad(edges, edges_of(self.beyond), arrived, allow_unused=True), strict=True)
        )


def edges_of(nodes: Sequence[Node]) -> list[GradientEdge]:
    """The first inputs of nodes."""
    return [GradientEdge(node, 0) for node in nodes]


def divisible(meetings: Sequence[Meeting]) -> bool:
    """Whether each parameter enters at one node, which can yield the gradients of its operands one at a time.

    Nodes of torch's own can; a Python function says so by an attribute `half`, which tells its backward what is wanted:
    "input", "weight" after that, or None for both at once.
    """
    beyond = [node for m in meetings for node in m.beyond]
    able = all(hasattr(m.node, "half") or not isinstance(m.node, BackwardCFunction) for m in meetings)
    return able and len(beyond) == len(set(beyond))


def meetings_of(made: Sequence[GradientEdge], parameters: Collection[Node]) -> tuple[Meeting, ...]:
    """Nodes that lead to activations and, by an edge of their own, to `parameters` alone; roots that lead to those alone."""
    search = _Search(parameters)
    for edge in made:
        reach = search.visit(edge.node, edge.output_nr)
        if not reach.activations:
            search.found[edge.node] = reach.parameters
    return tuple(
        Meeting(node, tuple(GradientEdge(node, i) for i in search.arriving[node]), tuple(beyond))
        for node, beyond in search.found.items()
    )


@dataclass
class _Reach:
    """What a node leads to: nodes of parameters, and whether to anything else."""

    parameters: dict[Node, None] = field(default_factory=dict)
    activations: bool = False


class _Search:
    """One walk through a graph: what was reached, by which inputs, and what was found."""

    def __init__(self, parameters: Collection[Node]) -> None:
        self.parameters = parameters
        self.reached: dict[Node, _Reach] = {}
        self.arriving: dict[Node, dict[int, None]] = {}
        self.found: dict[Node, dict[Node, None]] = {}

    def visit(self, node: Node, index: int) -> _Reach:
        """Where `node`, reached at its input `index`, leads to."""
        self.arriving.setdefault(node, {})[index] = None
        if node in self.reached:
            return self.reached[node]
        here = self.reached[node] = _Reach()
        if node in self.parameters:
            here.parameters[node] = None
            return here
        beyond = [self.visit(child, i) for child, i in node.next_functions if child is not None]
        for reach in beyond:
            here.parameters |= reach.parameters
            here.activations |= reach.activations
        here.activations |= not beyond
        alone = [reach for reach in beyond if reach.parameters and not reach.activations]
        if alone and here.activations:
            self.found[node] = {n: None for reach in alone for n in reach.parameters}
        return here

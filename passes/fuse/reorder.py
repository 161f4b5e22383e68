"""The calls of a graph in the order that needs the least memory: values, gradients and random numbers are the same.

Calls that draw random numbers, and calls that write to what they are given, stay in the order among themselves in which they
are. The order is taken where it lowers the peak of live bytes (planner/liveness.py), saved ones of a training graph included.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from ...planner.liveness import floor, peak
from ...planner.ordering import Ordering
from ..base import Contract, Program
from ..steps import steps_of, trains
from ..torch_compat import OpOverload, is_mutable


@dataclass(frozen=True)
class Order:
    """Calls in a new order (results of several are with what makes them), and the peak of live bytes before and after."""

    names: tuple[str, ...]
    before: int
    after: int


@dataclass(frozen=True)
class Reorder(Contract):
    """Calls in the order that needs the least memory, where that is at least the share `worth` lower than it is."""

    name: str = "reorder"
    requires: tuple[str, ...] = ("simple",)
    worth: float = 0.01

    def apply(self, program: Program) -> Program:
        found = reordering(program.graph, self.worth)
        if found is not None and found.after <= (1 - self.worth) * found.before:
            program.notes.append(f"calls reordered: at most {found.after:,} bytes alive, {found.before:,} before")
            _sort(program.graph, found)
        return program


def reordering(graph: fx.Graph, worth: float = 0.0) -> Order | None:
    """A better order of a graph's calls, None where none is found, or none can lower the peak by the share `worth`."""
    found = steps_of(graph, training=trains(graph))
    if floor(found.steps, found.kept) + found.given_bytes > (1 - worth) * found.peak:
        return None
    after = _after(graph)
    names, best = Ordering(found.steps, after, found.kept).best()
    place = {step.name: step for step in found.steps}
    again = peak([place[name] for name in names], found.kept)
    assert again == best, "the search and liveness disagree"
    best += found.given_bytes
    return Order(tuple(names), found.peak, best) if best < found.peak else None


def _after(graph: fx.Graph) -> dict[str, set[str]]:
    """Per call, the calls that it comes after: those it reads, and for random and writing ones the last such."""
    found: dict[str, set[str]] = {}
    last = ""
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        found[node.name] = {_maker(n).name for n in node.all_input_nodes if n.op == "call_function"}
        if _bound(node):
            found[node.name] |= {last} if last else set()
            last = node.name
    return found


def _maker(node: fx.Node) -> fx.Node:
    return node.args[0] if node.target is operator.getitem else node  # type: ignore[return-value]


def _bound(node: fx.Node) -> bool:
    """Whether a call does more than make its result from its operands."""
    target = node.target
    if not isinstance(target, OpOverload):
        return True
    return torch.Tag.nondeterministic_seeded in target.tags or is_mutable(target)


def _sort(graph: fx.Graph, order: Order) -> None:
    nodes = {n.name: n for n in graph.nodes}
    at = graph.output_node()
    for name in order.names:
        node = nodes[name]
        at.prepend(node)
        for part in [u for u in node.users if u.target is operator.getitem]:
            at.prepend(part)

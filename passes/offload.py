"""Marks in a lowered body: where each unit begins, and which values never leave the device for their backward pass.

Saved-tensor hooks see tensors, not graphs. So the graph itself calls `enter(u)` before the first op of unit u, and `exempt` with
what is no activation of the unit that is running: inputs, parameters in whatever form, and tables without a gradient that an
earlier unit made (they can be made again wherever they are needed, and their maker keeps them; planner/part.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..planner.outline import Outline
from .lowered import Feed, Lowered

Enter = Callable[[int], Callable[[], None]]


def unit_of(outline: Outline) -> dict[str, int]:
    """The unit of every op, counted in the order of planner/part.py."""
    found: dict[str, int] = {}
    instances = (ops for region in outline.regions for ops in region.instances)
    for unit, ops in enumerate(instances):
        found |= dict.fromkeys(ops, unit)
    return found


def mark_units(lowered: Lowered, outline: Outline, enter: Enter, exempt: Callable[[Any], None]) -> None:
    """Insert the calls into the body, whose nodes say in their meta which op they are.

    What another stage made is an activation of the unit that takes it, as what another unit made is.
    """
    graph, units = lowered.body.graph, unit_of(outline)
    made = {op.name: op for op in outline.ops}
    outside: set[fx.Node] = set()
    tables: list[fx.Node] = []
    here = -1
    nodes = list(graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    given = [n for n, feed in zip(placeholders, lowered.body_feeds, strict=True) if not _handed_on(feed, outline)]
    outside |= set(given)
    with graph.inserting_after(placeholders[-1]):
        graph.call_function(exempt, (given,))
    for node in nodes:
        name = node.meta.get("op")
        if node.op != "call_function":
            continue
        if name is None:
            if node.all_input_nodes and outside.issuperset(node.all_input_nodes):
                outside.add(node)
                with graph.inserting_after(node):
                    graph.call_function(exempt, (node,))
            continue
        unit = units.get(name, here)
        if unit != here:
            with graph.inserting_before(node):
                if tables:
                    graph.call_function(exempt, (list(tables),))
                graph.call_function(enter(unit))
            tables, here = [], unit
        if not any(outline.tensors[use.tensor].differentiable for use in made[name].results):
            tables.append(node)
    lowered.body.recompile()


def _handed_on(feed: Feed, outline: Outline) -> bool:
    """Whether a placeholder is an activation of another stage."""
    return feed.kind == "taken" and outline.tensors[feed.tensor].differentiable

"""Lowering pass: collectives launched early and waited for late, in a lowered graph that runs eagerly.

A collective of a parameter group becomes two nodes, a gather three (runtime/early.py says what they do):

    begin           at the top of the graph: the backward pass waits there for the gradients
    launch_gather   after the gather `prefetch` groups before, so that one runs under the ops of the unit before
    end             where the collective stood: waited for, and in the backward pass launched

Autograd runs a graph's nodes from last to first, so positions in the forward graph place both directions. Nodes keep their
order otherwise, and all ranks place alike: every group sees its collectives in one order.

Only groups that come straight from placeholders, which nothing else takes, are rewritten. A cast between is folded into the
collective, which casts itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

Op = Callable[..., Any]


@dataclass(frozen=True)
class Ends:
    """How a collective of parameter groups is written: its end and, where it gathers, its launch.

    `group` and `dtype` are the positions of its process group and of the dtype it casts to among the arguments after the tensors.
    """

    end: Op
    launch: Op | None
    group: int
    dtype: int


@dataclass(frozen=True)
class Early:
    """The ops of a runtime: `begin`, the others by the op that they stand for, and what casts a tensor before it."""

    begin: Op
    ends: Mapping[Any, Ends]
    cast: Op


@dataclass(frozen=True)
class _Collective:
    """A node to be rewritten: the placeholders it takes, the casts between, and its other arguments with the casting in them."""

    node: fx.Node
    operands: tuple[fx.Node, ...]
    casts: tuple[fx.Node, ...]
    rest: tuple[Any, ...]
    ends: Ends


def overlap(module: fx.GraphModule, early: Early, prefetch: int) -> None:
    """Rewrite in place. `prefetch`: groups gathered ahead of the one that is used."""
    graph = module.graph
    found = [c for n in graph.nodes if (c := _collective(n, early)) is not None]
    if not found:
        return
    top = next(n for n in graph.nodes if n.op != "placeholder")
    begun: list[fx.Node] = []
    with graph.inserting_before(top):
        for c in found:
            begun.append(graph.call_function(early.begin, (list(c.operands),)))
            begun[-1].meta["comment"] = f"begins {c.node.name}"
    ends = [_end(graph, c, b) for c, b in zip(found, begun, strict=True)]
    gathers = [i for i, c in enumerate(found) if c.ends.launch is not None]
    last = begun[-1]
    for at, i in enumerate(gathers if prefetch else ()):
        after = ends[gathers[at - prefetch]] if at >= prefetch else last
        with graph.inserting_after(after):
            launched = graph.call_function(found[i].ends.launch, (begun[i], *found[i].rest))
        ends[i].update_arg(0, launched)
        last = launched if at < prefetch else last
    module.recompile()


def _end(graph: fx.Graph, c: _Collective, begun: fx.Node) -> fx.Node:
    """Put the end where the collective stands."""
    with graph.inserting_before(c.node):
        end = graph.call_function(c.ends.end, (begun, *c.rest))
    end.meta = dict(c.node.meta)
    c.node.replace_all_uses_with(end)
    for node in (c.node, *c.casts):
        graph.erase_node(node)
    return end


def _collective(node: fx.Node, early: Early) -> _Collective | None:
    """What to rewrite, None for any other node."""
    ends = early.ends.get(node.target)
    if ends is None or node.kwargs or not node.args[1 + ends.group]:
        return None
    taken: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    casts = [x for x in taken if x.target is early.cast]
    operands = [x.args[0] if x.target is early.cast else x for x in taken]
    alone = all(isinstance(x, fx.Node) and x.op == "placeholder" and len(x.users) == 1 for x in operands)
    if not alone or len(set(operands)) < len(operands) or any(len(x.users) > 1 for x in casts):
        return None
    rest = list(node.args[1:])
    if casts:
        dtypes = {x.args[1] for x in casts}
        if len(casts) < len(taken) or len(dtypes) > 1 or rest[ends.dtype] is not None:
            return None
        rest[ends.dtype] = dtypes.pop()
    return _Collective(node, tuple(operands), tuple(casts), tuple(rest), ends)  # type: ignore[arg-type]

"""Lowering pass: branches of a lowered graph become one call each of a callable that runs them at once.

The branches of a fork-join region (planner/branches.py) are taken out of the graph, each into a graph of its own; `make` gives what
is called with the operands of all of them, one after the other, and returns their results likewise. What else stands between the
first op of a branch and the first reader of one moves to the side that it is on. Values are those of the graph as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from torch import fx

Make = Callable[[Sequence[fx.GraphModule], Sequence[int]], Callable[..., Sequence[object]]]
"""Branches and how many operands each takes -> what runs them."""


def run_beside(module: fx.GraphModule, branches: Sequence[Sequence[str]], make: Make) -> bool:
    """Rewrite in place; False where nodes between the branches do not let them start together.

    `branches` are names of ops of the outline, which nodes carry in their meta.
    """
    label = _labels(module.graph, branches)
    later = _later(module.graph, label)
    if later is None or len(set(label.values())) < 2:
        return False
    graph, bodies = module.graph, []
    operands: list[fx.Node] = []
    counts: list[int] = []
    results: list[fx.Node] = []
    for i in sorted(set(label.values())):
        own = [n for n in graph.nodes if label.get(n) == i]
        inside = set(own)
        taken = list(dict.fromkeys(x for n in own for x in n.all_input_nodes if x not in inside))
        given = [n for n in own if any(user not in inside for user in n.users)]
        bodies.append(_body(own, taken, given))
        operands, results = [*operands, *taken], [*results, *given]
        counts.append(len(taken))
    first = next(n for n in graph.nodes if n in later)
    with graph.inserting_before(first):
        call = graph.call_function(make(bodies, counts), tuple(operands))
        made = [graph.call_function(operator.getitem, (call, i)) for i in range(len(results))]
    stay = {*label, *later, call, *made}
    for node in [n for n in graph.nodes if n not in stay and n.op != "placeholder"]:
        call.prepend(node)
    for node, item in zip(results, made, strict=True):
        item.meta = dict(node.meta)
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in label)
    for node in reversed([n for n in graph.nodes if n in label]):
        graph.erase_node(node)
    module.recompile()
    return True


def _labels(graph: fx.Graph, branches: Sequence[Sequence[str]]) -> dict[fx.Node, int]:
    """The branch of each node; what stands for no op of its own goes with what it reads."""
    of = {name: i for i, branch in enumerate(branches) for name in branch}
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.meta.get("op") in of:
            found[node] = of[node.meta["op"]]
        elif "op" not in node.meta and len(read := {found[n] for n in node.all_input_nodes if n in found}) == 1:
            found[node] = read.pop()
    return found


def _later(graph: fx.Graph, label: dict[fx.Node, int]) -> set[fx.Node] | None:
    """The nodes that need a branch and are in none; None where a branch needs one of those, or another branch."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        for read in node.all_input_nodes:
            if node in label:
                if read in found or label.get(read, label[node]) != label[node]:
                    return None
            elif read in label or read in found:
                found.add(node)
    return found


def _body(own: Sequence[fx.Node], taken: Sequence[fx.Node], given: Sequence[fx.Node]) -> fx.GraphModule:
    """A graph of its own for the nodes of a branch."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in taken:
        new[node] = graph.placeholder(node.name)
    for node in own:
        new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(new[n] for n in given))
    return fx.GraphModule({}, graph)

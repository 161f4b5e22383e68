"""Keys and values that a ring passes on are those of their own heads, not the copies made for groups of queries.

    y = ring_attention(q, reshape(expand(unsqueeze(k, -3))), reshape(expand(unsqueeze(v, -3))))   becomes   ring_attention(q, k, v)

which is how models spell grouped-query attention. The ring takes groups by itself, and sends a group's keys once; the gradients of
the copies, whose sum it returns, are never sent at all. The planner prices it so (planner/ring.py, `repeated`).
"""

from __future__ import annotations

from torch import fx

RING = "shardwright.ring_attention.default"
MERGES = {f"aten.{name}" for name in ("reshape.default", "view.default", "_unsafe_view.default")}


def share_heads(graph: fx.Graph) -> None:
    """Rewrite every ring whose keys and values are both copies."""
    for node in graph.nodes:
        if str(node.target) != RING:
            continue
        query, key, value, *rest = node.args
        one, other = _single(key), _single(value)
        if one is not None and other is not None:
            node.args = (query, one, other, *rest)
    graph.eliminate_dead_code()


def _single(node: object) -> fx.Node | None:
    """x of reshape(expand(unsqueeze(x, -3))), where nothing but the new dim grows and the reshape merges it with the one before."""
    if not isinstance(node, fx.Node) or str(node.target) not in MERGES:
        return None
    expand, shape = node.args[0], node.args[1]
    if not isinstance(expand, fx.Node) or str(expand.target) != "aten.expand.default":
        return None
    opened, sizes = expand.args[0], expand.args[1]
    if not isinstance(opened, fx.Node) or str(opened.target) != "aten.unsqueeze.default":
        return None
    if not isinstance(sizes, list | tuple) or not isinstance(shape, list | tuple) or len(sizes) < 4:
        return None
    rank, dim, source = len(sizes), opened.args[1], opened.args[0]
    if not isinstance(dim, int) or dim % rank != rank - 3 or not isinstance(source, fx.Node):
        return None
    merged = [*sizes[: rank - 4], sizes[rank - 4] * sizes[rank - 3], *sizes[rank - 2 :]]
    return source if -1 not in sizes and list(shape) == merged else None

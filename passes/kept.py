"""Bytes that wait for the backward pass when a graph runs eagerly: each piece of memory once, whoever keeps it."""

from __future__ import annotations

from torch import fx

from .base import is_tensor, tensor_name
from .observe import SMALL, Observer
from .summarize import operands_of

HELD = frozenset({"parameter", "buffer", "constant"})
"""Roles of placeholders that are there anyway."""


def kept_bytes(graph: fx.Graph, observer: Observer) -> int:
    """What all ops of a graph keep, by what autograd was seen to save for each (observe.py); parameters and the like do not count.

    A view keeps the whole of what it is a view of. Tensors of two ops that are one piece of memory count once.
    """
    root: dict[str, str] = {}
    sizes: dict[str, int] = {}
    total, saved = 0, set[str]()
    for node in graph.nodes:
        if node.op == "placeholder":
            own(node, root, sizes)
            if node.meta["role"] in HELD:
                sizes[node.name] = 0
        elif node.op == "call_function" and tensor_name(node) == node.name:
            operands, seen = operands_of(node)[0], observer.observe(node)
            results = own(node, root, sizes)
            if seen.alias is not None:
                root |= dict.fromkeys(results, root[operands[seen.alias]])
            saved |= {root[operands[i]] for i in seen.operands} | {root[results[i]] for i in seen.results}
            total += sum(size for _, size in seen.new)
    return total + sum(sizes[name] for name in saved if sizes[name] > SMALL)


def own(node: fx.Node, root: dict[str, str], sizes: dict[str, int]) -> list[str]:
    """Enter the tensors of a node as memory of their own (`root` and bytes by name); their names."""
    value = node.meta["val"]
    named = {node.name: value} if is_tensor(value) else {f"{node.name}:{i}": v for i, v in enumerate(value)}
    tensors = {name: v for name, v in named.items() if is_tensor(v)}
    root |= {name: name for name in tensors}
    sizes |= {name: v.numel() * v.element_size() for name, v in tensors.items()}
    return list(tensors)

"""Lowering pass: gradients of weights computed beside the collective of their input's gradient, in a graph that runs eagerly.

    x  -> transition -> x' -> (views) -> linear(., w1, b1), linear(., w2), ...

The backward pass of `transition` communicates. It becomes a beginning where it stood and an end before its first use, and each
weight begins between the two (runtime/early.py, runtime/products.py):

    begin(x);  begin(w1, b1);  begin(w2);  end_transition;  end_linear(.), end_linear(.)

Backward, from last to first: gradients of the inputs, the collective launched, gradients of the weights, the collective waited for.
What the backward pass runs again is left as it is, and so are products behind the next transition, as those of a decoder's later
layers with the encoder's result: what their weights' gradients need would be kept until the collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from .shard import AGAIN

Op = Callable[..., Any]


@dataclass(frozen=True)
class LateOps:
    """The ops of a runtime: `begin`, the transition (plain, end), whether its backward pass communicates by its arguments, and
    what stands for a product: its op -> (position of its input, end, positions of weight and bias)."""

    begin: Op
    transition: Op
    end_transition: Op
    returns: Callable[..., bool]
    products: Mapping[Any, tuple[int, Op, tuple[int, ...]]]
    views: frozenset[Any]


def late_weights(module: fx.GraphModule, ops: LateOps) -> None:
    """Rewrite in place."""
    graph, changed = module.graph, False
    at = {node: i for i, node in enumerate(graph.nodes)}
    moves = [node for node in graph.nodes if node.target is ops.transition]
    for node in list(graph.nodes):
        if node.target is not ops.transition or node.meta.get(AGAIN) or not ops.returns(*node.args[1:3]):
            continue
        first = min(node.users, key=lambda user: at[user], default=None)
        if first is None:
            continue
        later = next((at[n] for n in moves if at[n] > at[first]), len(at))
        found = [p for p in _products(node, ops) if at[p] < later and all(at[w] < at[first] for w in _weights(p, ops))]
        if not found:
            continue
        changed = True
        _rewrite(graph, node, first, found, ops)
    if changed:
        module.recompile()


def _products(node: fx.Node, ops: LateOps) -> Iterator[fx.Node]:
    """Products of a value, views of it included, that do not run again; in the order of the graph."""
    for user in node.users:
        if user.target in ops.views and user.args[0] is node:
            yield from _products(user, ops)
        elif user.target in ops.products and not user.meta.get(AGAIN):
            where = ops.products[user.target][0]
            if user.args[where] is node and len(user.args) <= 3 and not user.kwargs and node not in _weights(user, ops):
                yield user


def _weights(product: fx.Node, ops: LateOps) -> list[fx.Node]:
    """Its weight and, if it has one, its bias."""
    return [
        w
        for i in ops.products[product.target][2]
        if i < len(product.args) and isinstance(w := product.args[i], fx.Node)
    ]


def _rewrite(graph: fx.Graph, node: fx.Node, first: fx.Node, products: list[fx.Node], ops: LateOps) -> None:
    with graph.inserting_before(node):
        begun = graph.call_function(ops.begin, ([node.args[0]],))
    with graph.inserting_before(first):
        weights = [graph.call_function(ops.begin, (_weights(p, ops),)) for p in products]
        end = graph.call_function(ops.end_transition, (begun, *node.args[1:]))
    end.meta = dict(node.meta)
    node.replace_all_uses_with(end)
    graph.erase_node(node)
    for product, weight in zip(products, weights, strict=True):
        where, op, _ = ops.products[product.target]
        with graph.inserting_before(product):
            made = graph.call_function(op, (weight, product.args[where]))
        made.meta = dict(product.meta)
        product.replace_all_uses_with(made)
        graph.erase_node(product)

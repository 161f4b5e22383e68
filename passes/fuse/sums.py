"""Sums as passes see them: the terms of nested additions, and additions again.

A term has any shape that broadcasts to the sum's; every term and partial sum has the sum's dtype, and no partial sum is used
elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..base import fake
from ..rewrite import Make

aten = torch.ops.aten


@dataclass(frozen=True)
class Sum:
    """A tree of additions: its root, the additions inside, root last, and its terms in order."""

    root: fx.Node
    inner: tuple[fx.Node, ...]
    terms: tuple[fx.Node, ...]


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors of its own dtype."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    return all(isinstance(a, fx.Node) and fake(a).dtype == fake(node).dtype for a in node.args)


def sum_at(root: fx.Node) -> Sum | None:
    """The largest sum that ends at `root`; None where it is no sum, or itself a part of one."""
    if not is_sum(root) or _inside(root):
        return None
    inner, terms = list[fx.Node](), list[fx.Node]()
    stack = [root]
    while stack:
        node = stack.pop()
        if node is root or (is_sum(node) and _inside(node)):
            inner.append(node)
            stack += reversed(node.args)  # type: ignore[arg-type]
        else:
            terms.append(node)
    return Sum(root, tuple(sorted(inner)), tuple(terms))


def _inside(node: fx.Node) -> bool:
    """Whether a sum is read by one larger sum alone, once, and has its shape."""
    if len(node.users) != 1:
        return False
    (user,) = node.users
    return is_sum(user) and list(user.args).count(node) == 1 and fake(user).shape == fake(node).shape


def own_terms(found: Sum) -> list[fx.Node]:
    """Terms that stand once and are used by this sum alone."""
    return [t for t in found.terms if len(t.users) == 1 and found.terms.count(t) == 1]


def rewrite(found: Sum, taken: Sequence[fx.Node], by: Callable[[Make], list[fx.Node]]) -> None:
    """Put what `by` makes in the place of the terms `taken`, which go where nothing else uses them."""
    graph, root = found.root.graph, found.root
    with graph.inserting_before(root):
        make = Make(root)
        total = _added(make, by(make), [t for t in found.terms if t not in taken])
    root.replace_all_uses_with(total)
    for node in reversed(found.inner):
        graph.erase_node(node)
    for node in taken:
        if not node.users and node.op == "call_function":
            graph.erase_node(node)


def _added(make: Make, made: list[fx.Node], rest: list[fx.Node]) -> fx.Node:
    """All of them added, what is small first: vectors among themselves before they are spread."""
    full = fake(make.root).shape
    small = [t for t in rest if fake(t).shape != full]
    small.sort(key=lambda t: (math.prod(fake(t).shape), fake(t).dim()))
    terms = [*made, *(t for t in rest if fake(t).shape == full)]
    spread: fx.Node | None = None
    for term in small:
        spread = term if spread is None else make(aten.add.Tensor, spread, term)
    total = terms[0]
    for term in [*terms[1:], *([spread] if spread is not None else [])]:
        total = make(aten.add.Tensor, total, term)
    return total

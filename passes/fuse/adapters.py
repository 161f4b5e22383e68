"""Adapters beside a frozen product do not keep what they read (passes/fuse/ops/remade_linear.py).

    h = gelu(x); y = linear(h, frozen)        becomes        h = gelu(x); y = linear(h, frozen)
                 z = linear(h, a)                                         z = remade_linear(h, a, [detach(x)], "gelu")

With full training both h and x wait for the backward pass, and h pays for itself: it feeds a large product's gradient. A frozen
product needs its weight alone, so that h waits only for the small weight beside it. Where h is an activation or a gate, its
operands are kept anyway and h is made from them again.
Left alone: an h that anything else reads, that no gradient goes through, or whose
maker keeps its result (ReLU, sigmoid, tanh).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..base import Contract, Program, emit, fake, replace
from ..gradients import differentiable
from .ops.gated import gated
from .ops.remade_linear import remade_linear

aten = torch.ops.aten
PRODUCTS = frozenset({aten.linear.default, aten.mm.default})
RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int})
Maker = tuple[tuple[fx.Node, ...], str]
"""What a value is made of, and by which activation."""


@dataclass(frozen=True)
class SlimAdapters(Contract):
    """Trained linear maps of an activation that frozen products read, too."""

    name: str = "adapters"
    requires: tuple[str, ...] = ("simple", "no fused bias")
    serves_neighbours: bool = True

    def apply(self, program: Program) -> Program:
        for node in list(program.graph.nodes):
            maker = _maker(node)
            if maker is not None and node.meta["differentiable"]:
                _slim(node, *maker)
        return program


def _maker(node: fx.Node) -> Maker | None:
    """The activation or gate that a node is, if what it keeps are its operands."""
    if node.target is gated:
        gate, up, act = node.args
        return (gate, up), str(act)  # type: ignore[return-value]
    if node.target is aten.silu.default:
        return (node.args[0],), "silu"  # type: ignore[return-value]
    if node.target is aten.gelu.default:
        return (node.args[0],), {"none": "gelu", "tanh": "gelu_tanh"}[str(node.kwargs.get("approximate", "none"))]  # type: ignore[return-value]
    return None


def _slim(made: fx.Node, sources: tuple[fx.Node, ...], act: str) -> None:
    """Let all trained maps of a value remake it, where the others that read it are frozen products."""
    users = list(_readers(made))
    frozen = [u for u in users if _is_product(u, made) and not u.args[1].meta["differentiable"]]  # type: ignore[union-attr]
    trained = [u for u in made.users if u.target is aten.linear.default and u.args[0] is made and u not in frozen]
    if not frozen or not trained or len(frozen) + len(trained) != len(users) or any(len(u.args) != 2 for u in trained):
        return
    for user in trained:
        with user.graph.inserting_before(user):
            apart = [emit(user.graph, aten.detach.default, (s,), like=user) for s in sources]
            for node in apart:
                node.meta["differentiable"] = False
            slim = emit(user.graph, remade_linear, (made, user.args[1], apart, act), like=user)
            slim.meta["differentiable"] = differentiable(slim)
        replace(user, slim)


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a value, as it is or reshaped."""
    return [r for user in node.users for r in (_readers(user) if user.target in RESHAPES else [user])]


def _is_product(node: fx.Node, made: fx.Node) -> bool:
    """Whether a node multiplies a value, as it is or reshaped, with another tensor from the right."""
    if node.target not in PRODUCTS:
        return False
    left, right = node.args[:2]
    while isinstance(left, fx.Node) and left.target in RESHAPES:
        left = left.args[0]  # type: ignore[assignment]
    return left is made and isinstance(right, fx.Node) and right is not made and fake(right).dim() == 2

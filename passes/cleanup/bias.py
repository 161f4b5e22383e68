"""Split the bias off a matmul, so that the matmul may be a partial sum.

    y = linear(x, w, b)       becomes       m = linear(x, w)
                                            y = add(m, b)

Exact up to rounding of one addition. Lowering fuses the two again where no collective stands between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..base import Contract, Program, emit, fake, replace
from ..gradients import differentiable
from ..torch_compat import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitBias(Contract):
    """linear with bias -> linear + add; addmm and baddbmm with unit factors -> mm or bmm + add."""

    name: str = "split-bias"
    requires: tuple[str, ...] = ("simple",)
    provides: tuple[str, ...] = ("no fused bias",)

    def apply(self, program: Program) -> Program:
        for node in program.graph.nodes:
            if node.op == "call_function" and (parts := _parts(node)) is not None:
                _split(node, *parts)
        return program


def _parts(node: fx.Node) -> tuple[OpOverload, tuple[fx.Node, ...], fx.Node] | None:
    """(matmul, its operands, bias) of a fused call."""
    if node.target is aten.linear.default:
        x, weight, *bias = node.args
        bias = bias or [node.kwargs.get("bias")]
        return (aten.linear.default, (x, weight), bias[0]) if bias[0] is not None else None  # type: ignore[return-value]
    plain = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}.get(node.target)  # type: ignore[arg-type]
    if plain is not None and not node.kwargs:  # beta or alpha other than 1 would stand in kwargs
        bias, left, right = node.args
        return plain, (left, right), bias  # type: ignore[return-value]
    return None


def _split(node: fx.Node, matmul: OpOverload, operands: tuple[fx.Node, ...], bias: fx.Node) -> None:
    with node.graph.inserting_before(node):
        product = node.graph.create_node("call_function", matmul, operands)
        product.meta = {**node.meta, "val": fake(node)}  # same shape and dtype as with the bias
        product.meta["differentiable"] = differentiable(product)
        total = emit(node.graph, aten.add.Tensor, (product, bias), like=node)
        total.meta["differentiable"] = node.meta["differentiable"]
    replace(node, total)

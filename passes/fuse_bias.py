"""Lowering, last pass: `linear` + bias and `mm` + bias become one call again where nothing stands between them.

Cleanup takes the bias out of the matmul so that a partial sum can be reduced before it is added once. Where no transition
ended up between the two, one fused call is faster. Before and after:

    linear = aten.linear(x, w)            ->    linear = aten.linear(x, w, b)
    add = aten.add(linear, b)
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
FUSED = {aten.linear.default, aten.mm.default}


def fuse_bias(graph: fx.Graph) -> int:
    """Fuse in place; returns the number of pairs fused. `add` must be unscaled and the matmul's only user."""
    count = 0
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
            continue
        matmul, bias = _pair(node)
        if matmul is None or bias is None:
            continue
        with graph.inserting_before(node):
            if matmul.target is aten.mm.default:
                fused = graph.call_function(aten.addmm.default, (bias, *matmul.args))
            else:
                fused = graph.call_function(aten.linear.default, (*matmul.args[:2], bias))
        fused.meta = dict(matmul.meta)
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        graph.erase_node(matmul)
        count += 1
    return count


def _pair(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """(matmul, bias) of an add that may be fused; the bias is marked by lowering (meta["bias"]). Both run again or neither."""
    for matmul, bias in (node.args, node.args[::-1]):
        if not isinstance(matmul, fx.Node) or not isinstance(bias, fx.Node):
            continue
        alike = matmul.meta.get("recompute") == node.meta.get("recompute")
        if (
            matmul.target in FUSED
            and len(matmul.users) == 1
            and len(matmul.args) == 2
            and bias.meta.get("bias")
            and alike
        ):
            return matmul, bias
    return None, None

"""A graph as Python that a person can read: one line a call, with shape and dtype, and where in the model it came from.

def graph(p_weight: "f32[8, 4]", x: "f32[2, 4]"):
    linear = aten.linear.default(x, p_weight)  # f32[2, 8]  model.py:12 in forward
    return (linear,)
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .torch_compat import OpOverload

SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "bool",
}  # fmt: skip


def listing(graph: fx.Graph, name: str = "graph") -> str:
    """The text of a graph."""
    return "\n".join(_lines(graph, name))


def _lines(graph: fx.Graph, name: str) -> Iterator[str]:
    given = [f'{n.name}: "{_type(n.meta.get("val"))}"' for n in graph.nodes if n.op == "placeholder"]
    yield f"def {name}("
    yield from textwrap.wrap(", ".join(given), 116, initial_indent="    ", subsequent_indent="    ")
    yield "):"
    for node in graph.nodes:
        if node.op == "call_function":
            args = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
            source = f"  {node.meta['source']}" if node.meta.get("source") else ""
            yield f"    {node.name} = {_called(node)}({', '.join(args)})  # {_type(node.meta.get('val'))}{source}"
        elif node.op == "output":
            yield f"    return {_text(node.args[0])}"


def _called(node: fx.Node) -> str:
    return (
        str(node.target) if isinstance(node.target, OpOverload) else str(getattr(node.target, "__name__", node.target))
    )


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_type, value))})"
    return "" if value is None else type(value).__name__


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return repr(value)

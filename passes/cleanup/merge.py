"""Compute equal things once.

    a = cos(x); b = cos(x)        becomes        a = cos(x)
    y = mul(a, b)                                y = mul(a, a)

Two calls are equal when target, arguments (types included: 1 is not 1.0) and keyword arguments are. Random ops are never merged.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..base import Program, replace
from .check import is_random


@dataclass(frozen=True)
class MergeEqual:
    """Common subexpressions, in one walk."""

    name: str = "merge-equal"
    requires: tuple[str, ...] = ("functional",)
    provides: tuple[str, ...] = ("no equal calls",)

    def apply(self, program: Program) -> Program:
        seen: dict[Hashable, fx.Node] = {}
        for node in program.graph.nodes:
            if node.op != "call_function" or is_random(node) or has_dropout(node):
                continue
            key = (node.target, _key(node.args), _key(node.kwargs))
            first = seen.setdefault(key, node)
            if first is not node:
                replace(node, first)
        return program


def has_dropout(node: fx.Node) -> bool:
    """Whether an attention call drops out."""
    if getattr(node.target, "_schema", None) is None or "dropout_p" not in {a.name for a in node.target._schema.arguments}:  # type: ignore[union-attr]
        return False
    index = [a.name for a in node.target._schema.arguments].index("dropout_p")  # type: ignore[union-attr]
    given = node.args[index] if len(node.args) > index else node.kwargs.get("dropout_p", 0.0)
    return given != 0


def _key(value: Any) -> Hashable:
    if isinstance(value, tuple | list):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(value[k])) for k in sorted(value))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))

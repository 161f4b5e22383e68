"""Compute equal things once.

    a = cos(x); b = cos(x)        becomes        a = cos(x)
    y = mul(a, b)                                y = mul(a, a)

Two calls are equal when target, arguments (types included: 1 is not 1.0) and keyword arguments are. Random ops are never
merged, nor are calls that read nothing (fills, ranges): zeros of one size may be positions by positions here and samples by
positions there, and one tensor for both would tie the batch to the sequence.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..base import Contract, Program, replace
from .check import is_random


@dataclass(frozen=True)
class MergeEqual(Contract):
    """Common subexpressions, in one walk."""

    name: str = "merge-equal"
    requires: tuple[str, ...] = ("functional",)
    provides: tuple[str, ...] = ("no equal calls",)

    def apply(self, program: Program) -> Program:
        seen: dict[Hashable, fx.Node] = {}
        for node in program.graph.nodes:
            if node.op != "call_function" or is_random(node) or not node.all_input_nodes:
                continue
            key = (node.target, _key(node.args), _key(node.kwargs))
            first = seen.setdefault(key, node)
            if first is not node:
                replace(node, first)
        return program


def _key(value: Any) -> Hashable:
    if isinstance(value, tuple | list):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(value[k])) for k in sorted(value))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))

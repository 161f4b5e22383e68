"""Remove what nobody uses.

    a = sin(x)        becomes        b = cos(x)
    b = cos(x)                       return b
    return b

Safe because the graph is functional by then: an unused op has no effect. Placeholders stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..base import Contract, Program


@dataclass(frozen=True)
class Sweep(Contract):
    """Dead code elimination in one backward walk."""

    name: str = "sweep"
    requires: tuple[str, ...] = ("functional",)
    provides: tuple[str, ...] = ("no dead code",)

    def apply(self, program: Program) -> Program:
        for node in reversed(program.graph.nodes):
            if node.op in ("call_function", "get_attr") and not node.users:
                program.graph.erase_node(node)
        return program

"""Replace what depends on no input by its value.

    a = arange(4); b = mul(a, 2)        becomes        a constant placeholder [0, 2, 4, 6]

A value of one repeated number becomes `aten.full`, which any split of it can make locally. Values above 1 MiB are
left to be computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from ..base import Contract, Program, emit, fake, is_tensor, replace
from ..constants import Known
from ..torch_compat import mode_of

aten = torch.ops.aten
LIMIT_BYTES = 1 << 20
"""Largest folded value."""


@dataclass(frozen=True)
class FoldConstants(Contract):
    """Folds the last known value of each input-independent chain."""

    name: str = "fold"
    requires: tuple[str, ...] = ("simple",)
    provides: tuple[str, ...] = ("folded",)

    def apply(self, program: Program) -> Program:
        known = Known(program.constants, LIMIT_BYTES)
        fold = _Fold(program)
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target is aten.full.default or not is_tensor(fake(node)):
                continue
            if (
                fake(node).nbytes <= LIMIT_BYTES
                and known.independent(node)
                and (value := known.value(node)) is not None
            ):
                # Later nodes look at the replaced one through `known`, which keeps its value.
                fold.add(node, value)
        fold.finish()
        return program


@dataclass
class _Fold:
    program: Program
    values: dict[fx.Node, torch.Tensor] = field(default_factory=dict)

    def add(self, node: fx.Node, value: torch.Tensor) -> None:
        self.values[node] = value

    def finish(self) -> None:
        """Replace each folded node that something not folded uses, and erase the others."""
        constants: dict[tuple[object, ...], fx.Node] = {}
        for node, value in reversed(self.values.items()):
            if not node.users:
                self.program.graph.erase_node(node)
                continue
            replace(node, self._node(node, value, constants))

    def _node(self, node: fx.Node, value: torch.Tensor, constants: dict[tuple[object, ...], fx.Node]) -> fx.Node:
        graph = self.program.graph
        flat = value.reshape(-1)
        if value.numel() and bool((flat == flat[0]).all()):
            with graph.inserting_before(node):
                made = emit(
                    graph, aten.full.default, (list(value.shape), flat[0].item()), {"dtype": value.dtype}, like=node
                )
                made.meta["differentiable"] = False
                return made
        value = value.contiguous()
        key = (
            value.dtype,
            tuple(value.shape),
            value.numpy().tobytes() if value.dtype is not torch.bfloat16 else id(value),
        )
        if key not in constants:
            constants[key] = self._placeholder(node, value)
        return constants[key]

    def _placeholder(self, node: fx.Node, value: torch.Tensor) -> fx.Node:
        graph = self.program.graph
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            made = graph.placeholder(f"c_{node.name}")
        made.target = made.name
        with mode_of(fake(node)):
            val = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
        made.meta = {
            "val": val,
            "source": node.meta["source"],
            "role": "constant",
            "fqn": made.name,
            "differentiable": False,
        }
        self.program.constants[made.name] = value
        return made

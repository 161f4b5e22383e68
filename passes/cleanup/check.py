"""Note what the passes cannot keep: effects on buffers, sizes that depend on data, ops that are no aten functions."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from ..base import Program

aten = torch.ops.aten
_BATCH_NORM_TRAINING = 5  # position of `training` in aten.batch_norm


@dataclass(frozen=True)
class CheckSupported:
    """Adds problems to the program; changes nothing."""

    name: str = "check"
    requires: tuple[str, ...] = ()
    provides: tuple[str, ...] = ("checked",)

    def apply(self, program: Program) -> Program:
        norms = []
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            if _unknown_size(node.meta.get("val")):
                program.problems.append(f"{node.target} has a size that depends on the data: {node.meta['source']}")
            elif not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
                program.problems.append(f"{node.target} is not supported: {node.meta['source']}")
            elif node.target is aten.batch_norm.default and node.args[_BATCH_NORM_TRAINING] and node.args[3] is not None:
                norms.append(node)
        if norms:
            program.problems.append(
                f"training-mode batch norm ({len(norms)} of them, first: {norms[0].meta['source']}) is not supported yet; "
                "put these modules in eval() mode to keep their running statistics fixed"
            )
        return program


def _unknown_size(value: object) -> bool:
    values = value if isinstance(value, tuple | list) else (value,)
    return any(
        isinstance(v, torch.SymInt | torch.SymFloat | torch.SymBool)
        or (isinstance(v, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in v.shape))
        for v in values
    )


def is_random(node: fx.Node) -> bool:
    """Whether two runs of the same call may differ."""
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in node.target.tags or node.target in _RANDOM
    )


_RANDOM = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default})

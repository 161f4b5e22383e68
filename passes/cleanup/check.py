"""Note what the passes cannot keep: effects on parameters and inputs, sizes that depend on data, ops that are no aten functions."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from ..base import Contract, Program
from ..torch_compat import OpOverload, arguments, is_mutable, storage_key

aten = torch.ops.aten
_MEAN, _USED = 3, 5  # positions in aten.instance_norm


@dataclass(frozen=True)
class CheckSupported(Contract):
    """Adds problems to the program; changes nothing."""

    name: str = "check"
    requires: tuple[str, ...] = ()
    provides: tuple[str, ...] = ("checked",)

    def apply(self, program: Program) -> Program:
        calls = [n for n in program.graph.nodes if n.op == "call_function"]
        program.problems += [p for n in calls if (p := _problem(n))]
        program.problems += _writes(program.graph)
        return program


def _problem(node: fx.Node) -> str:
    """What is wrong with one call, or ""; what follows from an unknown size is not repeated."""
    if any(_symbolic(n) for n in node.all_input_nodes):
        return ""
    if not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
        return f"{node.target} is not supported: {node.meta['source']}"
    if _symbolic(node):
        return f"{node.target} depends on the data: {node.meta['source']}"
    value = node.meta.get("val")
    for one in value if isinstance(value, tuple | list) else (value,):
        if isinstance(one, torch.Tensor) and one.layout is not torch.strided:
            return f"{node.target} makes a tensor of layout {one.layout}, which is not supported: {node.meta['source']}"
    if node.target is aten.instance_norm.default and node.args[_MEAN] is not None and node.args[_USED]:
        return f"an instance norm that updates running statistics is not supported yet: {node.meta['source']}"
    return ""


def _symbolic(node: fx.Node) -> bool:
    """Whether a result is a number or has a size that is not known."""
    value = node.meta.get("val")
    return any(
        isinstance(one, torch.SymInt | torch.SymFloat | torch.SymBool)
        or (isinstance(one, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in one.shape))
        for one in (value if isinstance(value, tuple | list) else (value,))
    )


def _writes(graph: fx.Graph) -> list[str]:
    """Writes to parameters and inputs; those to buffers are kept."""
    owners = {storage_key(n.meta["val"]): n for n in graph.nodes if n.op == "placeholder"}
    problems = []
    for node in graph.nodes:
        written = written_argument(node)
        value = written.meta.get("val") if written is not None else None
        owner = owners.get(storage_key(value)) if isinstance(value, torch.Tensor) else None
        if owner is None or owner.meta["role"] == "buffer":
            continue
        what = f"{owner.meta['role']} {owner.meta['fqn']}"
        problems.append(f"{what} is changed in place, which is not supported yet: {node.meta['source']}")
    return problems


def written_argument(node: fx.Node) -> fx.Node | None:
    """The node whose memory a call writes: its first argument, if the op is an in-place one."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload) or not is_mutable(target):
        return None
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) and target is not aten.detach_.default else None


def is_random(node: fx.Node) -> bool:
    """Whether two runs of the same call may differ; attention is random where it drops out."""
    if not isinstance(node.target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags and node.target not in _RANDOM:
        return False
    names = [a.name for a in arguments(node.target)]
    if "dropout_p" not in names:
        return True
    index = names.index("dropout_p")
    return (node.args[index] if len(node.args) > index else node.kwargs.get("dropout_p", 0.0)) != 0


_RANDOM = frozenset({
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.scaled_dot_product_attention.default,
})  # fmt: skip
"""Random ops that torch does not tag as such."""

"""A graph as steps that make and read buffers (planner/liveness.py): views are their base's, as observed on the ops themselves."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ..planner.liveness import Step, peak
from .base import fake, is_tensor, tensor_name
from .observe import Observer
from .torch_compat import OpOverload


@dataclass(frozen=True)
class Steps:
    """The calls of a graph as steps.

    `returned` are the buffers that the graph returns, `saves` those that the backward pass needs, by step; `home` is the buffer
    of every result, `given_bytes` what the inputs hold.
    """

    steps: tuple[Step, ...]
    returned: frozenset[str]
    saves: Mapping[str, frozenset[str]]
    home: Mapping[str, str]
    given_bytes: int

    @property
    def kept(self) -> frozenset[str]:
        """Buffers that live on to the end."""
        return self.returned.union(*self.saves.values())

    @property
    def peak(self) -> int:
        """The most bytes alive at once, inputs included."""
        return self.given_bytes + peak(self.steps, self.kept)


def steps_of(graph: fx.Graph, *, training: bool = False, observer: Observer | None = None) -> Steps:
    """The steps of a captured graph; with `training` also what autograd keeps of them, as buffers that the steps make."""
    observer, home = observer or Observer(), dict[str, str]()
    steps, saves = [], dict[str, frozenset[str]]()
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        seen = observer.observe(node)
        operands = [tensor_name(n) for n in _operands(node)]
        results = _results(node)
        makes = {} if seen.alias is not None else {name: value.nbytes for name, value in results.items()}
        for name in results:
            base = operands[seen.alias] if seen.alias is not None else name
            home[name] = home.get(base, base)
        if training:
            new = {f"{node.name} kept {i}": size for i, (_, size) in enumerate(seen.new)}
            makes |= new
            saved = [*(operands[i] for i in seen.operands), *(list(results)[i] for i in seen.results)]
            saves[node.name] = frozenset([*new, *(home.get(s, s) for s in saved)])
        reads = tuple(dict.fromkeys(home.get(o, o) for o in operands))
        steps.append(Step(node.name, reads, tuple(makes.items()), seen.inside))
    returned = [tensor_name(n) for n in graph.output_node().args[0] if n is not None]  # type: ignore[union-attr, arg-type]
    given = sum(fake(n).nbytes for n in graph.nodes if n.op == "placeholder" and n.meta.get("role") == "input")
    return Steps(tuple(steps), frozenset(home.get(n, n) for n in returned), saves, home, given)


def _operands(node: fx.Node) -> Iterable[fx.Node]:
    """Tensor operands in order of appearance, as they are observed."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    return found


def _results(node: fx.Node) -> dict[str, torch.Tensor]:
    value = fake(node)
    if isinstance(value, tuple | list):
        return {f"{node.name}:{i}": v for i, v in enumerate(value) if isinstance(v, torch.Tensor)}
    return {node.name: value}


def in_place(graph: fx.Graph) -> dict[str, str]:
    """Results that may be written where an operand is, by buffer: elementwise ones of the same shape and dtype."""
    home, found = steps_of(graph).home, dict[str, str]()
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload) or torch.Tag.pointwise not in node.target.tags:
            continue
        value = fake(node)
        alike = [
            n for n in node.all_input_nodes
            if n.op == "call_function" and is_tensor(fake(n)) and (fake(n).shape, fake(n).dtype) == (value.shape, value.dtype)
        ]  # fmt: skip
        if is_tensor(value) and alike and home[node.name] == node.name:
            found[node.name] = home[tensor_name(alike[0])]
    return found


def trains(graph: fx.Graph) -> bool:
    """Whether a gradient flows through any call."""
    flags = (n.meta.get("differentiable", False) for n in graph.nodes if n.op == "call_function")
    return any(any(f) if isinstance(f, tuple) else f for f in flags)

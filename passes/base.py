"""What a pass is, what passes work on, and the runner that records them.

A pass is a frozen dataclass with a `name`, the facts it `requires` and `provides`, and `apply(program) -> program`.
It owns the program it is given, leaves a valid graph, and does not log; the runner records time and node difference.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import fx

from ..errors import ShardwrightError
from .torch_compat import mode_of


@dataclass
class Program:
    """A lifted graph on its way through passes.

    Placeholders carry parameters, buffers, constants and inputs; `constants` holds the values of the constant ones by
    placeholder name. The graph's last outputs are the new values of the buffers named in `writes`. `notes` tell what a
    reader should know, `problems` what stops the capture (all are reported together).
    """

    graph: fx.Graph
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    writes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class HasGraph(Protocol):
    """Anything that carries an fx graph."""

    @property
    def graph(self) -> fx.Graph: ...


P = TypeVar("P", bound=HasGraph)


class Pass(Protocol[P]):
    """One rewrite of a program."""

    name: str
    requires: tuple[str, ...]
    provides: tuple[str, ...]

    def apply(self, program: P) -> P: ...


@dataclass(frozen=True)
class Record:
    """What one pass did: wall-clock seconds and the number of nodes before and after."""

    name: str
    seconds: float
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.name:<16} {self.seconds:7.3f} s  {self.before:>6} -> {self.after:<6} nodes ({self.after - self.before:+d})"


def run_passes(
    passes: Iterable[Pass[P]],
    program: P,
    *,
    known: Iterable[str] = (),
    after: Callable[[str, P], None] | None = None,
) -> tuple[P, tuple[Record, ...]]:
    """Run passes in order and record each; `after(name, program)` is called after each (to print, say).

    `known` are facts that hold already. Raises ShardwrightError where a pass requires a fact that no earlier pass
    provides.
    """
    known = set(known)
    records = []
    for step in passes:
        if missing := [fact for fact in step.requires if fact not in known]:
            raise ShardwrightError(f"pass {step.name} requires {', '.join(missing)}; no earlier pass provides it")
        begin, before = time.perf_counter(), len(program.graph.nodes)
        program = step.apply(program)
        records.append(Record(step.name, time.perf_counter() - begin, before, len(program.graph.nodes)))
        known.update(step.provides)
        if after is not None:
            after(step.name, program)
    return program, tuple(records)


def fake(node: fx.Node) -> Any:
    """The fake value of a node (a tensor, or a tuple of them)."""
    return node.meta["val"]


def tensor_name(node: fx.Node) -> str:
    """The name of the tensor a node stands for: its own, or "parent:index" of one of several results."""
    if node.target is operator.getitem:
        parent, index = node.args
        return f"{parent.name}:{index}"  # type: ignore[union-attr]
    return node.name


def emit(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    like: fx.Node,
) -> fx.Node:
    """Insert a call at the graph's insertion point, with provenance from `like` and its value from fake tensors."""
    node = graph.call_function(target, args, kwargs or {})
    node.meta = {k: v for k, v in like.meta.items() if k != "val"}
    with mode_of(_any_tensor(like, args)), torch.no_grad():
        node.meta["val"] = target(*fx.map_arg(node.args, fake), **fx.map_arg(node.kwargs, fake))
    return node


def _any_tensor(like: fx.Node, args: tuple[Any, ...]) -> torch.Tensor:
    found: list[torch.Tensor] = []

    def look(node: fx.Node) -> None:
        value = fake(node)
        found.extend(v for v in (value if isinstance(value, tuple | list) else [value]) if isinstance(v, torch.Tensor))

    look(like)
    fx.map_arg(args, look)
    return found[0]


def replace(node: fx.Node, by: fx.Node) -> None:
    """Let every user of `node` use `by`, and erase `node`."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def is_tensor(value: object) -> bool:
    """Whether a fake value is one tensor."""
    return isinstance(value, torch.Tensor)

"""What a pass is, what passes work on, and the runner that checks, records and, where asked, takes them back.

A pass is a small frozen dataclass: a `Contract` and `apply(program) -> program`. It owns the program it is given, leaves a
valid graph, and does not log. The runner refuses a pass whose contract does not hold, records time and node difference, and lets
`weigh` look at what a pass did: what it says does not stay is taken back, with the reason.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Sequence
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

    graph: fx.Graph


P = TypeVar("P", bound=HasGraph)


@dataclass(frozen=True)
class Contract:
    """What a pass is called and promises; passes are frozen dataclasses of this with an `apply`.

    It `requires` facts that earlier passes `provides`, and may not run after a pass that it `conflicts` with (names of
    passes) or whose conflicts name it. `semantics` is the class of what it does to the function (planner/plan.py): EXACT but for
    reassociation, VALID (that, but at padded positions), STALE, LOSSY or ARCH. One that `drops_outputs` puts None in the place
    of outputs that are not the loss and that it no longer makes: whoever wants those captures without it. One that
    `serves_neighbours` changes small ops for the sake of what lies between large ones: what it costs is held against all that
    reads the same tensors.
    """

    name: str = ""
    requires: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    semantics: str = "EXACT"
    drops_outputs: bool = False
    serves_neighbours: bool = False


class Pass(Protocol[P]):
    """One rewrite of a program, under its contract."""

    @property
    def name(self) -> str: ...
    @property
    def requires(self) -> tuple[str, ...]: ...
    @property
    def provides(self) -> tuple[str, ...]: ...
    @property
    def conflicts(self) -> tuple[str, ...]: ...
    @property
    def semantics(self) -> str: ...
    @property
    def drops_outputs(self) -> bool: ...
    @property
    def serves_neighbours(self) -> bool: ...

    def apply(self, program: P) -> P: ...


@dataclass(frozen=True)
class Verdict:
    """Whether what a pass did stays, and why not; what it gains a step where prices were asked: seconds, saved bytes."""

    stays: bool
    why: str = ""
    seconds: float | None = None
    saved_bytes: float | None = None


@dataclass(frozen=True)
class Record:
    """What one pass did: wall-clock seconds and the number of nodes before and after; a `verdict` where it was weighed."""

    name: str
    seconds: float
    before: int
    after: int
    verdict: Verdict | None = None

    def __str__(self) -> str:
        text = f"{self.name:<16} {self.seconds:7.3f} s  {self.before:>6} -> {self.after:<6} nodes ({self.after - self.before:+d})"
        return text if self.verdict is None or self.verdict.stays else f"{text}  taken back: {self.verdict.why}"


Weigh = Callable[[Pass[Any], fx.Graph, fx.Graph], Verdict]
"""Judges a pass by the graph before and after it."""


def run_passes(
    passes: Iterable[Pass[P]],
    program: P,
    *,
    known: Iterable[str] = (),
    after: Callable[[str, P], None] | None = None,
    weigh: Weigh | None = None,
) -> tuple[P, tuple[Record, ...]]:
    """Run passes in order and record each; `after(name, program)` is called after each (to print, say).

    `known` are facts that hold already. With `weigh`, a pass that changed the graph is judged, and taken back where its
    verdict says so. Raises ShardwrightError where a pass requires a fact that no earlier pass provides, or conflicts with
    one that ran.
    """
    facts, ran = set(known), list[Pass[P]]()
    records = []
    for step in passes:
        _check(step, facts, ran)
        kept = _copied(program.graph) if weigh is not None else None
        begin, before = time.perf_counter(), len(program.graph.nodes)
        program = step.apply(program)
        seconds, verdict = time.perf_counter() - begin, None
        if weigh is not None and kept is not None and _differ(kept, program.graph):
            verdict = weigh(step, kept, program.graph)
            if not verdict.stays:
                program.graph = kept
        records.append(Record(step.name, seconds, before, len(program.graph.nodes), verdict))
        if verdict is None or verdict.stays:
            facts.update(step.provides)
            ran.append(step)
        if after is not None:
            after(step.name, program)
    return program, tuple(records)


def _check(step: Pass[P], facts: set[str], ran: Sequence[Pass[P]]) -> None:
    if missing := [fact for fact in step.requires if fact not in facts]:
        raise ShardwrightError(f"pass {step.name} requires {', '.join(missing)}; no earlier pass provides it")
    for other in ran:
        if other.name in step.conflicts or step.name in other.conflicts:
            raise ShardwrightError(f"pass {step.name} conflicts with {other.name}, which ran before it; leave one out")


def _copied(graph: fx.Graph) -> fx.Graph:
    """The same graph with the same names in nodes of its own."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for old, new in zip(graph.nodes, copy.nodes, strict=True):
        new.meta = dict(old.meta)
    return copy


def _differ(one: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs, of which one is a copy of the other or was, are not the same any more."""
    return [n.format_node() for n in one.nodes] != [n.format_node() for n in other.nodes]


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

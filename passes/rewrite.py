"""Rewrites as tables: one pass is rows of (pattern, what takes its place), tried at every node in order.

    @dataclass(frozen=True)
    class FuseGate(Rewriting):
        name: str = "gated"
        table: tuple[Row, ...] = (Row(call("aten.mul", call("aten.silu", GATE), UP), gated),)

What takes a match's place is written with `Make`, which emits calls where the match's root stands, with its provenance, and may
return None: not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ..errors import ShardwrightError
from .base import Contract, Pass, Program, Weigh, emit, fake, is_tensor, run_passes, tensor_name
from .capture import Captured
from .gradients import differentiable, mark
from .pattern import Match, Pattern, find


@dataclass(frozen=True)
class Make:
    """Emits calls in the place of a match's root."""

    root: fx.Node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = emit(self.root.graph, target, args, kwargs, like=self.root)
        made.meta["differentiable"] = differentiable(made)
        return made


CLEAN = (
    "functional",
    "simple",
    "masks recognised",
    "folded",
    "summed losses",
    "no fused bias",
    "no equal calls",
    "no dead code",
)
"""What holds of every captured graph: its cleanup passes ran."""

After = Callable[[str, Program], None]
By = Callable[[Match, Make], fx.Node | None]


@dataclass(frozen=True)
class Row:
    """A pattern and what makes its replacement: a node of the same shape and dtype, or None where it does not apply."""

    pattern: Pattern
    by: By


@dataclass(frozen=True)
class Rewriting(Contract):
    """A pass that is a table. Rows are tried in order at every node, the last node first, so that the largest match wins."""

    table: tuple[Row, ...] = ()

    def apply(self, program: Program) -> Program:
        gone: set[fx.Node] = set()
        for node in reversed(list(program.graph.nodes)):
            if node.op == "call_function" and node not in gone:
                gone |= _at(node, self.table)
        return program


def _at(node: fx.Node, table: tuple[Row, ...]) -> frozenset[fx.Node]:
    """Rewrite what the first fitting row matches at `node`; the nodes that are gone."""
    for row in table:
        match = find(row.pattern, node)
        if match is None:
            continue
        with node.graph.inserting_before(node):
            by = row.by(match, Make(node))
        if by is not None:
            return _replaced(match, by)
    return frozenset()


def _replaced(match: Match, by: fx.Node) -> frozenset[fx.Node]:
    root = match.root
    was, made = fake(root), fake(by)
    if is_tensor(was) and (was.shape, was.dtype) != (made.shape, made.dtype):
        raise ShardwrightError(
            f"{by.target} makes {made.dtype}{list(made.shape)} in the place of {root}, {was.dtype}{list(was.shape)}"
        )
    root.replace_all_uses_with(by)
    for node in sorted(match.nodes, reverse=True):
        root.graph.erase_node(node)
    return match.nodes


def rewritten(
    captured: Captured, passes: Iterable[Pass[Program]], *, weigh: Weigh | None = None, after: After | None = None
) -> Captured:
    """A captured graph after `passes`; `captured` is left as it is. `weigh` judges each pass that changed something (base.py).

    An output that a pass gave up (None in its place; the pass `drops_outputs`) is no output of the result. Its name stays in
    `flat_outputs` and names nothing: like an output that was not asked for it is None, or refused when it is read.
    """
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    old = captured.graph.graph
    graph.output(graph.graph_copy(old, new))
    for node, copy in new.items():
        copy.meta = dict(node.meta)
    program = Program(graph, dict(captured.constants), tuple(captured.writes))
    program, records = run_passes(passes, program, known=CLEAN, weigh=weigh, after=after)
    mark(program.graph)
    before, now = (tuple(g.output_node().args[0]) for g in (old, program.graph))  # type: ignore[arg-type]
    name = {tensor_name(a): tensor_name(b) for a, b in zip(before, now, strict=True) if b is not None}
    program.graph.output_node().args = (tuple(n for n in now if n is not None),)
    held = {n.name for n in program.graph.nodes if n.op == "placeholder"}
    return replace(
        captured,
        graph=fx.GraphModule({}, program.graph),
        entries=tuple(e for e in captured.entries if e.node in held),
        constants={n: v for n, v in captured.constants.items() if n in held},
        loss=name[captured.loss] if captured.loss else "",
        flat_outputs=tuple(name.get(o, o) if isinstance(o, str) else o for o in captured.flat_outputs),
        writes={buffer: name[n] for buffer, n in captured.writes.items()},
        records=(*captured.records, *records),
    )

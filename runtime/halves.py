"""Backward passes in two halves: the gradients of activations first, those of parameters later (zero-bubble schedules).

    body = with_halves(body, feeds, outline, buckets)   # once: marks where parameters meet activations
    with Halves() as halves:
        made = body(...)                                # F
    torch.autograd.backward(roots, gradients)           # I: what other stages wait for
    halves.finish()                                     # W: gradients of parameters

A graph has a side that follows from parameters alone (gathers, casts, reductions) and the rest. Where one meets the other the
tensor is cut: what comes for it in I and W is summed, and W carries the sum on through the parameters' side, once, so that hooks
and collectives there run as often as in an undivided backward pass.

An op that multiplies activations by parameters (`Half(..., product=True)`) runs its own small graph behind an autograd function.
In I that graph yields the gradients of the activations and those that arrive where the parameters enter (runtime/meetings.py); W
goes on from there. Nothing runs twice: autograd computes of each node only the gradients that are asked for. Between the halves
stay the operands that products multiply with gradients, and those gradients; all else goes with I. Ops without products (norms,
biases) cost little and do all of it in I, as do those whose operands are made again (keeping them would undo the recompute); so
the planner prices them (planner/bench.py, `_late`). An op with no differentiable operand but parameters (an embedding) waits for W.

In a backward pass that is not to be divided (`halves.whole`), ops of a divided body leave nothing for later.
"""

from __future__ import annotations

import contextvars
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from ..passes.lowered import Feed
from ..planner.outline import Outline
from ..planner.work import PRODUCT_KINDS
from .meetings import Meeting, divisible, edges_of, meetings_of
from .regather import Handle, Regather, active_regather
from .step import Buckets

# -- where parameters meet activations


def with_halves(body: fx.GraphModule, feeds: Sequence[Feed], outline: Outline, buckets: Buckets) -> fx.GraphModule:
    """`body` with its parameters' side cut off and the ops that use it marked, in place.

    Parameters of one of the `buckets` hang together: the gradients of all are carried on at the same time.
    """
    parts = _parts(body.graph, feeds, outline, buckets)
    kinds = {op.name: op.kind for op in outline.ops}
    first = next(n for n in body.graph.nodes if n.op != "placeholder")
    for node, part in parts.items():
        users = [user for user in node.users if user not in parts]
        if not users:
            continue
        with body.graph.inserting_before(first) if node.op == "placeholder" else body.graph.inserting_after(node):
            cut = body.graph.call_function(Cut(part), (node,))
        for user in users:
            if user.op == "output":
                with body.graph.inserting_before(user):
                    user.replace_input_with(node, body.graph.call_function(Half(_same, False), (cut,)))
                continue
            user.replace_input_with(node, cut)
            if not isinstance(user.target, Half):
                user.target = Half(user.target, kinds.get(user.meta.get("op", "")) in PRODUCT_KINDS)
    body.recompile()
    return body


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _parts(graph: fx.Graph, feeds: Sequence[Feed], outline: Outline, buckets: Buckets) -> dict[fx.Node, int]:
    """The nodes that follow from parameters alone; those that hang together have one number."""
    bucket = {name: -1 - i for i, group in enumerate(buckets.every_microbatch) for name in group}
    parameters = {f.node: bucket.get(f.tensor) for f in feeds if f.kind in ("step", "chunk")}
    fixed = {f.node for f in feeds if f.kind == "whole" and outline.tensors[f.tensor].role in ("buffer", "constant")}
    found: dict[fx.Node, int] = {}
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.target in parameters:
                known = parameters[node.target]
                found[node] = len(found) if known is None else known
            elif node.target in fixed:
                constant.add(node)
            continue
        inputs = node.all_input_nodes
        if node.op != "call_function" or not all(n in found or n in constant for n in inputs):
            continue
        joined = {found[n] for n in inputs if n in found}
        if not joined:
            constant.add(node)
            continue
        found = {n: min(joined) if part in joined else part for n, part in found.items()}
        found[node] = min(joined)
    return found


class Cut:
    """Where a tensor of the parameters' side leaves it. `part` numbers what hangs together there."""

    def __init__(self, part: int) -> None:
        self.part = part
        self.__name__ = f"cut_{part}"
        self.__module__ = "shardwright"

    def __call__(self, source: Tensor) -> Tensor:
        """The tensor, cut off; itself where no gradient of it is wanted."""
        halves = _active.get()
        if halves is None or not source.requires_grad:
            return source
        return halves.cut(source, self.part)


class Half:
    """An op with operands of the parameters' side; called as the op is."""

    def __init__(self, target: Callable[..., Any], product: bool) -> None:
        self.target, self.product = target, product
        self.__name__ = f"half_{getattr(target, '__name__', 'op')}".replace(".", "_")
        self.__module__ = "shardwright"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The op's result."""
        halves = _active.get()
        if halves is None:
            return self.target(*args, **kwargs)
        flowing = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad}
        activations = [x for x in flowing.values() if x.grad_fn not in halves.sides]
        sides = [halves.sides[x.grad_fn] for x in flowing.values() if x.grad_fn in halves.sides]
        if not sides or (activations and not self.product):
            for side in sides:
                side.expect_all_at_once()
            return self.target(*args, **kwargs)
        for side in sides:
            side.part.awaited += 1
        call = _Call(self.target, self.product, halves)
        made = _Halved.apply(call, args, kwargs, halves.anchor, *activations)
        return made if call.listed else made[0]


# -- one microbatch of one stage


@dataclass(eq=False)
class _Side:
    """A tensor of the parameters' side: where its gradient goes on, and what has come of it."""

    source: GradientEdge
    part: _Part
    gradient: Tensor | None = None
    undivided: bool = False

    def expect_all_at_once(self) -> None:
        """Ops that are not divided use it: autograd sums up what comes from all of them."""
        self.part.awaited += not self.undivided
        self.undivided = True

    def add(self, gradient: Tensor | None) -> None:
        """One of the gradients that are awaited."""
        if gradient is not None:
            self.gradient = gradient if self.gradient is None else self.gradient + gradient
        self.part.awaited -= 1
        if not self.part.awaited:
            self.part.carry_on()


@dataclass(eq=False)
class _Part:
    """What hangs together of the parameters' side: its tensors, and how many gradients are still to come for them."""

    sides: list[_Side] = field(default_factory=list)
    awaited: int = 0

    def carry_on(self) -> None:
        """Take what has come on through the parameters' side."""
        ready = [s for s in self.sides if s.gradient is not None]
        if ready:
            torch.autograd.backward([s.source for s in ready], [s.gradient for s in ready])
        for side in ready:
            side.gradient = None


class _Enter(torch.autograd.Function):
    """A tensor under a node of its own, which holds no memory; a gradient that gets through is added to `side`."""

    @staticmethod
    def forward(ctx, box, side, anchor):  # type: ignore[no-untyped-def,override]
        ctx.side = side
        return box[0].detach()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def,override]
        ctx.side.add(gradient)
        return None, None, None


class Halves:
    """What W owes for one microbatch of one stage. Inside its block a body made by `with_halves` is divided."""

    def __init__(self) -> None:
        self.whole = False
        self.sides: dict[Node | None, _Side] = {}
        self.parts: dict[int, _Part] = defaultdict(_Part)
        self.owed: deque[tuple[Meeting, ...]] = deque()
        self.anchor = torch.zeros((), requires_grad=True)
        """Has what follows from it recorded by autograd; never gets a gradient."""
        self._tokens: list[contextvars.Token[Halves | None]] = []

    def __enter__(self) -> Halves:
        self._tokens.append(_active.set(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.reset(self._tokens.pop())

    def cut(self, source: Tensor, part: int) -> Tensor:
        """`source`, cut off from the parameters' side."""
        side = _Side(get_gradient_edge(source), self.parts[part])
        side.part.sides.append(side)
        cut: Tensor = _Enter.apply([source], side, self.anchor)
        self.sides[cut.grad_fn] = side
        return cut

    def finish(self) -> None:
        """What is left to do for parameters: op by op, and the parameters' side as soon as all has come for a part of it."""
        while self.owed:
            for meeting in self.owed.popleft():
                for node, gradient in meeting.settle():
                    self.sides[node].add(gradient)
        for part in self.parts.values():  # what nothing has come for was not read
            part.carry_on()


_active: contextvars.ContextVar[Halves | None] = contextvars.ContextVar("shardwright_halves", default=None)


# -- one op


class _Cell:
    """A tensor that an op saves, as `Regather` has it until I, then itself."""

    def __init__(self, x: Tensor, regather: Regather | None) -> None:
        self.regather = regather
        self.packed: Any = x if regather is None else regather.pack(x)
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        handle = isinstance(self.packed, Handle)
        self.gathered = handle and self.packed.recipe.crowded
        self.again = handle and not self.gathered

    def open(self) -> Tensor:
        """The tensor, made again where that is needed."""
        if self.regather is not None:
            self.packed = self.regather.unpack(self.packed)
            self.regather = None
        found: Tensor = self.packed
        return found

    def forget(self) -> None:
        """The gradient of a product's factor does not need that factor: a gathered parameter goes, its shape stays."""
        if self.gathered:
            self.packed = torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)


class _Call:
    """One call of an op in a forward pass: its own graph, which begins at nodes in the place of its operands."""

    def __init__(self, target: Callable[..., Any], product: bool, halves: Halves) -> None:
        self.target, self.product, self.halves = target, product, halves
        self.regather = active_regather()
        self.cells: list[_Cell] = []
        self.listed = False

    def run(self, args: Any, kwargs: Any, activations: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The forward pass; results without a graph. Only what the op saves stays alive."""
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._pack, _Cell.open):
            inside = {id(x): _Enter.apply([x], None, self.halves.anchor) for x in activations}
            self.activations = tuple(x.grad_fn for x in inside.values())
            args, kwargs = tree_map(lambda x: inside.get(id(x), x), (args, kwargs))
            made = self.target(*args, **kwargs)
        self.listed = isinstance(made, list | tuple)
        made = tuple(made) if self.listed else (made,)
        self.made = tuple(get_gradient_edge(x) if x.requires_grad else None for x in made)
        return tuple(x.detach() for x in made)

    def _pack(self, x: Tensor) -> _Cell:
        self.cells.append(_Cell(x, self.regather))
        return self.cells[-1]

    def backward(self, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Gradients of the activations; those of the parameters are owed, or made at once."""
        again = any(cell.again for cell in self.cells)
        for cell in self.cells:
            cell.open()
        flowing = [(e, g) for e, g in zip(self.made, gradients, strict=True) if e is not None]
        meetings = meetings_of([e for e, _ in flowing], self.halves.sides)
        if self.halves.whole or again or not divisible(meetings):
            return self._at_once(flowing, meetings)
        if self.activations:
            found = self._first(flowing, meetings)
        else:
            found = ()
            for meeting in meetings:
                meeting.arrived = tuple(g for e, g in flowing if e.node is meeting.node)
        for cell in self.cells if self.product else ():
            cell.forget()
        self.halves.owed.append(meetings)
        return found

    def _at_once(
        self, flowing: Sequence[tuple[GradientEdge, Tensor]], meetings: Sequence[Meeting]
    ) -> tuple[Tensor | None, ...]:
        nodes = list(dict.fromkeys(n for m in meetings for n in m.beyond))
        inputs = edges_of([*self.activations, *nodes])
        edges, came = zip(*flowing, strict=True)
        found = torch.autograd.grad(edges, inputs, came, allow_unused=True)
        for node, gradient in zip(nodes, found[len(self.activations) :], strict=True):
            self.halves.sides[node].add(gradient)
        return found[: len(self.activations)]

    def _first(
        self, flowing: Sequence[tuple[GradientEdge, Tensor]], meetings: Sequence[Meeting]
    ) -> tuple[Tensor | None, ...]:
        for meeting in meetings:
            meeting.want("input")
        inputs = [*edges_of(self.activations), *(edge for m in meetings for edge in m.edges)]
        edges, came = zip(*flowing, strict=True)
        found = torch.autograd.grad(edges, inputs, came, retain_graph=True, allow_unused=True)
        arrived = iter(found[len(self.activations) :])
        for meeting in meetings:
            meeting.arrived = tuple(next(arrived) for _ in meeting.edges)
        return found[: len(self.activations)]


class _Halved(torch.autograd.Function):
    """A call: forward and backward of `_Call`."""

    @staticmethod
    def forward(ctx, call, args, kwargs, anchor, *activations):  # type: ignore[no-untyped-def,override]
        ctx.call = call
        made = call.run(args, kwargs, activations)
        ctx.mark_non_differentiable(*[x for x, edge in zip(made, call.made, strict=True) if edge is None])
        return made

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def,override]
        call, ctx.call = ctx.call, None
        return (None, None, None, None, *call.backward(gradients))

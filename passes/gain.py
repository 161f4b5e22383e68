"""What a pass gains on one device, from the price model: seconds of a step and bytes that wait for the backward pass.

What a pass took out of the graph and what it put in fall into pieces that hang together (a norm, an activation). Every piece is
summarised by itself, as the model is (summarize.py), and priced as the planner prices ops; equal pieces are priced once. Bytes are
those that the graphs keep as wholes (kept.py); with fused kernels those of the pieces, every tensor that they read or make once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from ..planner.flow import Flow
from ..planner.fusedsaves import fused_saves
from ..planner.fusing import fusions
from ..planner.outline import Outline
from ..planner.prices import Prices
from ..planner.rules import VIEWS
from .base import Pass, Program, Verdict
from .capture import Captured, Entry
from .kept import kept_bytes
from .observe import Observer
from .pattern import target_of
from .summarize import summarize
from .torch_compat import pytree


@dataclass(frozen=True)
class Cost:
    """Seconds of forward and backward, and bytes kept for the backward pass."""

    seconds: float = 0.0
    saved_bytes: float = 0.0


@dataclass(frozen=True)
class Paying:
    """A `weigh` for `run_passes`: what does not pay under `prices` is taken back.

    A pass pays that saves seconds and keeps no more bytes, or keeps fewer bytes and costs no more than `slower` of the seconds
    that its pieces took (where it `serves_neighbours`, those and all that reads what they read). With `keep` what does not
    pay stays and is only priced. `observer` keeps what was seen of ops: most are those of the pass before.
    """

    prices: Prices
    slower: float = 0.1
    keep: bool = False
    observer: Observer = field(default_factory=Observer, compare=False, repr=False)

    def __call__(self, step: Pass[Program], before: fx.Graph, after: fx.Graph) -> Verdict:
        known, made = _names(before), _names(after)
        gone = [n for n in _calls(before) if _text(n) not in made]
        was = self.cost(gone)
        now = self.cost([n for n in _calls(after) if _text(n) not in known])
        seconds, saved = was.seconds - now.seconds, was.saved_bytes - now.saved_bytes
        if not self.prices.fused:  # what is kept outside the pieces may be what they keep
            saved = float(kept_bytes(before, self.observer) - kept_bytes(after, self.observer))
        held = self.cost(_with_readers(gone)) if step.serves_neighbours else was
        pays = (seconds > 0 and saved >= 0) or (saved > 0 and -seconds <= self.slower * held.seconds)
        why = "" if pays else f"it would take {-seconds:.3g} s and {-saved:.4g} saved bytes more a step"
        return Verdict(pays or self.keep, why, seconds, saved)

    def cost(self, nodes: Sequence[fx.Node]) -> Cost:
        """What calls cost, piece by piece."""
        priced: dict[str, _Priced] = {}
        seconds, new = 0.0, 0.0
        kept: dict[tuple[fx.Node, str], float] = {}
        for piece in _pieces(_with_views(nodes)):
            text, touched = _signature(piece), _touched(piece)
            if text not in priced:
                priced[text] = self._priced(*_outline(piece, self.observer))
            seconds, new = seconds + priced[text].seconds, new + priced[text].new
            kept |= {(touched[i], result): size for (i, result), size in priced[text].kept.items()}
        return Cost(seconds, new + sum(kept.values()))

    def _priced(self, outline: Outline, names: Sequence[str]) -> _Priced:
        outline, prices = as_priced(outline, self.prices)
        seconds = 0.0
        for op in outline.ops:
            forward, backward = prices.op(op, tuple(f.size for f in op.factors), outline.tensors)
            seconds += forward.seconds + backward.seconds
        flow = Flow(outline)
        roots = {name for name in flow.saved if outline.tensors[name].role not in ("parameter", "buffer", "constant")}
        new = sum(s.bytes for op in outline.ops for s in op.saved if s.source == "new")
        position = {name: i for i, name in enumerate(names)}
        sides = {name: name.partition(":") for name in roots}
        kept = {(position[node], result): outline.tensors[name].bytes for name, (node, _, result) in sides.items()}
        return _Priced(seconds, new, kept)


@dataclass(frozen=True)
class _Priced:
    """A piece: seconds, bytes that its ops keep besides operands and results, and those of the tensors they keep, by position
    among what the piece touches and result of it."""

    seconds: float
    new: float
    kept: Mapping[tuple[int, str], float]


def as_priced(outline: Outline, prices: Prices) -> tuple[Outline, Prices]:
    """An outline and its prices as kernels run it: with fused ones, where `prices` fuse, those of its own ops."""
    if not prices.fused:
        return outline, prices
    outline = fused_saves(outline)
    return outline, replace(prices, fused=fusions(outline))


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function"]


def _with_readers(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The calls and all others that read a result of a call that these read, as it is or through views."""
    made = {n for node in nodes for n in node.all_input_nodes if n.op == "call_function"}
    found, queue = set(nodes), list(made)
    while queue:
        users = set(queue.pop().users) - found
        found |= users
        queue.extend(u for u in users if _is_view(u))
    return [n for n in _calls(nodes[0].graph) if n in found] if nodes else []


def _text(node: fx.Node) -> tuple[str, str]:
    return node.name, str(node.target)


def _names(graph: fx.Graph) -> frozenset[tuple[str, str]]:
    return frozenset(_text(n) for n in _calls(graph))


def _with_views(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The calls and the views that what they read comes through: halves of one tensor are one piece of memory, kept whole."""
    found, queue = set(nodes), list(nodes)
    while queue:
        views = {n for n in queue.pop().all_input_nodes if _is_view(n)} - found
        found |= views
        queue.extend(views)
    return sorted(found)


def _is_view(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else node
    view = VIEWS.get(target_of(source)) if isinstance(source, fx.Node) else None
    return view is not None and view.kind == "view"


def _pieces(nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """Calls that hang together, in order."""
    own, owner = list(nodes), dict[fx.Node, int]()
    members = dict[int, list[fx.Node]]()
    inside = set(own)
    for index, node in enumerate(own):
        joined = {owner[n] for n in node.all_input_nodes if n in inside and n in owner}
        home = min(joined, default=index)
        members.setdefault(home, [])
        for other in sorted(joined - {home}):
            for moved in members.pop(other):
                owner[moved] = home
                members[home].append(moved)
        owner[node] = home
        members[home].append(node)
    order = {node: i for i, node in enumerate(own)}
    return [sorted(piece, key=order.__getitem__) for piece in members.values()]


def _signature(piece: Sequence[fx.Node]) -> str:
    """A text that is equal for pieces that do the same work."""
    number: dict[fx.Node, str] = {}

    def name(node: fx.Node) -> str:
        if node not in number:
            value = node.meta["val"]
            shape = f"{tuple(value.shape)}{value.dtype}" if hasattr(value, "shape") else ""
            number[node] = f"%{len(number)}{shape}{node.meta.get('differentiable')}{node.meta.get('role', '')}"
        return number[node]

    return "\n".join(f"{name(n)} {n.target} {fx.map_arg(n.args, name)} {fx.map_arg(n.kwargs, name)}" for n in piece)


def _touched(piece: Sequence[fx.Node]) -> list[fx.Node]:
    """What a piece reads, and its own nodes."""
    inside = set(piece)
    return [*dict.fromkeys(n for node in piece for n in node.all_input_nodes if n not in inside), *piece]


def _outline(piece: Sequence[fx.Node], observer: Observer) -> tuple[Outline, list[str]]:
    """The outline of one piece, with what it reads as inputs and what others read as outputs; its names of what it touches."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    inside, touched = set(piece), _touched(piece)
    entries: list[Entry] = []
    for node in touched[: len(touched) - len(piece)]:
        new[node] = graph.placeholder(node.name)
        new[node].meta = dict(node.meta)
        role = node.meta.get("role", "input")
        entries.append(Entry(new[node].name, role, new[node].name, trainable=bool(node.meta.get("differentiable"))))
    for node in piece:
        new[node] = graph.node_copy(node, new.__getitem__)
        new[node].meta = dict(node.meta)
    left = [n for n in piece if any(u not in inside for u in n.users) and not isinstance(n.meta["val"], tuple | list)]
    graph.output(tuple(new[n] for n in left))
    empty = pytree.tree_flatten(())[1]
    captured = Captured(fx.GraphModule({}, graph), tuple(entries), {}, "", empty, (), empty, (), False)
    outline = replace(summarize(captured, observer=observer).outline, trains=any(map(_flows, piece)))
    return outline, [new[node].name for node in touched]


def _flows(node: fx.Node) -> bool:
    flags = node.meta.get("differentiable", False)
    return any(flags) if isinstance(flags, tuple) else bool(flags)

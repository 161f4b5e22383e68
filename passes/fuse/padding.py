"""Ops that look at one position at a time run on valid positions alone (EnergonAI: Du et al. 2022, section 4.3).

A padding mask [b, s] of the model's inputs that reaches attention (padded_keys.py) says which positions nothing valid depends on.
Between two attentions everything is done position by position: linear maps, norms, activations, dropout, sums with the residual.
All that hangs together of it becomes one `shardwright::packed` (ops/packed.py), which gathers valid rows, computes on them and
scatters what is read outside back among zeros.

Outputs at padded positions are zeros, or made of zeros: the function is another there, and the same at valid positions, with the
same gradients for a loss that reads no padded position. A graph where positions mix without the mask is left alone (aligned.py).
"""

from __future__ import annotations

import heapq
import json
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ...planner.rule_packed import DROPS
from ..base import Contract, Program, emit, fake, is_tensor, tensor_name
from ..gradients import differentiable
from ..pattern import target_of
from ..torch_compat import OpOverload, full_name, overload_name
from .aligned import Aligned, Call, Place
from .local import arguments_of
from .ops.packed import packed
from .padded_keys import PaddedKeys

KINDS = frozenset({"elementwise", "norm", "matmul", "reduction", "random", "view"})
"""Kinds of ops that may go inside."""
RESHAPES = frozenset({"aten.view", "aten.reshape", "aten._unsafe_view"})
MOVES = frozenset({"aten.transpose", "aten.permute", "aten.unsqueeze"})
"""Views that may go inside where they leave the dims of positions in place."""
PLAIN = (bool, int, float, str, torch.dtype, torch.memory_format)


@dataclass(frozen=True)
class Part:
    """Calls that become one, in order, with the tensors of rows and the others that they read, and what is read of them."""

    nodes: tuple[fx.Node, ...]
    rows: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]
    out: tuple[fx.Node, ...]


@dataclass(frozen=True)
class PackPadding(Contract):
    """Padding leaves what works position by position.

    `share` is the share of positions that is expected to be valid, by which prices count: 0.5, a batch whose lengths are half of
    the longest one on average, unless said otherwise. Results do not depend on it.
    """

    name: str = "padding"
    requires: tuple[str, ...] = ("simple", "masks recognised")
    semantics: str = "VALID"
    share: float = 0.5

    def apply(self, program: Program) -> Program:
        for mask in _masks(program.graph):
            for zero in (False, True):
                aligned = Aligned(program.graph, PaddedKeys(program, mask, zero))
                parts = list(_parts(program.graph, aligned))
                if parts and aligned.safe(frozenset(n.name for part in parts for n in part.nodes)):
                    _pack(program.graph, aligned.keys.mask, [(p, _written(aligned, p, self.share)) for p in parts])
                    break
        return program


def _masks(graph: fx.Graph) -> list[fx.Node]:
    """Inputs that may be a padding mask: [b, s], carrying no gradient."""
    return [n for n in graph.nodes if n.op == "placeholder" and n.meta.get("role") == "input" and _may_mask(n)]


def _may_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not is_tensor(value) or value.dim() != 2 or value.shape[1] < 2:
        return False
    return not node.meta.get("differentiable") and not value.is_complex()


def _parts(graph: fx.Graph, aligned: Aligned) -> Iterator[Part]:
    """Calls that hang together with no other call on a way from one to another; each has a product with a weight."""
    own = {n for n in graph.nodes if n.op == "call_function" and _by_position(n, aligned)} if aligned.masked else set()
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:  # how many times a way to it has left such calls
        level[node] = max((level[n] + (n in own and node not in own) for n in node.all_input_nodes), default=0)
    for nodes in _together(graph, own, level):
        if not any(_product(aligned.calls[n.name]) for n in nodes):
            continue
        inside = set(nodes)
        read = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside))
        rows = tuple(n for n in read if _lead(n, aligned))
        given = tuple(n for n in read if n not in rows)
        out = tuple(n for n in nodes if any(u not in inside for u in n.users))
        yield Part(tuple(nodes), rows, given, out)


def _together(graph: fx.Graph, own: set[fx.Node], level: Mapping[fx.Node, int]) -> Iterable[list[fx.Node]]:
    """Connected calls of one level, in the order of the graph."""
    home: dict[fx.Node, int] = {}
    members: dict[int, list[fx.Node]] = {}
    for index, node in enumerate(graph.nodes):
        if node not in own:
            continue
        joined = sorted({home[n] for n in node.all_input_nodes if n in own and level[n] == level[node]})
        into = joined[0] if joined else index
        moved = [n for i in joined for n in members.pop(i)]
        members[into] = [*moved, node]
        home |= dict.fromkeys(members[into], into)
    order = {node: i for i, node in enumerate(graph.nodes)}
    return [sorted(nodes, key=order.__getitem__) for nodes in members.values()]


def _by_position(node: fx.Node, aligned: Aligned) -> bool:
    """Whether a call makes every position of its result from that position of its operands and from what has no positions."""
    call, value = aligned.calls.get(node.name), node.meta.get("val")
    if call is None or call.rule is None or not is_tensor(value) or not value.is_floating_point():
        return False
    op, lead = target_of(node), _lead(node, aligned)
    if not lead or call.rule.kind not in KINDS or not _writable(node, call.rule.kind, op):
        return False
    pair = aligned.pair(call, call.rule.results[0], _place(lead, aligned))
    if pair is None or not all(c is None or call.free(c) for c in pair):
        return False
    for operand, dims in zip(_nodes((node.args, node.kwargs)), call.rule.operands, strict=True):
        own = _lead(operand, aligned)
        if own and aligned.pair(call, dims, _place(own, aligned)) == pair:
            continue
        if any(letter in pair for members in dims for letter in members) or own:
            return False
    return True


def _writable(node: fx.Node, kind: str, op: str) -> bool:
    """Whether a call can stand in a program."""
    if kind == "view" and op not in RESHAPES | MOVES:
        return False
    if kind == "random" and _op_name(node) not in DROPS:
        return False
    args, kwargs = arguments_of(node)
    return all(map(_plain, (*args, *kwargs.values())))


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, (fx.Node, *PLAIN))


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, lambda n: found.append(n))
    return found


def _place(lead: int, aligned: Aligned) -> Place:
    return Place(None if aligned.batch == 1 else 0, lead - 1)


def _lead(node: fx.Node, aligned: Aligned) -> int:
    value = node.meta.get("val")
    return aligned.lead(tensor_name(node), tuple(value.shape)) if is_tensor(value) else 0


def _product(call: Call) -> bool:
    return call.rule is not None and call.rule.kind == "matmul"


def _op_name(node: fx.Node) -> str:
    """ "aten.linear.default" of a call."""
    target = node.target
    assert isinstance(target, OpOverload)
    return f"{full_name(target).replace('::', '.')}.{overload_name(target)}"


def _pack(graph: fx.Graph, mask: fx.Node, parts: list[tuple[Part, str]]) -> None:
    """Make each part, with its program, one call."""
    now: dict[fx.Node, fx.Node] = {}
    for part, program in parts:
        last = part.nodes[-1]
        rows, given = ([now.get(n, n) for n in nodes] for nodes in (part.rows, part.given))
        with graph.inserting_before(last):
            made = emit(graph, packed, (mask, rows, given, program, 1.0), like=last)
            made.meta["differentiable"] = differentiable(made)
            for i, node in enumerate(part.out):
                now[node] = graph.call_function(operator.getitem, (made, i))
                now[node].meta = {**node.meta, "val": made.meta["val"][i]}
                node.replace_all_uses_with(now[node])
        for node in reversed(part.nodes):
            graph.erase_node(node)
    _sort(graph)


def _written(aligned: Aligned, part: Part, share: float) -> str:
    """The program of a part (planner/rule_packed.py)."""
    number = {node: f"%{i}" for i, node in enumerate((*part.rows, *part.given, *part.nodes))}
    positions = aligned.batch * aligned.length
    lines = []
    for node in part.nodes:
        rule, lead = aligned.calls[node.name].rule, _lead(node, aligned)
        assert rule is not None
        rows = [n for n in node.all_input_nodes if _lead(n, aligned)]
        elements = sum(fake(n).numel() for n in (*rows, node)) / positions
        product, view = rule.kind == "matmul", rule.kind == "view"
        args, kwargs = arguments_of(node)
        name = _op_name(node)
        if target_of(node) in RESHAPES:
            name, args, kwargs = "rows.reshape", [args[0], lead, list(fake(node).shape[lead:])], {}
        written = _text((args, kwargs), number)
        lines.append([name, *written, rule.flops / positions if product else 0, 0 if product or view else elements])
    leads = [_lead(n, aligned) for n in part.rows]
    out = [[int(number[n][1:]), _lead(n, aligned)] for n in part.out]
    found = {"share": share, "zero": aligned.keys.zero, "leads": leads, "lines": lines, "out": out}
    return json.dumps(found, separators=(",", ":"))


def _text(value: Any, number: Mapping[fx.Node, str]) -> Any:
    if isinstance(value, fx.Node):
        return number[value]
    if isinstance(value, Mapping):
        return {k: _text(v, number) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_text(v, number) for v in value]
    return str(value) if isinstance(value, torch.dtype | torch.memory_format) else value


def _sort(graph: fx.Graph) -> None:
    """Put every call behind what it reads, in the order of the graph where that leaves a choice."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    waits = {node: len(node.all_input_nodes) for node in order}
    ready = [(i, node) for node, i in order.items() if not waits[node]]
    heapq.heapify(ready)
    done: list[fx.Node] = []
    while ready:
        _, node = heapq.heappop(ready)
        done.append(node)
        for user in node.users:
            waits[user] -= 1
            if not waits[user]:
                heapq.heappush(ready, (order[user], user))
    for before, node in pairwise(done):
        before.append(node)

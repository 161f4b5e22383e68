"""Lowering, first pass: the captured graph on local shapes, with one node per change of placement.

Each op is emitted once per rank on the sizes its choices leave it; a tensor wanted in another placement than it is produced in
goes through one chain of `shardwright::transition` nodes, shared by all who want it. Parameters enter by group: gathered
where they are stored in chunks, their gradient reductions bucketed. What runs is injected (`Emit`): this file makes no
collectives and no choices.

With microbatches there are three graphs: `entry` (stored parameters -> what the loop uses), `prologue` (inputs -> slices and
label counts of the whole batch) and `body` (one microbatch). With one microbatch `body` holds everything.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..errors import UsageError
from ..planner.assign import Assignment
from ..planner.choices import implementation
from ..planner.outline import Op
from ..planner.placement import Placement, R, V, local_dims, shape_of, steps
from ..planner.ring import split_by
from .experiment import fill
from .factories import on_device
from .fuse_bias import fuse_bias
from .localize import local_form
from .lowered import After, CallForm, Emit, Emitted, Feed, Lowered, Share
from .share_heads import share_heads
from .shop import Shop
from .summarize import Call, Summary

AGAIN = "again"
"""Marks a node (in its meta) that the backward pass runs again; a compiler reads the tags beside it."""
RUNS_AGAIN = {AGAIN: True, "recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": 0}


def lower(
    summary: Summary, assignment: Assignment, axis_sizes: tuple[int, ...], emit: Emit, *,
    microbatches: int = 1, outputs: Sequence[str] = (), local_batch: bool = False, share: Share | None = None,
) -> Lowered:  # fmt: skip
    """Lower for the rank `emit` speaks for. `outputs` are returned beside the loss, whole on every rank.

    With `local_batch` every data rank passes its own part of the batch instead of the global one. `share` says what a summary
    of some of the ops takes from the others and gives to them.
    """
    shop = Shop(summary, assignment, axis_sizes, emit, microbatches)
    shop.data_axes = assignment.data_axes if local_batch else ()
    looped = microbatches > 1 or (share is not None and share.looped)
    body = _Graph(shop, microbatched=looped)
    if share is not None:
        shop.order = dict(share.order)
        body.take(share.takes)
    hoisted = _hoisted(shop) if microbatches > 1 else frozenset()
    body.outside = hoisted
    loss = summary.outline.loss
    for op in summary.outline.ops:
        if not any(r.tensor in hoisted for r in op.results):
            body.op(op)
    whole: Placement = (R,) * len(axis_sizes)
    returned = [] if share is None else [body.get(name, placement) for name, placement in share.gives]
    if loss:
        returned.append(body.get(loss, body.produced[loss] if looped else (*whole, R)))
    returned += [body.get(name, body.apart(name) or (*whole, R)) for name in outputs]
    module = body.finish(returned)
    lowered = Lowered(module, tuple(body.feeds), loss, tuple(outputs))
    if looped:
        _surround(shop, body, hoisted, lowered)
    return lowered


def _surround(shop: Shop, body: _Graph, hoisted: frozenset[str], lowered: Lowered) -> None:
    """Entry and prologue graphs for a microbatched body, and how its loss and outputs become whole after it."""
    prologue = _Graph(shop, microbatched=False)
    for op in shop.summary.outline.ops:
        if any(r.tensor in hoisted for r in op.results):
            prologue.op(op)
    cuts = [f for f in body.feeds if f.kind == "cut"]
    lowered.prologue = prologue.finish([prologue.get(f.tensor, (*f.placement, R)) for f in cuts])
    lowered.prologue_feeds = tuple(prologue.feeds)
    entry = _Graph(shop, microbatched=False)
    wanted = [(f.tensor, f.placement) for f in body.feeds if f.kind == "step"]
    lowered.entry = entry.finish([entry.get(name, (*placement, R)) for name, placement in wanted])
    lowered.entry_feeds, lowered.entry_outputs = tuple(entry.feeds), tuple(wanted)
    loss = shop.summary.outline.loss
    if loss:
        lowered.loss_placement = body.produced[loss][:-1]
        lowered.after[loss] = After(shop.wholes(loss, lowered.loss_placement))
    for name in lowered.outputs:
        placement = body.apart(name)
        if placement is not None:
            place = shop.place(name, placement) if placement[-1].is_split else None
            lowered.after[name] = After(shop.wholes(name, placement[:-1]), place)


def _hoisted(shop: Shop) -> frozenset[str]:
    """Tensors computed before the microbatch loop: label counts, whole tensors that are cut, and what they need."""
    need = set(shop.summary.batch_cut.hoisted)
    for op in shop.summary.outline.ops:
        for use, state in zip(op.operands, shop.micro_states(op)[0], strict=True):
            if state.is_split and shop.summary.batch_cut.states.get(use.tensor, "R") == "R":
                need.add(use.tensor)
    for op in reversed(shop.summary.outline.ops):
        if any(r.tensor in need for r in op.results):
            need.update(use.tensor for use in op.operands)
    tensors = shop.summary.outline.tensors
    bad = [n for n in need if tensors[n].role == "parameter" or tensors[n].differentiable]
    if bad:
        raise UsageError(f"{bad[0]} couples the samples of a batch: use one microbatch (micro_batch = the local batch)")
    return frozenset(n for n in need if tensors[n].role == "activation")


class _Graph:
    """One fx graph under construction; `env` maps (tensor, placement) to the node that holds it."""

    def __init__(self, shop: Shop, *, microbatched: bool) -> None:
        self.shop, self.microbatched = shop, microbatched
        self.graph = fx.Graph()
        self.env: dict[tuple[str, Placement], fx.Node] = {}
        self.produced: dict[str, Placement] = {}
        self.feeds: list[Feed] = []
        self.outside: frozenset[str] = frozenset()
        self._last_placeholder: fx.Node | None = None
        self._seed: fx.Node | None = None
        self._done: set[tuple[str, ...]] = set()
        self._again = 0
        self._cut_sizes = (*shop.sizes, shop.m if microbatched else 1)

    # -- values

    def take(self, tensors: Sequence[tuple[str, Placement]]) -> None:
        """Placeholders of tensors that other graphs make."""
        for name, placement in tensors:
            self.env[name, placement] = self.placeholder(Feed(_plain(name), "taken", name, placement))
            self.produced[name] = placement

    def get(self, tensor: str, placement: Placement) -> fx.Node:
        """The node holding `tensor` as `placement` (microbatch axis last), made on first demand."""
        found = self.env.get((tensor, placement))
        if found is not None:
            return found
        role = self.shop.tensors[tensor].role
        if role == "parameter":
            self._parameter(tensor, placement[:-1])
        elif tensor not in self.produced:
            self._outside(tensor, placement)
        if (tensor, placement) not in self.env and tensor in self.produced:
            self._chain(tensor, self.produced[tensor], placement)
        return self.env[tensor, placement]

    def apart(self, tensor: str) -> Placement | None:
        """The placement in which a result of one microbatch leaves the loop, where results differ between microbatches."""
        made = self.produced.get(tensor)
        return (*self.shop.cut_of(made), made[-1]) if made is not None and made[-1] != R else None

    def _chain(self, tensor: str, source: Placement, target: Placement) -> None:
        node = self.env[tensor, source]
        if source[-1] != target[-1]:
            raise UsageError(f"{tensor} would be communicated between microbatches: use one microbatch")
        dims = local_dims(self.shop.tensors[tensor].dims, source[-1:], self._cut_sizes[-1:])
        again = (tensor, target[:-1]) in self.shop.assignment.again.copies
        for step in steps(dims, source[:-1], target[:-1], self.shop.sizes):
            node = self._call(self.shop.emit.transition(step, dims), node, f"{tensor} {step.source} -> {step.target}")
            node.meta |= RUNS_AGAIN if again else {}
        self.env[tensor, target] = node

    def _call(self, emitted: Emitted, first: Any, comment: str) -> fx.Node:
        target, rest = emitted
        node = self.graph.call_function(target, (first, *rest))
        node.meta["comment"] = comment
        return node

    def placeholder(self, feed: Feed) -> fx.Node:
        """Add a placeholder (always before the first op)."""
        if self._last_placeholder is None:
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                node = self.graph.placeholder(feed.node)
        else:
            with self.graph.inserting_after(self._last_placeholder):
                node = self.graph.placeholder(feed.node)
        self._last_placeholder = node
        self.feeds.append(feed)
        return node

    def _outside(self, tensor: str, placement: Placement) -> None:
        """Inputs, buffers and constants; in a microbatched body also slices and counts from the prologue."""
        if not self.microbatched or (tensor not in self.outside and not placement[-1].is_split):
            home = self.shop.home(tensor)
            self.env[tensor, (*home, R)] = self.placeholder(Feed(_plain(tensor), "whole", tensor, home))
            self.produced[tensor] = (*home, R)
            return
        base = self.shop.cut_of(placement)
        place = self.shop.place(tensor, (*base, placement[-1])) if placement[-1].is_split else None
        name = f"{_plain(tensor)}_{len(self.feeds)}"
        self.env[tensor, (*base, placement[-1])] = self.placeholder(Feed(name, "cut", tensor, base, place))
        if base != placement[:-1]:
            self._chain(tensor, (*base, placement[-1]), placement)

    # -- parameters

    def _parameter(self, tensor: str, wanted: Placement) -> None:
        storage = self.shop.assignment.storage[tensor]
        if self.microbatched and storage.zero < 3 and not self.shop.emit.streams(self.shop.group_of[tensor]):
            name = f"{_plain(tensor)}_{len(self.feeds)}"
            self.env[tensor, (*wanted, R)] = self.placeholder(Feed(name, "step", tensor, wanted))
            return
        group = self.shop.group_of[tensor]
        if group not in self._done:
            self._done.add(group)
            self._group(group)
        if (tensor, (*wanted, R)) not in self.env:
            self._chain(tensor, (*storage.home, R), (*wanted, R))

    def _group(self, group: tuple[str, ...]) -> None:
        """Bring a parameter group in: gather its chunks, bucket its reductions, then what is left, one by one."""
        shop, storage = self.shop, self.shop.assignment.storage
        first = storage[group[0]]
        nodes = [self.placeholder(Feed(_plain(name), "chunk", name, storage[name].home)) for name in group]
        now = [storage[name].home for name in group]
        shapes = [shape_of(local_dims(shop.tensors[n].dims, storage[n].home, shop.sizes)) for n in group]
        trainable = shop.trainable[group[0]]
        if first.zero:
            emitted = shop.emit.gather(shapes, first.zero_axes, keep=first.zero < 3, trainable=trainable)
            before = set(self.graph.nodes)
            nodes = self._spread(shop.emit.fetched(group, emitted) or emitted, nodes, "gather")
            if first.zero == 3:
                self._again += 1
                again = {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": self._again}
                for node in set(self.graph.nodes) - before:
                    node.meta.update(again)  # what a compiler keeps of a gather is the chunk
            arrived = V if trainable else R
            now = [tuple(arrived if a in first.zero_axes else s for a, s in enumerate(p)) for p in now]
        else:
            fetch = shop.emit.fetched(group, None)
            nodes = self._cast(nodes if fetch is None else self._spread(fetch, nodes, "fetch"), group)
        wants = [(i, w) for i, name in enumerate(group) for w in shop.wants.get(name, ())]
        held = [(nodes[i], now[i]) for i, _ in wants]
        for axes in shop.reductions([(at, w) for (_, w), (_, at) in zip(wants, held, strict=True)]):
            members = [k for k, (_, w) in enumerate(wants) if shop.reduced(held[k][1], w, axes)]
            reduced = self._spread(
                shop.emit.reduce(axes), [held[k][0] for k in members], f"reduce over axes {', '.join(map(str, axes))}"
            )
            for k, node in zip(members, reduced, strict=True):
                held[k] = node, tuple(V if a in axes else s for a, s in enumerate(held[k][1]))
        for (i, want), (node, at) in zip(wants, held, strict=True):
            dims = shop.tensors[group[i]].dims
            for step in steps(dims, at, want, shop.sizes):
                node = self._call(shop.emit.transition(step, dims), node, f"{group[i]} {step.source} -> {step.target}")
            self.env[group[i], (*want, R)] = node

    def _cast(self, nodes: list[fx.Node], group: tuple[str, ...]) -> list[fx.Node]:
        emitted = self.shop.emit.cast()
        if emitted is None or not self.shop.tensors[group[0]].dtype.startswith(("float", "bfloat")):
            return nodes
        return [self._call(emitted, node, "compute dtype") for node in nodes]

    def _spread(self, emitted: Emitted, nodes: list[fx.Node], comment: str) -> list[fx.Node]:
        listed = self._call(emitted, list(nodes), comment)
        return [self.graph.call_function(operator.getitem, (listed, i)) for i in range(len(nodes))]

    # -- ops

    def op(self, op: Op) -> None:
        """Emit one op on the sizes its choices leave it."""
        wanted, produced = self.shop.placed(op)
        if not self.microbatched:
            wanted, produced = [(*p[:-1], R) for p in wanted], [(*p[:-1], R) for p in produced]
        call = self.shop.summary.calls[op.name]
        operands = [self.get(u.tensor, p) for u, p in zip(op.operands, wanted, strict=True)]
        for use, operand in zip(op.operands, operands, strict=True):
            tensor = self.shop.tensors[use.tensor]
            if tensor.role == "parameter" and len(tensor.dims) == 1:
                operand.meta["bias"] = True
        target, args, kwargs = self._special(op, self._local_form(op, call))
        node = self.graph.call_function(target, fill(args, operands), fill(kwargs, operands))
        node.meta["comment"] = f"{op.source}"
        node.meta |= {"op": op.name} | (RUNS_AGAIN if op.name in self.shop.assignment.again.ops else {})
        for use, placement in zip(op.results, produced, strict=True):
            self.produced[use.tensor] = placement
            index = use.tensor.rpartition(":")[2] if ":" in use.tensor else None
            made = node if index is None else self.graph.call_function(operator.getitem, (node, int(index)))
            made.meta |= {key: value for key, value in node.meta.items() if key in RUNS_AGAIN and key != AGAIN}
            self.env[use.tensor, placement] = made

    def _chosen(self, op: Op) -> tuple[str, ...]:
        """The op's choice on every axis, the microbatch axis last where it applies."""
        own = tuple(self.shop.assignment.choices[op.name])
        cut = self.microbatched and self.shop.m > 1
        return (*own, self.shop.summary.batch_cut.choice[op.name]) if cut else own

    def _splits(self, op: Op) -> list[tuple[int, int]]:
        """(axis, factor index) of every split of this op, the microbatch axis included where it applies."""
        return [(axis, factor) for axis, choice in enumerate(self._chosen(op)) for factor in split_by(op, choice)]

    def _local_form(self, op: Op, call: Call) -> CallForm:
        sizes = [f.size for f in op.factors]
        for axis, factor in self._splits(op):
            sizes[factor] //= self._cut_sizes[axis]
        return local_form(op, call, sizes)

    def _special(self, op: Op, form: CallForm) -> CallForm:
        """Implementations of their own, seeded random ops, and factories on the device that runs."""
        target, args, kwargs = form
        emit = self.shop.emit
        kwargs = on_device(target, kwargs, emit.device)
        form = target, args, kwargs
        for axis, choice in enumerate(self._chosen(op)):
            if name := implementation(op, choice):
                form = emit.implementation(name, axis, form)
        real = sorted({axis for axis, _ in self._splits(op) if axis < len(self.shop.sizes)})
        salt = self.shop.order[op.name] * (1 << 20) + emit.shard_index(real)
        seeded = emit.random(form, salt)
        if seeded is None:
            return form
        if self._seed is None:
            self._seed = self.placeholder(Feed("seed", "seed"))
        return seeded(self._seed)

    def finish(self, returned: Sequence[fx.Node]) -> fx.GraphModule:
        """Close the graph: outputs, dead code, a module."""
        self.graph.output(tuple(returned))
        self.graph.eliminate_dead_code()
        fuse_bias(self.graph)
        share_heads(self.graph)
        return fx.GraphModule(torch.nn.Module(), self.graph)


def _plain(name: str) -> str:
    return name.replace(":", "_").replace(".", "_")

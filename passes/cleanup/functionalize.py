"""Replace in-place ops by out-of-place ones.

    y = x[:, 1:]                       z = add(x[:, 1:], 1)
    y.add_(1)            becomes       x1 = slice_scatter(x, z, 1, 1)
    return x                           return x1

Tensors that share memory are known exactly: traced fake tensors share storage. A write goes back through the chain of
views to the base tensor; later uses of other views are taken again from the new base. What a buffer holds at the end
becomes an output (`Program.writes`); writes to parameters and inputs are problems.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..base import Contract, Program, emit, fake, is_tensor
from ..gradients import differentiable
from ..torch_compat import OpOverload, is_mutable, storage_key
from .batch_norm import open_batch_norms
from .check import written_argument
from .views import in_place_twin, write_back


@dataclass(frozen=True)
class Functionalize(Contract):
    """No op of the graph changes its arguments afterwards."""

    name: str = "functionalize"
    requires: tuple[str, ...] = ()
    provides: tuple[str, ...] = ("functional",)

    def apply(self, program: Program) -> Program:
        open_batch_norms(program.graph)
        writes = {n: t for n in program.graph.nodes if (t := _written(n, program)) is not None}
        if writes and not program.problems:
            _return_buffers(program, {storage_key(fake(t)) for t in writes.values()})
            _Rewriter(program, writes).run()
        return program


def _return_buffers(program: Program, written: set[int]) -> None:
    """Buffers that are written to become outputs, after all others."""
    buffers = [
        n for n in program.graph.nodes
        if n.op == "placeholder" and n.meta["role"] == "buffer" and storage_key(fake(n)) in written
    ]  # fmt: skip
    program.writes = tuple(n.meta["fqn"] for n in buffers)
    output = next(reversed(program.graph.nodes))
    output.args = ((*output.args[0], *buffers),)


def _written(node: fx.Node, program: Program) -> fx.Node | None:
    """The node whose memory a call writes, or None; writes that cannot be replaced become problems."""
    if node.target is torch.ops.aten.detach_.default:
        node.target = torch.ops.aten.detach.default
        return None
    if not isinstance(node.target, OpOverload) or not is_mutable(node.target):
        return None
    first = written_argument(node)
    if first is None or in_place_twin(node.target) is None:
        program.problems.append(f"{node.target} changes its arguments in place: {node.meta['source']}")
        return None
    return first


@dataclass
class _Rewriter:
    """Walks the graph once. `value[n]` is what node n stands for now, valid while `seen[n]` equals its storage's version."""

    program: Program
    writes: dict[fx.Node, fx.Node]
    value: dict[fx.Node, fx.Node] = field(default_factory=dict)
    seen: dict[fx.Node, int] = field(default_factory=dict)
    version: dict[int, int] = field(default_factory=dict)
    parent: dict[fx.Node, fx.Node] = field(default_factory=dict)
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    call: dict[fx.Node, tuple[Any, Any, Any]] = field(default_factory=dict)

    def run(self) -> None:
        self.version = {storage_key(fake(t)): 0 for t in self.writes.values()}
        for node in list(self.program.graph.nodes):
            if node.op == "placeholder":
                self.seen[node] = 0
                continue
            with self.program.graph.inserting_before(node):
                self._visit(node)
        for node in reversed(list(self.writes)):
            self.program.graph.erase_node(node)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "call_function":
            self._register(node)
        if node in self.writes:
            self._write(node)
            return
        node.args = fx.map_arg(node.args, self._now)  # type: ignore[assignment]
        node.kwargs = fx.map_arg(node.kwargs, self._now)  # type: ignore[assignment]
        if node.op == "call_function":
            node.meta["differentiable"] = differentiable(node)

    def _register(self, node: fx.Node) -> None:
        """Note of which earlier node this one is a view."""
        value = fake(node)
        self.call[node] = (node.target, node.args, node.kwargs)
        if not is_tensor(value):
            return
        self.seen[node] = self.version.get(storage_key(value), 0)
        # The pieces of a split were called with present values; their memory is that of the original argument.
        call = self.call[node.args[0]] if node.target is operator.getitem else self.call[node]  # type: ignore[index]
        candidates: list[fx.Node] = []
        fx.map_arg(call[1:], candidates.append)
        for source in candidates:
            if is_tensor(fake(source)) and storage_key(fake(source)) == storage_key(value):
                self.parent[node] = self.same.get(source, source)

    def _now(self, node: fx.Node) -> fx.Node:
        """The node that holds the present value of `node`."""
        node = self.same.get(node, node)
        value = fake(node)
        if not is_tensor(value) or (key := storage_key(value)) not in self.version:
            return node
        if self.seen[node] != self.version[key]:
            self.value[node] = self._view_again(node)
            self.seen[node] = self.version[key]
        return self.value.get(node, node)

    def _view_again(self, node: fx.Node) -> fx.Node:
        if node not in self.parent:
            return self.value.get(node, node)
        if node.target is operator.getitem:
            pieces, index = node.args
            return self._again(operator.getitem, (self._again(*self.call[pieces], like=pieces), index), {}, like=node)  # type: ignore[index, arg-type]
        return self._again(*self.call[node], like=node)

    def _again(self, target: Any, args: Any, kwargs: Any, *, like: fx.Node) -> fx.Node:
        """Take a view again, of what its argument is now."""
        if target is not operator.getitem:
            args, kwargs = fx.map_arg(args, self._now), fx.map_arg(kwargs, self._now)
        made = emit(self.program.graph, target, args, kwargs, like=like)
        made.meta["differentiable"] = differentiable(made)
        return made

    def _write(self, node: fx.Node) -> None:
        target = self.same.get(self.writes[node], self.writes[node])
        args, kwargs = fx.map_arg(node.args, self._now), fx.map_arg(node.kwargs, self._now)
        twin = in_place_twin(node.target)  # type: ignore[arg-type]
        assert twin is not None
        made = twin(self.program.graph, args, kwargs, node)
        made.meta["differentiable"] = differentiable(made)
        self._store(target, made, node)
        self.same[node] = target

    def _store(self, target: fx.Node, made: fx.Node, write: fx.Node) -> None:
        """`made` becomes the value of `target` and, through the views between, of its base."""
        key = storage_key(fake(target))
        if target in self.parent:
            source = self.parent[target]
            if target.target is torch.ops.aten.detach.default and source.meta.get("differentiable"):
                self.program.problems.append(
                    f"a tensor that needs a gradient is changed under no_grad: {write.meta['source']}"
                )
            whole = write_back(self.program.graph, target, self._now(source), made)
            if whole is None:
                self.program.problems.append(
                    f"{write.target} through {target.target} is not supported: {write.meta['source']}"
                )
                return
            whole.meta["differentiable"] = differentiable(whole) if whole is not made else made.meta["differentiable"]
            self._store(source, whole, write)
        else:
            self.version[key] += 1
        self.value[target] = made
        self.seen[target] = self.version[key]

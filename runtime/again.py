"""Ops whose results autograd does not keep: the backward pass runs them again from what is kept (recompute).

Such an op stands in an eager lowered graph as a call of `Again(op)`. In a forward pass under `Regather` it runs as ever, and leaves
a recipe: the op, and its operands, each as it is or as a handle of what makes that again. What lies in its results' storages is
saved as handles, and so is what it saves for its own backward pass beside operands: its k-th saved tensor is the k-th that
it saves when it runs again, as in `torch.utils.checkpoint`.

In the backward pass a recipe is followed at most once, when the first handle of it is resolved, after the recipes that its operands
need. Random ops draw the numbers they drew (passes/random.py), and collectives run in the order of the graph on every rank.
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UsageError
from ..passes.shard import AGAIN
from . import collectives
from .regather import CHANGED, Handle, Recipe, Regather, active_regather


class Again:
    """An op that leaves a recipe; called as the op is."""

    def __init__(self, target: Callable[..., Any]) -> None:
        self.target = target
        self.__name__ = f"again_{getattr(target, '__name__', 'op')}".replace(".", "_")
        self.__module__ = "shardwright"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The op's result; under an active `Regather`, with a recipe of it."""
        regather = active_regather()
        if regather is None or not torch.is_grad_enabled():
            return self.target(*args, **kwargs)
        return Rerun(self.target, args, kwargs, regather).first(regather, args, kwargs)


class AgainWhereCopied(Again):
    """A view that copies where strides ask for it: a recipe where it did, and as it is where it lies in its operand."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The view or copy; autograd saves nothing for it."""
        result, regather = self.target(*args, **kwargs), active_regather()
        copied = result.untyped_storage()._cdata not in _storages((args, kwargs))
        if copied and regather is not None and torch.is_grad_enabled():
            regather.know(result, Rerun(self.target, args, kwargs, regather), 0)
        return result


class Rerun(Recipe):
    """The recipe of one call: slots are its results, and from the end backwards what it saved beside its operands."""

    crowded = False

    def __init__(self, target: Callable[..., Any], args: Any, kwargs: Any, regather: Regather) -> None:
        self.target = target
        self.ledger = collectives.active_ledger()
        self.handles: Counter[int] = Counter()
        self.resolved: Counter[int] = Counter()
        self.saved = 0
        self.operands = _storages((args, kwargs))
        self.form = tree_map(lambda x: _Operand(x, regather) if isinstance(x, Tensor) else x, (args, kwargs))

    def first(self, regather: Regather, args: Any, kwargs: Any) -> Any:
        """The forward pass: run, and have what it makes saved as handles."""
        before, regather.running = regather.running, self
        try:
            result = self.target(*args, **kwargs)
        finally:
            regather.running = before
        for slot, x in enumerate(_tensors(result)):
            if x.untyped_storage()._cdata not in self.operands:
                regather.know(x, self, slot)
        return result

    def inner(self, x: Tensor) -> Handle | None:
        """A handle for what the op saves while it runs; None for an operand."""
        if x.untyped_storage()._cdata in self.operands:
            return None
        self.saved += 1
        self.handles[-self.saved] += 1
        return Handle(self, -self.saved)

    def follow(self, regather: Regather) -> Sequence[Tensor]:
        """Run again; raises UsageError where a parameter was written to since the forward pass."""
        args, kwargs = tree_map(lambda x: x.again(regather) if isinstance(x, _Operand) else x, self.form)
        operands, saved = _storages((args, kwargs)), list[Tensor]()

        def keep(x: Tensor) -> int:
            if x.untyped_storage()._cdata not in operands:
                saved.append(x.detach())
            return 0

        with torch.enable_grad(), collectives.backward_phase(self.ledger), _hooks(keep):
            result = self.target(*args, **kwargs)
        if len(saved) != self.saved:
            raise UsageError(f"{self.target} saved {len(saved)} tensors when it ran again and {self.saved} before")
        return [*(x.detach() for x in _tensors(result)), *reversed(saved)]


class _Operand:
    """A tensor that an op took: itself, a handle of what makes it again, or of what has left the device."""

    def __init__(self, x: Tensor, regather: Regather) -> None:
        self.requires_grad = x.requires_grad
        made = regather.handle(x)
        if made is None and regather.leaving is not None:
            made = regather.leaving.pack(x)
        self.held: Any = x.detach() if made is None or isinstance(made, Tensor) else made
        self.version = x._version

    def again(self, regather: Regather) -> Tensor:
        """The tensor, a leaf; raises UsageError where it was written to."""
        if isinstance(self.held, Tensor):
            if self.held._version != self.version:
                raise UsageError(CHANGED)
            x = self.held
        elif isinstance(self.held, Handle):
            x = regather.resolve(self.held)
        else:
            assert regather.leaving is not None
            x = regather.leaving.unpack(self.held)
        return x.detach().requires_grad_(self.requires_grad)


def _hooks(keep: Callable[[Tensor], int]) -> contextlib.AbstractContextManager[None]:
    """Autograd hands what it would save to `keep`; the graph it makes is never walked."""

    def never(_: int) -> Tensor:
        raise AssertionError("the graph of an op that ran again was walked")

    return torch.autograd.graph.saved_tensors_hooks(keep, never)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _storages(values: Any) -> frozenset[int]:
    return frozenset(x.untyped_storage()._cdata for x in _tensors(values))


COPYING = frozenset(
    {torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default, torch.ops.aten.flatten.using_ints}
)
"""Views that may copy, as they do of heads that were gathered or split."""


def with_recipes(body: fx.GraphModule) -> fx.GraphModule:
    """`body` with every op that lowering marked as one that runs again called through `Again`, in place.

    So are views of their results that may copy: such a copy would be held in place of what is made again.
    """
    made: set[fx.Node] = set()
    for node in body.graph.nodes:
        if node.op != "call_function":
            continue
        seen = bool(node.args) and node.args[0] in made and _aliases(node.target)
        if node.meta.get(AGAIN):
            node.target = Again(node.target)
        elif seen and node.target in COPYING:
            node.target = AgainWhereCopied(node.target)
        elif not seen:
            continue
        made.add(node)
    if made:
        body.recompile()
    return body


def _aliases(target: Any) -> bool:
    """Whether results of an op may lie in its first operand."""
    if target is operator.getitem:
        return True
    schema = getattr(target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)

"""What autograd saves for an op, and whether its result is a view: observed on fake CPU tensors, once per signature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .random import own_form
from .torch_compat import StorageRef, fake_mode

SMALL = 64
"""Saved tensors of at most so many bytes weigh nothing (scalars, mostly)."""


@dataclass(frozen=True)
class Observation:
    """Operand and result indices that are saved, new tensors (shape, bytes), and the operand the result is a view of.

    `inside` are bytes that the op holds at its fullest moment beyond what is left of it (an op made of several).
    """

    operands: tuple[int, ...]
    results: tuple[int, ...]
    new: tuple[tuple[tuple[int, ...], int], ...]
    alias: int | None
    inside: int = 0


class Observer:
    """Runs each distinct op once; equal ops (target, arguments, shapes, strides, dtypes) share the observation.

    Ops that drop run as the op that a lowered graph has for them: its mask is one byte per element, on a CPU too.
    """

    def __init__(self) -> None:
        self._mode = fake_mode()
        self._seen: dict[str, Observation] = {}

    def observe(self, node: fx.Node) -> Observation:
        """Observe one call_function node with meta["val"] and meta["differentiable"] on its inputs."""
        key = _key(node)
        if key not in self._seen:
            self._seen[key] = self._run(node)
        return self._seen[key]

    def _run(self, node: fx.Node) -> Observation:
        operands: list[torch.Tensor] = []
        saved: list[torch.Tensor] = []

        def fake(arg: fx.Node) -> torch.Tensor:
            value = arg.meta["val"]
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            operands.append(made.requires_grad_(_differentiable(arg) and value.dtype.is_floating_point))
            return operands[-1]

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with self._mode:
            args, kwargs = fx.map_arg(node.args, fake), fx.map_arg(node.kwargs, fake)
            kwargs = {k: torch.device("cpu") if isinstance(v, torch.device) else v for k, v in kwargs.items()}
            args = tree_map(lambda v: torch.device("cpu") if isinstance(v, torch.device) else v, args)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                own = own_form((node.target, args, kwargs), torch.zeros((), dtype=torch.int64))  # type: ignore[arg-type]
                target, args, kwargs = own or (node.target, args, kwargs)
                with _Made() as made:
                    out = target(*args, **kwargs)  # type: ignore[operator]
                inside = made.most - made.alive()
        results = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
        return replace(_sort(operands, results, saved), inside=inside)


class _Made(TorchDispatchMode):
    """The bytes alive at once of what the calls inside make."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in given:
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = StorageRef(storage), storage.nbytes()
        self.most = max(self.most, self.alive())
        return result

    def alive(self) -> int:
        """Bytes of what is alive now."""
        self.known = {key: entry for key, entry in self.known.items() if not entry[0].expired()}
        return sum(size for _, size in self.known.values())


def _sort(operands: list[torch.Tensor], results: list[torch.Tensor], saved: list[torch.Tensor]) -> Observation:
    of_operand = {_storage(t): i for i, t in reversed(list(enumerate(operands)))}
    of_result = {_storage(t): i for i, t in reversed(list(enumerate(results)))}
    alias = next((of_operand[_storage(r)] for r in results if _storage(r) in of_operand), None)
    new: dict[int, tuple[tuple[int, ...], int]] = {}
    from_operand, from_result = set(), set()
    for tensor in saved:
        key = _storage(tensor)
        if key in of_operand:
            from_operand.add(of_operand[key])
        elif key in of_result:
            from_result.add(of_result[key])
        elif tensor.untyped_storage().nbytes() > SMALL:
            new.setdefault(key, (tuple(tensor.shape), tensor.untyped_storage().nbytes()))
    return Observation(tuple(sorted(from_operand)), tuple(sorted(from_result)), tuple(new.values()), alias)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _differentiable(node: fx.Node) -> bool:
    if node.op == "call_function" and len(node.args) == 2 and isinstance(node.args[0], fx.Node):
        flags: Any = node.args[0].meta.get("differentiable")
        if isinstance(flags, tuple | list) and isinstance(node.args[1], int):
            return bool(flags[node.args[1]])
    return bool(node.meta.get("differentiable", False))


def _key(node: fx.Node) -> str:
    def side(arg: fx.Node) -> str:
        value = arg.meta["val"]
        return f"{tuple(value.shape)}{value.stride()}{value.dtype}{_differentiable(arg)}"

    return f"{node.target}{fx.map_arg(node.args, side)}{fx.map_arg(node.kwargs, side)}"

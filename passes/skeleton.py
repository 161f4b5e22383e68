"""A copy of the user's module without its weights: what later captures (other shapes, eval mode) are made from."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UsageError


def skeleton(model: nn.Module) -> nn.Module:
    """Deep copy of `model` with meta parameters and shared buffers; ties between parameters are kept."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = empty
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)


def to_meta(value: Any) -> Any:
    """The same nested value with meta tensors of equal shape and dtype."""
    return torch.utils._pytree.tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, value)


class Tree(nn.Module):
    """A module that carries parameters and buffers under their original names, and looks like the original otherwise.

    It is an instance of the original's class too (see `like`), so methods, indexing and iteration work; attributes it lacks
    are the original's. It cannot be called: only the whole module has a plan. It has no methods of its own: the original's
    submodules may have any names.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a part has no plan of its own."""
        name = type(self.__dict__["_origin"]).__name__
        raise UsageError(f"{name} is part of a planned module and cannot be called by itself; call the whole module")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            origin = self.__dict__.get("_origin")
            if origin is None:
                raise
        return getattr(origin, name)


def grow(tree: Tree, origin: nn.Module) -> None:
    """Add a tree for every submodule of `origin`, in order; a module that stands in two places is one tree."""
    tree.__dict__["_origin"] = origin
    made: dict[int, Tree] = {id(origin): tree}
    for name, module in origin.named_modules(remove_duplicate=False):
        if not name:
            continue
        parent, _, last = name.rpartition(".")
        if id(module) not in made:
            made[id(module)] = bare = like(Tree, type(module))
            bare.__dict__["_origin"] = module
        # Written to the registries directly: forwarded attributes of the original must not count as taken names.
        part_of(tree, parent)._modules[last] = made[id(module)]


def put(tree: Tree, name: str, value: Tensor | nn.Parameter, *, persistent: bool = True) -> None:
    """Register a parameter or buffer at its dotted name."""
    path, _, last = name.rpartition(".")
    here = part_of(tree, path)
    if isinstance(value, nn.Parameter):
        here._parameters[last] = value
        return
    here._buffers[last] = value
    if not persistent:
        here._non_persistent_buffers_set.add(last)


def part_of(tree: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path. Unlike `get_submodule` it is not misled by methods that have a submodule's name."""
    for name in path.split(".") if path else ():
        found = tree._modules[name]
        assert found is not None
        tree = found
    return tree


def buffer_of(tree: nn.Module, name: str) -> Tensor:
    """The buffer at a dotted name."""
    path, _, last = name.rpartition(".")
    found = part_of(tree, path)._buffers[last]
    assert found is not None
    return found


T = TypeVar("T", bound=Tree)


def like(base: type[T], original: type[nn.Module]) -> T:
    """An empty module of a class that is both `base` and `original`, `base` first; `original`'s constructor does not run."""
    try:
        made = _joined(base, original)
    except TypeError:  # the original's class cannot be derived from
        made = base
    module = made.__new__(made)
    nn.Module.__init__(module)
    return module


@functools.cache
def _joined(base: type[T], original: type[nn.Module]) -> type[T]:
    if original is nn.Module:
        return base
    return types.new_class(
        original.__name__, (base, original), exec_body=lambda space: space.update(_space(base, original))
    )


def _space(base: type[Tree], original: type[nn.Module]) -> dict[str, Any]:
    """The body of a joined class: `base`'s forward under the original's signature, which libraries inspect."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    with contextlib.suppress(TypeError, ValueError):
        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    return {"forward": forward, "__module__": original.__module__, "__doc__": original.__doc__}

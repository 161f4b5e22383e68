"""Two tables for functionalisation: the out-of-place twin of an in-place op, and how a write goes back through a view."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..base import emit, fake
from ..torch_compat import OpOverload, arguments, full_name, name_of, overload_name

aten = torch.ops.aten

Twin = Callable[[fx.Graph, Any, Any, fx.Node], fx.Node]
"""(graph, args, kwargs, in-place node) -> node with the new value of the first argument."""


def in_place_twin(target: OpOverload) -> Twin | None:
    """What computes the new value an in-place op writes to its first argument; None where it is not known."""
    if target in _SPECIAL:
        return _SPECIAL[target]
    if torch.Tag.inplace_view in target.tags:
        return None
    writes = [a.alias_info is not None and a.alias_info.is_write for a in arguments(target)]
    if sum(writes) != 1 or not writes[0]:
        return None
    namespace, name = full_name(target).split("::")
    if match := re.fullmatch(r"__i(\w+)__", name):
        name = f"__{match[1]}__"
    elif name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    else:
        return None
    packet = getattr(getattr(torch.ops, namespace), name, None)
    overload = getattr(packet, overload_name(target), None)
    return None if overload is None else _same_args(overload)


def _same_args(overload: OpOverload) -> Twin:
    def twin(graph: fx.Graph, args: Any, kwargs: Any, node: fx.Node) -> fx.Node:
        made = emit(graph, overload, tuple(args), dict(kwargs), like=node)
        return _fit(graph, made, args[0])

    return twin


def _fit(graph: fx.Graph, made: fx.Node, like: fx.Node) -> fx.Node:
    """`made` in the dtype and shape of `like`, as a write would leave it."""
    if fake(made).dtype != fake(like).dtype:
        made = emit(graph, aten.to.dtype, (made, fake(like).dtype), like=made)
    if fake(made).shape != fake(like).shape:
        made = emit(graph, aten.expand.default, (made, list(fake(like).shape)), like=made)
    return made


def _copy(graph: fx.Graph, args: Any, kwargs: Any, node: fx.Node) -> fx.Node:
    return _fit(graph, args[1], args[0])


def _fill(value: Any) -> Twin:
    def twin(graph: fx.Graph, args: Any, kwargs: Any, node: fx.Node) -> fx.Node:
        number = args[1] if value is None else value
        like = fake(args[0])
        return emit(graph, aten.full.default, (list(like.shape), number), {"dtype": like.dtype}, like=node)

    return twin


_SPECIAL: dict[Any, Twin] = {
    aten.copy_.default: _copy,
    aten.fill_.Tensor: _copy,
    aten.fill_.Scalar: _fill(None),
    aten.zero_.default: _fill(0),
}

_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
_IDENTITIES = {
    "alias",
    "detach",
    "to",
    "contiguous",
    "lift_fresh",
    "dropout",
    "clone",
    "type_as",
    "expand",
    "expand_as",
    "slice",
}


def write_back(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node | None:
    """`base` after `value` was written to its view `view`; None for a view op that cannot be written through."""
    if view.target is operator.getitem:
        return _piece(graph, view, base, value)
    name = name_of(view)
    if name in _IDENTITIES and fake(value).shape == fake(base).shape:
        return value
    if name in _RESHAPES:
        return emit(graph, aten.reshape.default, (value, list(fake(base).shape)), like=value)
    if name == "slice":
        return emit(graph, aten.slice_scatter.default, (base, value, *view.args[1:]), like=value)
    if name == "narrow":
        dim, start, length = view.args[1:]
        return emit(graph, aten.slice_scatter.default, (base, value, dim, start, start + length), like=value)  # type: ignore[operator]
    if name == "select":
        return emit(graph, aten.select_scatter.default, (base, value, *view.args[1:]), like=value)
    if name == "diagonal":
        return emit(graph, aten.diagonal_scatter.default, (base, value, *view.args[1:]), like=value)
    if name in ("transpose", "t"):
        return emit(graph, view.target, (value, *view.args[1:]), like=value)  # type: ignore[arg-type]
    if name == "permute":
        order = [d % fake(base).dim() for d in view.args[1]]  # type: ignore[union-attr]
        inverse = [order.index(d) for d in range(len(order))]
        return emit(graph, aten.permute.default, (value, inverse), like=value)
    return None


def _piece(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node | None:
    """Write one piece of a split, chunk or unbind."""
    pieces, index = view.args
    assert isinstance(pieces, fx.Node)
    assert isinstance(index, int)
    name = name_of(pieces)
    if name == "unbind":
        dim = pieces.args[1] if len(pieces.args) > 1 else 0
        return emit(graph, aten.select_scatter.default, (base, value, dim, index), like=value)
    if name not in ("split", "split_with_sizes", "chunk"):
        return None
    dim = pieces.args[2] if len(pieces.args) > 2 else pieces.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    start = sum(piece.shape[dim] for piece in fake(pieces)[:index])
    return emit(
        graph, aten.slice_scatter.default, (base, value, dim, start, start + fake(value).shape[dim]), like=value
    )

"""Drop what changes nothing and write the rest in one form.

    b = to(a, a.dtype); c = contiguous(b); d = view(c, [-1, 8])      becomes      d = reshape(a, [4, 8])

Asserts, no-op casts, copies and views, dropout of probability zero and detach where no gradient flows go; every
reshaping view is a `reshape` with explicit sizes (it needs no particular strides, so `contiguous` is not needed),
every fill an `aten.full`, every cast `aten.to.dtype`. Device, layout and pin_memory arguments go: the graph runs on
one device, which lowering names (`on_device`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..base import Contract, Program, emit, fake, replace
from ..gradients import differentiable
from ..torch_compat import OpOverload, arguments, name_of, overload_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Simplify(Contract):
    """One walk in order, so that arguments are simple when their user is looked at."""

    name: str = "simplify"
    requires: tuple[str, ...] = ("functional",)
    provides: tuple[str, ...] = ("simple",)

    def apply(self, program: Program) -> Program:
        for node in program.graph.nodes:
            if node.op == "call_function":
                _simplify(node)
        return program


def _simplify(node: fx.Node) -> None:
    name = name_of(node)
    if name.startswith(("_assert", "sym_constrain")):
        node.graph.erase_node(node)
        return
    rule = _piece if node.target is operator.getitem else _RULES.get(name)
    if rule is not None:
        with node.graph.inserting_before(node):
            by = rule(node)
        if by is not None:
            if by is not node and "differentiable" not in by.meta:
                by.meta["differentiable"] = differentiable(by)
            if by is not node:
                replace(node, by)
                return
    _plain_kwargs(node)
    node.meta["differentiable"] = differentiable(node)


def _plain_kwargs(node: fx.Node) -> None:
    """Without placement arguments and without those that say the default."""
    target = node.target
    if not node.kwargs or not isinstance(target, OpOverload):
        return
    defaults = {a.name: a.default_value for a in arguments(target) if a.has_default_value()}
    node.kwargs = {
        k: v for k, v in node.kwargs.items()
        if k not in ("device", "layout", "pin_memory") and not (k in defaults and _same(v, defaults[k]))
    }  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, fx.Node) and bool(a == b)


def _first(node: fx.Node) -> fx.Node:
    found = node.args[0]
    assert isinstance(found, fx.Node)
    return found


def _identity(node: fx.Node) -> fx.Node:
    return _first(node)


def _cast(node: fx.Node) -> fx.Node:
    value, source = fake(node), _first(node)
    if value.dtype == fake(source).dtype:
        return source
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return node
    return emit(node.graph, aten.to.dtype, (source, value.dtype), like=node)


def _detach(node: fx.Node) -> fx.Node:
    return node if _first(node).meta["differentiable"] else _first(node)


def _reshape(node: fx.Node) -> fx.Node:
    if fake(node).dtype != fake(_first(node)).dtype:  # a bit cast
        return node
    shape, source = list(fake(node).shape), _first(node)
    if source.target is aten.reshape.default:
        source = _first(source)
    if list(fake(source).shape) == shape:
        return source
    if node.target is aten.reshape.default and list(node.args) == [source, shape]:
        return node
    return emit(node.graph, aten.reshape.default, (source, shape), like=node)


def _expand(node: fx.Node) -> fx.Node:
    shape, source = list(fake(node).shape), _first(node)
    if source.target is aten.expand.default and fake(source).dim() == len(shape):
        source = _first(source)
    if list(fake(source).shape) == shape:
        return source
    return emit(node.graph, aten.expand.default, (source, shape), like=node)


def _piece(node: fx.Node) -> fx.Node | None:
    """One of several tensors broadcast together is an expand of its own."""
    pieces, index = node.args
    if not isinstance(pieces, fx.Node) or name_of(pieces) != "broadcast_tensors":
        return None
    source = pieces.args[0][index]  # type: ignore[index, call-overload]
    if fake(source).shape == fake(node).shape:
        return source  # type: ignore[no-any-return]
    return emit(node.graph, aten.expand.default, (source, list(fake(node).shape)), like=node)


def _slice(node: fx.Node) -> fx.Node:
    """Explicit positive dim and bounds; the whole range is no slice."""
    source = _first(node)
    if list(fake(node).shape) == list(fake(source).shape):
        return source
    dim, start, end, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    dim = dim % fake(source).dim()  # type: ignore[operator]
    start, end, step = slice(start, end, step).indices(fake(source).shape[dim])
    args = (source, dim, start, end) if step == 1 else (source, dim, start, end, step)
    if node.args == args:
        return node
    return emit(node.graph, aten.slice.Tensor, args, like=node)


def _narrow(node: fx.Node) -> fx.Node:
    source, dim, start, length = node.args
    if not isinstance(start, int):
        return node
    size = fake(source).shape[dim]  # type: ignore[arg-type, index]
    start = start % size if start < 0 else start
    return emit(node.graph, aten.slice.Tensor, (source, dim % fake(source).dim(), start, start + length), like=node)  # type: ignore[operator, arg-type]


def _dropout(node: fx.Node) -> fx.Node:
    _, probability, train = node.args
    return _first(node) if not train or probability == 0 else node


def _neutral(number: float) -> Callable[[fx.Node], fx.Node | None]:
    """x op number is x, where that keeps shape and dtype."""

    def rule(node: fx.Node) -> fx.Node | None:
        first, second = node.args[:2]
        same = isinstance(first, fx.Node) and not isinstance(second, fx.Node | bool) and second == number
        return first if same and _alike(node, first) else None  # type: ignore[arg-type, return-value]

    return rule


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return fake(a).dtype == fake(b).dtype and fake(a).shape == fake(b).shape


def _joined(node: fx.Node) -> fx.Node | None:
    """A concatenation without its empty parts (the unrotated share of a head that is rotated whole); of one tensor, that one."""
    parts: list[fx.Node] = [p for p in node.args[0] if fake(p).numel()]  # type: ignore[union-attr, arg-type, misc]
    if len(parts) == 1 and _alike(node, parts[0]):
        return parts[0]
    if not parts or len(parts) == len(node.args[0]) or any(fake(p).dtype != fake(node).dtype for p in parts):  # type: ignore[arg-type]
        return None
    return emit(node.graph, aten.cat.default, (parts, *node.args[1:]), dict(node.kwargs), like=node)


def _pad(node: fx.Node) -> fx.Node | None:
    return _first(node) if not any(node.args[1]) else None  # type: ignore[arg-type]


def _whole(node: fx.Node) -> fx.Node | None:
    """A scatter that covers its base."""
    value = node.args[1]
    return value if isinstance(value, fx.Node) and _alike(node, value) else None


def _fill(value: Any, position: int = 0) -> Callable[[fx.Node], fx.Node | None]:
    """A constant fill; `value` None means that the number stands at `position`."""

    def rule(node: fx.Node) -> fx.Node | None:
        number = node.args[position] if value is None else value
        if isinstance(number, fx.Node):
            return None
        made = fake(node)
        return emit(node.graph, aten.full.default, (list(made.shape), number), {"dtype": made.dtype}, like=node)

    return rule


def _full(node: fx.Node) -> fx.Node | None:
    done = set(node.kwargs) == {"dtype"} and list(node.args[0]) == list(fake(node).shape)  # type: ignore[call-overload]
    return node if done else _fill(None, 1)(node)


def _renamed(target: str) -> Callable[[fx.Node], fx.Node]:
    """The same overload of an op that means the same."""

    def rule(node: fx.Node) -> fx.Node:
        overload = getattr(getattr(aten, target), overload_name(node.target))  # type: ignore[union-attr]
        return emit(node.graph, overload, node.args, dict(node.kwargs), like=node)

    return rule


_RULES: dict[str, Callable[[fx.Node], fx.Node | None]] = {
    **dict.fromkeys(("alias", "contiguous", "clone", "lift_fresh", "lift_fresh_copy"), _identity),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _dropout),
    **dict.fromkeys(("add", "sub"), _neutral(0)),
    **dict.fromkeys(("mul", "div"), _neutral(1)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty"), _fill(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _fill(1)),
    **dict.fromkeys(("slice_scatter", "select_scatter"), _whole),
    "detach": _detach,
    "slice": _slice,
    "narrow": _narrow,
    "cat": _joined,
    "pad": _pad,
    "full": _full,
    "full_like": _fill(None, 1),
    "scalar_tensor": _fill(None, 0),
    "new_full": _fill(None, 2),
    "__and__": _renamed("bitwise_and"),
    "__or__": _renamed("bitwise_or"),
    "__xor__": _renamed("bitwise_xor"),
}

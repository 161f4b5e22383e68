"""What a rewrite looks for: patterns of calls, and the one matcher that finds them.

    gate, up = Any_("gate"), Any_("up")
    swiglu = call("aten.mul", call("aten.silu", gate), up)

A pattern is a small tree. A name that stands twice must be the same node twice; `aten.add` and `aten.mul` match in either order;
`either` tries several; `casts` lets casts stand between. What a match covers besides its root must not be used outside it: a
second user of an intermediate value is never matched.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .torch_compat import OpOverload, arguments, full_name

COMMUTATIVE = frozenset({"add", "mul"})
"""Ops whose two tensors may stand in either order."""


@dataclass(frozen=True)
class Any_:
    """Any node, under a name."""

    name: str


@dataclass(frozen=True)
class Number:
    """Any number that stands in the graph, under a name."""

    name: str


@dataclass(frozen=True)
class Near:
    """One number. Constants cut to so few digits that float64 tells them apart are other constants."""

    value: float
    tolerance: float = 1e-10


@dataclass(frozen=True)
class Called:
    """A call of an op ("aten.mul", any overload). Arguments that the pattern does not give may be anything in `open`,
    else must be those the op has by default; `name` binds the node."""

    target: str
    args: tuple[Any, ...]
    name: str = ""
    open: bool = False


@dataclass(frozen=True)
class Either:
    """The first of several patterns that matches."""

    options: tuple[Any, ...]


@dataclass(frozen=True)
class Through:
    """A pattern behind any number of calls of the ops `targets`, which change nothing that the rewrite cares about."""

    pattern: Any
    targets: frozenset[str]


Pattern = Any_ | Number | Near | Called | Either | Through


def call(target: str, *args: Any, name: str = "", open: bool = False) -> Called:
    """A call of "aten.<op>" (or "getitem") with patterns or plain values as its first arguments."""
    return Called(target, args, name, open)


def either(*options: Pattern) -> Either:
    """Any of several patterns."""
    return Either(options)


def casts(pattern: Pattern) -> Through:
    """The pattern with casts between it and its user."""
    return Through(pattern, frozenset({"aten.to", "aten._to_copy"}))


@dataclass(frozen=True)
class Match:
    """Where a pattern was found: its root, the nodes it covers (root included), and what its names stand for."""

    root: fx.Node
    nodes: frozenset[fx.Node]
    bound: Mapping[str, Any] = field(hash=False)

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def get(self, name: str, default: Any = None) -> Any:
        """What a name stands for, where the option of the pattern that matched has it."""
        return self.bound.get(name, default)


@dataclass(frozen=True)
class _Found:
    """A partial match."""

    bound: tuple[tuple[str, Any], ...] = ()
    nodes: frozenset[fx.Node] = frozenset()

    def bind(self, name: str, value: Any) -> _Found | None:
        for known, other in self.bound:
            if known == name:
                return self if other is value or (not isinstance(value, fx.Node) and other == value) else None
        return _Found((*self.bound, (name, value)), self.nodes)

    def cover(self, node: fx.Node) -> _Found:
        return _Found(self.bound, self.nodes | {node})


def find(pattern: Pattern, root: fx.Node) -> Match | None:
    """The first match of `pattern` with its root at `root` that uses nothing twice outside itself."""
    for found in _match(pattern, root, _Found()):
        inner = found.nodes - {root}
        if found.nodes and all(user in found.nodes for node in inner for user in node.users):
            return Match(root, found.nodes, dict(found.bound))
    return None


def target_of(node: fx.Node) -> str:
    """ "aten.mul" for a call of any overload of it, "getitem" for one of several results, "" for what is no call of an op."""
    if node.target is operator.getitem:
        return "getitem"
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return ""
    return full_name(node.target).replace("::", ".")


def _match(pattern: Any, value: Any, so_far: _Found) -> Iterator[_Found]:
    """All ways in which `value` is as `pattern` says."""
    if isinstance(pattern, Any_):
        found = so_far.bind(pattern.name, value) if isinstance(value, fx.Node) else None
        yield from (found,) if found is not None else ()
    elif isinstance(pattern, Number):
        found = so_far.bind(pattern.name, value) if isinstance(value, int | float) else None
        yield from (found,) if found is not None else ()
    elif isinstance(pattern, Near):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isclose(value, pattern.value, rel_tol=pattern.tolerance):
            yield so_far
    elif isinstance(pattern, Either):
        for option in pattern.options:
            yield from _match(option, value, so_far)
    elif isinstance(pattern, Through):
        yield from _match(pattern.pattern, value, so_far)
        if isinstance(value, fx.Node) and target_of(value) in pattern.targets:
            yield from _match(pattern, value.args[0], so_far.cover(value))
    elif isinstance(pattern, Called):
        yield from _call(pattern, value, so_far)
    elif isinstance(pattern, list):
        if isinstance(value, list | tuple) and len(value) == len(pattern):
            yield from _all(tuple(pattern), tuple(value), so_far)
    elif type(pattern) is type(value) and pattern == value:
        yield so_far


def _call(pattern: Called, value: Any, so_far: _Found) -> Iterator[_Found]:
    if not isinstance(value, fx.Node) or target_of(value) != pattern.target:
        return
    given, count = _given(value), len(pattern.args)
    if len(given) < count or not (pattern.open or all(is_default for _, is_default in given[count:])):
        return
    found = so_far.cover(value)
    named = found.bind(pattern.name, value) if pattern.name else found
    if named is None:
        return
    first = tuple(v for v, _ in given[:count])
    orders = [first]
    if count == 2 and pattern.target.partition(".")[2] in COMMUTATIVE:
        orders.append((first[1], first[0]))
    for order in orders:
        yield from _all(pattern.args, order, named)


def _all(patterns: tuple[Any, ...], values: tuple[Any, ...], so_far: _Found) -> Iterator[_Found]:
    if not patterns:
        yield so_far
        return
    for found in _match(patterns[0], values[0], so_far):
        yield from _all(patterns[1:], values[1:], found)


def _given(node: fx.Node) -> list[tuple[Any, bool]]:
    """Every argument of a call in the order of its schema, and whether it is what it would be unsaid."""
    if not isinstance(node.target, OpOverload):
        return [(value, False) for value in node.args]
    found = []
    for i, argument in enumerate(arguments(node.target)):
        default = argument.default_value if argument.has_default_value() else None
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default)
        found.append((value, not isinstance(value, fx.Node) and value == default))
    return found

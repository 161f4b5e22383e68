"""Rotary embedding written out becomes one op (passes/fuse/ops/rotary.py).

    t = cat([neg(x[d / 2 :]), x[: d / 2]], -1)
    y = add(mul(x, cos), mul(t, sin))                                          becomes      y = rotary(x, cos, sin)
    y = cat([x1 cos - x2 sin, x2 cos + x1 sin], -1)                            likewise, with tables of half the width
    y = the same of even and odd elements, stacked and flattened               rotary(x, cos, sin, True)

Where only part of a head is rotated, x is that part. Seven or more passes over memory become one; what is kept stays cos and sin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..base import fake
from ..pattern import Any_, Match, Number, Pattern, call, either, target_of
from ..rewrite import Make, Rewriting, Row
from .ops.rotary import rotary

aten = torch.ops.aten
X, COS, SIN = Any_("x"), Any_("cos"), Any_("sin")


def _half(index: int) -> Pattern:
    """The first or second half of the last dim of x: a slice, or one of two pieces."""
    dim, start, end = (Number(f"{name}{index}") for name in ("dim", "start", "end"))
    return either(
        call("aten.slice", X, dim, start, end),
        call("getitem", call("aten.chunk", X, 2, dim), index),
        call("getitem", call("aten.split", X, Number("size"), dim), index),
    )


def _every_second(index: int) -> Pattern:
    """The even or odd elements of the last dim of x, which may be there as pairs only."""
    pairs = call("aten.reshape", Any_("source"), open=True, name="pairs")
    return either(
        call("aten.slice", X, *(Number(f"{name}{index}") for name in ("dim", "start", "end")), 2),
        call("aten.select", pairs, Number(f"dim{index}"), index),
        call("getitem", call("aten.unbind", pairs, Number(f"dim{index}")), index),
    )


def _cat(first: Pattern, second: Pattern) -> Pattern:
    return call("aten.cat", [first, second], Number("at"))


def _alternate(first: Pattern, second: Pattern) -> Pattern:
    stack = call("aten.stack", [first, second], Number("at"), name="stack")
    return call("aten.reshape", stack, open=True)


def _turning(turned: Pattern) -> Pattern:
    """x cos + turned sin."""
    return call("aten.add", call("aten.mul", X, COS), call("aten.mul", turned, SIN))


def _rotated(first: Pattern, second: Pattern) -> tuple[Pattern, Pattern]:
    """Both parts of the result."""
    return (
        call("aten.sub", call("aten.mul", first, COS), call("aten.mul", second, SIN)),
        call("aten.add", call("aten.mul", second, COS), call("aten.mul", first, SIN)),
    )


def _is_last(match: Match, shape: list[int], interleaved: bool) -> bool:
    """Whether what was cut, joined and stacked is the last dim, at its middle or in turn."""
    width, wide, pairs = shape[-1], len(shape) + 1, match.get("pairs")
    if pairs is not None and list(fake(pairs).shape) != [*shape[:-1], width // 2, 2]:
        return False
    cut = len(shape) if pairs is None else wide
    joined = len(shape) if match.get("stack") is None else wide
    if match["at"] % joined != joined - 1 or any(match.get(f"dim{i}", -1) % cut != cut - 1 for i in (0, 1)):
        return False
    end, start = (width, 1) if interleaved else (width // 2, width // 2)
    bounds = {"start0": 0, "end0": end, "start1": start, "end1": width, "size": width // 2}
    return all(match.get(name, bound) == bound for name, bound in bounds.items())


def _operands(match: Match, shape: list[int]) -> tuple[fx.Node, fx.Node] | None:
    """What is rotated (x, or what its pairs were made of) and the cosines."""
    x, cos, source = match.get("x"), match["cos"], match.get("source")
    if x is None:
        return source, cos
    if source is not None and not _same(x, source):
        x, cos = cos, x  # their product holds them in either order
    alike = source is None or _same(x, source)
    return (x, cos) if alike and list(fake(x).shape) == shape else None


def _same(x: fx.Node, source: fx.Node) -> bool:
    return x is source or (target_of(x) == "aten.reshape" and x.args[0] is source)


def _by(interleaved: bool, share: int):  # type: ignore[no-untyped-def]
    """Tables are as wide as the result divided by `share`."""

    def by(match: Match, make: Make) -> fx.Node | None:
        shape = list(fake(match.root).shape)
        if shape[-1] % 2 or shape[-1] < 4 or not _is_last(match, shape, interleaved):
            return None
        found = _operands(match, shape)
        if found is None or not fake(found[0]).is_floating_point():
            return None
        x, tables = found[0], (found[1], match["sin"])
        if any(fake(table).shape[-1:] != (shape[-1] // share,) for table in tables):
            return None
        x = x if list(fake(x).shape) == shape else make(aten.reshape.default, x, shape)
        return make(rotary, x, *tables, *([True] if interleaved else []))

    return by


@dataclass(frozen=True)
class FuseRotary(Rewriting):
    """Rotary embedding by halves or by neighbours, with tables for every element or for every angle."""

    name: str = "rotary"
    requires: tuple[str, ...] = ("simple",)
    table: tuple[Row, ...] = (
        Row(_turning(_cat(call("aten.neg", _half(1)), _half(0))), _by(False, 1)),
        Row(_turning(_alternate(call("aten.neg", _every_second(1)), _every_second(0))), _by(True, 1)),
        Row(_cat(*_rotated(_half(0), _half(1))), _by(False, 2)),
        Row(_alternate(*_rotated(_every_second(0), _every_second(1))), _by(True, 2)),
    )

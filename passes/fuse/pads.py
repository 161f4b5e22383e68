"""Padding with zeros before a convolution becomes the convolution's own.

    y = conv2d(pad(x, [1, 1, 1, 1]), w, b, stride, padding=0)      becomes      y = conv2d(x, w, b, stride, padding=1)

The padded copy is not made, and x is kept in its place. Paddings that differ at the two ends of a dim are left alone, and so are
transposed convolutions, whose padding is another thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..base import fake
from ..pattern import Any_, Match, call
from ..rewrite import Make, Rewriting, Row
from .convolutions import FOLDED, PLAIN, arguments_of

PADS = ("aten.pad", "aten.constant_pad_nd")


@dataclass(frozen=True)
class Pad:
    """A padding with one number: how much stands before and behind, last dim first."""

    ends: tuple[tuple[int, int], ...]
    value: float


def read_pad(node: fx.Node) -> Pad | None:
    """The padding that a call does; None for another kind (reflected, ..) or one that cuts."""
    given = arguments_of(node)
    flat, value = given["pad"], given["value"]
    if given.get("mode", "constant") != "constant" or any(not isinstance(n, int) or n < 0 for n in flat):
        return None
    return Pad(tuple(zip(flat[::2], flat[1::2], strict=True)), float(value or 0.0))


def around(pad: Pad, rank: int) -> tuple[int, ...] | None:
    """Zeros at both ends of each of `rank` dims of space, first dim first; None where they differ or lie elsewhere."""
    if pad.value != 0.0 or len(pad.ends) > rank or any(a != b for a, b in pad.ends):
        return None
    return (0,) * (rank - len(pad.ends)) + tuple(a for a, _ in reversed(pad.ends))


def _by(match: Match, make: Make) -> fx.Node | None:
    given, pad = arguments_of(match.root), read_pad(match["pad"])
    rank, padding = fake(match.root).dim() - 2, given["padding"]
    if pad is None or given.get("transposed") or isinstance(padding, str) or fake(match["pad"]).dim() != rank + 2:
        return None
    more = around(pad, rank)
    if more is None or not _reads_all(given, rank):
        return None
    own = tuple(padding) * (rank if len(padding) == 1 else 1)
    given["padding"] = [a + b for a, b in zip(own, more, strict=True)]
    return make(match.root.target, match["x"], *list(given.values())[1:])


def _reads_all(given: dict[str, Any], rank: int) -> bool:
    """Whether every weight of a convolution is one over space: the identity among branches is of the unpadded input's shape."""
    weights = given["weights"] if "weights" in given else [given["weight"]]
    return all(isinstance(w, fx.Node) and fake(w).dim() == rank + 2 for w in weights)


@dataclass(frozen=True)
class FoldPads(Rewriting):
    """Zeros around the input of a convolution into its padding."""

    name: str = "pads"
    requires: tuple[str, ...] = ("simple",)
    table: tuple[Row, ...] = tuple(
        Row(call(conv, call(pad, Any_("x"), name="pad", open=True), open=True), _by)
        for conv in (*PLAIN, FOLDED) for pad in PADS
    )  # fmt: skip

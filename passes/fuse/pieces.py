"""Convolutions of one input that are added, as taps on one lattice: which of them one kernel can hold, and which it should.

Tap t of a convolution with padding p and dilation d reads the input at stride o + (t d - p). Branches are one convolution where
a kernel with a padding P and a dilation D has all their taps among its own and makes as many positions. They should be where it
has no more taps than they have together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..base import fake
from .convolutions import Branch, Convolution, Frame


@dataclass(frozen=True)
class Span:
    """Taps along one dim: the offset of the first, the distance between two, how many."""

    first: int
    step: int
    count: int

    @property
    def last(self) -> int:
        return self.first + self.step * (self.count - 1)


@dataclass(frozen=True)
class Piece:
    """A term of a sum that is a convolution: its branches, and per branch and dim where its taps read. `taps` are those it costs:
    none for an identity, which is no product."""

    term: fx.Node
    frame: Frame
    branches: tuple[Branch, ...]
    spans: tuple[tuple[Span, ...], ...]
    taps: int


def piece_of(term: fx.Node, found: Convolution) -> Piece:
    """A convolution as a piece of a sum."""
    spans = tuple(_spans(found, branch) for branch in found.branches)
    return Piece(term, found.frame, found.branches, spans, math.prod(found.kernel))


def identity(term: fx.Node, frame: Frame, branch: Branch) -> Piece:
    """The input itself, or its batch norm."""
    return Piece(term, frame, (branch,), ((Span(0, 1, 1),) * frame.rank,), 0)


def _spans(found: Convolution, branch: Branch) -> tuple[Span, ...]:
    frame = found.frame
    places = branch.places or ((0, 1),) * frame.rank
    sides = zip(places, frame.padding, frame.dilation, branch.taps(frame.rank), strict=True)
    return tuple(Span(at * d - p, step * d, count) for (at, step), p, d, count in sides)


def joined(pieces: Sequence[Piece]) -> Convolution | None:
    """One convolution that is the sum of the pieces; None where no kernel holds them."""
    frame, space = pieces[0].frame, fake(pieces[0].term).shape[2:]
    dims = [[spans[d] for p in pieces for spans in p.spans] for d in range(frame.rank)]
    first = [min(s.first for s in dim) for dim in dims]
    steps = [_step(dim, low) for dim, low in zip(dims, first, strict=True)]
    kernel = [(max(s.last for s in dim) - low) // d + 1 for dim, low, d in zip(dims, first, steps, strict=True)]
    sizes = fake(frame.x).shape[2:]
    for n, out, low, d, k, stride in zip(sizes, space, first, steps, kernel, frame.stride, strict=True):
        if low > 0 or (n - 2 * low - d * (k - 1) - 1) // stride + 1 != out:
            return None
    branches = [
        replace(branch, places=tuple(_place(s, low, d) for s, low, d in zip(spans, first, steps, strict=True)))
        for p in pieces
        for branch, spans in zip(p.branches, p.spans, strict=True)
    ]
    whole = all(
        s.count == k for spans in (x for p in pieces for x in p.spans) for s, k in zip(spans, kernel, strict=True)
    )
    branches = [replace(b, places=()) for b in branches] if whole else branches
    at = replace(frame, padding=tuple(-low for low in first), dilation=tuple(steps))
    return Convolution(at, tuple(kernel), (tuple(branches),))


def _step(dim: Sequence[Span], low: int) -> int:
    """The largest distance of which all taps are multiples."""
    return math.gcd(*(s.step for s in dim if s.count > 1), *(s.first - low for s in dim)) or 1


def _place(span: Span, low: int, step: int) -> tuple[int, int]:
    return (span.first - low) // step, span.step // step if span.count > 1 else 1


def groups(pieces: Sequence[Piece]) -> Iterator[tuple[list[Piece], Convolution]]:
    """Pieces that should be one, and that one; the largest kernels first, which hold others."""
    left = sorted(pieces, key=lambda p: -p.taps)
    while left and left[0].taps:
        chosen, best = [left[0]], None
        for piece in left[1:]:
            together = joined([*chosen, piece]) if _alike(left[0], piece) else None
            if together is not None and math.prod(together.kernel) <= sum(p.taps for p in (*chosen, piece)):
                chosen.append(piece)
                best = together
        if best is not None:
            yield chosen, best
        left = [p for p in left if p not in chosen]


def _alike(one: Piece, other: Piece) -> bool:
    """Whether two pieces read one input in one manner."""
    key = [(p.frame.x, p.frame.stride, p.frame.groups, p.frame.transposed) for p in (one, other)]
    return key[0] == key[1]

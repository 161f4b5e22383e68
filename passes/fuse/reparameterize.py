"""Linear branches on one input that are added become one product.

    y = conv(x, w3, 3 x 3) + conv(x, w1, 1 x 1) + x      becomes      y = folded_conv(x, [w3, w1, None], kernel [3, 3])
    y = linear(x, a) + linear(x, b)                      becomes      y = linear_sum(x, [a, b])

Ding et al. 2021, "RepVGG: Making VGG-style ConvNets Great Again"; Ding et al. 2023, "UniRepLKNet" (dilated branches). There the
branches are merged after training; here the kernel is made of their weights in every step, so that these keep their own
gradients. A branch may have a batch norm on running statistics behind it (pass conv_bn), the identity too. Other terms of the sum
stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..base import Contract, Program, fake
from ..pattern import target_of
from ..rewrite import Make
from .conv_bn import runs_on
from .convolutions import Branch, Convolution, Frame, arguments_of, emit, read
from .ops.linear_sum import linear_sum
from .ops.recipe import VECTORS
from .pieces import Piece, groups, identity, piece_of
from .sums import Sum, own_terms, rewrite, sum_at

aten = torch.ops.aten
PRODUCTS = {aten.linear.default: False, aten.mm.default: True}
"""Products with a weight, and whether its first dim is the contracted one."""


@dataclass(frozen=True)
class Reparameterize(Contract):
    """Parallel convolutions, and parallel linear maps, that are added."""

    name: str = "reparameterize"
    requires: tuple[str, ...] = ("simple", "no fused bias")

    def apply(self, program: Program) -> Program:
        for root in [n for n in program.graph.nodes if sum_at(n) is not None]:
            found = sum_at(root)
            if found is not None:
                _merge(found)
        return program


def _merge(found: Sum) -> None:
    convs = list(groups(_pieces(found)))
    maps = list(_maps(found))
    taken = [p.term for pieces, _ in convs for p in pieces] + [t for terms in maps for t in terms]
    if not taken:
        return

    def by(make: Make) -> list[fx.Node]:
        made = [emit(make, together) for _, together in convs]
        return made + [
            make(linear_sum, t[0].args[0], [n.args[1] for n in t], *([True] if PRODUCTS[t[0].target] else []))  # type: ignore[index]
            for t in maps
        ]

    rewrite(found, taken, by)


def _pieces(found: Sum) -> list[Piece]:
    """The terms that are convolutions, and identities beside them."""
    full = fake(found.root).shape
    own = [t for t in own_terms(found) if fake(t).shape == full]
    pieces = [piece_of(t, c) for t in own if (c := read(t)) is not None and _is_plain(c)]
    for frame in {(p.frame.x, p.frame.groups): p.frame for p in pieces if _is_still(p.frame, full)}.values():
        pieces += [
            identity(t, frame, branch) for t in found.terms if (branch := _identity(t, frame, own, found)) is not None
        ]
    return pieces


def _is_plain(found: Convolution) -> bool:
    return len(found.parts) == 1 and not found.frame.transposed


def _is_still(frame: Frame, full: Sequence[int]) -> bool:
    """Whether the input itself may be a branch: it has the sum's shape and no kernel skips positions. One that is smaller than
    its own kernel would be is cheaper to add."""
    channels = fake(frame.x).shape[1]
    small = channels * channels // frame.groups <= fake(frame.x).numel()
    return small and fake(frame.x).shape == full and set(frame.stride) == {1}


def _identity(term: fx.Node, frame: Frame, own: Sequence[fx.Node], found: Sum) -> Branch | None:
    """The branch of a term that is the input, or a batch norm of it on running statistics."""
    if term is frame.x:
        return Branch(None) if found.terms.count(term) == 1 else None
    if target_of(term) != "aten.batch_norm" or term not in own or term.args[0] is not frame.x:
        return None
    norm = arguments_of(term)
    vectors = (None, *(norm[name] for name in ("weight", "bias", "running_mean", "running_var")))
    assert len(vectors) == VECTORS
    return Branch(None, vectors, norm["eps"]) if runs_on(norm) else None


def _maps(found: Sum) -> list[list[fx.Node]]:
    """Two or more products with weights, of one input."""
    alike: dict[object, list[fx.Node]] = {}
    for term in own_terms(found):
        if term.target in PRODUCTS and len(term.args) == 2 and fake(term).shape == fake(found.root).shape:
            x, weight = term.args
            if fake(weight).dim() == 2 and fake(x).dtype == fake(weight).dtype:  # type: ignore[arg-type]
                alike.setdefault((x, term.target), []).append(term)
    return [terms for terms in alike.values() if len(terms) > 1]

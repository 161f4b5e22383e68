"""Convolutions of one input that differ in their weights alone become one, whose result is cut into theirs.

    a = conv2d(x, v); b = conv2d(x, w)      becomes      y = folded_conv(x, [v, w], parts [1, 1]); a, b = split(y, [..], 1)

Horizontal fusion: the input is read once, its gradient made once, and there are more channels to fill a device with. Kernel,
stride, padding and dilation must agree, and nothing be grouped. The weights are put side by side in every step, there and back:
where they are larger than the reads of the input that go, the convolutions are left alone. So are those whose weights are not
there yet where the first of them stands, and one that takes no gradient beside others that do: behind it, tensors would be kept.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..base import Contract, Program, fake
from ..rewrite import Make
from .convolutions import Convolution, emit, read

aten = torch.ops.aten
Member = tuple[fx.Node, Convolution]


@dataclass(frozen=True)
class MergeConvs(Contract):
    """Parallel convolutions of one input, kept apart in the result."""

    name: str = "merge_convs"
    requires: tuple[str, ...] = ("simple",)

    def apply(self, program: Program) -> Program:
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        alike: dict[object, list[Member]] = {}
        for node in program.graph.nodes:
            found = read(node)
            if found is not None and _is_plain(found):
                alike.setdefault((found.frame, found.kernel, node.meta["differentiable"]), []).append((node, found))
        for members in alike.values():
            here = [m for m in members if all(order[n] < order[members[0][0]] for n in m[0].all_input_nodes)]
            if len(here) > 1 and _is_worth(here):
                _merge(here)
        return program


def _is_plain(found: Convolution) -> bool:
    """Whether the channels of the result are those of one weight each, in order."""
    frame = found.frame
    return len(found.parts) == 1 and frame.groups == 1 and not frame.transposed


def _is_worth(members: Sequence[Member]) -> bool:
    """Whether the input, once for each convolution but one, is larger than all weights."""
    weights = [b.weight for _, found in members for b in found.branches if b.weight is not None]
    return (len(members) - 1) * fake(members[0][1].frame.x).numel() >= sum(fake(w).numel() for w in weights)


def _merge(members: Sequence[Member]) -> None:
    (first, found), sizes = members[0], [fake(node).shape[1] for node, _ in members]
    parts = tuple(c.parts[0] for _, c in members)
    with first.graph.inserting_before(first):
        make = Make(first)
        whole = emit(make, Convolution(found.frame, found.kernel, parts))
        cut = make(aten.split_with_sizes.default, whole, sizes, 1)
        pieces = [make(operator.getitem, cut, i) for i in range(len(members))]
    for (node, _), piece in zip(members, pieces, strict=True):
        node.replace_all_uses_with(piece)
        node.graph.erase_node(node)

"""Which positions of attention a padding mask blocks: what is made of the mask is evaluated on a sample of it.

A mask [b, s] of the model's inputs says of each position of each sample whether it is padding, in some form (1 and 0, True and
False, 0 and a very negative number). What a model makes of it, an additive or boolean mask of any shape [b, .., s] or
[b heads, .., s], blocks the padded keys if, with random positions padded, every one of them is blocked for every query that is not
padded itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..base import Program, fake, is_tensor
from ..constants import Known
from ..lazy import Lazy, Unknown
from ..masks import LEAF, SEED, grids
from ..pattern import target_of

LOW = -1e4
"""Scores at or below this are of blocked keys: no exponential of such a number is anything in any dtype."""
THROUGH = frozenset({"aten.to", "aten._to_copy", "aten.clone", "aten.contiguous", "aten.alias", "aten.detach"})
"""Ops behind which a blocked score is a blocked score."""


@dataclass
class PaddedKeys:
    """A mask of a program, read one way: valid positions are those where it is not zero, or with `zero` those where it is."""

    program: Program
    mask: fx.Node
    zero: bool
    _known: list[Lazy] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        value = fake(self.mask)
        generator = torch.Generator().manual_seed(SEED)
        self.valid = torch.rand(tuple(value.shape), generator=generator) < 0.5
        self.valid[:, 0], self.valid[:, -1] = True, False
        for sample in self._samples(value.dtype):
            known = Known({**self.program.constants, self.mask.name: sample}, LEAF)
            for node in self.program.graph.nodes:
                known.independent(node)  # in order, so that no look-up recurses deeply
            self._known.append(Lazy(known))

    def _samples(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Masks that say what `valid` says."""
        yield (self.valid ^ self.zero).to(dtype)
        if self.zero and dtype.is_floating_point:
            yield torch.zeros(self.valid.shape, dtype=dtype).masked_fill_(~self.valid, torch.finfo(dtype).min)

    def made_of(self, node: fx.Node) -> bool:
        """Whether a node depends on the mask and constants alone."""
        return is_tensor(node.meta.get("val")) and self._known[0].known.independent(node)

    def blocks(self, node: Any, *, where: bool = True) -> bool:
        """Whether a node [b, .., s], added to scores or (boolean) `where` it lets them through, blocks all padded keys."""
        if not isinstance(node, fx.Node) or not self.made_of(node):
            return False
        shape, (batch, length) = tuple(fake(node).shape), self.valid.shape
        if len(shape) < 2 or shape[0] % batch or shape[-1] != length:
            return False
        return any(self._blocks(lazy, node, shape, where) for lazy in self._known)

    def _blocks(self, lazy: Lazy, node: fx.Node, shape: tuple[int, ...], where: bool) -> bool:
        some, square, each = False, len(shape) > 2 and shape[-2] == shape[-1], shape[0] // self.valid.shape[0]
        for grid in grids(shape):
            try:
                value = lazy.at(node, grid)
            except Unknown:
                return False
            if value.dtype is torch.bool:
                blocked = ~value if where else value
            elif value.is_floating_point():
                blocked = value <= LOW
            else:
                return False
            sample = grid[0] // each
            kept = self.valid[sample, grid[-1]]
            asked = self.valid[sample, grid[-2]] if square else torch.tensor(True)
            if not bool((blocked | kept | ~asked).all()):
                return False
            some = some or bool((kept & ~blocked).any())
        return some

    def masked(self, scores: Any) -> bool:
        """Whether scores [b, .., s] have very negative numbers at all padded keys."""
        if not isinstance(scores, fx.Node):
            return False
        op, args = target_of(scores), scores.args
        if op in THROUGH:
            return self.masked(args[0])
        if op == "aten.baddbmm" and not scores.kwargs:
            return self.blocks(args[0])
        if op == "aten.add" and not scores.kwargs:
            return any(self.blocks(a) or self.masked(a) for a in args)
        if op == "aten.masked_fill":
            return self.blocks(args[1], where=False) and self._low(args[2])
        if op == "aten.where" and len(args) == 3:
            here, other = args[1:]
            return (self._low(other) and self.blocks(args[0])) or (
                self._low(here) and self.blocks(args[0], where=False)
            )
        return False

    def _low(self, value: Any) -> bool:
        """Whether a number, or a constant, is very negative everywhere."""
        if isinstance(value, fx.Node):
            found = self._known[0].known.value(value) if self.made_of(value) else None
            return found is not None and found.is_floating_point() and bool((found <= LOW).all())
        return isinstance(value, int | float) and value <= LOW

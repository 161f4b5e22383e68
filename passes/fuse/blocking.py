"""Masks of attention that is written out, as the one mask that `scaled_dot_product_attention` takes.

Rows that are blocked as a whole come out of the chain with equal weights, or as NaN; fused kernels do other things there, in their
backward passes at the least. So a mask is taken only where it is seen to leave every row something:

    known        it depends on no input (causal, a window, a bias by distance), and its rows were looked at
    moderate     a bias: nothing in what it is made of is a large number (of its parameters that is taken for granted)
    key by key   padding: it says the same to every query, and a sample of nothing but padding is no sample

and of two masks at most one may block: causal and padding together block the first rows of samples that are padded on the left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...planner.rules import RULES
from ..base import fake
from ..masks import OTHER, TRUE, Judge, Kind
from ..pattern import Match, target_of
from ..rewrite import Make

aten = torch.ops.aten
LOW = -1e4
"""A score that was filled with at most this has a weight of zero beside any score of a model."""
LARGE = 1e3
"""Numbers of at least this size are there to block."""
DEPTH = 3
"""Most masks that one attention may have."""
UNBOUNDED = frozenset({"aten.log", "aten.reciprocal", "aten.div", "aten.exp", "aten.pow", "aten.rsqrt"})
"""Ops whose results may be large where their operands are not."""
SAME_ROWS = frozenset({"aten.unsqueeze", "aten.expand", "aten.to", "aten.reshape"})
"""Ops that leave what a mask does to a row as it is, if the last dim stays."""


@dataclass(frozen=True)
class Part:
    """One of several masks: boolean (true allows) or additive. `fill` is what a boolean one puts in, None for an additive one."""

    node: fx.Node
    kind: Kind
    fill: float | None = None


@dataclass(frozen=True)
class Blocked:
    """What becomes of all masks together: at most one mask, or the causal one."""

    mask: fx.Node | None = None
    causal: bool = False


@dataclass(frozen=True)
class Blocking:
    """Looks at the masks of one match. `constants` are values by name, `dtype` is that of the scores to be."""

    judge: Judge
    constants: Mapping[str, Tensor]
    dtype: torch.dtype

    def of(self, match: Match, make: Make) -> Blocked | None:
        """What takes the place of all masks; None where no one mask does the same."""
        parts = [p for p in self._parts(match, make) if p.kind is not TRUE]
        if not all(map(self._fits, parts)) or sum(not self._moderate(p.node) for p in parts) > 1:
            return None
        if len(parts) == 1 and parts[0].kind.causal:
            return Blocked(causal=True)
        if any(torch.promote_types(self._dtype(p), self.dtype) != self.dtype for p in parts):
            return None
        return Blocked(self._together(parts, make))

    def _parts(self, match: Match, make: Make) -> list[Part]:
        found = []
        for i in range(DEPTH):
            node, fill = match.get(f"added {i}"), match.get(f"fill {i}")
            if f"forbidden {i}" in match.bound:
                node = make(aten.logical_not.default, match[f"forbidden {i}"])
            elif fill is not None:
                node = match[f"allowed {i}"]
            if node is not None:
                found.append(Part(node, self.judge.kind(node), None if fill is None else float(fill)))
        return found

    def _dtype(self, part: Part) -> torch.dtype:
        return fake(part.node).dtype if part.fill is None else self.dtype

    def _fits(self, part: Part) -> bool:
        """Whether a mask is of a form that is taken, and leaves every row something."""
        dtype = fake(part.node).dtype
        if part.fill is None:
            return dtype.is_floating_point and self._leaves_rows(part.node)
        if dtype is not torch.bool or part.fill > LOW:
            return False
        absorbing = torch.finfo(self.dtype).min / 2 >= part.fill > -math.inf
        return part.kind is not OTHER or (absorbing and self._by_key(part.node))

    def _leaves_rows(self, mask: fx.Node) -> bool:
        """Whether every row of an additive mask has a number that blocks nothing, as far as can be seen."""
        if self.judge.kind(mask) is not OTHER or self._moderate(mask):
            return True
        value = self.judge.known.value(mask)
        if value is not None:
            return bool((value > LOW).any(-1).all())
        if target_of(mask) == "aten.add" and len(mask.all_input_nodes) == 2:
            one, other = mask.all_input_nodes
            if any(self._leaves_rows(a) and self._moderate(b) for a, b in ((one, other), (other, one))):
                return True
        source = mask.all_input_nodes[0] if target_of(mask) in SAME_ROWS else None
        if source is not None and fake(source).shape[-1:] == fake(mask).shape[-1:] and _floating(source):
            return self._leaves_rows(source)
        return self._by_key(mask) and not self._holds(mask, math.inf)

    def _moderate(self, mask: fx.Node) -> bool:
        return _floating(mask) and not self._holds(mask, LARGE)

    def _holds(self, mask: fx.Node, size: float) -> bool:
        """Whether a number of at least this size may go into a mask."""
        queue, seen = [mask], {mask}
        while queue:
            node = queue.pop()
            if self._brings(node, size):
                return True
            more = [n for n in node.all_input_nodes if n not in seen and _floating(n)]
            seen.update(more)
            queue.extend(more)
        return False

    def _brings(self, node: fx.Node, size: float) -> bool:
        if node.op == "placeholder":
            value = self.constants.get(node.name)
            known = node.meta["role"] == "parameter" if value is None else not bool((value.abs() >= size).any())
            return not known
        numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float)]
        return target_of(node) in UNBOUNDED or any(abs(a) >= size for a in numbers)

    def _by_key(self, mask: fx.Node) -> bool:
        """Whether a mask is the same for every query."""
        if fake(mask).dim() < 2 or fake(mask).shape[-2] == 1:
            return True
        value = self.judge.known.value(mask)
        if value is not None:
            return bool((value == value[..., :1, :]).all())
        if target_of(mask) == "aten.expand" and fake(mask.all_input_nodes[0]).dim() == fake(mask).dim():
            return self._by_key(mask.all_input_nodes[0])
        rule = RULES.get(target_of(mask))
        return rule is not None and rule.kind == "elementwise" and all(map(self._by_key, mask.all_input_nodes))

    def _together(self, parts: list[Part], make: Make) -> fx.Node | None:
        """One mask for all: a boolean one stays so if it is known and alone."""
        if len(parts) == 1 and parts[0].fill is not None and parts[0].kind is not OTHER:
            return parts[0].node
        total: fx.Node | None = None
        for part in parts:
            node = self._additive(part, make)
            total = node if total is None else make(aten.add.Tensor, total, node)
        return total

    def _additive(self, part: Part, make: Make) -> fx.Node:
        if part.fill is None:
            same = fake(part.node).dtype == self.dtype
            return part.node if same else make(aten.to.dtype, part.node, self.dtype)
        zero = make(aten.full.default, [], 0.0, dtype=self.dtype)
        return make(aten.where.ScalarOther, part.node, zero, max(part.fill, torch.finfo(self.dtype).min))


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return any(v.is_floating_point() for v in (value if isinstance(value, tuple | list) else [value]))

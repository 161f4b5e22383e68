"""Recognise attention masks that depend on no input, without ever making an S x S tensor of a long sequence.

    m = and(le(k, q), eq(packed[q], packed[k]))          becomes     y = sdpa(q, k, v, is_causal=True)
    y = sdpa(q, k, v, m)

A traced mask is a chain of pointwise ops, views and lookups over small vectors (positions, packed-sequence ids). Any
element of it can be computed by walking the chain backwards with *indices*: `_Lazy.at(node, grid)` gives node[grid],
where the grid holds one broadcastable index tensor per dim. The decision looks at the whole mask up to 2^24 elements,
else at the first and last rows, evenly spaced rows and pseudo-random rows (seeded) of the first, last and some batch
entries.

An all-true mask goes, a causal one becomes `is_causal`, boolean or additive. A sliding window becomes one S x S band
without batch. In an `and` with a padding mask, all-true operands go and causal ones become such a band; what is only
broadcast is passed unbroadcast. Anything else stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from .base import Contract, Program, emit, fake, replace
from .constants import Known
from .gradients import differentiable
from .lazy import Lazy, Unknown

aten = torch.ops.aten
WHOLE = 1 << 24
"""Masks of at most this many elements are looked at as a whole; also the number of elements sampled of larger ones."""
LEAF = 1 << 20
"""Elements of a value that is computed as it stands."""
SEED = 20240229


@dataclass(frozen=True)
class RecogniseMasks(Contract):
    """Simplifies masks of `scaled_dot_product_attention` and trivial lookups in what they are made of."""

    name: str = "masks"
    requires: tuple[str, ...] = ("simple",)
    provides: tuple[str, ...] = ("masks recognised",)

    def apply(self, program: Program) -> Program:
        judge = Judge(program)
        for node in program.graph.nodes:
            judge.known.independent(node)  # in order, so that no look-up recurses deeply
            if node.target is aten.index.Tensor:
                _lookup(node, judge)
            elif node.target is aten.scaled_dot_product_attention.default:
                _attention(node, judge)
        return program


@dataclass(frozen=True)
class Kind:
    """What a mask is: "true", "band" or "other". A band of window w allows 0 <= row - column < w; causal is w = rows."""

    name: str
    window: int = 0
    rows: int = 0

    @property
    def causal(self) -> bool:
        return self.name == "band" and self.window >= self.rows


TRUE, OTHER = Kind("true"), Kind("other")


class Judge:
    """Decides what a mask is, each mask once."""

    def __init__(self, program: Program) -> None:
        self.known = Known(program.constants, LEAF)
        self._lazy = Lazy(self.known)
        self._kinds: dict[fx.Node, Kind] = {}
        self._reduced: dict[fx.Node, fx.Node | None] = {}

    def kind(self, node: fx.Node) -> Kind:
        """The kind of a mask, boolean or additive (0 allows, the least number of its dtype or -inf blocks)."""
        if node not in self._kinds:
            self._kinds[node] = self._decide(node)
        return self._kinds[node]

    def _decide(self, node: fx.Node) -> Kind:
        shape = tuple(fake(node).shape)
        if len(shape) < 2 or not self.known.independent(node):
            return OTHER
        try:
            possible = {TRUE, self._band(node, shape)} - {OTHER}
            for grid in grids(shape):
                allowed, blocked = _as_boolean(self._lazy.at(node, grid))
                possible = {k for k in possible if _agrees(k, allowed, blocked, grid[-1] - grid[-2])}
                if not possible:
                    return OTHER
        except Unknown:
            return OTHER
        return TRUE if TRUE in possible else possible.pop()

    def _band(self, node: fx.Node, shape: tuple[int, ...]) -> Kind:
        """The only band that agrees with the last row of a square mask."""
        rows, columns = shape[-2:]
        if rows != columns:
            return OTHER
        last = [torch.zeros((), dtype=torch.long)] * (len(shape) - 2) + [torch.tensor(rows - 1), torch.arange(columns)]
        allowed, _ = _as_boolean(self._lazy.at(node, last))
        return Kind("band", int(allowed.expand(columns).sum()), rows)

    def reduced(self, node: fx.Node) -> fx.Node | None:
        """A boolean mask without its all-true operands and broadcasts, bands in one form; None where nothing is left."""
        if node not in self._reduced:
            self._reduced[node] = self._reduce(node)
        return self._reduced[node]

    def _reduce(self, node: fx.Node) -> fx.Node | None:
        kind = self.kind(node)
        if kind is TRUE:
            return None
        if kind.name == "band":
            return make_band(node, kind)
        if node.target is aten.expand.default:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return self.reduced(source) if fake(source).dim() == fake(node).dim() else node
        if node.target not in (aten.bitwise_and.Tensor, aten.logical_and.default) or fake(node).dtype is not torch.bool:
            return node
        left, right = node.args
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return node
        sides = [self.reduced(left), self.reduced(right)]
        if sides == [left, right]:
            return node
        kept = [s for s in sides if s is not None]
        if len(kept) < 2:
            return kept[0] if kept else None
        with node.graph.inserting_after(node):
            return _known_flag(emit(node.graph, aten.bitwise_and.Tensor, (kept[0], kept[1]), like=node))


def make_band(node: fx.Node, kind: Kind) -> fx.Node:
    """The boolean (rows, rows) mask of a band, after `node` (after all placeholders, where it is one)."""
    graph = node.graph
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1] if node.op == "placeholder" else node):
        made = emit(graph, aten.full.default, ([kind.rows, kind.rows], True), {"dtype": torch.bool}, like=node)
    for target, *arguments in [(aten.tril.default,)] + ([] if kind.causal else [(aten.triu.default, 1 - kind.window)]):
        with graph.inserting_after(_known_flag(made)):
            made = emit(graph, target, (made, *arguments), like=node)
    return _known_flag(made)


def _known_flag(node: fx.Node) -> fx.Node:
    node.meta["differentiable"] = False
    return node


def grids(shape: tuple[int, ...]) -> list[list[torch.Tensor]]:
    """Index grids, one broadcastable index per dim, in chunks of rows."""
    *leading, rows, columns = shape
    if math.prod(shape) <= WHOLE:
        outer = [torch.arange(n) for n in leading]
        chosen = torch.arange(rows)
    else:
        generator = torch.Generator().manual_seed(SEED)
        outer = [_some(n, 2, generator) for n in leading]
        budget = max(16, WHOLE // (columns * math.prod(len(o) for o in outer)))
        chosen = torch.arange(rows) if rows <= budget else _some(rows, budget, generator)
    rank = len(shape)
    fixed = [_along(o, dim, rank) for dim, o in enumerate(outer)]
    step = max(1, WHOLE // (4 * columns * math.prod(len(o) for o in outer)))
    last = _along(torch.arange(columns), rank - 1, rank)
    return [[*fixed, _along(part, rank - 2, rank), last] for part in chosen.split(step)]


def _some(size: int, budget: int, generator: torch.Generator) -> torch.Tensor:
    """First, last, evenly spaced and pseudo-random positions, ascending."""
    spaced = torch.linspace(0, size - 1, max(2, budget // 2)).round().long()
    random = torch.randint(0, size, (max(1, budget // 2),), generator=generator)
    edges = torch.tensor([0, min(1, size - 1), size // 2, size - 1])
    return torch.cat([spaced, random, edges]).clamp(0, size - 1).unique()


def _along(index: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    return index.view(*(-1 if d == dim else 1 for d in range(rank)))


def _as_boolean(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(allowed, blocked) of mask values; an additive value between 0 and the least of its dtype is neither."""
    if values.dtype is torch.bool:
        return values, ~values
    if not values.is_floating_point():
        raise Unknown
    return values == 0, values <= torch.finfo(values.dtype).min


def _agrees(kind: Kind, allowed: torch.Tensor, blocked: torch.Tensor, ahead: torch.Tensor) -> bool:
    """Whether these elements are as the kind says; `ahead` is column - row."""
    if kind is TRUE:
        return bool(allowed.all())
    inside = (ahead <= 0) & (ahead > -kind.window)
    return bool(torch.where(inside, allowed, blocked).all())


def _attention(node: fx.Node, judge: Judge) -> None:
    """Simplify the mask of one attention call."""
    query, key, value, *rest = node.args
    mask = rest[0] if rest else node.kwargs.get("attn_mask")
    if not isinstance(mask, fx.Node):
        return
    kind = judge.kind(mask)
    if kind is OTHER and fake(mask).dtype is torch.bool:
        reduced = judge.reduced(mask)
        mask, kind = (mask, TRUE) if reduced is None else (reduced, judge.kind(reduced))
    elif kind.name == "band" and not kind.causal:
        mask = judge.reduced(mask)
    dropout = rest[1] if len(rest) > 1 else node.kwargs.get("dropout_p", 0.0)
    kept = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")}
    stays = kind is not TRUE and not kind.causal
    node.args = (query, key, value, mask if stays else None, dropout, kind.causal)
    node.kwargs = kept


def _lookup(node: fx.Node, judge: Judge) -> None:
    """Replace `index(x, [0..n, 0..m])`, one whole range per dim, by a reshape of x."""
    source, indices = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    shape, dims = fake(source).shape, []
    for size, index in zip(shape, indices, strict=False):  # type: ignore[arg-type]
        value = judge.known.value(index) if isinstance(index, fx.Node) else None
        if value is None or value.numel() != size or value.dtype is torch.bool:
            return
        if not torch.equal(value.reshape(-1), torch.arange(size)):
            return
        wide = [d - value.dim() for d, n in enumerate(value.shape) if n > 1]
        dims += wide or [None]  # type: ignore[list-item]
    long = [d for d in dims if d is not None]
    if len(dims) != len(shape) or sorted(set(long)) != long:
        return
    with node.graph.inserting_before(node):
        made = emit(node.graph, aten.reshape.default, (source, list(fake(node).shape)), like=node)
        made.meta["differentiable"] = differentiable(made)
    replace(node, made)

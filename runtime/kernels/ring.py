"""Ring attention: queries, keys and values split along their positions, keys and values passed round the ranks.

In n rounds a rank attends from its queries to one block of keys and values while it sends that block on. The result is
kept normalised by the log-sum-exp l of each row so far: a block with scores s adds

    l' = log(exp l + sum exp s),    y' = exp(l - l') y + exp(s - l') v

(online softmax: Milakov and Gimelshein 2018; Liu et al. 2023, "Ring Attention with Blockwise Transformers"). The backward pass
needs only l and y: with p = exp(s - l) and d = sum(dy * y),  ds = p (dy v^T - d),  dq = ds k,  dk = ds^T q,  dv = p^T dy. Keys
and values go round again, and dK and dV with them from the second round on, which ends them at their owner: n - 1 passes each.

Blocks are cut into tiles of at most `TILE` scores, the largest tensor made here. In zig-zag order (zigzag.py) a rank holds two
stretches; under a causal mask a pair of stretches is whole, triangular, or left out. Scores and sums are in float32 where
operands are in less. Shapes: q [*b, s, k], k [*c, t, k], v [*c, t, e] -> [*b, s, e], where a head of c serves a group of heads
of b; a mask broadcasts to [*b, s, t of all ranks].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedOp
from ...passes.random import keep_mask, mix
from ...planner.ring import TILE, stretches
from .. import collectives
from ..passing import pass_on

CallForm = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
LOW_PRECISION = (torch.float16, torch.bfloat16)
NEVER = float("-inf")


@dataclass(frozen=True)
class Spread:
    """The ring: its ranks, this rank, its group, and how positions lie on it; `drop` is the probability of dropout."""

    ways: int
    index: int
    group: str
    zigzag: bool
    causal: bool
    scale: float
    drop: float = 0.0
    salt: int = 0

    def spans(self, rank: int, length: int) -> list[tuple[int, int, int]]:
        """(first of its own, first of all, number) of each stretch of positions that `rank` holds, `length` in all."""
        if not self.zigzag or length % 2:
            return [(0, rank * length, length)]
        half = length // 2
        return [(i * half, part * half, half) for i, part in enumerate(stretches(rank, self.ways))]

    def owner(self, turn: int) -> int:
        """Whose keys this rank has in a round."""
        return (self.index - turn) % self.ways


@dataclass(frozen=True)
class Tile:
    """Rows of the queries against columns of a block of keys. Row i sees column j where j - i <= `ahead`; None: everything.

    `first` is the global position of the first column, `number` tells tiles of one rank apart.
    """

    rows: slice
    columns: slice
    ahead: int | None
    first: int
    number: int


def tiles(at: Spread, queries: int, keys: int, owner: int, rows_beside: int) -> Iterator[Tile]:
    """Tiles of this rank's queries against the keys of `owner`; `rows_beside` rows of scores belong to each position."""
    number = owner << 20
    whole = [(0, 0, queries)]
    for q0, q_at, q_size in at.spans(at.index, queries) if at.causal else whole:
        for k0, k_at, k_size in at.spans(owner, keys):
            high = max(1, TILE // max(1, rows_beside * k_size))
            for start in range(0, q_size, high):
                size = min(high, q_size - start)
                number += 1
                ahead = q_at + start - k_at if at.causal else None
                if ahead is not None and ahead + size - 1 < 0:
                    continue  # all of it lies ahead of all rows
                if ahead is not None and ahead >= k_size - 1:
                    ahead = None
                yield Tile(slice(q0 + start, q0 + start + size), slice(k0, k0 + k_size), ahead, k_at, number)


class _Work:
    """One rank's part of one direction. Queries are [*c, g, s, k], the mask [.., g, s, t of all ranks]."""

    def __init__(self, at: Spread, q: Tensor, mask: Tensor | None, seed: Tensor | None) -> None:
        self.at, self.q, self.mask, self.seed = at, q, mask, seed
        self.sums = torch.float32 if q.dtype in LOW_PRECISION else q.dtype
        self.beside = math.prod(q.shape[:-2])

    def tiles(self, keys: int, turn: int) -> Iterator[Tile]:
        return tiles(self.at, self.q.shape[-2], keys, self.at.owner(turn), self.beside)

    def scores(self, tile: Tile, k: Tensor) -> Tensor:
        """[*c, g, rows, columns], -inf where a row does not see a column."""
        s = rows_by(self.q[..., tile.rows, :] * self.at.scale, k[..., tile.columns, :].transpose(-1, -2)).to(self.sums)
        if tile.ahead is not None:
            seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(tile.ahead)
            s = s.masked_fill(~seen, NEVER)
        if self.mask is None:
            return s
        mask = self.mask[self.place(tile)]
        return s.masked_fill(~mask, NEVER) if mask.dtype == torch.bool else s + mask.to(self.sums)

    def place(self, tile: Tile) -> tuple[Any, ...]:
        """Where the tile lies in the mask, whose broadcast dims have one entry."""
        assert self.mask is not None
        columns = slice(tile.first, tile.first + tile.columns.stop - tile.columns.start)
        rows, all_ = tile.rows, slice(None)
        return (..., rows if self.mask.shape[-2] > 1 else all_, columns if self.mask.shape[-1] > 1 else all_)

    def kept(self, tile: Tile, p: Tensor) -> Tensor | float:
        """What dropout multiplies the probabilities of a tile with, the same in both directions."""
        if not self.at.drop:
            return 1.0
        if self.at.drop >= 1.0:
            return 0.0
        assert self.seed is not None
        return keep_mask(p, self.at.drop, self.seed, mix(self.at.salt, tile.number)).to(p.dtype) / (1 - self.at.drop)


def rows_by(x: Tensor, y: Tensor) -> Tensor:
    """[*c, g, r, i] times [*c, i, j] -> [*c, g, r, j], without a copy of y per group."""
    return (x.flatten(-3, -2) @ y).unflatten(-2, x.shape[-3:-1])


def over_rows(x: Tensor, y: Tensor) -> Tensor:
    """[*c, g, r, i] and [*c, g, r, j] summed over g and r -> [*c, i, j]."""
    return x.flatten(-3, -2).transpose(-1, -2) @ y.flatten(-3, -2)


def _finite(x: Tensor) -> Tensor:
    """A log-sum-exp to subtract: 0 for rows that see nothing, whose probabilities are then 0."""
    return x.masked_fill(x == NEVER, 0.0).unsqueeze(-1)


def _heads_inside(q: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros [*c, g, s, width] for queries q, positions before heads in memory, as the kernels of one device have it: models
    join heads by a view."""
    lead, heads = q.shape[:-4], q.shape[max(q.dim() - 4, 0) : -2]
    return q.new_zeros((*lead, q.shape[-2], *heads, width), dtype=dtype).movedim(len(lead), -2)


def _packed(*parts: Tensor) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parts])


def _opened(flat: Tensor, *like: Tensor) -> list[Tensor]:
    """The parts of a flat buffer, in the shapes of `like`."""
    return [part.view(x.shape) for part, x in zip(flat.split([x.numel() for x in like]), like, strict=True)]


class _Ring(torch.autograd.Function):
    """q [*c, g, s, k], k and v [*c, t, .] of this rank, mask as `_Work` has it -> [*c, g, s, e]."""

    @staticmethod
    def forward(ctx, q, k, v, mask, seed, at):  # type: ignore[no-untyped-def,override]
        work = _Work(at, q, mask, seed)
        y = _heads_inside(q, v.shape[-1], work.sums)
        total = q.new_full(q.shape[:-1], NEVER, dtype=work.sums)
        ctx.ledger = collectives.active_ledger()
        block = _packed(k, v)
        gather = "all_gather", collectives.record("all_gather", at.ways * block.nbytes, at.group)
        for turn in range(at.ways):
            coming = pass_on(block, at.ways, at.index, gather, at.group) if turn + 1 < at.ways else None
            keys, values = _opened(block, k, v)
            for tile in work.tiles(k.shape[-2], turn):
                s = work.scores(tile, keys)
                before = total[..., tile.rows]
                after = torch.logaddexp(before, s.logsumexp(-1))
                p = (s - _finite(after)).exp_()
                p = p * work.kept(tile, p)
                y[..., tile.rows, :] *= (before.unsqueeze(-1) - _finite(after)).exp()
                y[..., tile.rows, :] += rows_by(p.to(v.dtype), values[..., tile.columns, :])
                total[..., tile.rows] = after
            if coming is not None:
                block = coming()
        result = y.to(q.dtype)
        ctx.save_for_backward(q, k, v, mask, seed, result, total)
        ctx.at = at
        return result

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        q, k, v, mask, seed, y, total = ctx.saved_tensors
        back = _Backward(_Work(ctx.at, q, mask, seed), y, total, grad, wants_mask=ctx.needs_input_grad[3])
        with collectives.backward_phase(ctx.ledger):
            dk, dv = back.round(k, v)
        d_mask = back.d_mask.to(mask.dtype) if back.d_mask is not None else None
        return back.dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_mask, None, None


class _Backward:
    """The backward pass of one rank; `dq` and `d_mask` are sums over rounds."""

    def __init__(self, work: _Work, y: Tensor, total: Tensor, grad: Tensor, *, wants_mask: bool) -> None:
        self.work, self.total, self.grad = work, total, grad
        self.along = (grad.to(work.sums) * y.to(work.sums)).sum(-1)
        self.dq = torch.zeros_like(work.q, dtype=work.sums)
        self.d_mask = torch.zeros_like(work.mask, dtype=work.sums) if wants_mask and work.mask is not None else None

    def round(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All rounds; returns the whole gradients of this rank's own keys and values."""
        at = self.work.at
        size = at.ways * (k.numel() + v.numel()) * k.element_size()
        gather, scatter = ((c, collectives.record(c, size, at.group)) for c in ("all_gather", "reduce_scatter"))
        block: Tensor | None = _packed(k, v)
        mine = [torch.zeros_like(x, dtype=self.work.sums) for x in (k, v)]
        sums: Tensor | None = None
        for turn in range(at.ways):
            assert block is not None
            coming = pass_on(block, at.ways, at.index, gather, at.group) if turn + 1 < at.ways else None
            own = self._theirs(k.numel() + v.numel(), sums) if turn else None
            sums = None
            self._block(*_opened(block, k, v), *(mine if own is None else _opened(own, k, v)), turn)
            block = coming() if coming is not None else None
            if own is not None:
                sums = pass_on(own.to(k.dtype), at.ways, at.index, scatter, at.group)()
                own = None
        if sums is not None:
            for whole, rest in zip(mine, _opened(sums, k, v), strict=True):
                whole += rest
        return mine[0], mine[1]

    def _theirs(self, count: int, sums: Tensor | None) -> Tensor:
        """Where gradients of another rank's keys and values are added up, flat: on what came with them."""
        work = self.work
        return work.q.new_zeros(count, dtype=work.sums) if sums is None else sums.to(work.sums)

    def _block(self, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, turn: int) -> None:
        """One block of keys and values: adds to `dq` and to its `dk` and `dv`."""
        for tile in self.work.tiles(k.shape[-2], turn):
            self._tile(tile, k, v, dk, dv)

    def _tile(self, tile: Tile, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor) -> None:
        work, at = self.work, self.work.at
        rows, columns = tile.rows, tile.columns
        p = (work.scores(tile, k) - _finite(self.total[..., rows])).exp_()
        kept, g = work.kept(tile, p), self.grad[..., rows, :]
        dv[..., columns, :] += over_rows((p * kept).to(v.dtype), g)
        dp = rows_by(g, v[..., columns, :].transpose(-1, -2)).to(work.sums) * kept
        ds = p * (dp - self.along[..., rows].unsqueeze(-1))
        if self.d_mask is not None:
            where = work.place(tile)
            self.d_mask[where] += ds.sum_to_size(self.d_mask[where].shape)
        low = (ds * at.scale).to(k.dtype)
        self.dq[..., rows, :] += rows_by(low, k[..., columns, :])
        dk[..., columns, :] += over_rows(low, work.q[..., rows, :])


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, ways: int, index: int, group: str, zigzag: bool, seed: Tensor | None = None, salt: int = 0,
) -> Tensor:  # fmt: skip
    lead = key.shape[:-2]
    groups = math.prod(query.shape[:-2]) // max(1, math.prod(lead))
    if value.shape[:-2] != lead or query.dim() != key.dim() or query.shape[:-3] != key.shape[:-3]:
        raise UnsupportedOp(
            f"a ring of attention over queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)}: "
            "their dims before heads must be equal"
        )
    own = Spread(
        ways, index, group, zigzag, is_causal, 1 / math.sqrt(query.shape[-1]) if scale is None else scale, dropout_p, salt
    )  # fmt: skip
    mask = _grouped(attn_mask, query.dim(), groups) if attn_mask is not None else None
    q = query.reshape(*lead, groups, *query.shape[-2:])
    return _Ring.apply(q, key, value, mask, seed, own).reshape(*query.shape[:-1], value.shape[-1])


def _grouped(mask: Tensor, rank: int, groups: int) -> Tensor:
    """The mask with its dim of heads opened into (heads of keys, groups)."""
    mask = mask.reshape(*(1,) * (rank - mask.dim()), *mask.shape)
    if groups == 1 or rank < 3 or mask.shape[-3] == 1:
        return mask.unsqueeze(-3)
    return mask.unflatten(-3, (mask.shape[-3] // groups, groups))


_LIBRARY.define(
    "ring_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, float? scale, "
    "int ways, int index, str group, bool zigzag, Tensor? seed=None, int salt=0) -> Tensor"
)
_LIBRARY.impl("ring_attention", _attention, "CompositeImplicitAutograd")

ring_attention = torch.ops.shardwright.ring_attention.default
"""Scaled dot product attention of this rank's queries over the keys of all `ways` ranks of `group`."""


def ring_form(form: CallForm, group: str, index: int, size: int, *, zigzag: bool) -> CallForm:
    """`aten.scaled_dot_product_attention` as a ring; `zigzag`: positions of this axis are held in two stretches."""
    target, args, kwargs = form
    if target is not torch.ops.aten.scaled_dot_product_attention.default:
        raise UnsupportedOp(f"{target} cannot run as a ring over an axis; plan with cp=1")
    names = {"query": None, "key": None, "value": None, "attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    bound = [args[i] if i < len(args) else kwargs.get(name, default) for i, (name, default) in enumerate(names.items())]
    return ring_attention, (*bound, kwargs.get("scale"), size, index, group, zigzag), {}


def without_dropout(form: CallForm) -> CallForm:
    """The ring with nothing dropped."""
    target, args, kwargs = form
    return target, (*args[:4], 0.0, *args[5:]), kwargs


def seeded_ring(form: CallForm, salt: int) -> Callable[[Any], CallForm] | None:
    """How to call the ring given the node of a seed; None where nothing is dropped."""
    target, args, kwargs = form
    return (lambda seed: (target, (*args[:11], seed, salt), kwargs)) if args[4] else None

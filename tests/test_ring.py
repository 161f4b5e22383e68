"""Ring attention and zig-zag order on real ranks, held against attention over the whole sequence in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from shardwright.planner.placement import R, Step, V, split
from shardwright.runtime import zigzag
from shardwright.runtime.collectives import CommLedger
from shardwright.runtime.kernels import ring
from shardwright.runtime.transitions import emit_args
from torch import Tensor

LENGTH, CLOSE = 24, 1e-9


def inputs(heads: int, groups: int, mask: str, keys: int = LENGTH) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v and a mask that may carry a gradient, the same on every rank; and what else attention is given."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    parts = [random(2, heads, LENGTH, 8), random(2, groups, keys, 8), random(2, groups, keys, 6)]
    more: dict[str, Any] = {"is_causal": mask == "causal"}
    if mask == "padded":  # the second sample is short, and a row may see nothing
        more["attn_mask"] = torch.arange(keys) < torch.tensor([keys, 5]).view(2, 1, 1, 1)
    if mask == "bias":
        more["attn_mask"] = random(1, heads, LENGTH, keys)
    return parts, more


def part(x: Tensor, dim: int, order: bool) -> Tensor:
    """This rank's positions of x."""
    n, index = dist.get_world_size(), dist.get_rank()
    return (zigzag.held(x, dim, 1, n) if order else x).chunk(n, dim)[index]


def compared(heads: int, groups: int, mask: str, keys: int, tile: int) -> tuple[float, list[tuple[str, int]]]:
    """Rank function: the largest difference of the result and all gradients, and the collectives that ran."""
    n, index, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD.group_name
    whole, more = inputs(heads, groups, mask, keys)
    bias = more.get("attn_mask")
    leaves = [*whole, *([bias] if bias is not None and bias.requires_grad else [])]
    wanted = torch.nn.functional.scaled_dot_product_attention(*whole, **more, enable_gqa=heads != groups)
    weight = torch.arange(wanted.numel(), dtype=torch.float64).view(wanted.shape).cos()
    expected = torch.autograd.grad((wanted * weight).sum(), leaves)
    zig, before = mask != "padded", ring.TILE
    own = [part(x.detach(), 2, zig).requires_grad_() for x in whole]
    local = bias.detach() if bias is not None else None
    if local is not None and mask == "bias":
        local = part(local, 2, zig).requires_grad_()
    ring.TILE = tile
    try:
        with CommLedger({group: "cp"}) as ledger:
            found = ring.ring_attention(*own, local, 0.0, mask == "causal", None, n, index, group, zig)
            got = torch.autograd.grad(
                (found * part(weight, 2, zig)).sum(), [*own, *([local] if mask == "bias" else [])]
            )
    finally:
        ring.TILE = before
    pairs = [(found, part(wanted, 2, zig)), *((g, part(e, 2, zig)) for g, e in zip(got, expected, strict=True))]
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    return worst, [(r.collective, r.bytes) for r in ledger.records]


@pytest.mark.parametrize(
    ("heads", "groups", "mask", "keys", "tile"),
    [(2, 2, "causal", LENGTH, 1 << 24), (4, 2, "causal", LENGTH, 100), (4, 1, "padded", LENGTH, 1 << 24),
     (2, 2, "", 2 * LENGTH, 60), (4, 2, "bias", LENGTH, 1 << 24)],
)  # fmt: skip
def test_ring(heads: int, groups: int, mask: str, keys: int, tile: int, pools: dict[int, Pool]) -> None:
    for n in (2, 4):
        for worst, ran in pools[n].run(compared, heads, groups, mask, keys, tile):
            assert worst < CLOSE
            size = 2 * groups * keys * (8 + 6) * 8
            assert ran == [("all_gather", size), ("all_gather", size), ("reduce_scatter", size)]


def dropped() -> tuple[float, float, float]:
    """Rank function: the result and a directional derivative with dropout, which draws the same numbers in both directions."""
    n, index, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD.group_name
    whole, _ = inputs(2, 2, "causal")
    q, k, v = (part(x.detach(), 2, True) for x in whole)
    seed, step = torch.tensor(5), 1e-6
    way = torch.randn(k.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)

    leaf = k.clone().requires_grad_()
    y = ring.ring_attention(q, leaf, v, None, 0.4, True, None, n, index, group, True, seed, 3 + index)
    (grad,) = torch.autograd.grad(y.sin().sum(), leaf)

    def value(keys: Tensor) -> Tensor:
        return (
            ring.ring_attention(q, keys, v, None, 0.4, True, None, n, index, group, True, seed, 3 + index).sin().sum()
        )

    along = torch.stack([(grad * way).sum(), (value(k + step * way) - value(k - step * way)) / (2 * step)]).detach()
    dist.all_reduce(along)
    plain = ring.ring_attention(q, k, v, None, 0.0, True, None, n, index, group, True)
    return float(along[0]), float(along[1]), float((plain - y).abs().max())


def test_dropout_of_a_ring(ranks2: Pool) -> None:
    for mine, numeric, apart in ranks2.run(dropped):
        assert mine == pytest.approx(numeric, rel=1e-7)
        assert apart > 0.1


def reordered() -> list[float]:
    """Rank function: differences of a slice and its gather in zig-zag order, forward and backward, for several places."""
    n, index, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD.group_name
    found = []
    for dims, place in ((((3,), (8,)), split(1)), (((3, 8), (2,)), split(0, 1)), (((8, 3),), split(0))):
        shape = [torch.Size(d).numel() for d in dims]
        x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)

        def change(x: Tensor, source: Any, target: Any, dims: Any = dims) -> Tensor:
            step = Step(0, source, target, (source,))
            args = emit_args(step, dims, (n,), (index,), group)
            return zigzag.zigzag_transition(x, *args, *zigzag.orders(step, dims, (n,)))

        leaf = x.clone().requires_grad_()
        mine = change(leaf, V, place)
        inner = x.reshape([s for d in dims for s in d]).movedim(place.factor + place.dim, 0)
        kept = torch.stack([inner.chunk(2 * n)[i] for i in (index, 2 * n - 1 - index)]).flatten(0, 1)
        opened = list(dims[place.dim])
        opened[place.factor] //= n
        shape_there = [torch.Size(opened).numel() if d == place.dim else s for d, s in enumerate(shape)]
        expected = kept.movedim(0, place.factor + place.dim).reshape(shape_there)
        found.append(float((mine - expected).abs().max()))
        back = change(mine, place, R)
        found.append(float((back - x).abs().max()))
        (grad,) = torch.autograd.grad((back * x).sum(), leaf)  # V: each rank its own part
        dist.all_reduce(grad)
        found.append(float((grad - x).abs().max()))
    return found


def test_zigzag_transitions(pools: dict[int, Pool]) -> None:
    for n in (2, 4):
        assert all(found == [0.0] * 9 for found in pools[n].run(reordered))


def test_tiles_cover_what_is_seen_once() -> None:
    n, length = 4, 12
    for rank, causal in itertools.product(range(n), (False, True)):
        at = ring.Spread(n, rank, "", True, causal, 1.0)
        seen = torch.zeros(length, n * length, dtype=torch.long)
        for turn in range(n):
            for tile in ring.tiles(at, length, length, at.owner(turn), 10):
                high, wide = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
                inside = torch.ones(high, wide, dtype=torch.long)
                inside = inside if tile.ahead is None else inside.tril(tile.ahead)
                seen[tile.rows, tile.first : tile.first + wide] += inside
        rows = torch.cat([torch.arange(first, first + size) for _, first, size in at.spans(rank, length)])
        expected = (torch.arange(n * length) <= rows[:, None]).long() if causal else torch.ones_like(seen)
        assert torch.equal(seen, expected)

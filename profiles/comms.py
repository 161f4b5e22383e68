"""Timing of collectives on a running process group: the functional calls that the runtime makes, copies included.

Bytes are those of the full tensor (planner/collectives.py). For each group size all its groups are timed at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from .timing import spread_mean, time_call

SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24)
"""Full bytes that are timed."""
SECONDS_PER_SIZE = 0.05

# torch.ops._c10d_functional is private in name only: DTensor and torch.compile are built on it, and it is what the
# lowered graph calls, so nothing else has the same cost. Tried with torch 2.13.
functional = torch.ops._c10d_functional


def time_collectives(
    names: tuple[str, ...], sizes: tuple[int, ...] = SIZES
) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """Rows (full bytes, seconds) by (collective, group size) for every group size that divides the world."""
    world = dist.get_world_size()
    found: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for size in (n for n in range(2, world + 1) if world % n == 0):
        group = _own_group(size)
        for name in names:
            found[name, size] = rising([(full, _time_one(name, full, size, group)) for full in sizes])
    return found


def rising(rows: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Rows whose seconds never fall with bytes: a slower smaller message was disturbed, so the larger one's seconds hold."""
    kept: list[tuple[int, float]] = []
    for full, seconds in reversed(rows):
        kept.append((full, min([seconds, *(s for _, s in kept[-1:])])))
    return kept[::-1]


def _own_group(size: int) -> str:
    """The name of this rank's group of `size` neighbours; makes all such groups."""
    own = ""
    for start in range(0, dist.get_world_size(), size):
        ranks = list(range(start, start + size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            own = group.group_name
    return own


def _time_one(name: str, full: int, size: int, group: str) -> float:
    call = _call(name, max(full // 4, size * size), size, group)
    call()
    return spread_mean(time_call(call, SECONDS_PER_SIZE).seconds)


def _call(name: str, elements: int, size: int, group: str) -> Callable[[], object]:
    """One collective of `elements` float32 elements of full tensor, as a call without arguments."""
    local = torch.ones(elements if name in ("all_reduce", "reduce_scatter") else elements // size)
    if name == "all_reduce":
        return lambda: functional.wait_tensor(functional.all_reduce(local, "sum", group))
    if name == "all_gather":
        return lambda: functional.wait_tensor(functional.all_gather_into_tensor(local, size, group))
    if name == "reduce_scatter":
        return lambda: functional.wait_tensor(
            functional.reduce_scatter_tensor(local.view(size, -1), "sum", size, group)
        )
    pieces = local[: len(local) // size * size].view(size, -1)
    ones = [1] * size
    return lambda: functional.wait_tensor(functional.all_to_all_single(pieces, ones, ones, group))

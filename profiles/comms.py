"""Timing of collectives on a running process group: the functional calls that the runtime makes, copies included.

Bytes are those of the full tensor (planner/collectives.py). For each group size all its groups are timed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from .timing import device, time_call, time_difference

SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24)
"""Full bytes that are timed."""
SEND_SIZES = (1 << 10, 1 << 17, 1 << 20, 1 << 23)
"""Bytes of messages that are timed."""
SECONDS_PER_SIZE = 0.05
WORK_SIDE = 512
SECONDS_AFTER_WORK, MOST_AFTER_WORK = 0.2, 10
SWEEPS = 3
"""A CPU's network stack has slow spells of seconds (new pages for its buffers, a paced sender): the quickest time counts.
Short sweeps get past a spell that a long one lies in."""

# torch.ops._c10d_functional is private in name only: DTensor and torch.compile are built on it, and it is what the
# lowered graph calls, so nothing else has the same cost. Tried with torch 2.13.
functional = torch.ops._c10d_functional


def time_collectives(
    names: tuple[str, ...], sizes: tuple[int, ...] = SIZES, groups: Sequence[tuple[int, int]] | None = None
) -> dict[tuple[str, int, int], list[tuple[int, float]]]:
    """Rows (full bytes, seconds) by (collective, group size, stride) for `groups` of (size, stride).

    Groups that are not given are those of neighbours, of every size that divides the world.
    """
    world = dist.get_world_size()
    if groups is None:
        groups = [(n, 1) for n in range(2, world + 1) if world % n == 0]
    found: dict[tuple[str, int, int], list[tuple[int, float]]] = {}
    for size, stride in groups:
        group = own_group(size, stride)
        for name in names:
            sweeps = [[_time_one(name, full, size, group) for full in sizes] for _ in range(SWEEPS)]
            found[name, size, stride] = rising(list(zip(sizes, map(min, *sweeps), strict=True)))
    return found


def time_sends(sizes: tuple[int, ...] = SEND_SIZES) -> list[tuple[int, float]]:
    """Rows (bytes, seconds) of a message to the neighbour, all pairs of neighbours at once; a rank without one looks on."""
    rank = dist.get_rank()
    other, first = rank ^ 1, rank % 2 == 0

    def message(full: int) -> Callable[[], object]:
        x = torch.ones(full // 4, device=device())
        if other >= dist.get_world_size():
            return lambda: None
        return lambda: dist.send(x, other) if first else dist.recv(x, other)

    sweeps = [[_time_call(message(full)) for full in sizes] for _ in range(SWEEPS)]
    return rising(list(zip(sizes, map(min, *sweeps), strict=True)))


def strided_groups(world: int) -> list[tuple[int, int]]:
    """(size, stride) of all groups that the axes of a mesh of `world` ranks may have, neighbours first."""
    found = [(n, s) for n in range(2, world + 1) if world % n == 0 for s in range(1, world // n + 1)]
    return sorted((pair for pair in found if world % (pair[0] * pair[1]) == 0), key=lambda pair: (pair[1], pair[0]))


def rising(rows: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Rows whose seconds never fall with bytes: a slower smaller message was disturbed, so the larger one's seconds hold."""
    kept: list[tuple[int, float]] = []
    for full, seconds in reversed(rows):
        kept.append((full, min([seconds, *(s for _, s in kept[-1:])])))
    return kept[::-1]


def own_group(size: int, stride: int = 1) -> str:
    """The name of this rank's group of `size` ranks `stride` apart; makes all such groups."""
    own, block = "", size * stride
    for start in range(0, dist.get_world_size(), block):
        for first in range(start, start + stride):
            ranks = list(range(first, first + block, stride))
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                own = group.group_name
    return own


def _time_one(name: str, full: int, size: int, group: str) -> float:
    """Seconds of one collective."""
    return _time_call(_call(name, max(full // 4, size * size), size, group))


def _time_call(call: Callable[[], object]) -> float:
    """Seconds of what ranks do together, on a CPU as what it adds to work that goes before it.

    Between two stretches of work ranks arrive at different moments, what is sent has left the caches, and gloo's threads
    want the cores that compute: none of it shows where a collective runs again and again alone.
    """
    call()
    alone = time_call(call, SECONDS_PER_SIZE, together=True).seconds
    if device().type != "cpu":
        return alone
    work = _work()
    return max(alone, time_difference(work, lambda: (work(), call()), SECONDS_AFTER_WORK, MOST_AFTER_WORK).seconds)


def _work() -> Callable[[], object]:
    """Some milliseconds of work, as between two collectives of a layer."""
    a, b = (torch.ones(WORK_SIDE, WORK_SIDE, device=device()) for _ in range(2))
    return lambda: a @ b


def _call(name: str, elements: int, size: int, group: str) -> Callable[[], object]:
    """One collective of `elements` float32 elements of full tensor, as a call without arguments."""
    local = torch.ones(elements if name in ("all_reduce", "reduce_scatter") else elements // size, device=device())
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

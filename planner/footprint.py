"""Bytes alive on each rank over a solved step, event by event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .engine import BACKWARD, COPY_IN, COPY_OUT, FORWARD, INPUT, WEIGHT
from .paths import Solved
from .stagecosts import RankCost, StageCost

Event = tuple[float, float, float]
"""(seconds, order among events of one moment, bytes gained)."""


@dataclass(frozen=True, slots=True)
class MemoryCurve:
    """Bytes of one rank: `bytes[i]` are alive from `seconds[i]` on. `peak_seconds` is when the peak is first reached."""

    seconds: tuple[float, ...]
    bytes: tuple[float, ...]
    peak_bytes: float
    peak_seconds: float


def memory_curves(solved: Solved, costs: Sequence[StageCost], ranks: Sequence[RankCost]) -> tuple[MemoryCurve, ...]:
    """The curve of every rank. What ends at a moment is freed before what starts at it is allocated."""
    compiled = solved.compiled
    events: list[list[Event]] = [[(0.0, -1.0, r.static_bytes)] for r in ranks]
    forward_at: dict[tuple[int, int], int] = {}
    for node in range(1, len(compiled.code)):
        part, stage = divmod(compiled.code[node], compiled.stages)
        key, rank = (stage, compiled.microbatch[node]), compiled.rank[node]
        if part == FORWARD:
            forward_at[key] = compiled.position[node]
        if part <= WEIGHT:
            events[rank] += _action_events(solved, node, part, costs[stage], compiled.final[stage])
        elif part == COPY_OUT:
            events[rank].append((solved.ends[node], 2.0 * forward_at[key] + 1.5, -costs[stage].offloaded_bytes))
        elif part == COPY_IN:
            events[rank].append((solved.start(node), 2.0 * _issued(solved, node) + 1.5, costs[stage].offloaded_bytes))
    for rank, (low, high) in _finishes(solved).items():
        last = 2.0 * len(compiled.lists[rank])
        events[rank] += [(low, last, ranks[rank].finish_bytes), (high, last + 1.0, -ranks[rank].finish_bytes)]
    return tuple(map(_curve, events))


def _action_events(solved: Solved, node: int, part: int, cost: StageCost, final: int) -> list[Event]:
    """What an action allocates at its start and frees at its end."""
    at = solved.compiled.position[node]
    working = cost.work_forward_bytes if part == FORWARD else cost.work_backward_bytes
    trained = solved.compiled.code[final] // solved.compiled.stages != FORWARD
    gained = cost.saved_bytes if part == FORWARD and trained else 0.0
    freed = 0.0
    if part == BACKWARD:
        freed = cost.saved_bytes
    elif part == INPUT:
        freed = cost.saved_bytes - cost.saved_weight_bytes
    elif part == WEIGHT:
        freed = cost.saved_weight_bytes
    return [(solved.start(node), 2.0 * at, gained + working), (solved.ends[node], 2.0 * at + 1.0, -freed - working)]


def _issued(solved: Solved, node: int) -> int:
    """The place in its rank's list of the action after which a copy in may start (-1: the start of the step)."""
    gate = solved.compiled.first[node]
    return solved.compiled.position[solved.compiled.first[gate]]


def _finishes(solved: Solved) -> dict[int, tuple[float, float]]:
    """By rank, when its finish starts and ends."""
    found: dict[int, tuple[float, float]] = {}
    base = len(solved.compiled.code)
    for i, stage in enumerate(solved.finish.stage):
        if stage >= 0:
            rank, start, end = solved.compiled.placement[stage], solved.start(base + i), solved.ends[base + i]
            low, high = found.get(rank, (start, end))
            found[rank] = (min(low, start), max(high, end))
    return found


def _curve(events: list[Event]) -> MemoryCurve:
    events.sort()
    amounts = list(accumulate(e[2] for e in events))
    peak = max(range(len(amounts)), key=amounts.__getitem__)
    return MemoryCurve(tuple(e[0] for e in events), tuple(amounts), amounts[peak], events[peak][0])

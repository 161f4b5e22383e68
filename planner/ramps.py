"""Schedules made ready once, and a bound of the step from their paths before any option is known.

The share of the forward and backward work that each stage takes is left free, so the bound holds for every division: the least T
such that T is at least the length of every path known, with the shares summing to the whole (a small linear program).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .engine import Compiled, compile_lists
from .live import live_vectors, local_chunks
from .paths import Path, makespan, rank_paths
from .program import INFINITE, Program
from .schedules import SCHEDULES, actions, stage_rank


@dataclass(frozen=True)
class Ready:
    """A schedule for so many ranks, chunks and microbatches: its compiled lists and the live microbatches of every rank."""

    compiled: Compiled
    placement: tuple[int, ...]
    local: tuple[tuple[int, ...], ...]
    live: tuple[tuple[tuple[int, ...], ...], ...]
    splits: bool


def make_ready(name: str, ranks: int, chunks: int, microbatches: int) -> Ready:
    """Lay out a schedule; raises PinError where it cannot be made."""
    lists = actions(name, ranks, chunks, microbatches)
    placement = stage_rank(name, ranks, chunks)
    return Ready(
        compile_lists(lists, placement), placement, local_chunks(placement), live_vectors(lists, placement),
        SCHEDULES[name].splits_backward,
    )  # fmt: skip


def seed_paths(ready: Ready, table: Sequence[Sequence[float]], slower: Sequence[float]) -> list[Path]:
    """Critical paths under `table` (forward, backward, weight, sends, ...) and where one rank is slower than the others."""
    found = [path for _, path in rank_paths(ready.compiled, ready.placement, *table)]
    for stages in ready.local:
        for times in slower:
            slow = [[x * times if s in stages else x for s, x in enumerate(part)] for part in table[:3]]
            found.append(makespan(ready.compiled, ready.placement, *slow, *table[3:])[1])
    return found


def ramp_seconds(ready: Ready, forward: float, backward: float, least: float, most: float) -> float:
    """The least step time of a chain of `forward` and `backward` seconds in all, however it is divided.

    `least` and `most` bound backward over forward seconds of any part of it.
    """
    stages = len(ready.placement)
    even = [[forward / stages] * stages, [backward / stages] * stages, [backward / stages / 2] * stages]
    nothing = [0.0] * stages
    paths = seed_paths(ready, [*even, nothing, nothing], (1.5,))
    program, scale = Program(), 1.0 / max(forward + backward, 1e-15)
    time = program.add(1.0, upper=INFINITE)
    parts = {part: [program.add(upper=INFINITE) for _ in range(stages)] for part in ("forward", "input", "weight")}
    program.row([(v, 1.0) for v in parts["forward"]], low=forward * scale)
    program.row([(v, 1.0) for part in ("input", "weight") for v in parts[part]], low=backward * scale)
    for s in range(stages):
        back = [(parts["input"][s], 1.0), (parts["weight"][s], 1.0)]
        program.row([*back, (parts["forward"][s], -least)], low=0.0)
        program.row([*back, (parts["forward"][s], -most)], high=0.0)
    for path in paths:
        terms = [(time, 1.0)]
        for (stage, part), n in path.counts.items():
            for name in ("input", "weight") if part == "backward" else (part,):
                if name in parts:
                    terms.append((parts[name][stage], -float(n)))
        program.row(terms, low=0.0)
    return program.solve(relaxed=True).objective / scale

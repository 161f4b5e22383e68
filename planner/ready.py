"""Schedules made ready once: compiled lists, live microbatches, and paths to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .engine import Compiled, compile_lists
from .live import live_vectors, local_chunks
from .paths import Path, makespan, rank_paths
from .schedules import SCHEDULES, actions, stage_edges, stage_rank


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
    compiled = compile_lists(lists, placement, edges=stage_edges(name, len(placement)))
    return Ready(
        compiled, placement, local_chunks(placement), live_vectors(lists, placement), SCHEDULES[name].splits_backward
    )


def seed_paths(ready: Ready, table: Sequence[Sequence[float]], slower: Sequence[float]) -> list[Path]:
    """Critical paths under `table` (forward, backward, weight, sends, ...) and where one rank is slower than the others."""
    found = [path for _, path in rank_paths(ready.compiled, ready.placement, *table)]
    for stages in ready.local:
        for times in slower:
            slow = [[x * times if s in stages else x for s, x in enumerate(part)] for part in table[:3]]
            found.append(makespan(ready.compiled, ready.placement, *slow, *table[3:])[1])
    return found

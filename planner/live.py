"""Live microbatches, read off action lists: the memory rows of a schedule.

An activation is alive from the start of its forward to the end of its backward. Where the backward is split, all of it is
until the end of the input half, and the part that weight gradients need until the end of the weight half. The lists fix the
order on each rank, so the counts at each action are those of every run, however long actions take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .schedules import Action, Lists

Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LiveRow:
    """Counts of live microbatches by local chunk while an action of `kind` of local chunk `chunk` runs."""

    kind: str
    chunk: int
    counts: Counts


def local_chunks(placement: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """By rank, its stages in ascending order; a stage's place there is its local chunk."""
    ranks = 1 + max(placement)
    return tuple(tuple(s for s, at in enumerate(placement) if at == r) for r in range(ranks))


def live_vectors(lists: Lists, placement: Sequence[int], *, two_part: bool = False) -> tuple[tuple[Counts, ...], ...]:
    """By rank, the greatest counts of live microbatches per local chunk (those no other moment's exceed in every entry).

    With `two_part`, each vector is two of them, one after the other: microbatches kept whole (until B or I ends) and those
    of which only the weight half's part is left (until W ends). Without, a microbatch counts until its B or W ends.
    """
    found = []
    for actions, stages in zip(lists, local_chunks(placement), strict=True):
        moments = {counts for _, _, counts in _moments(actions, stages, two_part)}
        found.append(_greatest(moments))
    return tuple(found)


def live_rows(lists: Lists, placement: Sequence[int], *, two_part: bool = False) -> tuple[tuple[LiveRow, ...], ...]:
    """As `live_vectors`, but by what runs at the moment, for rows that add working memory of the running action exactly."""
    found = []
    for actions, stages in zip(lists, local_chunks(placement), strict=True):
        moments: dict[tuple[str, int], set[Counts]] = {}
        for kind, chunk, counts in _moments(actions, stages, two_part, every=True):
            moments.setdefault((kind, chunk), set()).add(counts)
        rows = [LiveRow(*running, counts) for running in sorted(moments) for counts in _greatest(moments[running])]
        found.append(tuple(rows))
    return tuple(found)


def _moments(
    actions: Sequence[Action], stages: tuple[int, ...], two_part: bool, every: bool = False
) -> set[tuple[str, int, Counts]]:
    """(kind, local chunk, counts) while each action runs; unless `every`, only where counts are about to fall."""
    chunks = len(stages)
    local = {s: c for c, s in enumerate(stages)}
    counts = [0] * (2 * chunks if two_part else chunks)
    seen: set[tuple[str, int, Counts]] = set()
    for action in actions:
        kind, chunk = action.kind, local[action.stage]
        if kind == "F":
            counts[chunk] += 1
            if not every:
                continue
        seen.add((kind, chunk, tuple(counts)))
        if kind == "B" or (kind == "I" and two_part):
            counts[chunk] -= 1
        if kind == "I" and two_part:
            counts[chunks + chunk] += 1
        if kind == "W":
            counts[chunks + chunk if two_part else chunk] -= 1
    if any(a.kind in "BI" for a in actions) or not actions:
        return seen
    # Forwards only: nothing is kept, each runs alone.
    return {("F", c, tuple(int(c == d) for d in range(len(counts)))) for c in {local[a.stage] for a in actions}}


def _greatest(moments: set[Counts]) -> tuple[Counts, ...]:
    """The vectors that no other one reaches in every entry, greatest first."""
    ordered = np.array(sorted(moments, key=lambda v: (sum(v), v), reverse=True), dtype=np.int32)
    kept: npt.NDArray[np.int32] = np.empty((0, ordered.shape[1] if ordered.size else 0), dtype=np.int32)
    for vector in ordered:
        # Sums fall along the order, so a vector can only be reached by one kept before it.
        if not (kept >= vector).all(axis=1).any():
            kept = np.vstack((kept, vector))
    return tuple(tuple(int(n) for n in vector) for vector in kept)

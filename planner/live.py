"""Live microbatches, read off action lists: the memory rows of a schedule.

An activation is alive from the start of its forward to the end of its backward. Where the backward is split, all of it is
until the end of the input half, and the part that weight gradients need until the end of the weight half. The lists fix the
order on each rank, so the counts at each action are those of every run, however long actions take.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .schedules import Action, Lists

Counts = tuple[int, ...]


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
        found.append(_greatest(_moments(actions, stages, two_part)))
    return tuple(found)


def _moments(actions: Sequence[Action], stages: tuple[int, ...], two_part: bool) -> set[Counts]:
    """Counts wherever they are about to fall."""
    chunks = len(stages)
    local = {s: c for c, s in enumerate(stages)}
    counts = [0] * (2 * chunks if two_part else chunks)
    seen: set[Counts] = set()
    for action in actions:
        kind, chunk = action.kind, local[action.stage]
        if kind == "F":
            counts[chunk] += 1
            continue
        seen.add(tuple(counts))
        if kind == "B" or (kind == "I" and two_part):
            counts[chunk] -= 1
        if kind == "I" and two_part:
            counts[chunks + chunk] += 1
        if kind == "W":
            counts[chunks + chunk if two_part else chunk] -= 1
    if any(a.kind in "BI" for a in actions) or not actions:
        return seen
    # Forwards only: nothing is kept, each runs alone.
    return {tuple(int(local[a.stage] == d) for d in range(len(counts))) for a in actions}


def _greatest(moments: set[Counts]) -> tuple[Counts, ...]:
    """The vectors that no other one reaches in every entry, greatest first."""
    ordered = np.array(sorted(moments, key=lambda v: (sum(v), v), reverse=True), dtype=np.int32)
    kept: npt.NDArray[np.int32] = np.empty((0, ordered.shape[1] if ordered.size else 0), dtype=np.int32)
    for vector in ordered:
        # Sums fall along the order, so a vector can only be reached by one kept before it.
        if not (kept >= vector).all(axis=1).any():
            kept = np.vstack((kept, vector))
    return tuple(tuple(int(n) for n in vector) for vector in kept)

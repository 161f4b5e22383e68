"""One division for several chunks a rank: even by least seconds, then borders moved while that makes the step shorter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arcs import Line


def even_cuts(line: Line, local: Sequence[Sequence[int]], microbatches: int) -> list[int]:
    """Positions of the cuts, first and last included, for stages that ranks hold as `local` says (in ascending order).

    Units are taken with their least seconds; memory is left to the mixtures.
    """
    count = sum(len(stages) for stages in local)
    at = np.array(line.before) / (line.before[-1] / count)
    cuts = [0]
    for s in range(1, count):
        low, high = cuts[-1] + 1, len(line) - (count - s)
        # Rounded, so that of positions that are as near the first is taken.
        cuts.append(low + int(np.abs(at[low : high + 1] - s).round(9).argmin()))
    cuts.append(len(line))
    return _moved(line, local, microbatches, cuts)


def _moved(line: Line, local: Sequence[Sequence[int]], microbatches: int, cuts: list[int]) -> list[int]:
    rank_of = {s: r for r, stages in enumerate(local) for s in stages}
    spans = [_span(line, stages, microbatches, cuts) for stages in local]
    moved = True
    while moved:
        moved = False
        for s in range(1, len(cuts) - 1):
            for step in (-1, 1):
                most, beside = max(spans) * (1 - 1e-6), {rank_of[s - 1], rank_of[s]}
                # The ranks on both sides of the cut are all that changes: the slowest ones must be among them.
                slowest = {r for r, span in enumerate(spans) if span >= most}
                if not slowest <= beside or not cuts[s - 1] < cuts[s] + step < cuts[s + 1]:
                    continue
                other = [*cuts[:s], cuts[s] + step, *cuts[s + 1 :]]
                changed = {r: _span(line, local[r], microbatches, other) for r in beside}
                if max(changed.values()) < most:
                    cuts, moved = other, True
                    spans = [changed.get(r, span) for r, span in enumerate(spans)]
    return cuts


def _span(line: Line, stages: Sequence[int], microbatches: int, cuts: Sequence[int]) -> float:
    """Seconds of a rank with the least seconds of every unit, and what passes before it can begin."""
    busy = sum(line.seconds(cuts[s], cuts[s + 1]) for s in stages)
    return microbatches * busy + line.before[cuts[stages[0]]]


def apart(cuts: list[int], count: int) -> list[int]:
    """The nearest cuts that leave every stage a unit."""
    stages = len(cuts) - 1
    cuts[0], cuts[-1] = 0, count
    for s in range(1, stages):
        cuts[s] = min(max(cuts[s], cuts[s - 1] + 1), count - (stages - s))
    return cuts

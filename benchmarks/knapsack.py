"""A program over the layers of a stage: one item a layer, least seconds in all within a capacity, changes of layout paid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Item(NamedTuple):
    """Seconds, capacity it takes, and the layouts it wants and leaves."""

    seconds: float
    size: int
    entry: str
    exit: str


def quickest(
    layers: Sequence[Sequence[Item]], capacity: int, change: Mapping[tuple[str, str], float]
) -> tuple[float, list[int]] | None:
    """The least seconds of one item per layer with sizes of at most `capacity` in all, and the items; None where none fit.

    `f[i][v][s] = min over s' of f[i - 1][v - size(s)][s'] + change(s', s) + seconds(s)` (Miao et al. 2022, section 3.3).
    """
    layouts = sorted({layout for items in layers for item in items for layout in (item.entry, item.exit)})
    here = {layout: np.zeros(capacity + 1) for layout in layouts}
    came: list[dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]] = []
    for items in layers:
        there = {layout: np.full(capacity + 1, np.inf) for layout in layouts}
        marks = {layout: (np.zeros(capacity + 1, int), np.zeros(capacity + 1, int)) for layout in layouts}
        entered = {
            e: np.array([here[k] + (change.get((k, e), 0.0) if k != e else 0.0) for k in layouts]) for e in layouts
        }
        for k, item in enumerate(items):
            if item.size > capacity or any(_better(other, item, n < k) for n, other in enumerate(items) if n != k):
                continue
            ways = entered[item.entry][:, : capacity + 1 - item.size]
            seconds = ways.min(0) + item.seconds
            better = seconds < there[item.exit][item.size :]
            there[item.exit][item.size :][better] = seconds[better]
            marks[item.exit][0][item.size :][better] = k
            marks[item.exit][1][item.size :][better] = ways.argmin(0)[better]
        came.append(marks)
        here = there
    end = min(layouts, key=lambda layout: here[layout][-1])
    if not np.isfinite(here[end][-1]):
        return None
    picks, room, layout = [], capacity, end
    for items, marks in zip(reversed(layers), reversed(came), strict=True):
        k, before = int(marks[layout][0][room]), int(marks[layout][1][room])
        picks.append(k)
        room, layout = room - items[k].size, layouts[before]
    return float(here[end][-1]), picks[::-1]


def _better(one: Item, two: Item, first: bool) -> bool:
    """Whether one item makes another of the same layouts needless; of equal ones the first stays."""
    if (one.entry, one.exit) != (two.entry, two.exit) or one.seconds > two.seconds or one.size > two.size:
        return False
    return first or one.seconds < two.seconds or one.size < two.size

"""The efficiency-gap plot: every kind of op at its ideal and its predicted seconds, before and after passes.

Both axes are logarithmic, so that points of one efficiency lie on one diagonal and the way up to the first diagonal is the gap.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...planner.waterline import Totals, Waterline, by_target
from ..figures import percent_text, seconds_text
from .axes import Box, Decades, Tick, text_box

WIDTH, HEIGHT = 1040.0, 520.0
LEFT, RIGHT, TOP, BOTTOM = 78.0, 28.0, 12.0, 52.0
LANE = 100.0
"""Width of the lane at the left for ops without operations, which have no place on a logarithmic axis."""

WHOLE = "whole step"

LEAST_SHARE = 2e-3
"""Kinds of ops with a smaller share of the step, before and after, are not drawn: their places would stretch the axes."""


@dataclass(frozen=True, slots=True)
class Point:
    """A kind of op (or the whole step) `when` "before" or "after": where it stands, and its tooltip."""

    x: float
    y: float
    radius: float
    when: str
    whole: bool
    title: str


@dataclass(frozen=True, slots=True)
class Label:
    """A text beside a point, or at the end of a diagonal."""

    x: float
    y: float
    anchor: str
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """From one point to another."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True, slots=True)
class GapPlot:
    """All that is drawn. `lane` is where the lane of ops without operations is centred, None without such ops."""

    points: tuple[Point, ...]
    labels: tuple[Label, ...]
    diagonals: tuple[Line, ...]
    percents: tuple[Label, ...]
    moves: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    inner_left: float
    lane: float | None


def gap_plot(before: Waterline, after: Waterline) -> GapPlot:
    """The plot of two waterlines of one device, each with at least one moment."""
    kinds = _kinds(before, after)
    every = [one for own in kinds.values() for one in own.values()]
    idle = any(not one.ideal_seconds for one in every)
    inner = LEFT + (LANE if idle else 0.0)
    ideal = [one.ideal_seconds for one in every if one.ideal_seconds] or [one.seconds for one in every]
    across = Decades.around(ideal, inner, WIDTH - RIGHT)
    up = Decades.around([one.seconds for one in every], HEIGHT - BOTTOM, TOP)
    lane = LEFT + LANE / 2 if idle else None
    place = _Places(across, up, lane)
    most = max(one.seconds for one in every)
    points = [place.point(name, one, when, most) for when, own in kinds.items() for name, one in own.items()]
    taken = [Box(p.x - p.radius, p.y - p.radius, p.x + p.radius, p.y + p.radius) for p in points]
    diagonals, percents = _diagonals(across, up, taken)
    last = kinds["before"] | kinds["after"]
    wanted = sorted(last.items(), key=lambda item: -item[1].seconds)
    labels = _labels(((name, *place.at(one)) for name, one in wanted), taken)
    moves = [
        Line(*place.at(own), *place.at(kinds["after"][n])) for n, own in kinds["before"].items() if n in kinds["after"]
    ]
    return GapPlot(
        tuple(points), tuple(labels), tuple(diagonals), tuple(percents), tuple(moves), tuple(across.ticks()),
        tuple(up.ticks()), inner, lane,
    )  # fmt: skip


def _kinds(before: Waterline, after: Waterline) -> dict[str, dict[str, Totals]]:
    """What is drawn of either side, by name."""
    lines = {"before": before, "after": after}
    found = {when: by_target(line.moments) for when, line in lines.items()}
    large = {
        name
        for when, line in lines.items()
        for name, one in found[when].items()
        if one.seconds >= LEAST_SHARE * line.totals.seconds
    }
    return {
        when: {name: one for name, one in found[when].items() if name in large} | {WHOLE: line.totals}
        for when, line in lines.items()
    }


@dataclass(frozen=True, slots=True)
class _Places:
    across: Decades
    up: Decades
    lane: float | None

    def at(self, one: Totals) -> tuple[float, float]:
        x = self.across.at(one.ideal_seconds) if one.ideal_seconds or self.lane is None else self.lane
        return x, self.up.at(one.seconds)

    def point(self, name: str, one: Totals, when: str, most: float) -> Point:
        """Its size says its share of the longer step; a ring is seen around the disc that it may have become."""
        x, y = self.at(one)
        title = (
            f"{name}, {when}: {one.calls} ops, {seconds_text(one.seconds)}, ideal {seconds_text(one.ideal_seconds)}, "
            f"efficiency {percent_text(one.efficiency)}"
        )
        radius = 3.5 + 8.5 * (one.seconds / most) ** 0.5 + (2.5 if when == "before" else 0.0)
        return Point(x, y, radius, when, name == WHOLE, title)


def _diagonals(across: Decades, up: Decades, taken: list[Box]) -> tuple[list[Line], list[Label]]:
    """Lines of equal efficiency by powers of ten, cut to the axes, with the efficiency at the end that is free."""
    lines, labels = [], []
    for power in range(max(0, up.first - across.last), up.last - across.first + 1):
        low = max(across.first, up.first - power)  # seconds = ideal * 10**power
        high = min(across.last, up.last - power)
        if low >= high:
            continue
        (x1, y1), (x2, y2) = ((across.at(10.0**n), up.at(10.0 ** (n + power))) for n in (low, high))
        lines.append(Line(x1, y1, x2, y2))
        text = f"{100 / 10**power:g} %"
        ends = (Label(x2 - 12, y2 + 14, "end", text), Label(x1 + 16, y1 - 4, "start", text))
        free = [one for one in ends if not _covers(_box(one), taken)]
        labels += free[:1]
        taken += [_box(one) for one in free[:1]]
    return lines, labels


def _box(label: Label) -> Box:
    return text_box(label.x, label.y, label.text, label.anchor)


def _covers(box: Box, taken: Iterable[Box]) -> bool:
    return any(box.covers(other) for other in taken)


PLACES = ((1.0, 4.0, "start"), (-1.0, 4.0, "end"), (0.0, -1.0, "middle"), (0.0, 1.0, "middle"))
"""Where a label may stand: to the right, to the left, above, below."""


def _labels(wanted: Iterable[tuple[str, float, float]], taken: list[Box]) -> list[Label]:
    """Labels in order of weight where they cover nothing; the others are left to the tooltips and the table."""
    found = []
    for name, x, y in wanted:
        text = name.removeprefix("aten.").removeprefix("shardwright.")
        places = [
            Label(x + 17 * right, y + (down if right else (-17 if down < 0 else 26)), anchor, text)
            for right, down, anchor in PLACES
        ]
        free = [one for one in places if _inside(_box(one)) and not _covers(_box(one), taken)]
        found += free[:1]
        taken += [_box(one) for one in free[:1]]
    return found


def _inside(box: Box) -> bool:
    return box.left >= LEFT and box.right <= WIDTH - RIGHT and box.top >= TOP and box.bottom <= HEIGHT - BOTTOM

"""The waterline plot: the ops of a step in order, each as wide as its seconds and as high as their parts.

An op's column is cut by the shares of what its seconds are made of (planner/waterline.py), so that every area is seconds and the
height of the lowest part, the waterline, is the share of peak FLOP/s that is reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...planner.waterline import PARTS, Moment, Waterline, totals
from ..figures import bytes_text, count_text, percent_text, seconds_text
from .axes import Tick, linear_ticks, text_box, tick_text

WIDTH, HEIGHT = 1040.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 16.0, 44.0, 42.0
LEAST = 1.5
"""Columns narrower than this are drawn together with those after them."""


@dataclass(frozen=True, slots=True)
class Rect:
    """One part of a column."""

    part: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Column:
    """One op's pass, or several that are too narrow to be seen alone: its parts and its tooltip."""

    title: str
    rects: tuple[Rect, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Where the forward or the backward pass stands; `text` is "" where there is no room for it."""

    left: float
    right: float
    text: str


@dataclass(frozen=True, slots=True)
class WaterPlot:
    """All that is drawn of one waterline."""

    title: str
    columns: tuple[Column, ...]
    spans: tuple[Span, ...]
    ticks: tuple[Tick, ...]


def water_plot(name: str, line: Waterline, longest: float) -> WaterPlot:
    """The plot of a waterline on an axis of `longest` seconds (above 0)."""
    per_second = (WIDTH - LEFT - RIGHT) / longest
    columns, spans = [], []
    x = LEFT
    for phase in ("forward", "backward"):
        own = [one for one in line.moments if one.phase == phase]
        start = x
        for group in _grouped(own, LEAST / per_second):
            columns.append(_column(group, x, per_second))
            x += sum(one.seconds for one in group) * per_second
        if own:
            text = f"{phase} {seconds_text(totals(own).seconds)}"
            box = text_box(start, 0, text, "start")
            spans.append(Span(start, x, text if box.right < x else ""))
    whole = line.totals
    title = f"{name}: {seconds_text(whole.seconds)}, efficiency {percent_text(whole.efficiency)}"
    ticks = tuple(Tick(LEFT + value * per_second, tick_text(value)) for value in linear_ticks(longest, 10))
    return WaterPlot(title, tuple(columns), tuple(spans), ticks)


def _grouped(moments: Sequence[Moment], least: float) -> list[list[Moment]]:
    """Moments in order, each group of at least so many seconds (the last one may have less)."""
    groups: list[list[Moment]] = []
    room = 0.0
    for one in moments:
        if room <= 0.0:
            groups.append([])
            room = least
        groups[-1].append(one)
        room -= one.seconds
    return groups


def _column(group: Sequence[Moment], x: float, per_second: float) -> Column:
    whole = totals(group)
    bottom, high = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    rects = []
    for part, seconds in zip(PARTS, whole.parts, strict=True):
        height = high * seconds / whole.seconds
        bottom -= height
        if height > 0.0:
            rects.append(Rect(part, x, bottom, whole.seconds * per_second, height))
    return Column(_title(group), tuple(rects))


def _title(group: Sequence[Moment]) -> str:
    whole, first, last = totals(group), group[0], group[-1]
    ops = f"{first.op} ({first.target})" if len(group) == 1 else f"{len(group)} ops, {first.op} to {last.op}"
    parts = ", ".join(f"{part} {seconds_text(s)}" for part, s in zip(PARTS, whole.parts, strict=True) if s > 0)
    text = (
        f"{ops}, {first.phase}: {seconds_text(whole.seconds)}\n{parts}\n"
        f"{count_text(whole.flops)}FLOP, {bytes_text(whole.bytes)}, efficiency {percent_text(whole.efficiency)}"
    )
    return f"{text}\n{first.source}" if len(group) == 1 and first.source else text

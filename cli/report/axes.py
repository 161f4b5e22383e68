"""Axes of plots: round ticks, decades, and labels that do not cover each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..figures import seconds_text


@dataclass(frozen=True, slots=True)
class Tick:
    """A place on an axis, in units of the drawing, and what stands there."""

    at: float
    text: str


def linear_ticks(most: float, about: int) -> list[float]:
    """About so many round values (1, 2 or 5 times a power of ten apart) from 0 to `most`."""
    if most <= 0:
        return [0.0]
    scale = 10.0 ** math.floor(math.log10(most / about))
    step = next(scale * n for n in (1, 2, 5, 10) if scale * n >= most / about)
    return [step * i for i in range(int(most / step + 1e-9) + 1)]


def tick_text(seconds: float) -> str:
    """A round number of seconds without the zeros behind it: "20 ms", not "20.0 ms"."""
    number, _, unit = seconds_text(seconds).partition(" ")
    return f"{float(number):g} {unit}" if seconds else "0"


@dataclass(frozen=True, slots=True)
class Decades:
    """A logarithmic axis from 10**first to 10**last, drawn from `start` to `end`."""

    first: int
    last: int
    start: float
    end: float

    @staticmethod
    def around(values: list[float], start: float, end: float) -> Decades:
        """The axis whose decades hold all `values`, which are above 0."""
        first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        return Decades(first, max(last, first + 1), start, end)

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.first) / (self.last - self.first)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[Tick]:
        return [Tick(self.at(10.0**n), decade_text(n)) for n in range(self.first, self.last + 1)]


def decade_text(power: int) -> str:
    """10**power seconds, spelled with the unit that leaves at least 1."""
    for least, unit in ((0, "s"), (-3, "ms"), (-6, "µs"), (-9, "ns"), (-12, "ps"), (-15, "fs")):
        if power >= least:
            return f"{10 ** (power - least):,} {unit}"
    return f"1e{power} s"


@dataclass(frozen=True, slots=True)
class Box:
    """What a drawn thing covers."""

    left: float
    top: float
    right: float
    bottom: float

    def covers(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )  # fmt: skip


LETTER, LINE = 6.4, 14.0
"""Width of a letter and height of a line of labels, in units of the drawing (of 11 px in a sans face, on the wide side)."""


def text_box(x: float, y: float, text: str, anchor: str) -> Box:
    """What `text` covers whose baseline starts, ends or is centred ("start", "end", "middle") at (x, y)."""
    wide = LETTER * len(text)
    left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
    return Box(left, y - LINE + 3, left + wide, y + 3)

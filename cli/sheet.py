"""Tables and paragraphs that fit the terminal: lines break between words, a number keeps its unit, nothing is cut off.

A table that is too wide first takes less space between columns, then breaks the lines of its texts; what still does not fit goes
under its row, one column after the other, the widest text first. Cells of numbers are never broken.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

LONG = 28
"""Characters of a word from which on it may be broken, after punctuation."""

NARROW = 14
"""A column of text is not made narrower than this to keep it in its row."""

TALL = 4
"""Lines that a text of the last column may take before it goes under its row."""

GAP = 2
"""Least spaces between columns."""

_UNIT = r"(?:%|µs|ms|s|min|h|B|[KMGTP]i?B(?:/s)?|[kMBT]|[kMBT]?FLOP/s)"
_WORD = re.compile(rf"(?:\d+ x )?\S+(?: x \d+)?(?:(?<=\d) {_UNIT}(?=[\s,;.:)]|$)[,;.:)]*)?")
_PIECE = re.compile(r"[^./_,=\-]*[./_,=\-]+|[^./_,=\-]+")


@dataclass(frozen=True, slots=True)
class _Fit:
    """Widths of the columns that stay in the row, by index, those that go under it, and the spaces between columns."""

    widths: dict[int, int]
    under: tuple[int, ...]
    gap: int


class Sheet(Table):
    """A table without a box, drawn as wide as the console allows."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield from wrapped(Text(str(self.title), style="bold"), options.max_width)
        names = [_text(column.header) for column in self.columns]
        rows = [[_text(cell) for cell in cells] for cells in zip(*(c.cells for c in self.columns), strict=True)]
        fixed = [column.justify == "right" or bool(column.no_wrap) for column in self.columns]
        fit = _fitted(
            names if self.show_header else [Text()] * len(names), rows, fixed, self.padding[1], options.max_width
        )
        if self.show_header:
            yield from self._lines([Text(n.plain, style="bold") for n in names], fit)
        for cells, row in zip(rows, self.rows, strict=True):
            styled = [
                _styled(cell, row.style or column.style) for cell, column in zip(cells, self.columns, strict=True)
            ]
            told = [(names[i].plain, cells[i].plain.replace("\n", ", ")) for i in fit.under if cells[i].plain]
            last = max(fit.widths)
            if last and len(list(wrapped(cells[last], fit.widths[last]))) > TALL + cells[last].plain.count("\n"):
                told.append(("", cells[last].plain))
                styled[last] = Text()
            yield from self._lines(styled, fit)
            text = "; ".join(f"{name}: {cell}" if name else cell for name, cell in told)
            yield from wrapped(Text(text), options.max_width, "    ", "    ") if told else ()

    def _lines(self, cells: Sequence[Text], fit: _Fit) -> Iterable[Text]:
        """One row as lines of text."""
        blocks = {i: list(wrapped(cells[i], width)) for i, width in fit.widths.items()}
        for k in range(max(map(len, blocks.values()), default=0)):
            line = Text()
            for i, width in fit.widths.items():
                part = blocks[i][k] if k < len(blocks[i]) else Text()
                space = " " * (width - cell_len(part.plain))
                right = self.columns[i].justify == "right"
                line.append_text(Text.assemble(space, part) if right else Text.assemble(part, space))
                line.append(" " * fit.gap)
            line.rstrip()
            yield line


class Prose:
    """Paragraphs, each wrapped between words, its further lines indented."""

    def __init__(self, *texts: str, first: str = "", further: str = "  ") -> None:
        self.texts, self.first, self.further = texts, first, further

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text in self.texts:
            yield from wrapped(Text(text), options.max_width, self.first, self.further)


def fitted_text(text: str, file: IO[str]) -> str:
    """A text wrapped between words for a terminal; as it is for a file."""
    if not file.isatty():
        return text
    width = shutil.get_terminal_size().columns
    lines = []
    for line in text.split("\n"):
        lead = " " * (len(line) - len(line.lstrip()))
        lines += [part.plain for part in wrapped(Text(line.strip()), width, lead, lead + "  ")]
    return "\n".join(lines)


def words(text: str, width: int) -> list[tuple[int, int]]:
    """Where the unbreakable pieces of a line begin and end: words, numbers with their units, parts of what is too long."""
    found = []
    for match in _WORD.finditer(text):
        start, end = match.span()
        if end - start <= width and end - start <= LONG:
            found.append((start, end))
            continue
        for piece in _PIECE.finditer(text, start, end):
            at, stop = piece.span()
            found += [(k, min(k + width, stop)) for k in range(at, stop, width)]
    return found


def wrapped(text: Text, width: int, first: str = "", further: str = "") -> Iterable[Text]:
    """The lines of a text on at most `width` columns; `first` and `further` come before the first line and the others."""
    lead = first
    for line in text.split("\n", allow_blank=True):
        start = end = 0
        for a, b in words(line.plain, max(width - max(len(first), len(further)), 1)):
            if end > start and cell_len(lead + line.plain[start:b]) > width:
                yield Text.assemble(lead, line[start:end])
                start, lead = a, further
            end = b
        yield Text.assemble(lead, line[start:end]) if end > start else Text()
        lead = further


def _fitted(names: Sequence[Text], rows: Sequence[Sequence[Text]], fixed: Sequence[bool], gap: int, width: int) -> _Fit:
    """Widths of columns on a console of `width`; `fixed` columns are never broken."""
    columns = range(len(names))
    most = [max(_wide(t) for t in (names[i], *(row[i] for row in rows))) for i in columns]
    least = [
        max(_longest(names[i]), max((_wide(r[i]) if fixed[i] else _longest(r[i]) for r in rows), default=0))
        for i in columns
    ]
    least = [n if fixed[i] else max(n, min(most[i], NARROW)) for i, n in enumerate(least)]
    kept, under = list(columns), list[int]()
    for space in (gap, GAP):
        if sum(most) + space * (len(kept) - 1) <= width:
            return _Fit({i: most[i] for i in kept}, (), space)
    while len(kept) > 1 and sum((most if under else least)[i] for i in kept) + GAP * (len(kept) - 1) > width:
        moved = max(
            kept[1:], key=lambda i: (not fixed[i], most[i], i)
        )  # once one has to go, rows of one line read best
        kept.remove(moved)
        under.append(moved)
    room = width - GAP * (len(kept) - 1)
    return _Fit(_shared({i: (min(least[i], room), most[i]) for i in kept}, room), tuple(sorted(under)), GAP)


def _shared(limits: dict[int, tuple[int, int]], room: int) -> dict[int, int]:
    """Widths between their limits, the narrower ones filled first, that take all the room they can use."""
    for cap in range(max((most for _, most in limits.values()), default=0), 0, -1):
        widths = {i: max(least, min(most, cap)) for i, (least, most) in limits.items()}
        if sum(widths.values()) <= room:
            for i, (_, most) in limits.items():  # what is left goes to the first that can use it
                widths[i] += min(most - widths[i], room - sum(widths.values()))
            return widths
    return {i: least for i, (least, _) in limits.items()}


def _wide(text: Text) -> int:
    return max(map(cell_len, text.plain.split("\n")))


def _longest(text: Text) -> int:
    return max((end - start for line in text.plain.split("\n") for start, end in words(line, LONG)), default=0)


def _text(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))


def _styled(cell: Text, style: object) -> Text:
    made = cell.copy()
    if style:
        made.stylize_before(str(style))
    return made

"""Programs that a tile of an image goes through: what they read of their input, what they compute and what they hold.

    2|[["conv2d.default","%0","%1",null,[2,2],[1,1],[1,1],1],["relu.default","%3"],["add.Tensor","%4","%2"]]

The number of tensors given besides the image, then JSON: a list of [op, argument, ..] lines with all arguments in the order of
the op's schema (those by name alone in a last object). "%0" is the image [n, c, h, w], "%1", "%2" what is given (weights,
statistics, constants without positions), the next numbers are the results of the lines. No line names a size of the image.

Every op looks at a window of positions. To make the positions [lo, hi) of a result, a window of `extent` positions that moves by
`stride` behind `low` positions of padding reads [lo stride - low, (hi - 1) stride - low + extent) of its operand (Lin et al. 2021,
"MCUNetV2", section 3.1: the halo of a patch). Rows and columns do not mix, so that sums over tiles are products of two sums.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rule_types import Shape

Span = tuple[int, int]
"""Positions from (inclusive), to (exclusive)."""
Spans = tuple[NDArray[np.int64], NDArray[np.int64]]
"""The same of several tiles: where they begin, where they end."""
Grid = tuple[int, int]
"""Tiles along the rows (h) and along the columns (w)."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A value of the program, by number."""

    index: int


@dataclass(frozen=True, slots=True)
class Line:
    """One op of a program; `args` holds `Ref`, plain values and lists of either."""

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def refs(self) -> tuple[int, ...]:
        """The values it reads, in order of appearance."""
        return tuple(_refs((*self.args, *self.kwargs.values())))


def _refs(args: Sequence[Any]) -> Iterator[int]:
    for arg in args:
        if isinstance(arg, Ref):
            yield arg.index
        elif isinstance(arg, list):
            yield from _refs(arg)


@dataclass(frozen=True, slots=True)
class Program:
    """A parsed program: how many tensors are given, and its lines."""

    given: int
    lines: tuple[Line, ...]

    def tiled(self, value: int) -> bool:
        """Whether a value has positions (the image and every result)."""
        return value == 0 or value > self.given

    def result(self, line: int) -> int:
        """The number of the result of a line."""
        return self.given + 1 + line


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """The program written in `text`; raises ValueError where it is none."""
    given, bar, lines = text.partition("|")
    if not bar:
        raise ValueError(f"{text!r} is no program: it does not begin with a count and '|'")
    return Program(int(given), tuple(_line(line) for line in json.loads(lines)))


def _line(line: list[Any]) -> Line:
    op, *args = line
    kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
    return Line(op, tuple(_arg(a) for a in args), {k: _arg(v) for k, v in kwargs.items()})


def _arg(arg: Any) -> Any:
    if isinstance(arg, str) and arg.startswith("%"):
        return Ref(int(arg[1:]))
    return [_arg(a) for a in arg] if isinstance(arg, list) else arg


@dataclass(frozen=True, slots=True)
class Window:
    """What an op looks at along one dim to make one position of its result; `last` counts a window cut off at the end."""

    extent: int = 1
    stride: int = 1
    low: int = 0
    high: int = 0
    last: bool = False

    def size(self, n: int) -> int:
        """Positions of the result of an operand of `n`."""
        over = n + self.low + self.high - self.extent
        count = -(-over // self.stride) if self.last else over // self.stride
        if self.last and count * self.stride >= n + self.low:  # a window must begin inside
            count -= 1
        return count + 1

    def reads(self, spans: Spans) -> Spans:
        """Positions of the operand, those of its padding included."""
        return spans[0] * self.stride - self.low, (spans[1] - 1) * self.stride - self.low + self.extent

    def reads_one(self, span: Span) -> Span:
        """Those of one tile."""
        return span[0] * self.stride - self.low, (span[1] - 1) * self.stride - self.low + self.extent


POINT = Window()
Windows = tuple[Window, Window]
Shapes = Sequence[Shape]


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _conv(line: Line, shapes: Shapes) -> Windows:
    kernel = shapes[line.args[1].index][2:]
    stride, dilation = _pair(line.args[3]), _pair(line.args[5])
    windows = []
    for i in (0, 1):
        extent = dilation[i] * (kernel[i] - 1) + 1
        if isinstance(line.args[4], str):
            both = extent - 1 if line.args[4] == "same" else 0
            low, high = both // 2, both - both // 2
        else:
            low = high = _pair(line.args[4])[i]
        windows.append(Window(extent, stride[i], low, high))
    return windows[0], windows[1]


def _pool(line: Line, shapes: Shapes) -> Windows:
    """max_pool2d(x, kernel, stride, padding, dilation, ceil_mode); avg_pool2d has no dilation."""
    kernel, padding = _pair(line.args[1]), _pair(line.args[3])
    stride = _pair(line.args[2]) if line.args[2] else kernel
    most = line.op.startswith("max")
    dilation, last = (_pair(line.args[4]), bool(line.args[5])) if most else ((1, 1), bool(line.args[4]))
    made = [Window(dilation[i] * (kernel[i] - 1) + 1, stride[i], padding[i], padding[i], last) for i in (0, 1)]
    return made[0], made[1]


def _pad(line: Line, shapes: Shapes) -> Windows:
    sizes: list[int] = [*line.args[1], 0, 0]
    left, right, top, bottom = sizes[:4]
    return Window(low=top, high=bottom), Window(low=left, high=right)


WINDOWS: Mapping[str, Callable[[Line, Shapes], Windows]] = {
    "conv2d.default": _conv,
    "conv2d.padding": _conv,
    "max_pool2d.default": _pool,
    "avg_pool2d.default": _pool,
    "constant_pad_nd.default": _pad,
    "pad.default": _pad,
}
"""Ops that look at more than one position, or move positions; every other one makes a position of the same one."""

PADS = frozenset({"constant_pad_nd.default", "pad.default"})


def _channels(line: Line, program: Program, shapes: Shapes) -> int:
    if line.op.startswith("conv2d"):
        return int(shapes[line.args[1].index][0])
    tiled = [shapes[i][0] for i in line.refs if program.tiled(i)]
    if line.op == "cat.default":
        return sum(tiled)
    if line.op in PADS:
        return int(tiled[0] + sum(line.args[1][4:6]))
    if line.op == "batch_norm.default" or line.op in WINDOWS:
        return tiled[0]
    points = [shapes[i][-3] for i in line.refs if not program.tiled(i) and len(shapes[i]) > 2]
    return max([*tiled, *points])


@dataclass(frozen=True, slots=True)
class Layout:
    """A program on an image of one size: per value its shape, [c, h, w] for what has positions, and per line its windows."""

    program: Program
    shapes: tuple[Shape, ...]
    windows: tuple[Windows, ...]

    @property
    def out(self) -> Shape:
        """[c, h, w] of the last result."""
        return self.shapes[-1]

    def spans(self, axis: int, spans: Spans) -> dict[int, Spans]:
        """Per value, the positions along rows (0) or columns (1) that the positions `spans` of the result need."""
        program = self.program
        found = {program.result(len(program.lines) - 1): spans}
        for i in reversed(range(len(program.lines))):
            here = found.get(program.result(i))
            if here is None:
                continue
            for value in set(program.lines[i].refs):
                if program.tiled(value):
                    n = self.shapes[value][1 + axis]
                    lo, hi = clamped(self.windows[i][axis].reads(here), n)
                    before = found.get(value, (lo, hi))
                    found[value] = np.minimum(before[0], lo), np.maximum(before[1], hi)
        return found


def clamped(spans: Spans, n: int) -> Spans:
    """The part of spans inside [0, n); one position where they lie outside, so that nothing is empty."""
    lo, hi = np.clip(spans[0], 0, n - 1), np.clip(spans[1], 1, n)
    return lo, np.maximum(hi, lo + 1)


@functools.lru_cache(maxsize=1024)
def layout(text: str, image: Shape, given: tuple[Shape, ...]) -> Layout:
    """The program on an image [c, h, w] with tensors of these shapes given."""
    program = parse(text)
    shapes: list[Shape] = [image, *given]
    windows = []
    for line in program.lines:
        found = WINDOWS[line.op](line, shapes) if line.op in WINDOWS else (POINT, POINT)
        first = next(i for i in line.refs if program.tiled(i))
        size = tuple(w.size(n) for w, n in zip(found, shapes[first][1:], strict=True))
        shapes.append((_channels(line, program, shapes), *size))
        windows.append(found)
    return Layout(program, tuple(shapes), tuple(windows))


def cuts(n: int, parts: int) -> list[Span]:
    """`n` positions in as equal parts as they go; fewer than `parts` where there are not as many positions."""
    parts = min(parts, n)
    return [(n * i // parts, n * (i + 1) // parts) for i in range(parts)]


def parallel(parts: list[Span]) -> Spans:
    """Spans one by one as spans side by side."""
    begins, ends = np.array(parts, dtype=np.int64).T
    return begins, ends


Tile = tuple[dict[int, Span], dict[int, Span]]
"""Per value, its rows and its columns."""


def _each(plan: Layout, axis: int, parts: list[Span]) -> list[dict[int, Span]]:
    """What every part of the result needs along one axis."""
    found = plan.spans(axis, parallel(parts))
    return [{v: (int(lo[i]), int(hi[i])) for v, (lo, hi) in found.items()} for i in range(len(parts))]


def tiles(plan: Layout, grid: Grid) -> Iterator[Tile]:
    """The tiles of the result, row after row."""
    rows, columns = (_each(plan, a, cuts(plan.out[1 + a], grid[a])) for a in (0, 1))
    for row in rows:
        for column in columns:
            yield row, column


def last_uses(program: Program) -> dict[int, int]:
    """The last line that reads each value."""
    return {value: i for i, line in enumerate(program.lines) for value in line.refs}

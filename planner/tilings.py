"""What patches cost: work, memory traffic and live memory of a program in tiles of a grid (planner/patches.py).

Rows and columns of a tile are independent of each other, so that sums over tiles are products of a sum over rows and one over
columns, and a grid has as many kinds of tiles as rows and columns have kinds. All figures are of one sample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .patches import PADS, Grid, Layout, cuts, last_uses, layout, parallel
from .rule_types import Shape

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class _Axis:
    """One axis cut into parts: positions that all tiles together compute per value, and by kind of tile.

    `made` are positions per value, `read` those that a line reads, padding included, and `beyond` whether some are padding.
    `middle` are the positions per value of the tile in the middle.
    """

    total: dict[int, int]
    made: dict[int, Numbers]
    read: list[Numbers]
    beyond: list[NDArray[np.bool_]]
    middle: dict[int, int]


@dataclass(frozen=True)
class Choice:
    """A grid with its FLOPs, and elements that its tiles hold at least."""

    grid: Grid
    flops: float
    least: int


INDICES = {"max_pool2d.default": 8}
"""Bytes that an op makes beside an element of its result: where the largest values stand."""
MOST = 32
"""Most tiles along rows or columns that are tried."""


class Tilings:
    """The costs of all grids of one program on one size of image."""

    def __init__(self, plan: Layout) -> None:
        self.plan = plan
        self.last = last_uses(plan.program)
        self._axes: dict[tuple[int, int], _Axis] = {}

    def line_flops(self, grid: Grid) -> dict[int, float]:
        """FLOPs of every convolution; a multiply-add as two."""
        rows, columns = (self._axis(a, grid[a]).total for a in (0, 1))
        found = {}
        for i, line in enumerate(self.plan.program.lines):
            if line.op.startswith("conv2d"):
                value = self.plan.program.result(i)
                weight = math.prod(self.plan.shapes[line.args[1].index])
                found[i] = 2.0 * weight * rows[value] * columns[value]
        return found

    def flops(self, grid: Grid) -> float:
        """FLOPs of the forward pass."""
        return sum(self.line_flops(grid).values())

    def times(self, flowing: Sequence[bool]) -> dict[int, float]:
        """How often a training step computes every convolution: forward, again, and once per operand that takes a gradient.

        `flowing` says whether image and given tensors do.
        """
        flows, found = dict(enumerate(flowing)), {}
        for i, line in enumerate(self.plan.program.lines):
            flows[self.plan.program.result(i)] = any(flows[v] for v in line.refs)
            if line.op.startswith("conv2d"):
                own = flows[line.args[0].index] + flows[line.args[1].index]
                found[i] = 1.0 + (1 + own if any(flowing) else 0)
        return found

    def choices(self, times: Mapping[int, float], most: float) -> list[Choice]:
        """Grids whose FLOPs, each convolution counted so many times, are at most `most`; those that hold least first."""

        def work(grid: Grid) -> float:
            return sum(times[i] * f for i, f in self.line_flops(grid).items())

        parts: tuple[list[int], list[int]] = ([], [])
        for axis, tried in enumerate(parts):
            for p in range(1, min(self.plan.out[1 + axis], MOST) + 1):
                if work((p, 1) if axis == 0 else (1, p)) > most:
                    break
                tried.append(p)
        grids = [((r, c), work((r, c))) for r in parts[0] for c in parts[1]]
        found = [Choice(grid, flops, self._least(grid)) for grid, flops in grids if flops <= most]
        return sorted(found, key=lambda c: (c.least, c.flops, c.grid))

    def _least(self, grid: Grid) -> int:
        """What the tile in the middle holds of what one line reads and makes."""
        program, (rows, columns) = self.plan.program, self._both(grid)
        area = {v: self.plan.shapes[v][0] * rows.middle[v] * columns.middle[v] for v in rows.middle}
        area[0] = 0
        return max(
            area[program.result(i)] + sum(area[v] for v in set(line.refs) if program.tiled(v))
            for i, line in enumerate(program.lines)
        )

    def backward_flops(self, grid: Grid, flowing: Sequence[bool]) -> float:
        """FLOPs of the backward pass."""
        times = self.times(flowing)
        return sum((times[i] - 1) * flops for i, flops in self.line_flops(grid).items())

    def moved(self, grid: Grid) -> float:
        """Elements that the lines read and write."""
        rows, columns = (self._axis(a, grid[a]).total for a in (0, 1))
        area = {v: self.plan.shapes[v][0] * rows[v] * columns[v] for v in rows}
        return float(sum(
            sum(area[v] for v in line.refs if v in area) + area[self.plan.program.result(i)]
            for i, line in enumerate(self.plan.program.lines)
        ))  # fmt: skip

    def held(self, grid: Grid, width: int) -> int:
        """Bytes that the fullest moment of the fullest tile holds, besides image and result; `width` are those of an element.

        Follows `run_tile` (passes/fuse/tiles.py) for all kinds of tiles at once.
        """
        program, (rows, columns) = self.plan.program, self._both(grid)
        live = most = np.zeros((len(rows.made[0]), len(columns.made[0])), dtype=np.int64)
        for i, line in enumerate(program.lines):
            operands, dying = [v for v in line.refs if program.tiled(v)], np.zeros_like(live)
            for place, value in enumerate(operands):
                ends = value != 0 and self.last[value] == i and value not in operands[place + 1 :]
                own = self._area(value, rows, columns) if ends else np.zeros_like(live)
                if line.op in PADS:
                    dying = dying + own
                    continue
                beyond, copy = self._copied(i, value, rows, columns)
                live = live + width * copy
                most = np.maximum(most, live)
                live = live - width * np.where(beyond, own, 0)  # the copy takes its place
                dying = dying + np.where(beyond, copy, own)
            own = self._area(program.result(i), rows, columns)
            live = live + width * own
            most = np.maximum(most, live + INDICES.get(line.op, 0) * own)
            live = live - width * dying
        return int(most.max())

    def held_backward(self, grid: Grid, width: int) -> int:
        """Bytes that the backward pass of the fullest tile holds at most: all it makes again, and the gradients around one line."""
        program, (rows, columns) = self.plan.program, self._both(grid)
        total = around = np.zeros((len(rows.made[0]), len(columns.made[0])), dtype=np.int64)
        for i, line in enumerate(program.lines):
            operands = [v for v in line.refs if program.tiled(v)]
            copies = sum((self._copied(i, v, rows, columns)[1] for v in operands if line.op not in PADS), 0 * total)
            own = self._area(program.result(i), rows, columns)
            total = total + width * (own + copies) + INDICES.get(line.op, 0) * own
            around = np.maximum(around, width * sum((self._area(v, rows, columns) for v in operands), own + copies))
        return int((total + around).max())

    def _both(self, grid: Grid) -> tuple[_Axis, _Axis]:
        return self._axis(0, grid[0]), self._axis(1, grid[1])

    def _area(self, value: int, rows: _Axis, columns: _Axis) -> Numbers:
        return self.plan.shapes[value][0] * np.outer(rows.made[value], columns.made[value])

    def _copied(self, line: int, value: int, rows: _Axis, columns: _Axis) -> tuple[NDArray[np.bool_], Numbers]:
        """Whether a line's operand is padded, by kind of tile, and the elements of the padded copy."""
        beyond = np.logical_or.outer(rows.beyond[line], columns.beyond[line])
        return beyond, beyond * self.plan.shapes[value][0] * np.outer(rows.read[line], columns.read[line])

    def _axis(self, axis: int, parts: int) -> _Axis:
        key = axis, parts
        if key not in self._axes:
            self._axes[key] = self._cut(axis, parts)
        return self._axes[key]

    def _cut(self, axis: int, parts: int) -> _Axis:
        plan, program = self.plan, self.plan.program
        spans = plan.spans(axis, parallel(cuts(plan.out[1 + axis], parts)))
        made = {v: hi - lo for v, (lo, hi) in spans.items()}
        read, beyond = [], []
        for i, line in enumerate(program.lines):
            n = plan.shapes[next(v for v in line.refs if program.tiled(v))][1 + axis]
            lo, hi = plan.windows[i][axis].reads(spans[program.result(i)])
            read.append(hi - lo)
            beyond.append((lo < 0) | (hi > n))
        kinds = np.unique(np.array([*made.values(), *read, *beyond], dtype=np.int64), axis=1)
        first, second = len(made), len(made) + len(read)
        return _Axis(
            {v: int(lengths.sum()) for v, lengths in made.items()}, dict(zip(made, kinds[:first], strict=True)),
            list(kinds[first:second]), list(kinds[second:] > 0),
            {v: int(lengths[len(lengths) // 2]) for v, lengths in made.items()},
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def tilings(text: str, image: Shape, given: tuple[Shape, ...]) -> Tilings:
    """The tilings of a program on images [c, h, w] with tensors of these shapes given."""
    return Tilings(layout(text, image, given))

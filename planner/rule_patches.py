"""The rule of `shardwright::patched`: a chain of local ops on an image, tile by tile, as one op.

    x [z, c, h, w], given tensors -> [z, c', h', w']

    z       samples: free; what is given is V
    others  never: channels mix, and positions need their neighbours

Its work is that of its program on all tiles, halos counted as often as they are computed; the backward makes every tile again.
What a line reads and writes goes through memory as if the line were an op of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .outline import DTYPE_BYTES, Op, Tensor
from .ring import split_by
from .rule_types import Call, Rule, Shape
from .tilings import Tilings, tilings

TARGET = "shardwright.patched"
KIND = "patches"
PROGRAM, GRID = 2, 3
"""Positions of the program and of the grid among the arguments."""


def adapt(call: Call, rule: Rule) -> Rule | None:
    """The line for what is given in one call."""
    if len(call.operands[0]) != 4:
        return None
    given = (" ".join(f"u{i}_{d}!" for d in range(len(s))) for i, s in enumerate(call.operands[1:]))
    line = ", ".join(["z c! h! w!", *given]) + " -> z o! p! q!"
    return replace(rule, line=line)


RULE = Rule("z c! h! w! -> z o! p! q!", (), KIND, KIND, adapt=adapt)


def detail(args: Sequence[Any]) -> tuple[str, tuple[int, int]]:
    """Program and grid among the arguments of a call."""
    rows, columns = args[GRID]
    return str(args[PROGRAM]), (rows, columns)


def call_flops(call: Call) -> tuple[float, float]:
    """(forward, backward) FLOPs of a call of which everything takes a gradient."""
    program, grid = detail(call.args)
    plan, samples = _tilings(program, call.operands), call.operands[0][0]
    everything = (True,) * len(call.operands)
    return samples * plan.flops(grid), samples * plan.backward_flops(grid, everything)


def backward_of(args: Sequence[Any], operands: Sequence[Shape], flowing: Sequence[bool]) -> float:
    """FLOPs of the backward of a call of which the operands that are `flowing` take a gradient."""
    program, grid = detail(args)
    return operands[0][0] * _tilings(program, operands).backward_flops(grid, flowing)


def _tilings(program: str, operands: Sequence[Shape]) -> Tilings:
    return tilings(program, tuple(operands[0][1:]), tuple(operands[1:]))


def _of(op: Op) -> tuple[Tilings, tuple[int, int]]:
    shapes = [tuple(math.prod(op.factors[f].size for f in dim) for dim in use.factors) for use in op.operands]
    return _tilings(op.program, shapes), op.grid


Term = tuple[float, tuple[int, ...]]


def beside(op: Op) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Elements that the lines move, (forward, backward): twice as many backward as forward, besides those made again."""
    plan, grid = _of(op)
    each, samples = plan.moved(grid), tuple(i for i, f in enumerate(op.factors) if f.name.startswith("z"))
    return ((each, samples),), ((3.0 * each, samples),)


def launched(op: Op) -> tuple[int, int]:
    """Kernels started forward and backward: per tile, its lines (backward three times, each product twice) and the copy out."""
    plan, grid = _of(op)
    tiles = grid[0] * grid[1]
    return tiles * (len(plan.plan.program.lines) + 1), tiles * (3 * len(plan.plan.program.lines) + 1)


def scratch_bytes(
    op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str], sizes: Sequence[int], training: bool
) -> float:
    """Bytes of the fullest tile besides operands and result; 0 for every other op."""
    if op.kind != KIND:
        return 0.0
    plan, grid = _of(op)
    samples = float(math.prod(f.size for f in op.factors if f.name.startswith("z")))
    for name, n in zip(choice, sizes, strict=True):
        if any(op.factors[i].name.startswith("z") for i in split_by(op, name)):
            samples /= n
    width = DTYPE_BYTES[tensors[op.operands[0].tensor].dtype]
    return samples * (plan.held_backward(grid, width) if training else plan.held(grid, width))

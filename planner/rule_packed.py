"""The rule of `shardwright::packed`: ops that look at one position at a time, on the rows of valid positions alone, as one op.

    mask [z, s], rows [z, s, ..] or [z s, ..], given tensors -> [z, s, ..] or [z s, ..]

    z       samples: free, as every rank packs its own rows; what is given is V
    others  never: widths lie inside, and a mask splits positions unevenly

The program of the inside is JSON (an object), written by passes/fuse/padding.py:

    share   the share of positions that is expected to be valid, for prices
    zero    whether valid positions are those where the mask is zero (else those where it is not)
    leads   per tensor of rows, how many dims its positions are (2: [z, s], 1: merged)
    lines   [op, arguments, named arguments, FLOPs, elements] of each op, the latter two of one position: those of its product,
            and what is read and written where it is none. "%i" among the arguments is value i: rows, then given, then results
    out     [value, dims of positions] of each result

Work is that of the program times the expected share.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .outline import Op, Saved
from .rule_types import Call, Rule, Shape

TARGET = "shardwright.packed"
KIND = "packed"
PROGRAM = 3
"""Position of the program among the arguments."""
DROPS = {"aten.dropout.default": (1, 2)}
"""Ops of programs that draw random numbers: the positions of their probability and of their switch."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A value of the program, by number."""

    index: int


@dataclass(frozen=True, slots=True)
class Line:
    """One op; `args` and `kwargs` hold `Ref`, plain values and lists of either. FLOPs and elements are those of one position."""

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    flops: float
    elements: float

    @property
    def refs(self) -> tuple[int, ...]:
        """The values it reads, in order of appearance."""
        found: list[int] = []
        queue: list[Any] = [*self.args, *self.kwargs.values()]
        while queue:
            value = queue.pop(0)
            if isinstance(value, Ref):
                found.append(value.index)
            elif isinstance(value, list):
                queue[:0] = value
        return tuple(found)

    @property
    def drops(self) -> bool:
        """Whether it draws random numbers."""
        if self.op not in DROPS:
            return False
        p, train = (self.args[i] for i in DROPS[self.op])
        return bool(p and train)


@dataclass(frozen=True, slots=True)
class Inside:
    """A parsed program."""

    share: float
    zero: bool
    leads: tuple[int, ...]
    lines: tuple[Line, ...]
    out: tuple[tuple[int, int], ...]

    @property
    def flops(self) -> float:
        """Of one position, forward."""
        return sum(line.flops for line in self.lines)

    def backward_flops(self, flowing: Sequence[bool]) -> float:
        """Of one position, where the rows and given tensors that are `flowing` take a gradient."""
        flows, total = list(flowing), 0.0
        for line in self.lines:
            own = [flows[i] for i in line.refs]
            total += line.flops * sum(own[:2])
            flows.append(any(own))
        return total


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Inside:
    """The program written in `text`."""
    found = json.loads(text)
    lines = tuple(
        Line(op, tuple(_arg(a) for a in args), {k: _arg(v) for k, v in kwargs.items()}, flops, elements)
        for op, args, kwargs, flops, elements in found["lines"]
    )
    out = tuple((value, lead) for value, lead in found["out"])
    return Inside(found["share"], found["zero"], tuple(found["leads"]), lines, out)


def _arg(arg: Any) -> Any:
    if isinstance(arg, str) and arg.startswith("%"):
        return Ref(int(arg[1:]))
    return [_arg(a) for a in arg] if isinstance(arg, list) else arg


def drops(program: str) -> bool:
    """Whether a program draws random numbers."""
    return any(line.drops for line in parse(program).lines)


def adapt(call: Call, rule: Rule) -> Rule | None:
    """The line for the rows and given tensors of one call."""
    inside = parse(call.args[PROGRAM])
    rows = call.operands[1 : 1 + len(inside.leads)]
    sides = [_side(f"r{i}_", shape, lead) for i, (shape, lead) in enumerate(zip(rows, inside.leads, strict=True))]
    sides += [_row(f"u{i}_", shape) for i, shape in enumerate(call.operands[1 + len(rows) :])]
    made = [_side(f"o{i}_", s, lead) for i, (s, (_, lead)) in enumerate(zip(call.results, inside.out, strict=True))]
    return replace(rule, line=f"z s!, {', '.join(sides)} -> {', '.join(made)}")


def _side(name: str, shape: Shape, lead: int) -> str:
    return f"{'z s!' if lead == 2 else '(z s!)'} {_row(name, shape[lead:])}"


def _row(name: str, shape: Shape) -> str:
    return " ".join(f"{name}{d}!" for d in range(len(shape)))


RULE = Rule("z s!, z s! *r! -> z s! *o!", (), KIND, KIND, adapt=adapt)


def call_flops(call: Call) -> tuple[float, float]:
    """(forward, backward) FLOPs of a call of which everything takes a gradient."""
    inside = parse(call.args[PROGRAM])
    positions = inside.share * math.prod(call.operands[0])
    return positions * inside.flops, positions * inside.backward_flops((True,) * (len(call.operands) - 1))


def backward_of(args: Sequence[Any], operands: Sequence[Shape], flowing: Sequence[bool]) -> float:
    """FLOPs of the backward of a call of which the operands that are `flowing` take a gradient."""
    inside = parse(args[PROGRAM])
    return inside.share * math.prod(operands[0]) * inside.backward_flops(flowing[1:])


Term = tuple[float, tuple[int, ...]]


def moved(op: Op) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Elements that the lines move beside products, (forward, backward), twice as many backward; every row that comes in is
    written once more, every one that goes out read once more, and in the backward pass the other way round."""
    inside = parse(op.program)
    positions = tuple(f for dim in op.operands[0].factors for f in dim)
    rows = sum(_width(op, use.factors[lead:]) for use, lead in zip(op.operands[1:], inside.leads, strict=False))
    rows += sum(_width(op, use.factors[lead:]) for use, (_, lead) in zip(op.results, inside.out, strict=True))
    each = sum(line.elements for line in inside.lines)
    return ((inside.share * (each + rows), positions),), ((inside.share * (2 * each + rows), positions),)


def _width(op: Op, dims: Sequence[Sequence[int]]) -> float:
    return float(math.prod(op.factors[f].size for dim in dims for f in dim))


def launched(op: Op) -> tuple[int, int]:
    """Kernels started forward and backward: one for each op (products twice backward), and for each tensor packed or unpacked."""
    inside = parse(op.program)
    ends, products = len(inside.leads) + len(inside.out), sum(line.flops > 0 for line in inside.lines)
    return len(inside.lines) + ends + 1, len(inside.lines) + products + ends


def saved(op_factors: Sequence[Any], new: Sequence[tuple[tuple[int, ...], int]]) -> tuple[Saved, ...]:
    """What is kept: packed rows, that scale with samples and positions."""
    positions = tuple(i for i, f in enumerate(op_factors) if f.name[0] in "zs")
    return tuple(Saved("new", 0, positions, size) for _, size in new)

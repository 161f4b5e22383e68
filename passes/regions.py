"""Repeated regions of a captured model as programs to time (profiles/regions.py): one repeat, and two that follow each other.

Sizes are those of one rank with the batch cut over `ranks`, as ops are timed too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..planner.outline import Op, Region
from ..planner.rule_types import Operand
from ..profiles.ops import filled
from ..profiles.regions import RegionProgram, Step, encode_program
from .localize import local_form
from .random import own_form
from .summarize import Summary, operands_of, target_name

SEED = "?"
"""The last input of every program: the seed of ops that draw numbers."""


@dataclass(frozen=True)
class TimedRegion:
    """A region to time: the key it is filed under, its programs as JSON values, and the ops of the repeat that is timed."""

    key: str
    one: list[object]
    two: list[object]
    ops: tuple[Op, ...]
    repeats: int


def timed_regions(summary: Summary, ranks: int) -> tuple[list[TimedRegion], dict[str, str]]:
    """Programs of every region that repeats, and why there is none for others, by region name."""
    found: list[TimedRegion] = []
    why: dict[str, str] = {}
    by_name = summary.outline.by_name
    for region in summary.outline.regions:
        if region.repeats < 2:
            continue
        try:
            one, two = (encode_program(_program(summary, region, n, ranks)) for n in (1, 2))
        except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            why[region.name] = f"{type(error).__name__}: {error}"
            continue
        digest = hashlib.sha256(json.dumps(two).encode()).hexdigest()[:16]
        ops = tuple(by_name[name] for name in region.instances[1])
        found.append(TimedRegion(f"{len(ops)} ops {digest}", one, two, ops, region.repeats))
    return found, why


def local_sizes(op: Op, ranks: int) -> tuple[int, ...]:
    """Factor sizes of an op with its batch over `ranks` (whole where it does not divide)."""
    return tuple(f.size // ranks if f.batch and f.size % ranks == 0 else f.size for f in op.factors)


def _program(summary: Summary, region: Region, repeats: int, ranks: int) -> RegionProgram:
    """The first `repeats` of a region as one program; raises TypeError, ValueError or KeyError where an op cannot be called so."""
    outline = summary.outline
    names = {name for instance in region.instances[:repeats] for name in instance}
    ops = [op for op in outline.ops if op.name in names]
    made = {use.tensor for op in ops for use in op.results}
    given = list(dict.fromkeys(use.tensor for op in ops for use in op.operands if use.tensor not in made))
    number = {name: i for i, name in enumerate([*given, SEED])}
    steps = [_step(summary, op, number, ranks) for op in ops]
    shapes: dict[str, tuple[int, ...]] = {}
    for op in ops:
        sizes = local_sizes(op, ranks)
        for use in op.operands:
            shapes.setdefault(use.tensor, _shape(use.factors, sizes))
    used_after = {use.tensor for op in outline.ops if op.name not in names for use in op.operands}
    ends = [n for n in made if n in used_after or n not in {use.tensor for op in ops for use in op.operands}]
    outputs = tuple(sorted(number[n] for n in ends if outline.tensors[n].differentiable))
    inputs = tuple((shapes[n], outline.tensors[n].dtype, _takes_gradient(summary, n)) for n in given)
    return RegionProgram((*inputs, ((), "int64", False)), tuple(steps), outputs)


def _step(summary: Summary, op: Op, number: dict[str, int], ranks: int) -> Step:
    call = summary.calls[op.name]
    target, args, kwargs = local_form(op, call, local_sizes(op, ranks))
    operands = operands_of(call.node)[0]
    marks = [Operand(number[name]) for name in operands]
    for use in op.results:
        number.setdefault(use.tensor, len(number))
    placed = tuple(filled(list(args), marks)), {k: filled(v, marks) for k, v in kwargs.items()}  # type: ignore[arg-type]
    target, placed_args, placed_kwargs = own_form((target, *placed), Operand(number[SEED])) or (target, *placed)
    return Step(target_name(target), placed_args, placed_kwargs, tuple(number[r] for r in call.results))


def _shape(factors: Sequence[Sequence[int]], sizes: Sequence[int]) -> tuple[int, ...]:
    shape = []
    for members in factors:
        size = 1
        for f in members:
            size *= sizes[f]
        shape.append(size)
    return tuple(shape)


def _takes_gradient(summary: Summary, name: str) -> bool:
    tensor = summary.outline.tensors[name]
    return tensor.differentiable and "float" in tensor.dtype

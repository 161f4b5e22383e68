"""Whole regions in place, by the layer-difference method (Galvatron, VLDB 2023, section 3.3): two repeats less one.

The ops of one repeat of a region, and those of two that follow each other, are run as a program: forward, then backward from
all its results into all its operands that take a gradient. What begins and ends a program cancels in the difference, and what
ops do to each other (caches, what autograd adds, kernels that overlap or fuse) is in it. The difference over the sum of the
region's op rows is its *factor*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .failures import KIND, UNSUPPORTED, failure, key_of
from .ops import decode, encode, filled, resolve
from .progress import Tell, untold
from .timing import agree, device, spread_mean, time_difference

SECONDS_PER_REGION = 2.0
ROUNDS = 2
INTEGER_BOUND = 2
"""Made-up integers are 0 or 1: valid in any table or mask."""


@dataclass(frozen=True)
class Step:
    """One op of a program: `Operand(i)` in its arguments is value i; its tensors become the values `results`."""

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[int, ...]


@dataclass(frozen=True)
class RegionProgram:
    """Values 0..n-1 are the `inputs` (shape, dtype, takes a gradient); `outputs` are the values a gradient comes into."""

    inputs: tuple[tuple[tuple[int, ...], str, bool], ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class RegionRequest:
    """What to time: one repeat and two, filed under `key`. `count` is the number of repeats in the model."""

    key: str
    one: RegionProgram
    two: RegionProgram
    count: int = 1


def encode_program(program: RegionProgram) -> list[Any]:
    """A program as JSON values; raises TypeError where an argument has none."""
    steps = [
        [s.target, encode(list(s.args)), {k: encode(v) for k, v in s.kwargs.items()}, list(s.results)]
        for s in program.steps
    ]
    return [[list(i) for i in program.inputs], steps, list(program.outputs)]


def decode_program(data: Sequence[Any]) -> RegionProgram:
    """The inverse of `encode_program`."""
    inputs, steps, outputs = data
    return RegionProgram(
        tuple((tuple(shape), dtype, bool(grad)) for shape, dtype, grad in inputs),
        tuple(
            Step(target, tuple(decode(args)), {k: decode(v) for k, v in kwargs.items()}, tuple(results))
            for target, args, kwargs, results in steps
        ),
        tuple(outputs),
    )


def time_regions(
    requests: Sequence[tuple[str, RegionProgram, RegionProgram]], tell: Tell = untold
) -> dict[str, tuple[float, float]]:
    """(seconds of one repeat, their relative spread) by key, the quicker of two times; `tell` hears of rows and failures."""
    found: dict[str, tuple[float, float]] = {}
    failed: set[str] = set()
    for turn in range(ROUNDS):
        for key, one, two in requests:
            if key in failed:
                continue
            tell("begin", "region", key)
            timed = _time_region(one, two)
            if timed == SHORT and (turn + 1 < ROUNDS or key in found):  # something else ran on this machine
                continue
            if isinstance(timed, dict):
                failed.add(key)
                tell(KIND, key_of("region", key), timed)
                continue
            found[key] = min(found.get(key, timed), timed)
            tell("region", key, found[key])
    return found


SHORT = {"type": UNSUPPORTED, "message": "two repeats took no longer than one: too short for this clock"}
"""Why a region has no time: perhaps because something else ran meanwhile."""


def _time_region(one: RegionProgram, two: RegionProgram) -> tuple[float, float] | dict[str, str]:
    calls, why = None, {"type": UNSUPPORTED, "message": "it failed on another rank"}
    try:
        calls = [Runner(program) for program in (one, two)]
        for call in calls:
            call()
            call()
    except Exception as error:  # an op may not run on made-up inputs
        calls, why = None, failure(error)
    if agree(0.0 if calls is not None else 1.0) > 0.0 or calls is None:
        return why
    timed = time_difference(calls[0], calls[1], SECONDS_PER_REGION)
    seconds = spread_mean(timed.seconds)
    if seconds <= 0.0:
        return SHORT
    return seconds, round(spread_mean(timed.spread), 3)


class Runner:
    """A program with made-up inputs; calling it runs it forward and backward once."""

    def __init__(self, program: RegionProgram) -> None:
        self._program = program
        self._calls = [(resolve(step.target), step) for step in program.steps]
        self._inputs = [_made(*given) for given in program.inputs]
        self._wanted = [x for x in self._inputs if x.requires_grad]

    def __call__(self) -> object:
        values: dict[int, torch.Tensor] = dict(enumerate(self._inputs))
        for target, step in self._calls:
            given = [filled(a, values) for a in step.args]
            result = target(*given, **{k: filled(v, values) for k, v in step.kwargs.items()})
            parts = result if isinstance(result, tuple | list) else (result,)
            tensors = [r for r in parts if isinstance(r, torch.Tensor)]
            values.update(zip(step.results, tensors, strict=False))
        ends = [values[i] for i in self._program.outputs if values[i].requires_grad]
        if not ends or not self._wanted:
            return None
        return torch.autograd.grad(ends, self._wanted, [torch.ones_like(e) for e in ends], allow_unused=True)


def _made(shape: tuple[int, ...], name: str, grad: bool) -> torch.Tensor:
    dtype = getattr(torch, name)
    if dtype.is_floating_point:
        return (torch.rand(shape, device=device()) - 0.5).to(dtype).requires_grad_(grad)
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype, device=device())
    return torch.randint(0, INTEGER_BOUND, shape, dtype=dtype, device=device())

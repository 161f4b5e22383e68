"""Small samples of a call: the same op on small sizes, so that `discover` can run it many times.

Each distinct size of the operands is replaced by a small one, in the shapes and, where that alone does not run, in the
integer arguments too; a replacement stands when the op still runs and its results change shape accordingly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..planner.rule_types import Shape
from .experiment import Trial, fill, flat, run

SIZES = ((4, 6, 8, 10, 12, 14, 16, 18, 20, 22), (8, 4, 12, 6, 16, 10, 20, 14, 24, 18))
"""Small sizes given to the distinct sizes of a call, one row per sample."""
MOST_ELEMENTS = 1 << 20
"""A sample larger than this (in all operands together) is not run."""


@dataclass(frozen=True)
class Sample:
    """A small call with values, and what the op makes of them."""

    trial: Trial
    operands: tuple[torch.Tensor, ...]
    results: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Small:
    """A call's arguments and shapes after some sizes were replaced."""

    args: Any
    kwargs: Mapping[str, Any]
    shapes: tuple[Shape, ...]
    results: tuple[Shape, ...]


def samples(
    trial: Trial, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], results: Sequence[Shape]
) -> list[Sample] | str:
    """Samples of a call over several sizes and kinds of values, or why there are none."""
    start = Small(trial.args, trial.kwargs, tuple(shapes), tuple(results))
    found: list[Sample] = []
    seen: set[tuple[Shape, ...]] = set()
    reason = ""
    for row in SIZES:
        small = _shrink(trial, start, dtypes, row)
        if small.shapes in seen:
            continue
        seen.add(small.shapes)
        if sum(torch.Size(s).numel() for s in small.shapes) > MOST_ELEMENTS:
            reason = (
                reason
                or f"it cannot be tried at a small size (operands of {', '.join(str(list(s)) for s in small.shapes)})"
            )
            continue
        here = replace(trial, args=small.args, kwargs=small.kwargs)
        some, problem = _valued(here, small.shapes, dtypes)
        found += some
        reason = reason or problem
    return found or reason


def _shrink(trial: Trial, small: Small, dtypes: Sequence[torch.dtype], row: Sequence[int]) -> Small:
    """Replace each distinct size, largest first, by the next of `row` that works."""
    sizes = sorted({n for s in small.shapes for n in s if n > 1}, reverse=True)
    spare = list(row)
    for size in sizes:
        for new in [n for n in spare if n < max(size, 25) and (n == size or n not in sizes)][:3]:
            found = next((s for s in _replaced(small, size, new) if _runs(trial, s, dtypes)), None)
            if found is not None:
                small = found
                spare.remove(new)
                break
    return small


def _replaced(small: Small, size: int, new: int) -> Iterable[Small]:
    """The call with `size` replaced in the shapes, then in the integer arguments as well."""
    shapes, results = (
        tuple(tuple(new if n == size else n for n in s) for s in side) for side in (small.shapes, small.results)
    )
    yield replace(small, shapes=shapes, results=results)
    yield Small(_swap(small.args, size, new), _swap(small.kwargs, size, new), shapes, results)


def _swap(args: Any, size: int, new: int) -> Any:
    if isinstance(args, list | tuple):
        return type(args)(_swap(a, size, new) for a in args)
    if isinstance(args, Mapping):
        return {k: _swap(v, size, new) for k, v in args.items()}
    return new if type(args) is int and args == size else args


def _runs(trial: Trial, small: Small, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether the op runs on these shapes with the results expected (a result dim of another size is free to change)."""
    for device in ("meta", "cpu"):
        if device == "cpu" and sum(torch.Size(s).numel() for s in small.shapes) > MOST_ELEMENTS:
            return False
        operands = [torch.zeros(s, dtype=d, device=device) for s, d in zip(small.shapes, dtypes, strict=True)]
        try:
            results = flat(trial.target(*fill(small.args, operands), **fill(small.kwargs, operands)))
        except Exception:
            continue  # no kernel for meta tensors, or not these shapes
        known = {n for s in small.shapes for n in s} | {1}
        return len(results) == len(small.results) and all(
            r.dim() == len(s) and all(n == m or m not in known for n, m in zip(r.shape, s, strict=True))
            for r, s in zip(results, small.results, strict=True)
        )
    return False


def _valued(trial: Trial, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> tuple[list[Sample], str]:
    """Samples of one set of shapes: normal values and small ids; positive values; ignored labels."""
    found: list[Sample] = []
    problem = ""
    generator = torch.Generator().manual_seed(len(shapes))
    for kind in ("normal", "positive", "ignored"):
        if kind == "ignored" and not any(d in (torch.int64, torch.int32) for d in dtypes):
            continue
        for dtype in (torch.float64, torch.float32, None):
            operands = tuple(_values(s, d, dtype, kind, generator) for s, d in zip(shapes, dtypes, strict=True))
            try:
                outcome = run(trial, operands)
            except Exception as error:
                problem = (
                    problem
                    or f"it does not run on the CPU: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                )
                continue
            found.append(Sample(trial, operands, outcome.results))
            break
    return found, problem


def _values(
    shape: Shape, dtype: torch.dtype, floating: torch.dtype | None, kind: str, generator: torch.Generator
) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        real = torch.randn(shape, generator=generator, dtype=torch.float64)
        if kind == "positive":
            real = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.9 + 0.05
        return real.to(floating if floating is not None and dtype.is_floating_point else dtype)
    ids = torch.randint(2, shape, generator=generator)
    if kind == "ignored":
        ids = torch.where(torch.rand(shape, generator=generator) < 0.3, torch.full_like(ids, -100), ids)
    return ids.to(dtype)

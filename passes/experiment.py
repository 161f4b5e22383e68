"""Running one op on pieces: the experiment by which rules are verified (`verify`) and discovered (`discover`).

A letter is split by giving each of n ranks some of its indices: a run of them ("major"), or every n-th ("minor", what a
split of the minor factor of a merged dim does). Tensors that have the letter are cut there, the others are whole; results
are joined or summed, and so are the gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..planner.rule_types import Letters, Operand


@dataclass(frozen=True)
class Trial:
    """A call as an experiment: the op, its arguments with `Operand(i)` for tensors, and which operands take gradients."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    differentiable: tuple[bool, ...]


@dataclass(frozen=True)
class Outcome:
    """What one run gave: results, and the gradient of each operand (None where none flows)."""

    results: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor | None, ...]


def strip(args: Any, found: list[torch.Tensor]) -> Any:
    """`args` with tensors replaced by `Operand(i)`; the tensors are appended to `found`."""
    if isinstance(args, torch.Tensor):
        found.append(args)
        return Operand(len(found) - 1)
    if isinstance(args, list | tuple):
        return (
            type(args)(strip(a, found) for a in args)
            if type(args) in (list, tuple)
            else [strip(a, found) for a in args]
        )
    if isinstance(args, Mapping):
        return {k: strip(v, found) for k, v in args.items()}
    return args


def fill(args: Any, tensors: Sequence[Any]) -> Any:
    """Inverse of `strip`: `args` with tensors (or what stands for them) in the places of `Operand` marks."""
    if isinstance(args, Operand):
        return tensors[args.index]
    if isinstance(args, list | tuple):
        return type(args)(fill(a, tensors) for a in args)
    if isinstance(args, Mapping):
        return {k: fill(v, tensors) for k, v in args.items()}
    return args


def flat(results: Any) -> tuple[torch.Tensor, ...]:
    """All tensors an op returned."""
    found: list[torch.Tensor] = []
    strip(list(results) if isinstance(results, tuple) else results, found)
    return tuple(found)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's random state fixed inside, restored after. (`torch.manual_seed` would also queue calls for every device.)"""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def run(
    trial: Trial, operands: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor | None] | None = None
) -> Outcome:
    """Run the op with a fixed random state; `incoming` are the gradients of its results (None: forward only)."""
    leaves = [x.detach().clone().requires_grad_(d and incoming is not None)
              for x, d in zip(operands, trial.differentiable, strict=True)]  # fmt: skip
    with seeded(0):
        results = flat(trial.target(*fill(trial.args, leaves), **fill(trial.kwargs, leaves)))
    pairs = [(r, g) for r, g in zip(results, incoming or (), strict=False) if r.requires_grad and g is not None]
    if pairs:
        torch.autograd.backward([r for r, _ in pairs], [g for _, g in pairs])
    return Outcome(tuple(r.detach() for r in results), tuple(x.grad for x in leaves))


def indices(size: int, ways: int, minor: bool) -> list[torch.Tensor]:
    """Which indices of a letter each rank holds."""
    every = torch.arange(size)
    return [every[r::ways] for r in range(ways)] if minor else list(every.chunk(ways))


def take(x: torch.Tensor, dims: Letters, sizes: Mapping[str, int], letter: str, held: torch.Tensor) -> torch.Tensor:
    """The piece of `x` (its dims in letters) with only the `held` indices of `letter`; `x` itself where it lacks it."""
    order = [c for members in dims for c in members]
    if letter not in order:
        return x
    local = {**sizes, letter: len(held)}
    piece = x.reshape([sizes[c] for c in order]).index_select(order.index(letter), held)
    return piece.reshape([_size(members, local) for members in dims])


def join(
    pieces: Sequence[torch.Tensor], dims: Letters, sizes: Mapping[str, int], letter: str, held: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Pieces joined along `letter`, or summed where the tensor lacks it. Raises ValueError where shapes do not fit."""
    order = [c for members in dims for c in members]
    if letter not in order:
        total = pieces[0].clone()
        for piece in pieces[1:]:
            total = total + piece
        return total
    parts = []
    for piece, some in zip(pieces, held, strict=True):
        local = {**sizes, letter: len(some)}
        if list(piece.shape) != [_size(members, local) for members in dims]:
            raise ValueError(f"a piece has shape {list(piece.shape)}, {[_size(m, local) for m in dims]} was expected")
        parts.append(piece.reshape([local[c] for c in order]))
    at = order.index(letter)
    back = torch.argsort(torch.cat(list(held)))
    return torch.cat(parts, at).index_select(at, back).reshape([_size(members, sizes) for members in dims])


def _size(members: Sequence[str], sizes: Mapping[str, int]) -> int:
    total = 1
    for c in members:
        total *= sizes[c]
    return total


def slack(results: Sequence[torch.Tensor]) -> float:
    """Tolerance (relative and absolute) of a comparison: what the coarsest dtype among the results rounds to."""
    coarse = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}
    return max((coarse.get(r.dtype, 5e-2) for r in results if r.is_floating_point() or r.is_complex()), default=1e-9)


def difference(
    found: torch.Tensor | None, wanted: torch.Tensor | None, tolerance: float = 1e-9, *, finite: bool = False
) -> str:
    """What is wrong with a value ("" for nothing); with `finite`, only where the wanted value is finite."""
    if found is None or wanted is None:
        present = found if wanted is None else wanted
        return "" if present is None or not present.any() else "is missing"
    if found.shape != wanted.shape:
        return f"has shape {list(found.shape)} instead of {list(wanted.shape)}"
    if not (found.is_floating_point() or found.is_complex()):
        kinds = (found.dtype == torch.bool, wanted.dtype == torch.bool)
        return "" if kinds[0] == kinds[1] and torch.equal(found.to(wanted.dtype), wanted) else "differs"
    if finite:
        some = wanted.isfinite()
        found, wanted = found[some], wanted[some]
    if torch.allclose(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True):
        return ""
    return f"differs by {(found - wanted).abs().nan_to_num(nan=float('inf')).max().item():.2g}"


def differentiable(trial: Trial, operands: Sequence[torch.Tensor]) -> tuple[bool, ...]:
    """Which of the operands that `trial` differentiates the op can really be differentiated by."""

    def works(flags: tuple[bool, ...]) -> bool:
        here = Trial(trial.target, trial.args, trial.kwargs, flags)
        try:
            plain = run(here, operands)
            run(here, operands, [torch.ones_like(r) if r.is_floating_point() else None for r in plain.results])
        except (RuntimeError, NotImplementedError):
            return False
        return True

    if works(trial.differentiable):
        return trial.differentiable
    alone = [tuple(i == j and d for j in range(len(operands))) for i, d in enumerate(trial.differentiable)]
    return tuple(d and works(flags) for d, flags in zip(trial.differentiable, alone, strict=True))


def sample_like(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal values of the shape and dtype of `x`."""
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def variants(operands: Sequence[torch.Tensor], generator: torch.Generator) -> list[tuple[str, list[torch.Tensor]]]:
    """Adversarial values for an op: as given, with ties, and negated with zeros. Integers and bools stay as given."""

    def ties(x: torch.Tensor) -> torch.Tensor:
        few = x.flatten()[: max(2, x.numel() // 4)]
        return few[torch.randint(len(few), (x.numel(),), generator=generator)].reshape(x.shape) if x.numel() else x

    def signs(x: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.rand(x.shape, generator=generator) < 0.3, torch.zeros_like(x), -x)

    floats = [x.is_floating_point() for x in operands]
    return [
        ("given", list(operands)),
        *((name, [change(x) if f else x for x, f in zip(operands, floats, strict=True)])
          for name, change in (("ties", ties), ("signs", signs)) if any(floats)),
    ]  # fmt: skip

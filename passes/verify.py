"""Mechanical verification of a rule: split by it, run the op on the pieces, join, and compare with the unsplit op.

For every factor that may be split, each entry of `linear`, and V, values and gradients must agree in float64. This is the
oracle that makes the table of rules trustworthy (tests/test_rules.py runs it on every line).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..planner.rule_types import RuleInstance
from .experiment import (
    Outcome,
    Trial,
    difference,
    differentiable,
    indices,
    join,
    run,
    sample_like,
    slack,
    strip,
    take,
    variants,
)  # fmt: skip
from .localize import localize


@dataclass(frozen=True)
class _Case:
    """One set of values: operands, incoming gradients, and what the unsplit op makes of them."""

    trial: Trial
    rule: RuleInstance
    operands: list[torch.Tensor]
    incoming: tuple[torch.Tensor | None, ...]
    whole: Outcome
    label: str
    generator: torch.Generator


def verify_rule(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], instance: RuleInstance, *,
    ways: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64,
) -> list[str]:  # fmt: skip
    """Problems of a rule instance for the call `target(*args, **kwargs)` on real tensors; empty when it is sound.

    Floating operands run in `dtype`. Where no tensor requires a gradient, all floating ones are differentiated. Letters
    that `ways` does not divide are split by their smallest prime; implementations have kernels and tests of their own.
    """
    found: list[torch.Tensor] = []
    bare_args, bare_kwargs = strip(tuple(args), found), strip(dict(kwargs), found)
    operands = [x.detach().to(dtype) if x.is_floating_point() else x.detach() for x in found]
    asked = any(x.requires_grad for x in found)
    grads = tuple(x.is_floating_point() and (x.requires_grad or not asked) for x in found)
    trial = Trial(target, bare_args, bare_kwargs, grads)
    trial = replace(trial, differentiable=differentiable(trial, operands))
    generator = torch.Generator().manual_seed(seed)
    problems: list[str] = []
    for label, values in variants(operands, generator):
        try:
            case = _case(trial, instance, values, label, generator)
        except Exception as error:
            if label == "given":
                return [f"the op itself fails: {_first_line(error)}"]
            continue  # values outside the op's domain
        if label == "given" and (problem := _shapes(case)):
            return [problem]
        problems += _verify_case(case, ways)
    return problems


def _case(
    trial: Trial, rule: RuleInstance, values: list[torch.Tensor], label: str, generator: torch.Generator
) -> _Case:
    plain = run(trial, values)
    incoming = tuple(sample_like(r, generator) if r.is_floating_point() else None for r in plain.results)
    return _Case(trial, rule, values, incoming, run(trial, values, incoming), label, generator)


def _shapes(case: _Case) -> str:
    """A rule whose letters do not describe the tensors is wrong before any split."""
    rule = case.rule
    sides = (("operand", case.operands, rule.operands), ("result", case.whole.results, rule.results))
    for side, tensors, rows in sides:
        if len(tensors) != len(rows):
            return f"{len(tensors)} {side}s where the rule has {len(rows)}"
        for i, (x, dims) in enumerate(zip(tensors, rows, strict=True)):
            shape = [_product(rule.sizes[c] for c in members) for members in dims]
            if list(x.shape) != shape:
                return f"{side} {i} has shape {list(x.shape)}, the rule says {shape}"
    return ""


def _product(sizes: Any) -> int:
    total = 1
    for n in sizes:
        total *= n
    return total


def _verify_case(case: _Case, ways: int) -> list[str]:
    problems = []
    for letter in case.rule.free():
        n = _ways(case.rule.sizes[letter], ways)
        for minor in (False, True) if case.label == "given" else (False,):
            problem = _guard(_split, case, letter, n, minor)
            if problem:
                problems.append(
                    f"splitting {letter} {n} ways{' (strided)' if minor else ''}, values {case.label}: {problem}"
                )
    for entry, group in enumerate(case.rule.linear):
        problem = _guard(_partial, case, group, ways)
        if problem:
            problems.append(f"linear entry {entry} {group}, values {case.label}: {problem}")
    problem = _guard(_varying, case)
    if problem:
        problems.append(f"V, values {case.label}: {problem}")
    return problems


def _guard(check: Any, case: _Case, *args: Any) -> str:
    try:
        return str(check(case, *args))
    except Exception as error:
        return f"fails: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _ways(size: int, ways: int) -> int:
    return ways if size % ways == 0 else next(p for p in range(2, size + 1) if size % p == 0)


def _split(case: _Case, letter: str, ways: int, minor: bool) -> str:
    """Split one letter: S where a tensor has it, else V (operands) or P (results)."""
    rule, trial = case.rule, case.trial
    held = indices(rule.sizes[letter], ways, minor)
    local = localize(trial.target, trial.args, trial.kwargs, rule, {letter: len(held[0])})
    here = Trial(*local, trial.differentiable)
    parts = []
    for some in held:
        operands = [take(x, d, rule.sizes, letter, some) for x, d in zip(case.operands, rule.operands, strict=True)]
        incoming = [None if g is None else take(g, d, rule.sizes, letter, some)
                    for g, d in zip(case.incoming, rule.results, strict=True)]  # fmt: skip
        parts.append(run(here, operands, incoming))
    results = [join([p.results[i] for p in parts], d, rule.sizes, letter, held) for i, d in enumerate(rule.results)]
    gradients = []
    for i, dims in enumerate(rule.operands):
        pieces = _gradients(parts, i)
        gradients.append(join(pieces, dims, rule.sizes, letter, held) if pieces else None)
    return _compare(case, results, gradients)


def _gradients(parts: Sequence[Outcome], operand: int) -> list[torch.Tensor]:
    """The gradient of one operand on every rank; none at all where it takes no gradient on some."""
    found = [p.gradients[operand] for p in parts]
    return [g for g in found if g is not None] if all(g is not None for g in found) else []


def _partial(case: _Case, group: tuple[int, ...], ways: int) -> str:
    """The operands of `group` as partial sums, the others whole: results sum, and every rank has the whole gradient of a P."""
    if any(case.operands[i].dtype == torch.bool for i in group):
        return ""  # a bool is never a partial sum
    tolerance = slack(case.whole.results)
    shares = {i: _shares(case.operands[i], ways, case.generator) for i in group}
    parts = []
    for rank in range(ways):
        operands = [shares[i][rank] if i in shares else x for i, x in enumerate(case.operands)]
        parts.append(run(case.trial, operands, case.incoming))
    results = [_total([p.results[i] for p in parts]) for i in range(len(case.whole.results))]
    gradients: list[torch.Tensor | None] = []
    for i in range(len(case.operands)):
        pieces = _gradients(parts, i)
        if i in group:
            wrong = [d for g in pieces if (d := difference(g, case.whole.gradients[i], tolerance, finite=True))]
            if wrong:
                return f"gradient of operand {i} {wrong[0]}"
        gradients.append(case.whole.gradients[i] if i in group else _total(pieces) if pieces else None)
    return _compare(case, results, gradients, finite=True)


def _total(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    return total


def _shares(x: torch.Tensor, ways: int, generator: torch.Generator) -> list[torch.Tensor]:
    """`ways` tensors that sum to `x`, none of them like it."""
    noise = [
        sample_like(x, generator) if x.is_floating_point() else torch.randint_like(x, -3, 4) for _ in range(ways - 1)
    ]
    return [*noise, x - _total(noise)]


def _varying(case: _Case) -> str:
    """The backward is linear in the incoming gradient: shares of it give shares of every gradient."""
    if not any(g is not None for g in case.whole.gradients):
        return ""
    shares = [None if g is None else _shares(g, 2, case.generator) for g in case.incoming]
    parts = [run(case.trial, case.operands, [None if s is None else s[rank] for s in shares]) for rank in range(2)]
    gradients = [_total(_gradients(parts, i)) if _gradients(parts, i) else None for i in range(len(case.operands))]
    return _compare(case, parts[0].results, gradients, finite=True)


def _compare(
    case: _Case, results: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], *, finite: bool = False
) -> str:
    """First difference from the unsplit op. Sums of shares are compared where finite: shares of infinity have no sum."""
    tolerance = slack(case.whole.results)
    for i, (mine, wanted) in enumerate(zip(results, case.whole.results, strict=True)):
        if problem := difference(mine, wanted, tolerance, finite=finite):
            return f"result {i} {problem}"
    for i, (grad, whole) in enumerate(zip(gradients, case.whole.gradients, strict=True)):
        if problem := difference(grad, whole, tolerance, finite=finite):
            return f"gradient of operand {i} {problem}"
    return ""

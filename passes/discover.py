"""Rules found by experiment, for ops that have no line in the table.

The call is shrunk to small sizes, then every set of operand dims of equal size is split and the op run on the pieces: where
the results join along a dim, or sum, and the gradients do too, over several shapes and adversarial values, the set is a
factor. Partial sums are tried the same way. What fails, or is not a deterministic function of its arguments, is run whole on
every rank, and `Discovery.failures` says why.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..errors import UnsupportedOp
from ..planner.rule_types import Letters, RuleInstance, Shape
from ..planner.views import letter_name
from .discover_cache import Factor, Finding, load, signature, store
from .experiment import Trial, difference, fill, flat, indices, run, strip, take
from .shrink import Sample, samples
from .verify import verify_rule

MOST_CANDIDATES = 4096
"""Sets of operand dims tried for one op; an op with more (very many operands) is only tried on the first ones."""


@dataclass(frozen=True)
class Discovery:
    """What was found: the rule for this call (nothing may be split where nothing was found), and what did not hold."""

    instance: RuleInstance
    failures: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The rule as a line of the table."""
        return str(self.instance)


def discover(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *,
    results: Sequence[Shape] | None = None, cache: Path | None = None,
) -> Discovery:  # fmt: skip
    """The rule of `target(*args, **kwargs)` by experiment on the CPU.

    Tensor arguments may be fake or meta: only shapes and dtypes are read. `results` are the shapes of the call's results
    (found by running the op on meta tensors when None). `cache` is a JSON file of earlier findings; a finding read from it is
    verified once more before it is used, so a changed op is discovered anew.
    """
    found: list[torch.Tensor] = []
    bare, named = strip(tuple(args), found), strip(dict(kwargs or {}), found)
    shapes = [tuple(int(n) for n in x.shape) for x in found]
    dtypes = [x.dtype for x in found]
    trial = Trial(target, bare, named, tuple(d.is_floating_point for d in dtypes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ops without an autograd kernel warn once per backward
        return _discover(trial, shapes, dtypes, results, cache)


def discover_node(node: fx.Node, *, cache: Path | None = None) -> Discovery:
    """The same for a node of a captured graph, whose `meta["val"]` and those of its arguments are (fake) tensors."""
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    results = [tuple(int(n) for n in r.shape) for r in flat(node.meta["val"])]
    return discover(node.target, tuple(args), kwargs, results=results, cache=cache)  # type: ignore[arg-type]


def _discover(
    trial: Trial, shapes: list[Shape], dtypes: list[torch.dtype], results: Sequence[Shape] | None, cache: Path | None
) -> Discovery:
    try:
        outcome = [tuple(r) for r in results] if results is not None else _result_shapes(trial, shapes, dtypes)
    except Exception as error:
        raise UnsupportedOp(
            f"{trial.target} fails on meta tensors ({_first_line(error)}); register a fake for it"
        ) from error
    tried = _prepare(trial, shapes, dtypes, outcome)
    if isinstance(tried, str):
        return Discovery(_instance(Finding(), shapes, outcome), (tried,))
    key = signature(trial.target, trial.args, trial.kwargs, shapes, dtypes)
    finding = load(cache, key) if cache is not None else None
    if finding is None or _problems(tried[0], finding.factors, tuple(finding.linear)):
        finding = _search(tried)
        if cache is not None:
            store(cache, key, finding)
    return Discovery(_instance(finding, shapes, outcome), tuple(finding.failures))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _result_shapes(trial: Trial, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> list[Shape]:
    operands = [torch.empty(s, dtype=d, device="meta") for s, d in zip(shapes, dtypes, strict=True)]
    return [tuple(r.shape) for r in flat(trial.target(*fill(trial.args, operands), **fill(trial.kwargs, operands)))]


def _prepare(
    trial: Trial, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], results: Sequence[Shape]
) -> list[Sample] | str:
    """Small samples of the call, or why the op cannot be tried."""
    schema = getattr(trial.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return "it changes its arguments"
    tried = samples(trial, shapes, dtypes, results)
    if isinstance(tried, str):
        return tried
    return next((problem for sample in tried if (problem := _impure(sample))), tried)


def _search(tried: Sequence[Sample]) -> Finding:
    """Try every set of dims and every group of partial sums, on every sample."""
    first = tried[0]
    finding = Finding()
    used: set[tuple[int, int]] = set()
    for dims in _candidates(first.operands):
        if any(place in used for place in dims.items()):
            continue
        joined = _joins(first, dims)
        if joined is not None and all(not _problems(s, [(dims, joined)], ()) for s in tried):
            finding.factors.append((dims, joined))
            used |= set(dims.items())
    for group in _groups(first.operands):
        covered = any(set(entry) <= set(group) for entry in finding.linear)
        if not covered and all(not _problems(s, [], (group,)) for s in tried):
            finding.linear.append(group)
    if not finding.factors:
        finding.failures.append("no dim can be split")
    return finding


def _impure(sample: Sample) -> str:
    """Why the op is not a deterministic function of its arguments ("" when it is)."""
    trial, outcomes = sample.trial, []
    for seed in (1, 2):
        operands = [x.clone() for x in sample.operands]
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            outcomes.append(flat(trial.target(*fill(trial.args, operands), **fill(trial.kwargs, operands))))
        if any(difference(x, y) for x, y in zip(operands, sample.operands, strict=True)):
            return "it changes its arguments"
    if any(difference(x, y) for x, y in zip(*outcomes, strict=True)):
        return "it is random, or depends on more than its arguments"
    return ""


def _candidates(operands: Sequence[torch.Tensor]) -> Iterator[dict[int, int]]:
    """Sets of dims of equal size, at most one per operand ({operand: dim}), largest sets first."""
    found: list[dict[int, int]] = []
    for size in sorted({n for x in operands for n in x.shape if n > 1}):
        options = [[None, *(d for d, n in enumerate(x.shape) if n == size)] for x in operands]
        for choice in itertools.islice(itertools.product(*options), MOST_CANDIDATES):
            dims = {i: d for i, d in enumerate(choice) if d is not None}
            if dims:
                found.append(dims)
    return iter(sorted(found, key=lambda dims: -len(dims))[:MOST_CANDIDATES])


def _joins(sample: Sample, dims: Mapping[int, int]) -> list[int | None] | None:
    """How the results of pieces cut along `dims` join: per result its dim, or None for a sum; None when one does not."""
    trial, whole = sample.trial, sample.results
    letters = _letters(sample.operands, dims, "f")
    sizes = _sizes(sample.operands, letters)
    held = indices(sizes["f"], 2, False)
    try:
        parts = [run(trial, [take(x, d, sizes, "f", some) for x, d in zip(sample.operands, letters, strict=True)])
                 for some in held]  # fmt: skip
        return [_join_of([p.results[i] for p in parts], wanted, sizes["f"]) for i, wanted in enumerate(whole)]
    except Exception:
        return None  # the op does not run on such pieces


def _join_of(pieces: Sequence[torch.Tensor], wanted: torch.Tensor, size: int) -> int | None:
    """The dim along which pieces join to `wanted`, or None where their sum is it; raises ValueError for neither."""
    for d, n in enumerate(wanted.shape):
        cut = n == size and pieces[0].dim() == wanted.dim() and pieces[0].shape[d] < n
        if cut and not difference(torch.cat(list(pieces), d), wanted):
            return d
    if pieces[0].shape == wanted.shape and wanted.dtype != torch.bool:  # noqa: SIM102
        if not difference(sum(pieces[1:], pieces[0]), wanted):
            return None
    raise ValueError("the pieces neither join nor sum")


def _groups(operands: Sequence[torch.Tensor]) -> Iterator[tuple[int, ...]]:
    """Sets of floating operands that may be jointly linear, smallest first; of many operands only single ones and all."""
    floating = [i for i, x in enumerate(operands) if x.is_floating_point()]
    sizes = range(1, len(floating) + 1) if len(floating) <= 4 else sorted({1, len(floating)})
    return itertools.chain.from_iterable(itertools.combinations(floating, n) for n in sizes)


def _problems(sample: Sample, factors: Sequence[Factor], linear: tuple[tuple[int, ...], ...]) -> list[str]:
    """What mechanical verification says of some factors and linear entries on one sample."""
    rule = _rule([x.shape for x in sample.operands], [x.shape for x in sample.results], factors)
    if rule is None:
        return ["sizes differ"]
    trial = sample.trial
    args, kwargs = fill(trial.args, sample.operands), fill(trial.kwargs, sample.operands)
    floats = [x.dtype for x in sample.operands if x.is_floating_point()]
    return verify_rule(
        trial.target, args, kwargs, replace(rule, linear=linear), dtype=floats[0] if floats else torch.float64
    )


def _rule(operands: Sequence[Shape], results: Sequence[Shape], factors: Sequence[Factor]) -> RuleInstance | None:
    """A rule instance with these factors; every other dim gets a letter of its own that may not be split."""
    places: dict[tuple[str, int, int], int] = {}
    for index, (dims, joined) in enumerate(factors):
        here = [("operand", i, d) for i, d in dims.items()]
        here += [("result", i, d) for i, d in enumerate(joined) if d is not None]
        if len({(operands if side == "operand" else results)[i][d] for side, i, d in here}) > 1:
            return None
        places |= dict.fromkeys(here, index)
    sizes: dict[str, int] = {}
    never: set[str] = set()
    named: dict[int, str] = {}

    def letter(place: tuple[str, int, int], size: int) -> tuple[str, ...]:
        if size == 1:
            return ()
        index = places.get(place)
        name = named.get(index) if index is not None else None
        if name is None:
            name = letter_name(len(sizes))
            sizes[name] = size
            if index is None:
                never.add(name)
            else:
                named[index] = name
        return (name,)

    def row(side: str, index: int, shape: Shape) -> Letters:
        return tuple(letter((side, index, d), size) for d, size in enumerate(shape))

    left = tuple(row("operand", i, tuple(s)) for i, s in enumerate(operands))
    right = tuple(row("result", i, tuple(s)) for i, s in enumerate(results))
    elements = float(sum(torch.Size(s).numel() for s in results))
    return RuleInstance(tuple(sizes), sizes, frozenset(never), {}, left, right, (), "other", elements, 2 * elements)


def _instance(finding: Finding, operands: Sequence[Shape], results: Sequence[Shape]) -> RuleInstance:
    """The finding at the sizes of the call."""
    rule = _rule(operands, results, finding.factors) or _rule(operands, results, ())
    assert rule is not None  # without factors every dim has a letter of its own
    return replace(rule, linear=tuple(finding.linear))


def _letters(operands: Sequence[torch.Tensor], dims: Mapping[int, int], letter: str) -> list[Letters]:
    return [
        tuple(((letter,) if dims.get(i) == d else (f"{letter}{i}.{d}",)) for d in range(x.dim()))
        for i, x in enumerate(operands)
    ]


def _sizes(operands: Sequence[torch.Tensor], letters: Sequence[Letters]) -> dict[str, int]:
    return {
        members[0]: n
        for x, dims in zip(operands, letters, strict=True)
        for members, n in zip(dims, x.shape, strict=True)
    }

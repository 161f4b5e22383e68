"""From measured rows to prices of shapes nobody measured: which op shapes to time, and the rates fitted to what was timed.

A rate is fitted per op target, and per kind over all its targets: the amounts moved (FLOPs for matmul, attention and
convolution, bytes for all else) over the seconds left after the fixed cost of a call, summed so that large calls weigh most.
Its error is the median relative deviation of the rows it was fitted to.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .outline import Op, Outline, Tensor
from .prices import OpRow, Prices, Rate
from .work import FREE_KINDS, OpKey

UNTIMED_KINDS = FREE_KINDS | {"fill"}
LEAST_ERROR = 0.05
MOST_SECONDS = 0.1
"""An op estimated to take longer is timed at a smaller shape: rates hardly depend on it any more."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One op at local factor sizes, worth timing; `weight` is the estimated seconds a step spends on such ops."""

    op: Op
    sizes: tuple[int, ...]
    weight: float


def samples(outline: Outline, prices: Prices, stages: int = 1) -> tuple[Sample, ...]:
    """Distinct (op, local shape) that plans of `stages` pipeline ranks on the cluster of `prices` may ask for, every target's
    heaviest first.

    Shapes: the batch cut over d ranks and at most one other factor over t, for every d x t that makes up the devices of a stage.
    Targets take turns, so that a short budget has timed each of them once.
    """
    found: dict[OpKey, Sample] = {}
    devices = max(1, prices.cluster.devices // stages)
    meshes = [(d, devices // d) for d in range(1, devices + 1) if devices % d == 0]
    for op in outline.ops:
        if op.kind in UNTIMED_KINDS:
            continue
        for wanted in dict.fromkeys(s for d, t in meshes for s in _cuts(op, d, t)):
            sizes = _shrunk(op, wanted, prices, outline.tensors)
            key = prices.op_key(op, sizes, outline.tensors)
            forward, backward = prices.op(op, sizes, outline.tensors)
            seconds = forward.seconds + backward.seconds
            kept = found.get(key)
            found[key] = Sample(op, sizes, seconds + (kept.weight if kept is not None else 0.0))
    return _in_turn(sorted(found.values(), key=lambda s: -s.weight))


def fitted(
    prices: Prices, rows: Mapping[OpKey, OpRow], picked: Iterable[Sample], tensors: Mapping[str, Tensor]
) -> Prices:
    """`prices` with the measured `rows` and the rates fitted to those of `picked` that were timed."""
    points: dict[str, list[_Point]] = {}
    overhead = prices.cluster.device.kernel_overhead_seconds
    for sample in picked:
        row = rows.get(prices.op_key(sample.op, sample.sizes, tensors))
        if row is not None:
            forward, backward, kernels = prices.amounts(sample.op, sample.sizes, tensors)
            point = _Point(forward, row.forward, backward, row.backward, kernels)
            for name in (sample.op.target, sample.op.kind):
                points.setdefault(name, []).append(point)
    rates = {name: _rate(found, overhead) for name, found in points.items()}
    return replace(prices, ops={**prices.ops, **rows}, rates={**prices.rates, **rates})


def _in_turn(ordered: list[Sample]) -> tuple[Sample, ...]:
    """The first of every target, then the second of every target, and so on."""
    turn: Counter[str] = Counter()
    keyed = []
    for place, sample in enumerate(ordered):
        keyed.append((turn[sample.op.target], place, sample))
        turn[sample.op.target] += 1
    return tuple(sample for _, _, sample in sorted(keyed, key=lambda k: k[:2]))


def _shrunk(op: Op, sizes: tuple[int, ...], prices: Prices, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """`sizes` with the largest free factor halved until the op is short enough to time (its work stays as compact)."""
    while sum(price.seconds for price in prices.op(op, sizes, tensors)) > MOST_SECONDS:
        free = [i for i, f in enumerate(op.factors) if f.split != "never" and sizes[i] > 1]
        if not free:
            break
        largest = max(free, key=lambda i: sizes[i])
        sizes = tuple(size // 2 if i == largest else size for i, size in enumerate(sizes))
    return sizes


@dataclass(frozen=True, slots=True)
class _Point:
    forward_amount: float
    forward_seconds: float
    backward_amount: float
    backward_seconds: float
    kernels: int


def _rate(points: list[_Point], overhead: float) -> Rate:
    ahead = [(p.forward_amount, p.forward_seconds, overhead) for p in points]
    back = [(p.backward_amount, p.backward_seconds, overhead * p.kernels) for p in points if p.backward_amount > 0]
    forward = _slope(ahead)
    backward = _slope(back) if back else forward
    off = [abs(f + a / forward - s) / s for a, s, f in ahead if s > 0]
    off += [abs(f + a / backward - s) / s for a, s, f in back if s > 0]
    return Rate(forward, backward, overhead, max(LEAST_ERROR, round(statistics.median(off), 3)) if off else LEAST_ERROR)


def _slope(points: list[tuple[float, float, float]]) -> float:
    """Amount per second beyond the fixed cost; a call that is all fixed cost leaves a tenth of its seconds to its work."""
    amount = sum(a for a, _, _ in points)
    seconds = sum(max(s - fixed, 0.1 * s) for _, s, fixed in points)
    return amount / seconds if amount > 0 and seconds > 0 else 1e15


def _cuts(op: Op, d: int, t: int) -> Iterable[tuple[int, ...]]:
    """Local sizes of `op` with its batch over `d` ranks (whole where it does not divide) and nothing or one factor over `t`."""
    sizes = [f.size // d if f.batch and f.size % d == 0 else f.size for f in op.factors]
    yield tuple(sizes)
    for i, factor in enumerate(op.factors):
        if t > 1 and factor.split != "never" and sizes[i] % t == 0:
            yield tuple(size // t if i == j else size for j, size in enumerate(sizes))

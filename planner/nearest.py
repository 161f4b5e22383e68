"""Seconds of an op at a local shape nobody measured, from rows of the same op at other local shapes.

Rows belong together where target, plain arguments, dtypes, gradients and numbers of dims are equal. A row's distance is how many
times a factor must be doubled or halved to come from its shape to the one asked for, summed over factors. What an op does there
(FLOPs or bytes, as for fitted rates) says how its seconds scale: from the nearest row that does less and the nearest that does
more, each weighed by the other's distance (along one factor that is a straight line between the two in log amount and
log seconds); beyond the measured ones from the nearest row alone, whose fixed cost of a call stays. A measured shape costs what was
measured, and the error grows with the distance, by as much per doubling as leaving out one row at a time shows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .work import OpKey, Work

if TYPE_CHECKING:
    from .prices import OpRow

GROWTH = 0.1
"""Relative error per doubling where too few rows are there to see it."""
LEAST_GROWTH = 0.02
LEAST_ROWS = 3
"""Rows that must be there to leave one out."""

Family = tuple[str, str, tuple[tuple[int, str, bool], ...]]


@dataclass(frozen=True, slots=True)
class Near:
    """Forward and backward seconds at a shape, and their relative error."""

    forward: float
    backward: float
    error: float


@dataclass(frozen=True, slots=True)
class Point:
    """A measured row as an op sees it: local sizes of its factors, amounts and seconds (forward, backward), relative spread."""

    sizes: tuple[float, ...]
    amounts: tuple[float, float]
    seconds: tuple[float, float]
    error: float

    def distance(self, sizes: Sequence[float]) -> float:
        """Doublings and halvings from here to `sizes`."""
        return sum(abs(math.log2(there / here)) for here, there in zip(self.sizes, sizes, strict=True) if here != there)


@dataclass(frozen=True)
class Measured:
    """Measured rows by family; what an op makes of its family's rows is kept while this object lives, and so is the op's work."""

    families: Mapping[Family, Sequence[tuple[OpKey, OpRow]]]
    _known: dict[int, tuple[Work, tuple[Point, ...], float]] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(rows: Mapping[OpKey, OpRow]) -> Measured:
        """Sort rows into families."""
        families: dict[Family, list[tuple[OpKey, OpRow]]] = {}
        for key, row in rows.items():
            families.setdefault(_family(key), []).append((key, row))
        return Measured(families)

    def near(self, work: Work, sizes: tuple[float, ...], overhead: float) -> Near | None:
        """Seconds of `work` at local `sizes` from the rows of its family; None where it has none.

        `overhead` is the fixed seconds of a call of one kernel.
        """
        kept = self._known.get(id(work))
        if kept is None:
            points = self._points(work)
            kept = self._known[id(work)] = (work, points, _growth(points, work, overhead))
        _, points, growth = kept
        guess = _guess(points, work, sizes, overhead)
        return None if guess is None else Near(*guess.seconds, math.hypot(guess.spread, growth * guess.distance))

    def _points(self, work: Work) -> tuple[Point, ...]:
        found = []
        for key, row in self.families.get(_family(work.key(tuple(map(float, work.global_sizes)))), ()):
            sizes = sizes_of(work, key)
            if sizes is not None and row.forward > 0 and (row.backward > 0 or not work.differentiable):
                found.append(Point(sizes, work.amounts(sizes), (row.forward, row.backward), row.error))
        return tuple(found)


def sizes_of(work: Work, key: OpKey) -> tuple[float, ...] | None:
    """Local factor sizes at which `work` has the operand shapes of `key`; None where there are none, or no operand tells.

    Factors that only ever occur together in one dim are told apart by giving all but the first their whole size (one where
    that does not divide): nothing but their product counts.
    """
    dims = [
        (group, extent)
        for (groups, _, _), (shape, _, _) in zip(work.shapes, key.operands, strict=True)
        for group, extent in zip(groups, shape, strict=True)
    ]
    known: dict[int, int] = {}
    while True:
        open_dims = [(group, extent) for group, extent in dims if any(f not in known for f in group)]
        if not open_dims:
            break
        group, extent = min(open_dims, key=lambda dim: sum(f not in known for f in dim[0]))
        first, *others = [f for f in dict.fromkeys(group) if f not in known]
        left = extent // math.prod(known.get(f, 1) for f in group)
        for f in others:
            known[f] = work.global_sizes[f] if left % work.global_sizes[f] == 0 else 1
            left //= known[f]
        known[first] = left
    if len(known) < len(work.global_sizes) or min(known.values(), default=1) < 1:
        return None
    sizes = tuple(float(known[f]) for f in range(len(work.global_sizes)))
    return sizes if work.key(sizes).operands == key.operands else None


def _family(key: OpKey) -> Family:
    return key.target, key.arguments, tuple((len(shape), dtype, grad) for shape, dtype, grad in key.operands)


@dataclass(frozen=True, slots=True)
class _Guess:
    """Seconds at a shape, the spread of the rows they come from, and how far these are."""

    seconds: tuple[float, float]
    spread: float
    distance: float


def _guess(points: Sequence[Point], work: Work, sizes: tuple[float, ...], overhead: float) -> _Guess | None:
    amounts = work.amounts(sizes)
    below, above = _closest(points, sizes, amounts[0], -1), _closest(points, sizes, amounts[0], 1)
    one = below or above
    if one is None or amounts[0] <= 0:
        return None
    if below is None or above is None or below is above:
        fixed = (overhead, overhead * work.kernels)
        ahead, back = (_scaled(one, which, amounts, fixed[which]) for which in (0, 1))
        return _Guess((ahead, back), one.error, one.distance(sizes))
    low, high = below.distance(sizes), above.distance(sizes)
    share, reach = (low / (low + high), low * high / (low + high)) if low + high > 0 else (0.5, 0.0)
    reach += (
        low + high - below.distance(above.sizes)
    ) / 2  # how far the shape lies beside the way from one to the other
    ahead, back = (_between(below, above, share, which, amounts) for which in (0, 1))
    return _Guess((ahead, back), (1 - share) * below.error + share * above.error, reach)


def _closest(points: Sequence[Point], sizes: Sequence[float], amount: float, side: int) -> Point | None:
    """The nearest point that does no more (side -1) or no less (side 1) than `amount`; the first of several as near."""
    found = [p for p in points if p.amounts[0] > 0 and side * (p.amounts[0] - amount) >= -1e-9 * amount]
    return min(found, key=lambda p: (p.distance(sizes), p.sizes), default=None)


def _ratio(point: Point, which: int, amounts: tuple[float, float]) -> float:
    """How many times as much there is to do as at a point (as much where nothing counts what is done)."""
    was = point.amounts[which]
    return amounts[which] / was if was > 0 and amounts[which] > 0 else 1.0


def _scaled(point: Point, which: int, amounts: tuple[float, float], fixed: float) -> float:
    """A row's seconds at another amount: its fixed cost stays (a call that is all fixed cost leaves a tenth to its work)."""
    seconds = point.seconds[which]
    own = max(seconds - fixed, 0.1 * seconds)
    return seconds - own + own * _ratio(point, which, amounts)


def _between(below: Point, above: Point, share: float, which: int, amounts: tuple[float, float]) -> float:
    """Seconds between two rows, each scaled to the amount asked for, in log seconds."""
    low, high = (point.seconds[which] * _ratio(point, which, amounts) for point in (below, above))
    return math.exp((1 - share) * math.log(low) + share * math.log(high)) if low > 0 and high > 0 else max(low, high)


def _growth(points: Sequence[Point], work: Work, overhead: float) -> float:
    """Relative error per doubling: the median over rows of how far off they are when the others say what they cost."""
    if len(points) < LEAST_ROWS:
        return GROWTH
    found = []
    for i, left in enumerate(points):
        guess = _guess([*points[:i], *points[i + 1 :]], work, left.sizes, overhead)
        if guess is not None and guess.distance > 0:
            pairs = zip(guess.seconds, left.seconds, strict=True)
            off = max(abs(told - seen) / seen if seen > 0 else 0.0 for told, seen in pairs)
            found.append(off / guess.distance)
    return max(LEAST_GROWTH, statistics.median(found)) if found else GROWTH

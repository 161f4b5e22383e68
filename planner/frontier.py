"""The frontier: plans that no other plan found beats in seconds, memory and devices at once, and the best of other meshes.

On the cluster and on halves of it, the fastest plan is sought under memory limits that fall by equal factors from what the
fastest plan needs to what the leanest does. Every point is a plan of the joint search and has its gap; between the limits there
may be others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from ..errors import PinError
from .appraise import appraise
from .cluster import Cluster
from .costs import PriceBook
from .fewer import device_counts, priced_on, sized
from .goal import Point
from .joint import Found, Solved, search
from .objectives import least_peak, limited
from .outline import Outline
from .plan import Plan, ShapeRecord
from .progress import Event, silent
from .shapes import Arrangement
from .workbench import Workbench

if TYPE_CHECKING:
    from .solve import Request

LIMITS = 4
"""Memory limits below what the fastest plan needs, on the whole cluster; on parts of it half as many."""

HALVES = 3
"""How often the devices are halved."""

OTHERS = 4
"""Other meshes whose best plan is shown."""


@dataclass(frozen=True)
class _Bench:
    """A workbench of one number of devices, with its shapes, and the searches made of them (planner/joint.py)."""

    bench: Workbench
    shapes: Sequence[Arrangement]
    offered: Sequence[bool]


def frontier(
    outline: Outline, cluster: Cluster, prices: PriceBook, request: Request, plan: Plan
) -> tuple[Point, ...]:  # fmt: skip
    """Points by seconds: `plan` itself, the frontier and the runners-up."""
    points = [point_of(plan)]
    for part in _parts(cluster):
        request.progress(Event("frontier", f"{part.devices} devices"))
        points += _points(outline, part, priced_on(prices, part), request, whole=part.devices == cluster.devices)
    return ranked(points)


def ranked(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points by seconds without repetition; those another one is as good as in all three are runners-up, or left out.

    A runner-up stays where it is the best of its mesh and devices.
    """
    kept: list[Point] = []
    seen: set[tuple[float, int, int]] = set()
    for point in sorted(points, key=lambda p: (p.seconds, p.peak_bytes, p.devices, p.status, sorted(p.mesh.items()))):
        key = (point.seconds, point.peak_bytes, point.devices)
        if key not in seen:
            seen.add(key)
            kept.append(point)
    best = [p for p in kept if not any(_beats(q, p) for q in kept)]
    meshes = {(p.devices, *sorted(p.mesh.items())) for p in best}
    found = [msgspec.structs.replace(p, status="best") for p in best]
    for point in kept:
        mesh = (point.devices, *sorted(point.mesh.items()))
        if mesh not in meshes:
            meshes.add(mesh)
            found.append(msgspec.structs.replace(point, status="runner-up"))
    return tuple(sorted(found, key=lambda p: (p.seconds, p.peak_bytes, p.devices)))


def _beats(one: Point, other: Point) -> bool:
    mine, theirs = ((p.seconds, p.peak_bytes, p.devices) for p in (one, other))
    return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def point_of(plan: Plan) -> Point:
    """A plan as a point."""
    pipeline = plan.pipeline
    sizes = {"pp": pipeline.ranks, "ep": pipeline.experts, **{axis.name: axis.size for axis in plan.mesh}}
    mesh = {name: sizes[name] for name in ("pp", "dp", "ep", "cp", "tp") if sizes.get(name, 1) > 1} or {"dp": 1}
    devices = pipeline.ranks * math.prod(axis.size for axis in plan.mesh)
    return Point(
        plan.predicted.step_seconds, plan.predicted.peak_bytes_per_device, devices, mesh, "best", pipeline.schedule,
        pipeline.chunks, pipeline.microbatches, pipeline.micro_batch, plan.memory_limit_bytes, plan.search.gap,
    )  # fmt: skip


def _parts(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, and the largest candidates within a half, a quarter, ... of it."""
    counts = device_counts(cluster)
    wanted = dict.fromkeys(
        max(c for c in counts if c <= max(cluster.devices // 2**k, 1)) for k in range(HALVES + 1)
    )  # fmt: skip
    for devices in wanted:
        yield sized(cluster, devices)


def _points(
    outline: Outline, cluster: Cluster, prices: PriceBook, request: Request, *, whole: bool
) -> list[Point]:  # fmt: skip
    """The plans of one number of devices under falling limits."""
    from .solve import make_bench, tiers_of

    try:
        made = make_bench(outline, cluster, prices, replace(request, progress=silent), tiers=False)
        bench = _Bench(*made, tiers_of(cluster, request.pins))
        found = _search(bench, request.memory_limit_bytes)
    except PinError:
        return []
    if found is None or found.best is None:
        return []
    bench = replace(bench, bench=bench.bench.offering(bench.offered[-1]))
    first = _point(bench.bench, found, found.best, request.memory_limit_bytes)
    points = [first, *_less(bench, first, LIMITS if whole else LIMITS // 2)]
    return [*points, *_others(bench, found, request.memory_limit_bytes)] if whole else points


def _search(bench: _Bench, limit: int, shapes: Sequence[Arrangement] | None = None) -> Found | None:
    try:
        return search(limited(bench.bench, limit), bench.shapes if shapes is None else shapes, silent, bench.offered)[1]
    except PinError:
        if shapes is None:
            raise
        return None


def _less(bench: _Bench, first: Point, steps: int) -> Iterator[Point]:
    """The fastest plans under limits from just below a known peak down to the least."""
    most, least = first.peak_bytes, least_peak(bench.bench, bench.shapes)
    if least is None or least >= most:
        return
    for k in range(1, steps + 1):
        limit = min(math.ceil(most * (least / most) ** (k / steps)), most - 1)
        found = _search(bench, limit)
        if found is not None and found.best is not None:
            yield _point(bench.bench, found, found.best, limit)


def _others(bench: _Bench, found: Found, limit: int) -> Iterator[Point]:
    """The best plan of each of the next meshes, as far as the search solved them."""
    assert found.best is not None
    seen = [found.best.shape.mesh()]
    for record in found.records:
        if record.status != "solved" or record.mesh in seen or len(seen) > OTHERS:
            continue
        seen.append(record.mesh)
        again = _search(bench, limit, [s for s in bench.shapes if _is(s, record)])
        if again is not None and again.best is not None:
            yield msgspec.structs.replace(_point(bench.bench, again, again.best, limit), status="runner-up")


def _is(shape: Arrangement, record: ShapeRecord) -> bool:
    mine = (shape.mesh(), shape.schedule, shape.chunks, shape.microbatches, shape.micro_batch)
    return mine == (record.mesh, record.schedule, record.chunks, record.microbatches, record.micro_batch)


def _point(bench: Workbench, found: Found, best: Solved, limit: int) -> Point:
    shape, solution = best.shape, best.solution
    assert solution.stages is not None
    options = [solution.flat[k] for held in solution.stages for k in held.picks]
    cuts = [held.start for held in solution.stages] + [len(bench.chain)]
    figures = appraise(bench, shape, cuts, options)
    seconds = figures.step_seconds
    gap = max(0.0, (seconds - min(found.bound_seconds, seconds)) / seconds) if seconds else 0.0
    schedule = shape.schedule if shape.pp > 1 else "none"
    return Point(
        seconds, figures.peak_bytes, shape.devices, shape.mesh(), "best", schedule, shape.chunks, shape.microbatches,
        shape.micro_batch, limit, gap,
    )  # fmt: skip

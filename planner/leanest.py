"""The plan that needs the least memory per device, and what is proven of it.

    1  per mesh the smallest microbatch and the plainest schedule, every unit in its smallest option (planner/objectives.py)
    2  the joint search under the peak of that plan: the fastest plan that needs no more
    3  the same under a little less, and less again, while it finds anything

Host memory and disk are offered where the cluster has them, so the least is often with everything there; `offload=none` keeps it
on the device.

What is certified is a bound: no option of the space, however mixed and divided, needs less on its fullest device. It is proven
per mesh and size of microbatch from the options of the units alone, whatever the schedule: a rank holds at least one microbatch
of what its units save, the fullest rank at least the mean of all, and every unit runs somewhere. Meshes whose bound is above a
limit are not searched under it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from ..errors import PinError
from .cluster import Cluster
from .costs import PriceBook
from .goal import Goal
from .joint import JointSearch
from .objectives import least_memory, limited
from .options import Option
from .outline import Outline
from .plan import Plan
from .progress import Event
from .shapes import Arrangement
from .spell import plan_of
from .workbench import Workbench

if TYPE_CHECKING:
    from .solve import Request

STEP = 0.98
"""How much of what the least plan so far needs, beside what every rank has, the next search may use."""

ROUNDS = 6
"""Searches at most."""

MOST = 600
"""Meshes with a size of microbatch up to which a bound is proven: each needs the options of its units."""

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How the bound weighs the moment of the running schedule against that of the optimizer step."""

Key = tuple[int, ...]


def leanest(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Plan:
    """The plan of least peak memory that was found, with what is proven of it; raises Infeasible where it breaks the limit."""
    from .relax import explain_joint
    from .solve import make_bench

    best = least_memory(outline, cluster, prices, request)
    if best is None or best.predicted.peak_bytes_per_device > request.memory_limit_bytes:
        raise explain_joint(outline, cluster, prices, request)
    tiers = cluster.host is not None and request.pins.offload != "none"
    bench, shapes = make_bench(outline, cluster, prices, replace(request, memory_limit_bytes=2**62), tiers=tiers)
    lows = least_bytes(bench, shapes)
    if lows is None:
        return msgspec.structs.replace(best, goal=Goal())
    fixed = bench.task.setting.reserve + bench.given_bytes
    share = 1.0
    for _ in range(ROUNDS):
        peak = best.predicted.peak_bytes_per_device
        limit = math.ceil(fixed + share * (peak - fixed))
        found = _within(bench, [s for s in shapes if lows.get(_key(s), math.inf) <= limit], limit, request, outline)
        if found is not None and found.predicted.peak_bytes_per_device <= peak:
            best = found
        elif share < 1.0:
            break
        share = STEP
    least = min(math.floor(min(lows.values())), best.predicted.peak_bytes_per_device)
    return msgspec.structs.replace(
        best, goal=Goal(least_bytes=least), memory_limit_bytes=request.memory_limit_bytes
    )  # fmt: skip


def _within(
    bench: Workbench, shapes: Sequence[Arrangement], limit: int, request: Request, outline: Outline
) -> Plan | None:  # fmt: skip
    """The fastest plan of some shapes within a limit."""
    if not shapes:
        return None
    request.progress(Event("memory", f"within {limit} bytes"))
    try:
        found = JointSearch(limited(bench, limit), shapes, request.progress).run()
    except PinError:
        return None
    if found.best is None:
        return None
    return plan_of(bench, found, found.best, request, outline, limit)


def least_bytes(bench: Workbench, shapes: Sequence[Arrangement]) -> dict[Key, float] | None:
    """Per mesh and microbatches, bytes that no plan stays below on its fullest device; None where there are too many to look at.

    Those that cannot run are left out.
    """
    unlike = {_key(s): s for s in shapes}
    if len(unlike) > MOST:
        return None
    given = bench.given_bytes
    found = {
        key: low + bench.reserve(shape) + given
        for key, shape in unlike.items()
        if (low := _least(bench, shape)) is not None
    }
    return found or None


def _key(shape: Arrangement) -> Key:
    return shape.pp, shape.dp, shape.ep, shape.cp, shape.tp, shape.microbatches


def _least(bench: Workbench, shape: Arrangement) -> float | None:
    """The bound of one mesh and size of microbatch, without what every rank has; None where it cannot run."""
    try:
        options = [bench.options(r, shape) for r in range(len(bench.chain.parts))]
    except PinError:
        return None
    if not all(options):
        return None
    once, counted = bench.data(shape).once, Counter(bench.regions)

    def running(o: Option) -> float:
        return o.static + (0.0 if once else o.gradient) + o.saved

    def stepping(o: Option) -> float:
        return o.static + o.gradient + o.step

    used = [options[r] for r in counted]
    alone = max(min(max(running(o) + o.work, stepping(o)) for o in found) for found in used)
    work = min(o.work for found in used for o in found)
    shared = max(
        share * work + sum(
            times * min(share * running(o) + (1.0 - share) * stepping(o) for o in options[r])
            for r, times in counted.items()
        ) / shape.pp
        for share in SHARES
    )  # fmt: skip
    return max(alone, shared)

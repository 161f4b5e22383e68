"""Seconds of a collective: alpha-beta formulas per algorithm, the best algorithm by size, and measured rows where they exist.

With p ranks, a full tensor of T bytes, alpha seconds per hop and beta seconds per byte (techniques.md F6; NCCL's and
Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH", use the same forms):

    ring all-reduce       2 (p-1) alpha + 2 (p-1)/p T beta          tree all-reduce   2 ceil(log2 p) alpha + 2 T beta
    ring all-gather         (p-1) alpha +   (p-1)/p T beta          (reduce-scatter likewise)
    all-to-all              (p-1) alpha +   (p-1)/p (T/p) beta

T is always the FULL tensor of the group: what all-gather returns, what reduce-scatter takes, what all-reduce leaves on every
rank, and for all-to-all the p local tensors together. Summed over the group this is F7: (p-1) T for a gather, 2 (p-1) T for
an all-reduce, (p-1)/p T for an all-to-all. A ring over several levels is as fast as its slowest level and pays each level's
latency for the hops it makes there; an all-to-all fills all levels at once.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from .cluster import Cluster, Hop, Level, Route

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")

SEND = "send"
"""What rows of a message from one rank to another are filed under, with a group of 2."""

Rows = Sequence[tuple[float, float]]
"""Measured (full bytes, seconds), ascending in bytes."""
Table = Mapping[tuple[str, str, int], Rows]
"""Measured rows by (collective, level name, group size)."""


def collective_seconds(name: str, full_bytes: float, route: Route) -> float:
    """Seconds of one collective of a full tensor of `full_bytes` along `route`, by the fastest algorithm that exists for it."""
    if name not in COLLECTIVES:
        raise ValueError(f"no collective {name!r}; known: {', '.join(COLLECTIVES)}")
    if route.size == 1 or not route.hops:
        return 0.0
    launch = max(hop.level.launch_seconds for hop in route.hops)
    if name == "all_to_all":
        return launch + _all_to_all(full_bytes, route)
    if name == "all_reduce":
        return launch + min(2 * _ring(full_bytes, route), _tree(full_bytes, route))
    return launch + _ring(full_bytes, route)


def level_route(level: Level, size: int) -> Route:
    """The route of a group of `size` neighbours that crosses one level only."""
    return Route(size, (Hop(level, 1, size),) if size > 1 else ())


def wire_bytes(name: str, full_bytes: float, size: int) -> float:
    """Bytes one rank sends (F6): 2 (p-1)/p T, (p-1)/p T or (p-1)/p^2 T."""
    factor = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0 / size}[name]
    return factor * (size - 1) / size * full_bytes


def measured_seconds(table: Table, name: str, full_bytes: float, size: int, level: str) -> float | None:
    """Seconds from measured rows, linear between them in log bytes and log seconds; None where nothing was measured.

    Below the first row its seconds hold (latency); above the last one its bytes per second do.
    """
    rows = table.get((name, level, size))
    if not rows:
        return None
    return interpolate(rows, full_bytes)


def interpolate(rows: Rows, x: float) -> float:
    """y at `x` from ascending (x, y) rows: log-log linear inside, constant below, proportional above."""
    if x <= rows[0][0]:
        return rows[0][1]
    if x >= rows[-1][0]:
        return rows[-1][1] * x / rows[-1][0]
    above = bisect_left(rows, (x,))
    (x0, y0), (x1, y1) = rows[above - 1], rows[above]
    if x == x1:  # a measured size costs what was measured, to the last digit
        return y1
    share = math.log(x / x0) / math.log(x1 / x0)
    return float(y0 * (y1 / y0) ** share)


def cluster_seconds(cluster: Cluster, name: str, full_bytes: float, stride: int, size: int) -> float:
    """`collective_seconds` for the group of a mesh axis: `size` ranks `stride` apart."""
    return collective_seconds(name, full_bytes, cluster.route(stride, size))


def _ring(full_bytes: float, route: Route) -> float:
    """One pass round the ring: every rank sends (p-1)/p of the tensor."""
    slowest = min(hop.ring_bytes_per_second for hop in route.hops)
    # p-1 hops in all; size/below blocks are joined at this level or further out, size/within of them further out.
    latency = sum((route.size // h.below - route.size // h.within) * h.level.latency_seconds for h in route.hops)
    return latency + (route.size - 1) / route.size * full_bytes / slowest


def _tree(full_bytes: float, route: Route) -> float:
    """Reduce up a tree and broadcast down it: twice the depth in latency, twice the whole tensor over the slowest level."""
    slowest = min(hop.ring_bytes_per_second for hop in route.hops)
    latency = sum(2 * math.ceil(math.log2(h.within // h.below)) * h.level.latency_seconds for h in route.hops)
    return latency + 2 * full_bytes / slowest


def _all_to_all(full_bytes: float, route: Route) -> float:
    """Each rank sends 1/p of its local tensor to every other; the levels work side by side, the slowest one decides."""
    local = full_bytes / route.size
    seconds = max(local * (route.size - h.below) / route.size / h.pair_bytes_per_second for h in route.hops)
    return seconds + sum((h.within - h.below) * h.level.latency_seconds for h in route.hops)

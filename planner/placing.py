"""Which links the axes of a mesh land on: strides, levels crossed, sends between pipeline stages, and the orders worth trying.

A mesh is a row of axes, outermost first; ranks are numbered with the innermost axis fastest, so an axis stands `stride` = the
product of the sizes inside it apart. Tensor parallelism is innermost, then context and expert parallelism: they move the most
bytes per step. Pipeline and data parallelism take the outer places in either order (Megatron-LM puts the pipeline outermost).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ClusterError
from .cluster import Cluster, Level, Route
from .collectives import SEND, measured_seconds
from .costs import PriceBook
from .prices import DATASHEET_ERROR, FREE, MODELLED_ERROR, Price, Prices

INNER = ("ep", "cp", "tp")
"""Axes with a fixed place, outermost first."""

OUTER = (("pp", "dp"), ("dp", "pp"))
"""The orders of the others."""


@dataclass(frozen=True, slots=True)
class AxisPlace:
    """One axis of a mesh on a cluster: its groups are `size` ranks `stride` apart and cross `route`."""

    name: str
    size: int
    stride: int
    route: Route

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels crossed, innermost first; empty for an axis of one."""
        return tuple(hop.level.name for hop in self.route.hops)


def axis_strides(order: Sequence[str], sizes: Mapping[str, int]) -> dict[str, int]:
    """How far apart neighbours on each axis stand, for `order` outermost first; an axis without a size has one rank."""
    strides, inside = {}, 1
    for name in reversed(order):
        strides[name] = inside
        inside *= sizes.get(name, 1)
    return strides


def axis_levels(cluster: Cluster, order: Sequence[str], sizes: Mapping[str, int]) -> tuple[AxisPlace, ...]:
    """Where each axis lands, in `order` (outermost first).

    Raises ClusterError when the sizes do not make up the cluster, when one is left out, or when no level joins a group.
    """
    left_out = [name for name, size in sizes.items() if size > 1 and name not in order]
    if left_out:
        raise ClusterError(f"axis order {', '.join(order)} leaves out {', '.join(left_out)}")
    ranks = math.prod(sizes.get(name, 1) for name in order)
    if ranks != cluster.devices:
        told = " x ".join(f"{name} {sizes.get(name, 1)}" for name in order)
        raise ClusterError(f"mesh {told} is {ranks} ranks; {cluster.name} has {cluster.devices} devices")
    strides = axis_strides(order, sizes)
    return tuple(
        AxisPlace(name, sizes.get(name, 1), strides[name], cluster.route(strides[name], sizes.get(name, 1)))
        for name in order
    )


def axis_orders(cluster: Cluster, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """The axis orders worth trying, the pipeline outermost first; orders that land alike are given once.

    On a cluster of unlike pools only the pipeline may be outermost: every stage then lies in one pool.
    """
    found: dict[tuple[object, ...], tuple[str, ...]] = {}
    for outer in OUTER[:1] if cluster.pools else OUTER:
        order = (*outer, *INNER)
        places = axis_levels(cluster, order, sizes)
        alike = tuple(sorted(_landing(cluster, place) for place in places if place.size > 1))
        found.setdefault(alike, order)
    return tuple(found.values())


def send_level(cluster: Cluster, stride: int, start: int | None = None, *, size: int | None = None) -> Level:
    """The slowest level any rank of a stage crosses to the rank `stride` further, for the stage from rank `start` on.

    Without `start` it is the slowest over all stages that send, where `size` stages of `stride` ranks make one pipeline (all
    ranks of the cluster when not said).
    """
    depth = size if size is not None else cluster.devices // max(stride, 1)
    if stride < 1 or depth < 2 or stride * depth > cluster.devices:
        raise ClusterError(f"{depth} stages of {stride} ranks make no pipeline on {cluster.devices} devices")
    if start is not None:
        return cluster.levels[_crossed(cluster, start, stride, stride)]
    pipelines = range(0, cluster.devices - stride * depth + 1, stride * depth)
    starts = (first + stage * stride for first in pipelines for stage in range(depth - 1))
    return _slowest(cluster, {_crossed(cluster, first, stride, stride) for first in starts})


def send_seconds(
    cluster: Cluster, send_bytes: float, stride: int, start: int | None = None, *, size: int | None = None
) -> float:
    """Seconds for every rank of a pipeline stage to send `send_bytes` to the rank `stride` further, all at once.

    A level's bandwidth is a rank's share with all ranks sending, so nothing is divided further. `start` and `size` as in
    `send_level`.
    """
    if send_bytes <= 0:
        return 0.0
    return _seconds(send_level(cluster, stride, start, size=size), send_bytes)


def send_price(prices: PriceBook, cluster: Cluster, send_bytes: float, stride: int, size: int) -> Price:
    """`send_seconds` with its source: measured where `prices` has rows of messages over the link."""
    rows = prices.collectives if isinstance(prices, Prices) else {}
    level = send_level(cluster, stride, size=size)
    known = measured_seconds(rows, SEND, send_bytes, 2, level.name)
    if send_bytes <= 0:
        return FREE
    if known is not None:
        return Price(known, "measured", MODELLED_ERROR)
    return Price(_seconds(level, send_bytes), "datasheet", DATASHEET_ERROR)


def wrap_seconds(cluster: Cluster, send_bytes: float, stride: int, size: int) -> float:
    """Seconds of the send from the last of `size` stages back to the first (interleaved schedules), slowest pipeline."""
    if send_bytes <= 0 or size < 2:
        return 0.0
    firsts = range(0, cluster.devices - stride * size + 1, stride * size)
    crossed = {_crossed(cluster, first, stride * (size - 1), stride) for first in firsts}
    return _seconds(_slowest(cluster, crossed), send_bytes)


def join_seconds(cluster: Cluster, send_bytes: float) -> float:
    """Seconds of a send between stages in different pools (or across the outermost level of equal devices)."""
    return _seconds(cluster.levels[-1], send_bytes) if send_bytes > 0 else 0.0


_TYPICAL_BYTES = 1e6
"""Levels are ranked by the time of a message this long."""


def _seconds(level: Level, send_bytes: float) -> float:
    rate = level.bytes_per_second * level.efficiency
    return level.launch_seconds + level.latency_seconds + send_bytes / rate


def _slowest(cluster: Cluster, indices: set[int]) -> Level:
    return max((cluster.levels[i] for i in sorted(indices)), key=lambda level: _seconds(level, _TYPICAL_BYTES))


def _crossed(cluster: Cluster, first: int, distance: int, width: int) -> int:
    """Index of the outermost level that separates any of `width` ranks from `first` on from the one `distance` further."""
    last = len(cluster.levels) - 1
    for index, level in enumerate(cluster.levels[:last]):
        # They all stay inside exactly when the first sender and the last receiver share a block.
        if first // level.ranks == (first + width - 1 + distance) // level.ranks:
            return index
    return last


def _landing(cluster: Cluster, place: AxisPlace) -> tuple[object, ...]:
    """What an axis pays for where it stands: the links of its collectives, or of its sends for the pipeline."""
    hops = tuple((hop.level.name, hop.level.ranks, hop.below, hop.within) for hop in place.route.hops)
    if place.name == "pp":
        return (place.name, place.size, send_level(cluster, place.stride, size=place.size).name)
    return (place.name, place.size, hops)

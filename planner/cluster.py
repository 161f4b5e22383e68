"""Machines: a device, how many of it there are, and the levels of links that join them.

Ranks are numbered so that neighbours are close: a level of span `ranks` joins blocks of that many consecutive ranks. A group
of a mesh axis is `size` ranks that stand `stride` apart. What it crosses on its way is its `Route`: one `Hop` per level, with
the group's members below that level and within one block of it. All groups of one axis run at once, so a link that several
of them cross is divided: `Level.bytes_per_second` is one rank's share of it while every rank sends.

A cluster of unlike devices is a row of `Pool`s of consecutive ranks, each with levels of its own, joined by the outermost
level. `Cluster.sub` gives one pool as a cluster of equal devices, which is what everything below a pipeline stage sees.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import ClusterError

MEASURED = "measured"
"""A source that starts with this word belongs to a figure that was timed on the machine itself."""


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or one CPU process), as its data sheet or a measurement describes it.

    `peak_flops` are dense FLOP/s by compute dtype; `efficiencies` the achieved fractions by kind of op ("matmul",
    "attention", "elementwise", ... and "default"), of `peak_flops` for the first two and "conv", else of memory bandwidth.
    `kernel_overhead_seconds` is added to every kernel; no kernel takes less than `issue_seconds`, what the host needs to start
    one. `compute_units` (0: not modelled) and `contraction_half` describe how small matmuls fall short (planner/prices.py).
    `context_bytes` is what the driver and the libraries' kernels take, `communicator_bytes` the buffers of one communicator of the
    communication library. `reserve_fraction` of the memory is left to the caching allocator, which keeps more than tensors use.
    `sources` says where each figure comes from.
    `overlap_fraction` of a collective's seconds may hide under compute that does not wait for it; while both run, both take
    `overlap_slowdown` times as long. `calibration` is what every figure in seconds was multiplied by (profiles/calibrate.py).
    Nine of ten measured steps lie between `accuracy_low` and `accuracy_high` times what is predicted (planner/interval.py).
    """

    name: str
    memory_bytes: int
    peak_flops: Mapping[str, float]
    memory_bytes_per_second: float
    kernel_overhead_seconds: float
    efficiencies: Mapping[str, float] = field(default_factory=dict)
    compute_units: int = 0
    contraction_half: float = 0.0
    issue_seconds: float = 0.0
    context_bytes: int = 0
    communicator_bytes: int = 0
    reserve_fraction: float = 0.08
    kind: str = "gpu"
    sources: Mapping[str, str] = field(default_factory=dict)
    overlap_fraction: float = 0.0
    overlap_slowdown: float = 1.0
    calibration: float = 1.0
    accuracy_low: float = 0.65
    accuracy_high: float = 1.6

    def peak(self, dtype: str) -> float:
        """Dense peak FLOP/s for `dtype`; raises ClusterError naming the dtypes the device has."""
        if dtype not in self.peak_flops:
            raise ClusterError(
                f"device {self.name} has no {dtype} arithmetic figure; it has {', '.join(self.peak_flops)}; pin one of those dtypes"
            )
        return self.peak_flops[dtype]

    def efficiency(self, kind: str) -> float:
        """Achieved fraction for a kind of op, the default one where the kind has none."""
        return self.efficiencies.get(kind, self.efficiencies.get("default", 0.8))

    def source(self, datum: str) -> str:
        """Where a figure comes from; "" when nothing is noted."""
        return self.sources.get(datum, self.sources.get(datum.partition(".")[0], ""))


@dataclass(frozen=True, slots=True)
class Host:
    """The tiers behind the devices of one node: host memory and disk. What is not said to be a rank's is the node's.

    `ranks` devices share the node. `copy_bytes_per_second` between host and device is one direction of one rank's share while
    all ranks copy, `duplex_fraction` what is left of it while the other direction is busy too, `copy_latency_seconds` the fixed
    cost of one copy. `host_update_seconds_per_element` is one rank's Adam step on its share of the cores, all ranks at it.
    `disk_bytes` is 0 without a disk; `cost_per_hour` is in US dollars, None where no list price is known.
    """

    ranks: int
    host_bytes: int
    copy_bytes_per_second: float
    host_memory_bytes_per_second: float
    host_update_seconds_per_element: float
    copy_latency_seconds: float = 0.0
    duplex_fraction: float = 1.0
    disk_bytes: int = 0
    disk_read_bytes_per_second: float = 0.0
    disk_write_bytes_per_second: float = 0.0
    cost_per_hour: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def rank_host_bytes(self) -> int:
        """Host memory of one rank."""
        return self.host_bytes // self.ranks

    @property
    def rank_disk_bytes(self) -> int:
        """Disk of one rank."""
        return self.disk_bytes // self.ranks

    @property
    def rank_disk_read_bytes_per_second(self) -> float:
        """What one rank reads from disk while all ranks of the node do."""
        return self.disk_read_bytes_per_second / self.ranks

    @property
    def rank_disk_write_bytes_per_second(self) -> float:
        """What one rank writes to disk while all ranks of the node do."""
        return self.disk_write_bytes_per_second / self.ranks

    @property
    def rank_host_memory_bytes_per_second(self) -> float:
        """One rank's share of the host's memory bandwidth."""
        return self.host_memory_bytes_per_second / self.ranks

    @property
    def rank_cost_per_hour(self) -> float | None:
        """US dollars an hour for one rank's share of the node."""
        return None if self.cost_per_hour is None else self.cost_per_hour / self.ranks

    def scaled(self, ranks: int) -> Host:
        """A node of `ranks` such devices: a slice (or a multiple) of this one, every rank's share unchanged."""
        part = ranks / self.ranks
        return replace(
            self,
            ranks=ranks,
            host_bytes=int(self.host_bytes * part),
            host_memory_bytes_per_second=self.host_memory_bytes_per_second * part,
            disk_bytes=int(self.disk_bytes * part),
            disk_read_bytes_per_second=self.disk_read_bytes_per_second * part,
            disk_write_bytes_per_second=self.disk_write_bytes_per_second * part,
            cost_per_hour=None if self.cost_per_hour is None else self.cost_per_hour * part,
        )

    def source(self, datum: str) -> str:
        """Where a figure comes from; "" when nothing is noted."""
        return self.sources.get(datum, "")


@dataclass(frozen=True, slots=True)
class Level:
    """Links that join blocks of `ranks` consecutive ranks.

    `bytes_per_second` is one direction of one rank's share when all ranks of a block send at once; `efficiency` the fraction
    of it that collectives reach; `latency_seconds` one hop; `launch_seconds` the fixed cost of one collective over it.
    """

    name: str
    ranks: int
    bytes_per_second: float
    latency_seconds: float
    efficiency: float = 1.0
    launch_seconds: float = 0.0
    source: str = ""


@dataclass(frozen=True, slots=True)
class Hop:
    """One level a group crosses: its members inside one block of the level below, and inside one block of this level."""

    level: Level
    below: int
    within: int

    @property
    def ring_bytes_per_second(self) -> float:
        """What a ring through this level carries: the members below share their links, the other groups take the rest."""
        return self.level.bytes_per_second * self.level.efficiency * self.below

    @property
    def pair_bytes_per_second(self) -> float:
        """What one member alone may send across this level while all others do the same."""
        return self.level.bytes_per_second * self.level.efficiency


@dataclass(frozen=True, slots=True)
class Route:
    """The levels a group of `size` ranks crosses, innermost first; empty for a group of one."""

    size: int
    hops: tuple[Hop, ...]

    @property
    def level(self) -> Level | None:
        """The outermost level crossed."""
        return self.hops[-1].level if self.hops else None


@dataclass(frozen=True, slots=True)
class Pool:
    """Equal devices inside a cluster: consecutive ranks with nodes, links and tiers of their own."""

    device: Device
    devices: int
    per_node: int
    levels: tuple[Level, ...]
    host: Host | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Cluster:
    """`devices` equal devices, `per_node` to a node, joined by `levels` (innermost first). `spec` is the string it came from.

    `limit_bytes` is a memory limit per device that replaces the default one. `host` are the tiers behind each node, None where
    nothing can be offloaded. With `pools`, `devices` is the sum over them, `device`, `per_node` and `host` are the first pool's,
    and `levels` are the slowest of all, with the level that joins the pools outermost: `join_pools` makes such a cluster.
    """

    name: str
    device: Device
    devices: int
    per_node: int
    levels: tuple[Level, ...]
    spec: str = ""
    limit_bytes: int | None = None
    host: Host | None = None
    pools: tuple[Pool, ...] = ()

    def pool_list(self) -> tuple[Pool, ...]:
        """The pools in rank order; the whole cluster as one pool when its devices are equal."""
        whole = Pool(self.device, self.devices, self.per_node, self.levels, self.host, self.name)
        return self.pools or (whole,)

    def sub(self, pool: Pool) -> Cluster:
        """One pool as a cluster of equal devices."""
        return Cluster(
            pool.name, pool.device, pool.devices, pool.per_node, pool.levels, pool.name, self.limit_bytes, pool.host
        )

    @property
    def cost_per_hour(self) -> float | None:
        """US dollars an hour for all devices; None where a pool has no list price."""
        costs = [(p.host.rank_cost_per_hour if p.host is not None else None, p.devices) for p in self.pool_list()]
        known = [cost * devices for cost, devices in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None

    def level_of(self, stride: int, size: int) -> Level:
        """The outermost level that a group of `size` ranks `stride` apart crosses (the innermost one for a group of one)."""
        level = self.route(stride, size).level
        return level if level is not None else self.levels[0]

    def route(self, stride: int, size: int) -> Route:
        """Every level that a group of `size` ranks `stride` apart crosses."""
        if stride < 1 or size < 1 or stride * size > self.devices:
            raise ClusterError(f"{size} ranks {stride} apart do not fit on {self.devices} devices of {self.name}")
        hops, below = [], 1
        for level in self.levels:
            within = _members(stride, size, level.ranks, below)
            if within > below:
                hops.append(Hop(level, below, within))
            below = within
        if below < size:
            raise ClusterError(f"cluster {self.name}: no level of links joins all {self.devices} devices")
        return Route(size, tuple(hops))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a plan file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cluster:
        """The inverse of `to_dict`; raises ClusterError naming what is missing or unknown."""
        try:
            parts = dict(data)
            parts["device"] = Device(**parts["device"])
            parts["levels"] = tuple(Level(**level) for level in parts["levels"])
            parts["host"] = _host(parts.get("host"))
            parts["pools"] = tuple(_pool(pool) for pool in parts.get("pools", ()))
            return cls(**parts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ClusterError(f"cluster description: {str(error).replace('__init__() ', '')}") from None

    def fingerprint(self) -> str:
        """16 hex digits over all that was described, without figures timed on the spot (they differ from run to run)."""
        text = json.dumps(_described(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def default_limit_bytes(cluster: Cluster) -> int:
    """The memory a plan may use per device: the limit given, else the device's memory less what its allocator loses."""
    if cluster.limit_bytes is not None:
        return cluster.limit_bytes
    devices = [pool.device for pool in cluster.pool_list()]
    return min(int(device.memory_bytes * (1.0 - device.reserve_fraction)) for device in devices)


def has_host(cluster: Cluster) -> bool:
    """Whether anything lies behind the devices of some pool."""
    return any(pool.host is not None for pool in cluster.pool_list())


def unlike(cluster: Cluster) -> bool:
    """Whether a cluster has several pools."""
    return len(cluster.pools) > 1


def pool_names(cluster: Cluster) -> tuple[str, ...]:
    """The name of every pool, each once: "h100-sxm:8x2", and "h100-sxm:8x2 (2)" for a second one."""
    found: list[str] = []
    for pool in cluster.pool_list():
        name = base = pool.name or pool.device.name
        k = 1
        while name in found:
            k += 1
            name = f"{base} ({k})"
        found.append(name)
    return tuple(found)


def join_pools(name: str, pools: Sequence[Pool], outer: Level, spec: str = "") -> Cluster:
    """One cluster of several pools in rank order, joined by `outer` (its span is set to all ranks).

    Its own `levels` serve groups that span pools: the slowest innermost links as far as they reach in every pool, then `outer`.
    """
    if not pools:
        raise ClusterError(f"cluster {name}: expected at least one pool of devices")
    devices = sum(pool.devices for pool in pools)
    inner = [pool.levels[0] for pool in pools]
    slowest = min(inner, key=lambda level: level.bytes_per_second * level.efficiency)
    reach = math.gcd(*(level.ranks for level in inner))
    levels: tuple[Level, ...] = (replace(outer, ranks=devices),)
    if 1 < reach < devices:
        levels = (replace(slowest, ranks=reach), *levels)
    first = pools[0]
    return Cluster(name, first.device, devices, first.per_node, levels, spec, host=first.host, pools=tuple(pools))


def _members(stride: int, size: int, ranks: int, below: int) -> int:
    """How many members of an aligned group share one block of `ranks`: a group that straddles blocks counts its whole parts."""
    for members in range(size, below, -1):
        if size % members == 0 and members % below == 0 and ranks % (stride * members) == 0:
            return members
    return below


def _host(data: Mapping[str, Any] | None) -> Host | None:
    return Host(**data) if data is not None else None


def _pool(data: Mapping[str, Any]) -> Pool:
    parts = dict(data)
    parts["device"] = Device(**parts["device"])
    parts["levels"] = tuple(Level(**level) for level in parts["levels"])
    parts["host"] = _host(parts.get("host"))
    return Pool(**parts)


def _described(cluster: Cluster) -> dict[str, Any]:
    parts = {
        "device": _device_figures(cluster.device),
        "devices": cluster.devices,
        "per_node": cluster.per_node,
        "levels": _level_figures(cluster.levels),
    }
    if cluster.host is not None:
        parts["host"] = _host_figures(cluster.host)
    if cluster.pools:
        parts["pools"] = [_described(cluster.sub(pool)) for pool in cluster.pools]
    return parts


def _device_figures(device: Device) -> dict[str, Any]:
    figures = {
        k: v
        for k, v in asdict(device).items()
        if k not in ("sources", "efficiencies", "calibration", "accuracy_low", "accuracy_high")
    }
    return {k: v for k, v in figures.items() if not device.source(k).startswith(MEASURED)}


def _host_figures(host: Host) -> dict[str, Any]:
    figures = {k: v for k, v in asdict(host).items() if k != "sources"}
    return {k: v for k, v in figures.items() if not host.source(k).startswith(MEASURED)}


def _level_figures(levels: Sequence[Level]) -> list[dict[str, Any]]:
    figures = []
    for level in levels:
        one = asdict(level)
        if level.source.startswith(MEASURED):
            one = {"name": level.name, "ranks": level.ranks}
        figures.append({k: v for k, v in one.items() if k != "source"})
    return figures

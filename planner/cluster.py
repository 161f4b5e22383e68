"""Machines: a device, how many of it there are, and the levels of links that join them.

Ranks are numbered so that neighbours are close: a level of span `ranks` joins blocks of that many consecutive ranks. A group
of a mesh axis is `size` ranks that stand `stride` apart. What it crosses on its way is its `Route`: one `Hop` per level, with
the group's members below that level and within one block of it. All groups of one axis run at once, so a link that several
of them cross is divided: `Level.bytes_per_second` is one rank's share of it while every rank sends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
    `context_bytes` is what the driver and the communication library take. `sources` says where each figure comes from.
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
    reserve_fraction: float = 0.08
    kind: str = "gpu"
    sources: Mapping[str, str] = field(default_factory=dict)

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
class Cluster:
    """`devices` equal devices, `per_node` to a node, joined by `levels` (innermost first). `spec` is the string it came from.

    `limit_bytes` is a memory limit per device that replaces the default one.
    """

    name: str
    device: Device
    devices: int
    per_node: int
    levels: tuple[Level, ...]
    spec: str = ""
    limit_bytes: int | None = None

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
            return cls(**parts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ClusterError(f"cluster description: {str(error).replace('__init__() ', '')}") from None

    def fingerprint(self) -> str:
        """16 hex digits over all that was described, without figures timed on the spot (they differ from run to run)."""
        text = json.dumps(_described(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def default_limit_bytes(cluster: Cluster) -> int:
    """The memory a plan may use per device: the limit given, else the device's memory less its reserve (8 %)."""
    if cluster.limit_bytes is not None:
        return cluster.limit_bytes
    return int(cluster.device.memory_bytes * (1.0 - cluster.device.reserve_fraction))


def _members(stride: int, size: int, ranks: int, below: int) -> int:
    """How many members of an aligned group share one block of `ranks`: a group that straddles blocks counts its whole parts."""
    for members in range(size, below, -1):
        if size % members == 0 and members % below == 0 and ranks % (stride * members) == 0:
            return members
    return below


def _described(cluster: Cluster) -> dict[str, Any]:
    device = cluster.device
    figures = {k: v for k, v in asdict(device).items() if k not in ("sources", "efficiencies")}
    kept = {k: v for k, v in figures.items() if not device.source(k).startswith(MEASURED)}
    levels = []
    for level in cluster.levels:
        one = asdict(level)
        if level.source.startswith(MEASURED):
            one = {"name": level.name, "ranks": level.ranks}
        levels.append({k: v for k, v in one.items() if k != "source"})
    return {"device": kept, "devices": cluster.devices, "per_node": cluster.per_node, "levels": levels}

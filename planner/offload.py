"""What it costs to keep part of the training state behind the device, in host memory or on disk: seconds and bytes.

Rates are those of a `Host`: one rank's share while all ranks of the node do the same.
The optimizer step over such states is in planner/hostupdate.py.

Parameters: every rank fetches its part of a tensor over its own link and the parts are gathered between devices, so d ranks
reach d times the bandwidth of one link (ZeRO-Infinity, techniques.md F5).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ClusterError
from .cluster import Cluster, Host, default_limit_bytes
from .precision import StateBytes

TIERS = ("device", "host", "disk")

HOST_MEMORY_FRACTION = 0.75
"""Share of the host's memory bandwidth that copies of all ranks reach together (assumed: streaming over all channels)."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """Bytes on the device, in host memory and on disk, of one rank."""

    device: float = 0.0
    host: float = 0.0
    disk: float = 0.0

    def __add__(self, other: Tiers) -> Tiers:
        return Tiers(self.device + other.device, self.host + other.host, self.disk + other.disk)


@dataclass(frozen=True, slots=True)
class Split:
    """Which share of something lies in host memory and which on disk; the rest stays on the device."""

    host: float = 0.0
    disk: float = 0.0

    def __post_init__(self) -> None:
        if self.host < 0 or self.disk < 0 or self.host + self.disk > 1 + 1e-9:
            raise ValueError(f"shares of {self.host} and {self.disk} are no split")

    def spread(self, size: float) -> Tiers:
        """`size` bytes over the tiers."""
        return Tiers(size * (1.0 - self.host - self.disk), size * self.host, size * self.disk)


ON_DEVICE = Split()
ON_HOST = Split(host=1.0)
ON_DISK = Split(disk=1.0)


@dataclass(frozen=True, slots=True)
class Offload:
    """Where the classes of training state lie."""

    optimizer: Split = ON_DEVICE
    gradients: Split = ON_DEVICE
    parameters: Split = ON_DEVICE
    activations: Split = ON_DEVICE


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes one rank copies onto and off the device and reads from and writes to disk, in so many copies."""

    in_bytes: float = 0.0
    out_bytes: float = 0.0
    read_bytes: float = 0.0
    write_bytes: float = 0.0
    copies: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.in_bytes + other.in_bytes,
            self.out_bytes + other.out_bytes,
            self.read_bytes + other.read_bytes,
            self.write_bytes + other.write_bytes,
            self.copies + other.copies,
        )


@dataclass(frozen=True, slots=True)
class LaneSeconds:
    """How long each queue is busy with some traffic."""

    copy_in: float
    copy_out: float
    read: float
    write: float

    @property
    def window(self) -> float:
        """The compute that hides all of it: the lanes work side by side, the slowest one decides."""
        return max(self.copy_in, self.copy_out, self.read, self.write)


def host_of(cluster: Cluster) -> Host:
    """The tiers behind each node; raises ClusterError where there are none."""
    if cluster.host is None:
        raise ClusterError(f"cluster {cluster.name}: no host memory to offload to; describe it in a [host] table")
    return cluster.host


def duplex_bytes_per_second(host: Host) -> float:
    """One rank's copies in each direction while all ranks copy both ways: their links' share or that of host memory."""
    memory = host.rank_host_memory_bytes_per_second * HOST_MEMORY_FRACTION / 2
    return min(host.copy_bytes_per_second * host.duplex_fraction, memory)


def offloaded_state_bytes(state: StateBytes) -> int:
    """Bytes per element that leave the device with the optimizer states: the moments and what they update.

    That is the master copy, or the stored parameter where a recipe has no master copy.
    """
    return state.moments + (state.master or state.parameter)


def resident_parameter_bytes(state: StateBytes) -> int:
    """Bytes per element of the parameters that a device computes with while its optimizer states are offloaded."""
    return state.parameter if state.master else state.copy or state.parameter


def lane_seconds(host: Host, traffic: Traffic) -> LaneSeconds:
    """How long each of a rank's queues is busy; copies both ways at once share the link (`duplex_fraction`)."""
    rate = host.copy_bytes_per_second
    if traffic.in_bytes and traffic.out_bytes:
        rate = duplex_bytes_per_second(host)
    if traffic.read_bytes or traffic.write_bytes:
        need_disk(host)
    start = host.copy_latency_seconds * traffic.copies
    return LaneSeconds(
        copy_in=traffic.in_bytes / rate + start * bool(traffic.in_bytes),
        copy_out=traffic.out_bytes / rate + start * bool(traffic.out_bytes),
        read=traffic.read_bytes / host.rank_disk_read_bytes_per_second if traffic.read_bytes else 0.0,
        write=traffic.write_bytes / host.rank_disk_write_bytes_per_second if traffic.write_bytes else 0.0,
    )


def fetch_seconds(host: Host, full_bytes: float, shards: int, tier: str = "host", *, partitioned: bool = True) -> float:
    """Seconds until a tensor kept on `tier` has reached the devices of its `shards` ranks, gathering between them not counted.

    `partitioned`: every rank brings 1/shards of it; else its owner brings all of it. Disk and link work as a pipeline.
    """
    local = full_bytes / shards if partitioned else full_bytes
    read = local if tier == "disk" else 0.0
    return lane_seconds(host, Traffic(in_bytes=local, read_bytes=read, copies=1)).window


def parameter_traffic(elements: float, state: StateBytes, where: Split, shards: int = 1) -> tuple[Traffic, Traffic]:
    """(forward, backward) of one microbatch for parameters that lie on `where`: fetched, used, dropped and fetched again.

    `elements` are whole tensors of this rank's slice of the model, fetched in `shards` parts. Gradients: `gradient_traffic`.
    """
    away = where.spread(elements * (state.copy or state.parameter) / shards)
    fetch = Traffic(in_bytes=away.host + away.disk, read_bytes=away.disk, copies=1 if away.host + away.disk else 0)
    return fetch, fetch


def gradient_traffic(elements: float, state: StateBytes, where: Split) -> Traffic:
    """Gradients of so many local elements leaving the device once."""
    away = where.spread(elements * state.gradient)
    return Traffic(out_bytes=away.host + away.disk, write_bytes=away.disk, copies=1 if away.host + away.disk else 0)


def activation_traffic(size: float, where: Split, copies: int = 1) -> tuple[Traffic, Traffic]:
    """(forward, backward) of saved tensors of `size` bytes that wait on `where` for their backward pass."""
    away = where.spread(size)
    left = away.host + away.disk
    count = copies if left else 0
    out = Traffic(out_bytes=left, write_bytes=away.disk, copies=count)
    back = Traffic(in_bytes=left, read_bytes=away.disk, copies=count)
    return out, back


def held_bytes(elements: float, state: StateBytes, offload: Offload, *, zero: int, shards: int) -> Tiers:
    """Bytes of model states that one rank keeps of `elements` parameters under ZeRO `zero` over `shards` ranks (F4).

    ZeRO 1 divides optimizer states, 2 gradients as well, 3 everything. Offloaded optimizer states take the tensor they update
    with them and leave the device the parameters it computes with.
    """
    part = [1.0 if zero < stage else 1.0 / shards for stage in (1, 2, 3)]
    gone = offload.optimizer.host + offload.optimizer.disk
    plain, resident = state.parameter, resident_parameter_bytes(state)
    parameters = offload.parameters.spread(elements * part[2] * (plain + gone * (resident - plain)))
    gradients = offload.gradients.spread(elements * part[1] * state.gradient)
    kept = elements * part[0] * (1.0 - gone) * (state.master + state.moments)
    moved = elements * part[0] * offloaded_state_bytes(state)
    optimizer = Tiers(kept, moved * offload.optimizer.host, moved * offload.optimizer.disk)
    return parameters + gradients + optimizer


def capacity(cluster: Cluster) -> Tiers:
    """What one rank may fill: the device up to its limit, and its share of the host's memory and disk."""
    host = cluster.host
    if host is None:
        return Tiers(default_limit_bytes(cluster))
    return Tiers(default_limit_bytes(cluster), host.rank_host_bytes, host.rank_disk_bytes)


def largest_model(limits: Tiers, state: StateBytes, offload: Offload, *, zero: int, shards: int) -> float:
    """The most parameters whose model states fit `limits` on every rank; activations are the caller's to take off first."""
    one = held_bytes(1.0, state, offload, zero=zero, shards=shards)
    pairs = [(limits.device, one.device), (limits.host, one.host), (limits.disk, one.disk)]
    return min(limit / each for limit, each in pairs if each > 0)


def efficiency(flops_per_byte: float, bytes_per_second: float, peak: float) -> float:
    """Share of `peak` FLOP/s reached when data of this arithmetic intensity arrive unhidden (ZeRO-Infinity eq. 6, F5)."""
    rate = flops_per_byte * bytes_per_second
    return rate / (rate + peak)


def need_disk(host: Host) -> None:
    """Raises ClusterError where the node has no disk."""
    if not host.disk_bytes:
        raise ClusterError("no disk to offload to; describe it as disk_bytes in a [host] table")


def spare_host_bytes(cluster: Cluster) -> int:
    """Bytes of host memory that a rank may use; 0 without a host. CPU ranks have their own memory out of it."""
    if cluster.host is None:
        return 0
    mine = default_limit_bytes(cluster) if cluster.device.kind == "cpu" else 0
    return max(0, cluster.host.rank_host_bytes - mine)

"""The optimizer step over states kept behind the device: on the CPU, on the GPU, or interleaved between them.

A step over S local elements goes subgroup by subgroup through six lanes: disk read, CPU, copy in, GPU, copy out, disk write.
With stride k every k-th subgroup is updated on the GPU, its states copied in and out; the others are updated on the CPU and
only their new parameters are copied in (Deep Optimizer States, techniques.md F11; k = 1 is all on the GPU, k = inf
ZeRO-Offload's all on the CPU). The lanes are in balance at

    k* = 1 + (in + gpu) / (cpu - return)       seconds per element of states in, GPU update, CPU update, parameters in

and what really happens around it, filling and draining included, is simulated.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from itertools import pairwise

from .offload import (
    TIERS,
    duplex_bytes_per_second,
    host_of,
    need_disk,
    offloaded_state_bytes,
    resident_parameter_bytes,
)
from .plan import Precision
from .precision import StateBytes, state_bytes
from .prices import Prices

ALL_CPU = math.inf
"""The stride at which no subgroup is updated on the GPU."""

SUBGROUP_ELEMENTS = 100_000_000
"""Elements updated at a time (the subgroup size of the published Deep Optimizer States runs)."""

MOST_SUBGROUPS = 64
"""A longer row of subgroups is simulated as so many larger ones: its filling and draining are then under 2 % of it."""

SLOTS = 2
"""Subgroups whose states the device holds at once: one is updated while the next one is copied in."""

HOST_UPDATE_BYTES = 30
"""Bytes per element moved by the Adam step behind `Host.host_update_seconds_per_element`: three fp32 states read and written,
an fp32 gradient read, a 16-bit parameter written."""


@dataclass(frozen=True, slots=True)
class UpdateRates:
    """Seconds per local element of an optimizer step, by lane: F11's 1/U_c + 1/D_c, 1/U_g, 3/B, 3/B and 1/2B.

    `read` and `write` are those of the states' disk, 0 when they lie in host memory. `latency_seconds` is added to every copy.
    """

    cpu: float
    gpu: float
    copy_in: float
    copy_out: float
    parameters_in: float
    read: float = 0.0
    write: float = 0.0
    latency_seconds: float = 0.0


def update_rates(prices: Prices, precision: Precision, optimizer: str, tier: str = "host") -> UpdateRates:
    """The rates of one rank's step when its optimizer states lie on `tier` ("host" or "disk")."""
    if tier not in TIERS[1:]:
        raise ValueError(f"no tier {tier!r} behind the device; expected one of {', '.join(TIERS[1:])}")
    host = host_of(prices.cluster)
    state = state_bytes(precision, optimizer)
    moved = offloaded_state_bytes(state)
    both_ways = duplex_bytes_per_second(host)
    read, write = 0.0, 0.0
    if tier == "disk":
        need_disk(host)
        read, write = moved / host.rank_disk_read_bytes_per_second, moved / host.rank_disk_write_bytes_per_second
    return UpdateRates(
        cpu=host.host_update_seconds_per_element * _host_work(state),
        gpu=prices.optimizer_seconds(1e6, optimizer, precision) / 1e6,
        copy_in=moved / both_ways,
        copy_out=moved / both_ways,
        parameters_in=resident_parameter_bytes(state) / both_ways,
        read=read,
        write=write,
        latency_seconds=host.copy_latency_seconds,
    )


def update_seconds(
    elements: float, rates: UpdateRates, stride: float = ALL_CPU, subgroup: float = SUBGROUP_ELEMENTS
) -> float:
    """Seconds of a step over `elements` local elements, every `stride`-th subgroup on the GPU: an exact event simulation.

    Each lane serves what is ready in the order in which it became ready. States may enter the device once the subgroup `SLOTS`
    places before has left it. The step ends when all parameters are on the device and all states back where they belong.
    """
    if elements <= 0:
        return 0.0
    if stride < 1:
        raise ValueError(f"stride {stride}: expected at least 1")
    groups = _groups(elements, subgroup)
    size = elements / groups
    free = dict.fromkeys(_LANES, 0.0)
    running = _tasks(groups, stride, size, rates)
    ready = [(0.0, index) for index, task in enumerate(running) if not task.waits]
    heapq.heapify(ready)
    while ready:
        # Nothing that becomes ready later can have become ready earlier, so this is each lane's own order.
        at, index = heapq.heappop(ready)
        task = running[index]
        end = free[task.lane] = max(at, free[task.lane]) + task.seconds
        for later in task.releases:
            waiting = running[later]
            waiting.waits -= 1
            waiting.ready = max(waiting.ready, end)
            if not waiting.waits:
                heapq.heappush(ready, (waiting.ready, later))
    return max(free.values())


def balanced_stride(rates: UpdateRates) -> float:
    """F11's closed form k*, at least 1; `ALL_CPU` where the CPU keeps up with the link that returns its parameters."""
    surplus = rates.cpu - rates.parameters_in
    if surplus <= 0:
        return ALL_CPU
    return max(1.0, 1.0 + (rates.copy_in + rates.gpu) / surplus)


def best_stride(
    elements: float, rates: UpdateRates, subgroup: float = SUBGROUP_ELEMENTS, least: int = 1
) -> tuple[float, float]:
    """(stride, seconds) of the fastest step: k* and its neighbours, all on the GPU and all on the CPU, simulated.

    `least` is the smallest stride allowed. Of equal ones the largest wins: it copies least.
    """
    found = balanced_stride(rates)
    strides = {float(least), ALL_CPU}
    if math.isfinite(found):
        groups = _groups(elements, subgroup)
        near = range(math.floor(found) - 1, math.ceil(found) + 2)
        # Few subgroups: the smallest strides that put as many of them on the GPU as k* would.
        few = (groups // (count + 1) + 1 for count in (math.floor(groups / found), math.ceil(groups / found)))
        strides |= {float(max(least, k)) for k in (*near, *few)}
    timed = [(update_seconds(elements, rates, stride, subgroup), -stride) for stride in strides]
    seconds, stride = min(timed)
    return -stride, seconds


_LANES = ("read", "cpu", "copy_in", "gpu", "copy_out", "write")


@dataclass(slots=True)
class _Task:
    lane: str
    seconds: float
    releases: list[int] = field(default_factory=list)
    waits: int = 0
    ready: float = 0.0


def _tasks(groups: int, stride: float, size: float, rates: UpdateRates) -> list[_Task]:
    """The copies and updates of a step, subgroup by subgroup, with what each one releases."""
    start, disk = rates.latency_seconds, bool(rates.read or rates.write)
    seconds = {"read": size * rates.read, "cpu": size * rates.cpu, "gpu": size * rates.gpu,
               "copy_out": size * rates.copy_out + start, "write": size * rates.write}  # fmt: skip
    tasks: list[_Task] = []
    left: list[int] = []  # the copies out of the subgroups updated on the GPU
    for group in range(groups):
        on_gpu = math.isfinite(stride) and group % stride == stride - 1
        seconds["copy_in"] = size * (rates.copy_in if on_gpu else rates.parameters_in) + start
        row = ["copy_in", "gpu", "copy_out"] if on_gpu else ["cpu", "copy_in"]
        row = ["read", *row] if disk else row
        place = {lane: len(tasks) + i for i, lane in enumerate(row)}
        tasks += [_Task(lane, seconds[lane]) for lane in row]
        for before, after in pairwise(row):
            _release(tasks, place[before], place[after])
        if disk:  # on the CPU, new states go to disk while new parameters go to the device
            tasks.append(_Task("write", seconds["write"]))
            _release(tasks, place["copy_out" if on_gpu else "cpu"], len(tasks) - 1)
        if on_gpu:
            if len(left) >= SLOTS:
                _release(tasks, left[-SLOTS], place["copy_in"])
            left.append(place["copy_out"])
    return tasks


def _groups(elements: float, subgroup: float) -> int:
    return max(1, min(MOST_SUBGROUPS, math.ceil(elements / subgroup)))


def _release(tasks: list[_Task], before: int, after: int) -> None:
    tasks[before].releases.append(after)
    tasks[after].waits += 1


def _host_work(state: StateBytes) -> float:
    """Bytes an update on the CPU moves against those its figure was taken with."""
    moved = 2 * offloaded_state_bytes(state) + state.gradient + resident_parameter_bytes(state)
    return moved / HOST_UPDATE_BYTES

"""This machine as a cluster: its GPUs where torch sees any, else processes on its CPU, measured once and kept.

All figures of CPU ranks are taken with all of them running at once: they share cores, caches and memory.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ClusterError
from ..planner.cluster import MEASURED, Cluster, Device, Host, Level
from ..planner.collectives import SEND, Table
from ..planner.hostupdate import HOST_UPDATE_BYTES
from ..planner.prices import FUSED_STEP
from .devices import list_clusters, load_device, parse_cluster
from .jobs import run_ranks
from .measured import with_measured
from .store import Store

LEVEL = "gloo"
FLOOR = 1 << 30
"""The memory a rank is given at least; below it, so many ranks make no sense on this machine."""


def local_cluster(
    count: int | None, *, store: str | Path | None = None, cpu: bool = False, spec: str = "local"
) -> Cluster:
    """`count` devices of this machine (all GPUs, or one CPU rank a core up to 8, when None).

    `store` is the file that measurements are kept in; without one they are taken anew. Raises ClusterError when there
    are fewer GPUs or too little memory.
    """
    if count is not None and count < 1:
        raise ClusterError(f"cluster {spec!r}: at least 1 device")
    if not cpu and torch.cuda.is_available():
        return with_measured(_gpus(count, spec), _store(store), versions())
    return _cpus(count if count is not None else min(8, cores()), _store(store), spec)


def local_collectives(cluster: Cluster, *, store: str | Path | None = None) -> Table:
    """Measured rows of collectives and sends of a CPU cluster of this machine; empty for one rank and for any other cluster."""
    if not is_local_cpu(cluster) or cluster.devices == 1:
        return {}
    figures = _figures(cluster.devices, _store(store))
    table = {
        (name, LEVEL, size): tuple(map(tuple, found)) for (name, size), found in _split(figures["collectives"]).items()
    }
    return table | {(SEND, LEVEL, 2): tuple(map(tuple, figures["sends"]["pairs"]))}


def is_local_cpu(cluster: Cluster) -> bool:
    """Whether the cluster is measured CPU ranks of one machine."""
    return cluster.device.kind == "cpu" and cluster.device.source("memory_bytes_per_second").startswith(MEASURED)


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(ranks: int) -> int:
    """Threads each of `ranks` CPU ranks gets."""
    return max(1, cores() // ranks)


def machine_key(ranks: int) -> str:
    """What figures of this machine are filed under: processor, cores, ranks and threads."""
    return f"cpu {_processor()}, {cores()} cores, {ranks} ranks of {threads_per_rank(ranks)} threads"


def device_name(device: torch.device, ranks: int) -> str:
    """What a run on `device` with `ranks` ranks is filed under: the preset of a GPU (else its own name), or this machine."""
    if device.type != "cuda":
        return machine_key(ranks)
    properties = torch.cuda.get_device_properties(device)
    return preset_name(properties.name, properties.total_memory) or str(properties.name)


def versions() -> str:
    """The libraries whose change makes figures stale."""
    return f"torch {torch.__version__}"


def memory_bytes() -> int:
    """Memory of this machine, or of the control group this process is confined to."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _store(path: str | Path | None) -> Store:
    return Store(Path(path) if path is not None else None)


def _cpus(ranks: int, store: Store, spec: str) -> Cluster:
    memory = memory_bytes() // ranks
    if memory < FLOOR:
        raise ClusterError(
            f"cluster {spec!r}: {ranks} ranks would have {memory >> 20} MiB each; use at most {memory_bytes() // FLOOR}"
        )
    figures = _figures(ranks, store)
    device = _device(figures["machine"], memory, ranks)
    level = (
        _level(_split(figures["collectives"]), ranks)
        if ranks > 1
        else Level(LEVEL, 1, 1e9, 0.0, source="one rank: unused")
    )
    return Cluster(spec, device, ranks, ranks, (level,), spec, host=_host(figures, ranks))


def _figures(ranks: int, store: Store) -> dict[str, Any]:
    """Figures of `ranks` ranks by kind, from the store or measured now and kept there."""
    key, libraries = machine_key(ranks), versions()
    kinds = ("machine", "copies", "collectives", "sends")
    found = {kind: store.read(key, libraries, kind) for kind in kinds}
    if FUSED_STEP not in found["machine"]:
        found["machine"] = {}  # filed before the step of one kernel was timed
    tasks = [kind for kind in kinds if not found[kind] and (ranks > 1 or kind not in ("collectives", "sends"))]
    if tasks:
        fresh = run_ranks(ranks, threads_per_rank(ranks), tasks, folder=tempfile.gettempdir())
        for kind, figures in fresh.items():
            store.write(key, libraries, kind, figures)
        found |= fresh
    return found


def _split(rows: dict[str, Any]) -> dict[tuple[str, int], Any]:
    """Rows of neighbours; those of groups with a stride ("NAME:SIZE@STRIDE") are as fast on one machine."""
    near = {key: found for key, found in rows.items() if "@" not in key}
    return {(key.partition(":")[0], int(key.partition(":")[2])): found for key, found in near.items()}


def _device(figures: dict[str, float], memory: int, ranks: int) -> Device:
    """A CPU rank: its best matmul is its peak, other kinds are fractions of streaming bandwidth."""
    stream = figures["memory"]
    text = f"{MEASURED} with {ranks} ranks of {threads_per_rank(ranks)} threads at once"
    base = load_device("cpu")
    peaks = {k.removeprefix("matmul."): _round(v) for k, v in figures.items() if k.startswith("matmul.")}
    shares = {k: min(1.0, round(figures[k] / stream, 3)) for k in ("elementwise", "copy", "optimizer")}
    shares[FUSED_STEP] = round(
        figures[FUSED_STEP] / stream, 3
    )  # it mostly reads, and so may pass what streaming reaches
    efficiencies = {**base.efficiencies, "matmul": 1.0, "memory": 1.0, **shares}
    timed = ("memory_bytes_per_second", "peak_flops", "kernel_overhead_seconds", *(f"efficiencies.{k}" for k in shares))
    return Device(
        name="local-cpu",
        memory_bytes=memory,
        peak_flops=peaks,
        memory_bytes_per_second=_round(stream),
        kernel_overhead_seconds=_round(figures["overhead"]),
        efficiencies=efficiencies,
        kind="cpu",
        sources={
            "memory_bytes": f"memory of this machine / {ranks}",
            "machine": machine_key(ranks),
            **dict.fromkeys(timed, text),
        },
    )


def _host(figures: dict[str, Any], ranks: int) -> Host:
    """The tiers behind CPU ranks: the memory that their limits leave, and the disk of the system's temporary folder.

    One core copies both ways, and the optimizer's step is the device's.
    """
    machine, copies = figures["machine"], figures["copies"]
    rate = _round(copies["memory"])
    disk = "disk_read" in copies and "disk_write" in copies
    timed = ["copy_bytes_per_second", "host_memory_bytes_per_second", "host_update_seconds_per_element"]
    timed += ("disk_read_bytes_per_second", "disk_write_bytes_per_second", "disk_bytes") if disk else ()
    return Host(
        ranks, memory_bytes(), rate, _round(machine["memory"]) * ranks, _round(HOST_UPDATE_BYTES / machine[FUSED_STEP]),
        duplex_fraction=0.5,
        disk_bytes=int(copies["disk_bytes"]) if disk else 0,
        disk_read_bytes_per_second=_round(copies["disk_read"]) * ranks if disk else 0.0,
        disk_write_bytes_per_second=_round(copies["disk_write"]) * ranks if disk else 0.0,
        sources={"host_bytes": "memory of this machine, of which ranks have their limits",
                 **dict.fromkeys(timed, f"{MEASURED} with {ranks} ranks at once")},
    )  # fmt: skip


def _level(rows: dict[tuple[str, int], Any], ranks: int) -> Level:
    """One level whose latency and bandwidth are those of the measured ring all-reduce over all ranks."""
    measured = rows["all_reduce", ranks]
    hops, sent = 2 * (ranks - 1), 2 * (ranks - 1) / ranks
    small, (full, seconds) = measured[0][1], measured[-1]
    rate = sent * full / max(seconds - small, 1e-9)
    return Level(
        LEVEL,
        ranks,
        _round(rate),
        _round(small / hops),
        source=f"{MEASURED}: gloo all-reduce of 1 KiB and {full >> 20} MiB over {ranks} ranks",
    )


def _gpus(count: int | None, spec: str) -> Cluster:
    """GPUs of this machine by their preset, with the memory they really have."""
    present = torch.cuda.device_count()
    wanted = present if count is None else count
    if wanted > present:
        raise ClusterError(f"cluster {spec!r}: torch sees {present} GPUs; use local:{present} or local-cpu:{wanted}")
    properties = torch.cuda.get_device_properties(0)
    name = preset_name(properties.name, properties.total_memory)
    if name is None:
        raise ClusterError(f"cluster {spec!r}: no preset for {properties.name}; describe it in a cluster.toml")
    cluster = parse_cluster(f"{name}:{wanted}")
    sources = {**cluster.device.sources, "memory_bytes": "reported by the driver"}
    device = replace(cluster.device, memory_bytes=properties.total_memory, sources=sources)
    return replace(cluster, name=spec, spec=spec, device=device)


def preset_name(title: str, memory: int) -> str | None:
    """The preset that the driver's name of a GPU means, by nearest memory where several do; None without one."""
    words = set(re.findall(r"[a-z]+\d+\w*|\d{4}", title.lower()))
    fits = [n for n in list_clusters() if n.removeprefix("rtx-").partition("-")[0] in words]
    pcie = "pcie" in title.lower()
    fits = [n for n in fits if ("pcie" in n) == pcie] or fits
    return min(fits, key=lambda n: abs(load_device(n).memory_bytes - memory), default=None)


def _processor() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _round(value: float) -> float:
    """Three significant digits: no more is known."""
    return float(f"{value:.3g}")

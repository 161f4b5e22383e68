"""From a cluster string to a Cluster: presets (presets.py), cluster files (clusterfile.py), and this machine (local.py).

    h100-sxm:8x4                        4 nodes of 8 on that device's usual network
    h100-sxm:8x4@3200Gbps               the same with so much network per node (Gbps, Tbps, GB/s)
    h100-sxm:8                          one node of 8
    h100-sxm:8x2+a100-sxm-80gb:8x2      two pools of unlike devices, joined by the slower of their networks
    cluster.toml                        a file (see `read_cluster`)
    local[:N] local-cpu:N               this machine: N of its GPUs where torch sees any, else N processes on its CPU

Only the last form imports torch.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ClusterError
from ..planner.cluster import Cluster, Device, Level, Pool, join_pools
from .clusterfile import read_cluster, slowest
from .presets import (
    FIGURES,
    HOST_FIGURES,
    build_device,
    device_file,
    level,
    list_clusters,
    nearest,
    network_level,
    usual_host,
    usual_levels,
)

__all__ = [
    "describe",
    "describe_cluster",
    "list_clusters",
    "load_device",
    "parse_bytes",
    "parse_cluster",
    "read_cluster",
]

_SPEC = re.compile(
    r"(?P<device>[a-z0-9-]+)(?::(?P<per_node>\d+)(?:x(?P<nodes>\d+))?)?(?:@(?P<rate>[\d.]+)(?P<unit>[A-Za-z/]+))?"
)
LOCAL = re.compile(r"(local|local-cpu)(?::(\d+))?")
_RATES = {"Mbps": 1e6 / 8, "Gbps": 1e9 / 8, "Tbps": 1e12 / 8, "GB/s": 1e9, "GBps": 1e9}
_SIZES = {unit + end: 1000**i for i, unit in enumerate(("", "k", "M", "G", "T")) for end in ("", "B")} | {
    f"{unit}iB": 1024 ** (i + 1) for i, unit in enumerate("KMGT")
}


def parse_cluster(spec: str, memory_limit: int | str | None = None, *, cache: str | Path | None = None) -> Cluster:
    """The cluster that `spec` names, with a memory limit per device where one is given (bytes, or "12GiB").

    `cache` is the profile store that measurements of this machine are kept in; other clusters do not use it. Raises
    ClusterError saying what was expected, with the nearest names.
    """
    limit = parse_bytes(memory_limit) if memory_limit is not None else None
    local = LOCAL.fullmatch(spec)
    if local is not None:
        from .local import local_cluster  # the only form that needs torch

        count = int(local[2]) if local[2] else None
        cluster = local_cluster(count, store=cache, cpu=local[1] == "local-cpu", spec=spec)
    elif spec.endswith(".toml"):
        cluster = read_cluster(Path(spec))
    elif "+" in spec:
        cluster = _pools(spec)
    else:
        pool, _ = _preset(spec, f"cluster {spec!r}")
        cluster = Cluster(spec, pool.device, pool.devices, pool.per_node, pool.levels, spec, host=pool.host)
    return replace(cluster, limit_bytes=limit)


def describe(name: str) -> dict[str, Any]:
    """Everything known about a preset as plain values: title, node, and (value, source) for every figure.

    Figures of the host are those of a usual node; "host_figures" lists their names.
    """
    data = device_file(name)
    node = data["node"]
    usual = int(node["devices"])
    levels = (level("rank", node["link"], usual), level("node", node["network"], usual))
    host = usual_host(data, usual, f"device {name}")
    return _described(name, data["title"], Pool(load_device(name), usual, usual, levels, host, name))


def describe_cluster(cluster: Cluster) -> list[dict[str, Any]]:
    """The same of every pool of a cluster, as it is there."""
    found = []
    for pool in cluster.pool_list():
        title = f"{pool.devices} x {pool.device.name}"
        found.append(_described(pool.name, title, pool))
    return found


def _described(name: str, title: str, pool: Pool) -> dict[str, Any]:
    device, host = pool.device, pool.host
    rows: dict[str, Any] = {
        key: (getattr(device, key), device.source(key))
        for key in (*FIGURES, "overlap_fraction", "overlap_slowdown", "accuracy_low", "accuracy_high")
    }
    told = [key for key in HOST_FIGURES if host is not None and key in host.sources]
    rows |= {key: (getattr(host, key), host.source(key)) for key in told if host is not None}
    peaks = {k: (v, device.source(f"peak_flops.{k}")) for k, v in device.peak_flops.items()}
    factors = {k: (v, device.source(f"efficiencies.{k}")) for k, v in device.efficiencies.items()}
    return {
        "name": name, "title": title, "usual_node": pool.per_node, "figures": rows, "host_figures": told,
        "peak_flops": peaks, "efficiencies": factors,
        "levels": [{f: getattr(v, f) for f in v.__slots__} for v in pool.levels],
    }  # fmt: skip


def load_device(name: str) -> Device:
    """The preset device called `name`; raises ClusterError with the nearest names."""
    return build_device(device_file(name), where=f"device {name}")


def parse_bytes(text: int | str) -> int:
    """Bytes from "12GiB", "80GB", "512MiB" or a plain number; raises ClusterError for anything else."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2] not in _SIZES or float(found[1]) <= 0:
        raise ClusterError(f"memory size {text!r}: expected a number and a unit, such as 12GiB, 80GB or 512MiB")
    return int(float(found[1]) * _SIZES[found[2]])


def _pools(spec: str) -> Cluster:
    """Pools of unlike devices in rank order, joined by the slowest of their networks."""
    parts = [_preset(part, f"cluster {spec!r}, pool {i + 1} ({part!r})") for i, part in enumerate(spec.split("+"))]
    return join_pools(spec, [pool for pool, _ in parts], slowest([network for _, network in parts]), spec)


def _preset(spec: str, where: str) -> tuple[Pool, Level]:
    """The devices one DEVICE:PER_NODE[xNODES][@RATE] names, and the network that leads out of their nodes."""
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise ClusterError(
            f"{where}: expected DEVICE:PER_NODE[xNODES][@RATE] such as h100-sxm:8x4@3200Gbps (several joined by +), "
            f"a .toml file, local[:N] or local-cpu:N{nearest(spec)}"
        )
    name = found["device"]
    data = device_file(name, where)
    if found["per_node"] is None:
        raise ClusterError(f"{where}: how many? Say {name}:{data['node']['devices']} for one usual node")
    per_node, nodes = int(found["per_node"]), int(found["nodes"] or 1)
    if per_node < 1 or nodes < 1:
        raise ClusterError(f"{where}: the numbers of devices and nodes must be at least 1")
    most = int(data["node"]["most"])
    if per_node > most:
        usual = int(data["node"]["devices"])
        raise ClusterError(
            f"{where}: {per_node} {name} do not fit in one node (at most {most}); "
            f"did you mean {name}:{usual}x{-(-per_node // usual)}?"
        )
    rate = _rate(where, found["rate"], found["unit"])
    levels = usual_levels(data["node"], per_node, nodes, rate)
    host = usual_host(data, per_node, f"device {name}")
    device = build_device(data, where=f"device {name}")
    return Pool(device, per_node * nodes, per_node, levels, host, spec), network_level(data["node"], per_node, rate)


def _rate(where: str, number: str | None, unit: str | None) -> float | None:
    if number is None:
        return None
    try:
        rate = float(number) * _RATES[unit or ""]
    except (KeyError, ValueError):
        raise ClusterError(f"{where}: rate {number}{unit}: expected {', '.join(_RATES)}, as in @3200Gbps") from None
    if rate <= 0:
        raise ClusterError(f"{where}: the network rate must be more than 0")
    return rate

"""Clusters from TOML files."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ClusterError
from ..planner.cluster import Cluster, Host, Level, Pool, join_pools
from .presets import (
    LINK,
    build_device,
    build_host,
    count,
    device_file,
    figure,
    merged_device,
    network_level,
    only,
    usual_host,
    usual_levels,
)

_NODES = ("device", "devices_per_node", "nodes", "level", "host")


def read_cluster(path: Path) -> Cluster:
    """A cluster from a TOML file. Figures are SI (bytes, seconds, bytes per second); `source` strings are optional.

    name = "mine"                     # optional
    device = "h100-sxm"               # a preset, or a table:
    # [device]
    # preset = "h100-sxm"             # what is not given below comes from it (without it every figure is required)
    # memory_bytes = 80e9             # also memory_bytes_per_second, kernel_overhead_seconds, issue_seconds, compute_units,
    #                                 # contraction_half, context_bytes, communicator_bytes;
    #                                 # a figure may be {value = .., source = ".."}
    # [device.peak_flops]             # by dtype: bfloat16 = 989e12
    # [device.efficiencies]           # by kind of op: matmul = 0.7
    # [device.overlap]                # collectives under compute: fraction = 0.9, slowdown = 1.1
    # [device.accuracy]               # measured / predicted steps, 5th and 95th percentile: low = 0.8, high = 1.2
    devices_per_node = 8
    nodes = 4
    [host]                            # optional: over the preset's, scaled to devices_per_node; `host = false` for none
    host_bytes = 2e12                 # of a node, like host_memory_bytes_per_second, disk_bytes, disk_read_bytes_per_second,
    #                                 # disk_write_bytes_per_second and cost_per_hour
    copy_bytes_per_second = 40e9      # of a rank, one direction, while all ranks copy; also copy_latency_seconds,
    #                                 # duplex_fraction (what is left with both directions busy)
    host_update_seconds_per_element = 1e-9  # of a rank's Adam step on the CPU, while all ranks step
    [[level]]                         # innermost first, as many as there are; without any: the device's usual links
    name = "nvlink"
    ranks = 8                         # how many consecutive ranks one block joins
    bytes_per_second = 450e9          # one direction, per rank (for the network: of the node / its devices)
    oversubscription = 1              # optional: how many times less than that gets through with all ranks sending
    efficiency = 0.8                  # optional, 1
    latency_seconds = 2e-6            # optional, 0; launch_seconds likewise

    Unlike devices: one `[[pool]]` table per kind, with `device`, `devices_per_node`, `nodes`, `[pool.host]` and
    `[[pool.level]]` as above, and at most one `[[level]]` that joins them (without it: the slowest of their networks).
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ClusterError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path}: not TOML: {error}") from None
    name = str(data.get("name", path.stem))
    if "pool" in data:
        return _joined(data, name, path)
    only(data, ("name", *_NODES, "pool"), str(path))
    pool, _ = _pool(data, name, str(path))
    return Cluster(name, pool.device, pool.devices, pool.per_node, pool.levels, str(path), host=pool.host)


def _joined(data: Mapping[str, Any], name: str, path: Path) -> Cluster:
    only(data, ("name", "pool", "level"), f"{path}: a file of pools")
    tables = data["pool"]
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ClusterError(f"{path}: field pool: expected [[pool]] tables")
    pools, networks = [], []
    for index, table in enumerate(tables):
        where = f"{path}: pool {index + 1}"
        only(table, ("name", *_NODES), where)
        pool, network = _pool(table, str(table.get("name", f"{name}-{index + 1}")), where)
        pools.append(pool)
        networks.append(network)
    return join_pools(name, pools, _joining(data, pools, networks, str(path)), str(path))


def _joining(data: Mapping[str, Any], pools: list[Pool], networks: list[Level | None], where: str) -> Level:
    devices = sum(pool.devices for pool in pools)
    if "level" not in data:
        known = [network for network in networks if network is not None]
        if len(known) < len(networks):
            raise ClusterError(f"{where}: field level: expected one [[level]] that joins the pools")
        return slowest(known)
    tables = data["level"]
    if not isinstance(tables, list) or len(tables) != 1 or not isinstance(tables[0], dict):
        raise ClusterError(f"{where}: field level: expected one [[level]] that joins the pools")
    return _levels([{"ranks": devices, **tables[0]}], devices, where)[0]


def slowest(networks: list[Level]) -> Level:
    """The network with the least bandwidth for a rank, with the longest latency of any."""
    found = min(networks, key=lambda level: level.bytes_per_second * level.efficiency)
    return replace(found, latency_seconds=max(level.latency_seconds for level in networks))


def _pool(data: Mapping[str, Any], name: str, where: str) -> tuple[Pool, Level | None]:
    """The devices that a file or one of its pools describes, and the network that leads out of their nodes."""
    described = data.get("device")
    if not isinstance(described, str | dict):
        raise ClusterError(f"{where}: field device: expected the name of a preset or a table, found {described!r}")
    table = {"preset": described} if isinstance(described, str) else described
    base = device_file(str(table["preset"]), f"{where}: field device") if "preset" in table else None
    device = build_device(merged_device(base, table, where), where=f"{where}: field device")
    per_node, nodes = (count(data, key, where) for key in ("devices_per_node", "nodes"))
    host = _host(base, data.get("host"), per_node, where)
    network: Level | None
    if "level" in data:
        levels = _levels(data["level"], per_node * nodes, where)
        network = levels[-1] if levels[-1].ranks > per_node else None
    elif base is None:
        raise ClusterError(f"{where}: field level: a device without a preset needs at least one [[level]]")
    else:
        levels, network = usual_levels(base["node"], per_node, nodes), network_level(base["node"], per_node)
    return Pool(device, per_node * nodes, per_node, levels, host, name), network


def _host(base: Mapping[str, Any] | None, table: Any, per_node: int, where: str) -> Host | None:
    """A [host] table over the preset's host; `false` says that there is none."""
    usual = usual_host(base, per_node, where) if base is not None else None
    if table is None or table is False:
        return usual if table is None else None
    if not isinstance(table, dict):
        raise ClusterError(f"{where}: field host: expected a table or false, found {table!r}")
    known: dict[str, Any] = {}
    if usual is not None:
        known = {key: {"value": getattr(usual, key), "source": source} for key, source in usual.sources.items()}
    return build_host({**known, **table}, per_node, f"{where}: field host")


def _levels(levels: Any, devices: int, where: str) -> tuple[Level, ...]:
    if not isinstance(levels, list) or not levels or not all(isinstance(v, dict) for v in levels):
        raise ClusterError(f"{where}: field level: expected [[level]] tables")
    built: list[Level] = []
    for index, table in enumerate(levels):
        built.append(_level(table, f"level-{index + 1}", f"{where}: level {index + 1}", built))
    if built[-1].ranks < devices:
        raise ClusterError(f"{where}: the last level joins {built[-1].ranks} ranks, the cluster has {devices}")
    return tuple(built)


def _level(table: Mapping[str, Any], name: str, where: str, below: list[Level]) -> Level:
    only(table, ("name", "ranks", "source", "oversubscription", *LINK), where)
    notes: dict[str, str] = {}
    figures = {"efficiency": 1.0, "latency_seconds": 0.0, "launch_seconds": 0.0, **table}
    values = {key: figure(figures, key, key, where, notes) for key in LINK}
    if values["bytes_per_second"] <= 0 or not 0 < values["efficiency"] <= 1:
        raise ClusterError(f"{where}: bytes_per_second must be more than 0 and efficiency in (0, 1]")
    over = figure(table, "oversubscription", "oversubscription", where, notes) if "oversubscription" in table else 1.0
    if over < 1:
        raise ClusterError(f"{where}.oversubscription: expected a number of at least 1, found {over}")
    values["bytes_per_second"] /= over
    ranks = count(table, "ranks", where)
    if below and (ranks <= below[-1].ranks or ranks % below[-1].ranks):
        raise ClusterError(f"{where}, field ranks: {ranks} must be a multiple of the level below ({below[-1].ranks})")
    source = str(table.get("source", "; ".join(dict.fromkeys(notes.values()))))
    return Level(str(table.get("name", name)), ranks, source=source, **values)

"""What a profile of this machine's GPUs says, in place of the data sheet's figures: overlap, memory, host copies, links.

Measured figures name that as their source, and are no part of a cluster's fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..planner.cluster import MEASURED, Cluster, Device, Host
from ..planner.collectives import SEND, Table
from .store import Store

TEXT = f"{MEASURED} on this machine (shardwright profile)"


def with_measured(cluster: Cluster, store: Store, versions: str) -> Cluster:
    """`cluster` of equal GPUs of this machine with what `store` has of them; unchanged where it has nothing."""
    found = {
        kind: store.read(cluster.device.name, versions, kind) for kind in ("overlap", "allocator", "copies")
    }  # fmt: skip
    if not any(found.values()):
        return cluster
    host = cluster.host and _host(cluster.host, found["copies"])
    return replace(cluster, device=_device(cluster.device, found["overlap"], found["allocator"]), host=host)


def measured_collectives(cluster: Cluster, store: Store, versions: str) -> Table:
    """Measured rows by (collective, level, group size) of the groups that lie on one level of `cluster`, and of messages."""
    table: dict[tuple[str, str, int], tuple[tuple[float, float], ...]] = {}
    for key, rows in store.read(cluster.device.name, versions, "collectives").items():
        name, _, group = key.partition(":")
        size, _, stride = group.partition("@")
        if int(size) * int(stride or 1) > cluster.devices:
            continue
        level = cluster.route(int(stride or 1), int(size)).level
        if level is not None:
            table.setdefault((name, level.name, int(size)), _rows(rows))
    messages = store.read(cluster.device.name, versions, "sends").get("pairs")
    if messages and cluster.devices > 1:
        table[SEND, cluster.level_of(1, 2).name, 2] = _rows(messages)
    return table


def _rows(rows: Any) -> tuple[tuple[float, float], ...]:
    return tuple((float(b), float(s)) for b, s in rows)


def _device(device: Device, overlap: Mapping[str, Any], allocator: Mapping[str, Any]) -> Device:
    changed: dict[str, Any] = {}
    beside = overlap.get("all ranks")
    if beside:
        # At twice the seconds nothing is won by running both at once.
        hides = beside["slowdown"] < 2.0
        changed |= {"overlap_fraction": 1.0 if hides else 0.0, "overlap_slowdown": beside["slowdown"] if hides else 1.0}
    if "reserve" in allocator:
        changed["reserve_fraction"] = round(1.0 - 1.0 / allocator["reserve"], 4)
    if "context_bytes" in allocator:
        changed["context_bytes"] = int(allocator["context_bytes"])
    return replace(device, **changed, sources={**device.sources, **dict.fromkeys(changed, TEXT)})


def _host(host: Host, copies: Mapping[str, Any]) -> Host:
    """The slower direction counts: plans use one figure for both."""
    changed: dict[str, Any] = {}
    if {"host_to_device", "device_to_host", "both_ways"} <= set(copies):
        rate = min(copies["host_to_device"], copies["device_to_host"])
        changed |= {
            "copy_bytes_per_second": rate,
            "duplex_fraction": min(1.0, copies["both_ways"] / rate),
            "copy_latency_seconds": copies["latency"],
        }
    for way in ("read", "write"):
        if f"disk_{way}" in copies:
            changed[f"disk_{way}_bytes_per_second"] = copies[f"disk_{way}"] * host.ranks
    return replace(host, **changed, sources={**host.sources, **dict.fromkeys(changed, TEXT)})

"""Devices, links and host tiers from tables: the presets in data/*.toml, and the same tables in a user's cluster file.

A figure is a number or `{ value = .., source = ".." }`. Every function that reads one takes `where`, the place its errors name.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from typing import Any

from ..errors import ClusterError
from ..planner.cluster import Device, Host, Level

FIGURES = (
    "memory_bytes",
    "memory_bytes_per_second",
    "kernel_overhead_seconds",
    "issue_seconds",
    "compute_units",
    "contraction_half",
    "context_bytes",
    "communicator_bytes",
)
"""Plain figures of a device table."""

HOST_FIGURES = (
    "host_bytes",
    "copy_bytes_per_second",
    "copy_latency_seconds",
    "duplex_fraction",
    "host_memory_bytes_per_second",
    "host_update_seconds_per_element",
    "disk_bytes",
    "disk_read_bytes_per_second",
    "disk_write_bytes_per_second",
    "cost_per_hour",
)
"""Figures of a [host] table; those of `HOST_OPTIONAL` may be absent."""

HOST_OPTIONAL: Mapping[str, float] = {
    "copy_latency_seconds": 0.0,
    "duplex_fraction": 1.0,
    "disk_bytes": 0.0,
    "disk_read_bytes_per_second": 0.0,
    "disk_write_bytes_per_second": 0.0,
}

OVERLAP = ("fraction", "slowdown")
"""Figures of an [overlap] table."""

ACCURACY = ("low", "high")
"""Figures of an [accuracy] table: measured over predicted step seconds, 5th and 95th percentile."""

UNCHECKED: Mapping[str, Any] = {
    "low": {"value": 0.65, "source": "assumed: no published run of this device was checked"},
    "high": {"value": 1.6, "source": "assumed: no published run of this device was checked"},
}
"""What holds where a device's file has none."""

HOST_RESERVE = 0.08
"""Share of a machine's memory that a process on its CPU leaves alone."""

LINK = ("bytes_per_second", "efficiency", "latency_seconds", "launch_seconds")
"""Figures of a level of links."""

RESERVE = "reserve_fraction"
"""Share of a device's memory that its allocator loses, where a device's file says so; else `allocator_loss`."""

_NEUTRAL = {
    "kernel_overhead_seconds": 4e-6,
    "issue_seconds": 0.0,
    "compute_units": 0,
    "contraction_half": 0.0,
    "context_bytes": 0,
    "communicator_bytes": 0,
}
_POSITIVE = frozenset(
    {"memory_bytes", "memory_bytes_per_second", "host_bytes", "copy_bytes_per_second", "host_memory_bytes_per_second",
     "host_update_seconds_per_element", "duplex_fraction"}
)  # fmt: skip


def list_clusters() -> tuple[str, ...]:
    """Names of all device presets."""
    folder = resources.files(__package__) / "data" / "devices"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def device_file(name: str, where: str = "device") -> dict[str, Any]:
    """The tables of a preset; raises ClusterError with the nearest names."""
    if name not in list_clusters():
        raise ClusterError(f"{where}: no device is called {name!r}{nearest(name)}")
    return _toml("devices", f"{name}.toml")


def usual_levels(node: Mapping[str, Any], per_node: int, nodes: int, rate: float | None = None) -> tuple[Level, ...]:
    """The links of `nodes` nodes of `per_node` devices; `rate` replaces the network's bytes per second of a node."""
    devices = per_node * nodes
    inner = level("rank", node["link"], per_node)
    if "span" in _network("rank", node["link"]):
        # A switch fabric wider than a node joins whole nodes, as many as divide the cluster evenly.
        fit = [n for n in range(1, nodes + 1) if nodes % n == 0 and n * per_node <= inner.ranks]
        inner = replace(inner, ranks=per_node * max(fit, default=1))
    if inner.ranks >= devices:
        return (replace(inner, ranks=devices),)
    return (inner, replace(network_level(node, per_node, rate), ranks=devices))


def network_level(node: Mapping[str, Any], per_node: int, rate: float | None = None) -> Level:
    """The network between nodes of `per_node` devices; `rate` replaces its bytes per second of a node."""
    outer = level("node", node["network"], per_node)
    if rate is None:
        return outer
    return replace(outer, name="network", bytes_per_second=rate / per_node, source="given in the cluster string")


def level(kind: str, name: str, per_node: int) -> Level:
    """A level of networks.toml ("rank" or "node"); a node's bandwidth is divided among its ranks."""
    data = _network(kind, name)
    share = per_node if kind == "node" else 1
    values = {key: float(data[key]["value"]) for key in LINK}
    values["bytes_per_second"] /= share
    source = "; ".join(f"{key}: {data[key]['source']}" for key in LINK)
    return Level(name, int(data.get("span", per_node)), source=source, **values)


def merged_device(base: Mapping[str, Any] | None, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A user's device table over the preset's."""
    nested = ("peak_flops", "efficiencies", "overlap", "accuracy")
    only(table, ("preset", "name", "kind", *nested, *FIGURES, RESERVE), f"{where}: field device")
    merged: dict[str, Any] = dict(base) if base is not None else {"name": "device", "kind": "gpu"}
    for key, value in table.items():
        if key in nested:
            if not isinstance(value, dict):
                raise ClusterError(f"{where}: field device.{key}: expected a table, found {value!r}")
            merged[key] = {**merged.get(key, {}), **value}
        elif key != "preset":
            merged[key] = value
    for key, neutral in _NEUTRAL.items():
        merged.setdefault(key, neutral)
    return merged


def build_device(data: Mapping[str, Any], *, where: str) -> Device:
    """A device from its tables; raises ClusterError naming the first figure that will not do."""
    sources: dict[str, str] = {}
    values = {key: figure(data, key, key, where, sources) for key in FIGURES}
    peaks, factors = data.get("peak_flops", {}), {**_toml("efficiencies.toml"), **data.get("efficiencies", {})}
    if not peaks:
        raise ClusterError(f"{where}.peak_flops: missing; give FLOP/s for at least one dtype")
    fraction, slowdown = _overlap(data.get("overlap", {}), where, sources)
    low, high = _accuracy(data.get("accuracy", {}), where, sources)
    kind = str(data.get("kind", "gpu"))
    return Device(
        name=str(data.get("name", "device")),
        memory_bytes=int(values["memory_bytes"]),
        peak_flops={k: figure(peaks, k, f"peak_flops.{k}", where, sources) for k in peaks},
        memory_bytes_per_second=values["memory_bytes_per_second"],
        kernel_overhead_seconds=values["kernel_overhead_seconds"],
        efficiencies={k: figure(factors, k, f"efficiencies.{k}", where, sources) for k in factors},
        compute_units=int(values["compute_units"]),
        contraction_half=values["contraction_half"],
        issue_seconds=values["issue_seconds"],
        context_bytes=int(values["context_bytes"]),
        communicator_bytes=int(values["communicator_bytes"]),
        reserve_fraction=_reserve(data, kind, where, sources),
        kind=kind,
        sources=sources,
        overlap_fraction=fraction,
        overlap_slowdown=slowdown,
        accuracy_low=low,
        accuracy_high=high,
    )


def build_host(data: Mapping[str, Any], ranks: int, where: str) -> Host:
    """The host tiers of a node of `ranks` devices from a [host] table that says all of it."""
    only(data, HOST_FIGURES, where)
    sources: dict[str, str] = {}
    table = {**HOST_OPTIONAL, **data}
    values = {key: figure(table, key, key, where, sources) for key in HOST_FIGURES if key in table}
    if values["duplex_fraction"] > 1:
        raise ClusterError(f"{where}.duplex_fraction: expected a number in (0, 1]")
    if values["disk_bytes"] and not (values["disk_read_bytes_per_second"] and values["disk_write_bytes_per_second"]):
        raise ClusterError(f"{where}: a disk needs disk_read_bytes_per_second and disk_write_bytes_per_second")
    return Host(
        ranks=ranks,
        host_bytes=int(values["host_bytes"]),
        copy_bytes_per_second=values["copy_bytes_per_second"],
        host_memory_bytes_per_second=values["host_memory_bytes_per_second"],
        host_update_seconds_per_element=values["host_update_seconds_per_element"],
        copy_latency_seconds=values["copy_latency_seconds"],
        duplex_fraction=values["duplex_fraction"],
        disk_bytes=int(values["disk_bytes"]),
        disk_read_bytes_per_second=values["disk_read_bytes_per_second"],
        disk_write_bytes_per_second=values["disk_write_bytes_per_second"],
        cost_per_hour=values.get("cost_per_hour"),
        sources={key: sources[key] for key in data},
    )


def usual_host(data: Mapping[str, Any], per_node: int, where: str) -> Host | None:
    """The host of a preset's usual node, scaled to `per_node` devices; None where the preset has no tier below its memory."""
    if "host" not in data:
        return None
    return build_host(data["host"], int(data["node"]["devices"]), f"{where}.host").scaled(per_node)


def figure(data: Mapping[str, Any], key: str, label: str, where: str, sources: dict[str, str]) -> float:
    """A non-negative number, plain or with its source, noted in `sources` under `label`."""
    if key not in data:
        raise ClusterError(f"{where}.{label}: missing")
    found = data[key]
    value = found.get("value") if isinstance(found, dict) else found
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ClusterError(f"{where}.{label}: expected a non-negative number, found {value!r}")
    if value == 0 and (label.startswith(("peak_flops.", "efficiencies.")) or key in _POSITIVE):
        raise ClusterError(f"{where}.{label}: must be more than 0")
    sources[label] = str(found.get("source", "given in the file")) if isinstance(found, dict) else "given in the file"
    return float(value)


def count(data: Mapping[str, Any], key: str, where: str) -> int:
    """A whole number of at least 1."""
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ClusterError(f"{where}: field {key}: expected a whole number of at least 1, found {value!r}")
    return value


def only(data: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raises ClusterError at the first key that is not known."""
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ClusterError(f"{where}: unknown field {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))


def nearest(text: str) -> str:
    """The preset names nearest to what was asked, as the end of a message."""
    names = [*list_clusters(), "local", "local-cpu"]
    asked = text.partition(":")[0].lower()
    begun = [n for n in names if asked and n.startswith(asked)]
    close = begun or difflib.get_close_matches(asked, names, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(names)}"


def allocator_loss() -> tuple[float, str]:
    """Share of a device's memory that its caching allocator loses to fragments, and where that is known from.

    A quantile over public out-of-memory messages (data/allocator.toml): this share of the failed runs lost no more.
    """
    data = _toml("allocator.toml")
    shares = sorted(lost / whole for _, whole, lost in data["failures"])
    at = min(int(data["quantile"] * len(shares)), len(shares) - 1)
    return round(shares[at], 3), f"{data['source']}: {data['quantile']:.0%} lost no more than this"


def _reserve(data: Mapping[str, Any], kind: str, where: str, sources: dict[str, str]) -> float:
    """The share of the memory left to the allocator."""
    if RESERVE in data:
        found = figure(data, RESERVE, RESERVE, where, sources)
        if found >= 1:
            raise ClusterError(f"{where}.{RESERVE}: expected a number in [0, 1)")
        return found
    if kind != "gpu":
        sources[RESERVE] = "assumed: what the system and the process itself take"
        return HOST_RESERVE
    share, sources[RESERVE] = allocator_loss()
    return share


def _overlap(table: Mapping[str, Any], where: str, sources: dict[str, str]) -> tuple[float, float]:
    fraction, slowdown = _pair("overlap", OVERLAP, {"fraction": 0.0, "slowdown": 1.0}, table, where, sources)
    if fraction > 1 or slowdown < 1:
        raise ClusterError(f"{where}.overlap: expected a fraction in [0, 1] and a slowdown of at least 1")
    return fraction, slowdown


def _accuracy(table: Mapping[str, Any], where: str, sources: dict[str, str]) -> tuple[float, float]:
    """Between which ratios of measured and predicted steps nine of ten lie; wide where nobody has said."""
    low, high = _pair("accuracy", ACCURACY, UNCHECKED, table, where, sources)
    if not 0 < low <= 1 <= high:
        raise ClusterError(f"{where}.accuracy: expected low in (0, 1] and high of at least 1")
    return low, high


def _pair(
    name: str, keys: tuple[str, str], usual: Mapping[str, Any], table: Mapping[str, Any], where: str, sources: dict[str, str]
) -> tuple[float, float]:  # fmt: skip
    """Two figures of the table `name`, noted as NAME_KEY in `sources` where the table or what is usual has a source."""
    only(table, keys, f"{where}.{name}")
    notes: dict[str, str] = {}
    figures = {**usual, **table}
    one, other = (figure(figures, key, f"{name}.{key}", where, notes) for key in keys)
    told = {key for key in keys if key in table or isinstance(usual[key], dict)}
    sources.update({f"{name}_{key}": notes[f"{name}.{key}"] for key in keys if key in told})
    return one, other


def _network(kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = _toml("networks.toml")[kind][name]
    return found


def _toml(*parts: str) -> dict[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath("data", *parts).read_text())

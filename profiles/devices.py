"""From a cluster string to a Cluster: device and network presets (data/*.toml), cluster files, and this machine.

    h100-sxm:8x4             4 nodes of 8 on that device's usual network
    h100-sxm:8x4@3200Gbps    the same with so much network per node (Gbps, Tbps, GB/s)
    h100-sxm:8               one node of 8
    cluster.toml             a file (see `read_cluster`)
    local[:N] local-cpu:N    this machine: N of its GPUs where torch sees any, else N processes on its CPU

Only the last form imports torch.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ClusterError
from ..planner.cluster import Cluster, Device, Level

_SPEC = re.compile(
    r"(?P<device>[a-z0-9-]+)(?::(?P<per_node>\d+)(?:x(?P<nodes>\d+))?)?(?:@(?P<rate>[\d.]+)(?P<unit>[A-Za-z/]+))?"
)
_LOCAL = re.compile(r"(local|local-cpu)(?::(\d+))?")
_RATES = {"Mbps": 1e6 / 8, "Gbps": 1e9 / 8, "Tbps": 1e12 / 8, "GB/s": 1e9, "GBps": 1e9}
_SIZES = {unit + end: 1000**i for i, unit in enumerate(("", "k", "M", "G", "T")) for end in ("", "B")} | {
    f"{unit}iB": 1024 ** (i + 1) for i, unit in enumerate("KMGT")
}
_FIGURES = (
    "memory_bytes",
    "memory_bytes_per_second",
    "kernel_overhead_seconds",
    "issue_seconds",
    "compute_units",
    "contraction_half",
    "context_bytes",
)
_NEUTRAL = {
    "kernel_overhead_seconds": 4e-6,
    "issue_seconds": 0.0,
    "compute_units": 0,
    "contraction_half": 0.0,
    "context_bytes": 0,
}
_LINK = ("bytes_per_second", "efficiency", "latency_seconds", "launch_seconds")


def parse_cluster(spec: str, memory_limit: int | str | None = None, *, cache: str | Path | None = None) -> Cluster:
    """The cluster that `spec` names, with a memory limit per device where one is given (bytes, or "12GiB").

    `cache` is the profile store that measurements of this machine are kept in; other clusters do not use it. Raises
    ClusterError saying what was expected, with the nearest names.
    """
    limit = parse_bytes(memory_limit) if memory_limit is not None else None
    local = _LOCAL.fullmatch(spec)
    if local is not None:
        from .local import local_cluster  # the only form that needs torch

        count = int(local[2]) if local[2] else None
        cluster = local_cluster(count, store=cache, cpu=local[1] == "local-cpu", spec=spec)
    elif spec.endswith(".toml"):
        cluster = read_cluster(Path(spec))
    else:
        cluster = _preset(spec)
    return replace(cluster, limit_bytes=limit)


def list_clusters() -> tuple[str, ...]:
    """Names of all device presets."""
    folder = resources.files(__package__) / "data" / "devices"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def describe(name: str) -> dict[str, Any]:
    """Everything known about a preset as plain values: title, node, and (value, source) for every figure."""
    data = _device_file(name)
    device = load_device(name)
    node = data["node"]
    levels = [_level("rank", node["link"], int(node["devices"])), _level("node", node["network"], int(node["devices"]))]
    rows = {key: (getattr(device, key), device.source(key)) for key in _FIGURES}
    peaks = {k: (v, device.source(f"peak_flops.{k}")) for k, v in device.peak_flops.items()}
    factors = {k: (v, device.source(f"efficiencies.{k}")) for k, v in device.efficiencies.items()}
    return {
        "name": name, "title": data["title"], "usual_node": node["devices"], "figures": rows, "peak_flops": peaks,
        "efficiencies": factors, "levels": [{f: getattr(v, f) for f in v.__slots__} for v in levels],
    }  # fmt: skip


def load_device(name: str) -> Device:
    """The preset device called `name`; raises ClusterError with the nearest names."""
    return _device(_device_file(name), where=f"device {name}")


def parse_bytes(text: int | str) -> int:
    """Bytes from "12GiB", "80GB", "512MiB" or a plain number; raises ClusterError for anything else."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2] not in _SIZES or float(found[1]) <= 0:
        raise ClusterError(f"memory size {text!r}: expected a number and a unit, such as 12GiB, 80GB or 512MiB")
    return int(float(found[1]) * _SIZES[found[2]])


def read_cluster(path: Path) -> Cluster:
    """A cluster from a TOML file. Figures are SI (bytes, seconds, bytes per second); `source` strings are optional.

    name = "mine"                     # optional
    device = "h100-sxm"               # a preset, or a table:
    # [device]
    # preset = "h100-sxm"             # what is not given below comes from it (without it every figure is required)
    # memory_bytes = 80e9             # also memory_bytes_per_second, kernel_overhead_seconds, issue_seconds, compute_units,
    #                                 # contraction_half, context_bytes; a figure may be {value = .., source = ".."}
    # [device.peak_flops]             # by dtype: bfloat16 = 989e12
    # [device.efficiencies]           # by kind of op: matmul = 0.7
    devices_per_node = 8
    nodes = 4
    [[level]]                         # innermost first; without any: the device's usual links
    name = "nvlink"
    ranks = 8                         # how many consecutive ranks one block joins
    bytes_per_second = 450e9          # one direction, per rank (for the network: of the node / its devices)
    efficiency = 0.8                  # optional, 1
    latency_seconds = 2e-6            # optional, 0; launch_seconds likewise
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ClusterError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path}: not TOML: {error}") from None
    _only(data, ("name", "device", "devices_per_node", "nodes", "level"), str(path))
    described = data.get("device")
    if not isinstance(described, str | dict):
        raise ClusterError(f"{path}: field device: expected the name of a preset or a table, found {described!r}")
    table = {"preset": described} if isinstance(described, str) else described
    base = _device_file(str(table["preset"]), f"{path}: field device") if "preset" in table else None
    device = _device(_merged(base, table, str(path)), where=f"{path}: field device")
    per_node, nodes = (_count(data, key, str(path)) for key in ("devices_per_node", "nodes"))
    levels = data.get("level")
    if levels is None:
        if base is None:
            raise ClusterError(f"{path}: field level: a device without a preset needs at least one [[level]]")
        built = _levels(base["node"], per_node, nodes, None)
    else:
        built = _file_levels(levels, per_node * nodes, str(path))
    return Cluster(str(data.get("name", path.stem)), device, per_node * nodes, per_node, built, str(path))


def _preset(spec: str) -> Cluster:
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise ClusterError(
            f"cluster {spec!r}: expected DEVICE:PER_NODE[xNODES][@RATE] such as h100-sxm:8x4@3200Gbps, a .toml file, "
            f"local[:N] or local-cpu:N{_nearest(spec)}"
        )
    name = found["device"]
    data = _device_file(name, f"cluster {spec!r}")
    if found["per_node"] is None:
        raise ClusterError(f"cluster {spec!r}: how many? Say {name}:{data['node']['devices']} for one usual node")
    per_node, nodes = int(found["per_node"]), int(found["nodes"] or 1)
    if per_node < 1 or nodes < 1:
        raise ClusterError(f"cluster {spec!r}: the numbers of devices and nodes must be at least 1")
    most = int(data["node"]["most"])
    if per_node > most:
        usual = int(data["node"]["devices"])
        raise ClusterError(
            f"cluster {spec!r}: {per_node} {name} do not fit in one node (at most {most}); "
            f"did you mean {name}:{usual}x{-(-per_node // usual)}?"
        )
    levels = _levels(data["node"], per_node, nodes, _rate(spec, found["rate"], found["unit"]))
    return Cluster(spec, _device(data, where=f"device {name}"), per_node * nodes, per_node, levels, spec)


def _levels(node: Mapping[str, Any], per_node: int, nodes: int, rate: float | None) -> tuple[Level, ...]:
    devices = per_node * nodes
    inner = _level("rank", node["link"], per_node)
    if "span" in _network("rank", node["link"]):
        # A switch fabric wider than a node joins whole nodes, as many as divide the cluster evenly.
        fit = [n for n in range(1, nodes + 1) if nodes % n == 0 and n * per_node <= inner.ranks]
        inner = replace(inner, ranks=per_node * max(fit, default=1))
    if inner.ranks >= devices:
        return (replace(inner, ranks=devices),)
    outer = _level("node", node["network"], per_node)
    if rate is not None:
        outer = replace(outer, name="network", bytes_per_second=rate / per_node, source="given in the cluster string")
    return (inner, replace(outer, ranks=devices))


def _level(kind: str, name: str, per_node: int) -> Level:
    """A level of networks.toml; a node's bandwidth is divided among its ranks."""
    data = _network(kind, name)
    share = per_node if kind == "node" else 1
    values = {key: float(data[key]["value"]) for key in _LINK}
    values["bytes_per_second"] /= share
    source = "; ".join(f"{key}: {data[key]['source']}" for key in _LINK)
    return Level(name, int(data.get("span", per_node)), source=source, **values)


def _network(kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = _toml("networks.toml")[kind][name]
    return found


def _device_file(name: str, where: str = "device") -> dict[str, Any]:
    if name not in list_clusters():
        raise ClusterError(f"{where}: no device is called {name!r}{_nearest(name)}")
    return _toml("devices", f"{name}.toml")


def _toml(*parts: str) -> dict[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath("data", *parts).read_text())


def _merged(base: Mapping[str, Any] | None, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    _only(table, ("preset", "name", "kind", "peak_flops", "efficiencies", *_FIGURES), f"{where}: field device")
    merged: dict[str, Any] = dict(base) if base is not None else {"name": "device", "kind": "gpu"}
    for key, value in table.items():
        if key in ("peak_flops", "efficiencies"):
            if not isinstance(value, dict):
                raise ClusterError(f"{where}: field device.{key}: expected a table, found {value!r}")
            merged[key] = {**merged.get(key, {}), **value}
        elif key != "preset":
            merged[key] = value
    for key, neutral in _NEUTRAL.items():
        merged.setdefault(key, neutral)
    return merged


def _device(data: Mapping[str, Any], *, where: str) -> Device:
    sources: dict[str, str] = {}
    values = {key: _figure(data, key, key, where, sources) for key in _FIGURES}
    peaks, factors = data.get("peak_flops", {}), {**_toml("efficiencies.toml"), **data.get("efficiencies", {})}
    if not peaks:
        raise ClusterError(f"{where}.peak_flops: missing; give FLOP/s for at least one dtype")
    return Device(
        name=str(data.get("name", "device")),
        memory_bytes=int(values["memory_bytes"]),
        peak_flops={k: _figure(peaks, k, f"peak_flops.{k}", where, sources) for k in peaks},
        memory_bytes_per_second=values["memory_bytes_per_second"],
        kernel_overhead_seconds=values["kernel_overhead_seconds"],
        efficiencies={k: _figure(factors, k, f"efficiencies.{k}", where, sources) for k in factors},
        compute_units=int(values["compute_units"]),
        contraction_half=values["contraction_half"],
        issue_seconds=values["issue_seconds"],
        context_bytes=int(values["context_bytes"]),
        kind=str(data.get("kind", "gpu")),
        sources=sources,
    )


def _figure(data: Mapping[str, Any], key: str, label: str, where: str, sources: dict[str, str]) -> float:
    """A non-negative number, plain or with its source, noted in `sources`."""
    if key not in data:
        raise ClusterError(f"{where}.{label}: missing")
    found = data[key]
    value = found.get("value") if isinstance(found, dict) else found
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ClusterError(f"{where}.{label}: expected a non-negative number, found {value!r}")
    if value == 0 and ("." in label or key in ("memory_bytes", "memory_bytes_per_second")):
        raise ClusterError(f"{where}.{label}: must be more than 0")
    sources[label] = str(found.get("source", "given in the file")) if isinstance(found, dict) else "given in the file"
    return float(value)


def _file_levels(levels: Any, devices: int, where: str) -> tuple[Level, ...]:
    if not isinstance(levels, list) or not levels or not all(isinstance(v, dict) for v in levels):
        raise ClusterError(f"{where}: field level: expected [[level]] tables")
    built: list[Level] = []
    for index, table in enumerate(levels):
        label = f"{where}: level {index + 1}"
        _only(table, ("name", "ranks", "source", *_LINK), label)
        notes: dict[str, str] = {}
        figures = {"efficiency": 1.0, "latency_seconds": 0.0, "launch_seconds": 0.0, **table}
        values = {key: _figure(figures, key, key, label, notes) for key in _LINK}
        if values["bytes_per_second"] <= 0 or not 0 < values["efficiency"] <= 1:
            raise ClusterError(f"{label}: bytes_per_second must be more than 0 and efficiency in (0, 1]")
        ranks = _count(table, "ranks", label)
        if built and (ranks <= built[-1].ranks or ranks % built[-1].ranks):
            raise ClusterError(
                f"{label}, field ranks: {ranks} must be a multiple of the level below ({built[-1].ranks})"
            )
        source = str(table.get("source", "; ".join(dict.fromkeys(notes.values()))))
        built.append(Level(str(table.get("name", f"level-{index + 1}")), ranks, source=source, **values))
    if built[-1].ranks < devices:
        raise ClusterError(f"{where}: the last level joins {built[-1].ranks} ranks, the cluster has {devices}")
    return tuple(built)


def _count(data: Mapping[str, Any], key: str, where: str) -> int:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ClusterError(f"{where}: field {key}: expected a whole number of at least 1, found {value!r}")
    return value


def _only(data: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ClusterError(f"{where}: unknown field {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))


def _rate(spec: str, number: str | None, unit: str | None) -> float | None:
    if number is None:
        return None
    try:
        rate = float(number) * _RATES[unit or ""]
    except (KeyError, ValueError):
        raise ClusterError(
            f"cluster {spec!r}: rate {number}{unit}: expected {', '.join(_RATES)}, as in @3200Gbps"
        ) from None
    if rate <= 0:
        raise ClusterError(f"cluster {spec!r}: the network rate must be more than 0")
    return rate


def _nearest(text: str) -> str:
    names = [*list_clusters(), "local", "local-cpu"]
    asked = text.partition(":")[0].lower()
    begun = [n for n in names if asked and n.startswith(asked)]
    close = begun or difflib.get_close_matches(asked, names, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(names)}"

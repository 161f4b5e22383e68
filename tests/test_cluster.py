"""Clusters: strings and files to clusters, the levels a group crosses, and collective formulas."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from shardwright.errors import ClusterError
from shardwright.planner.cluster import Cluster, Level, default_limit_bytes
from shardwright.planner.collectives import (
    COLLECTIVES,
    collective_seconds,
    interpolate,
    level_route,
    measured_seconds,
    wire_bytes,
)
from shardwright.profiles.devices import describe, list_clusters, load_device, parse_bytes, parse_cluster

PRESETS = [
    "v100-sxm-16gb", "v100-sxm-32gb", "a100-sxm-40gb", "a100-sxm-80gb", "a100-pcie-40gb", "a100-pcie-80gb", "h100-sxm",
    "h100-pcie", "h200-sxm", "b200-sxm", "gb200", "mi250x", "mi300x", "t4", "l4", "a10g", "rtx-3090", "rtx-4090", "cpu",
]  # fmt: skip


def test_preset_names_are_those_promised() -> None:
    assert sorted(list_clusters()) == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_figure_of_a_preset_has_a_source(name: str) -> None:
    device = load_device(name)
    for datum in (
        "memory_bytes",
        "memory_bytes_per_second",
        "kernel_overhead_seconds",
        "compute_units",
        "context_bytes",
        "reserve_fraction",
        *(("communicator_bytes",) if device.kind == "gpu" else ()),
    ):
        assert device.sources[datum]
    assert all(device.sources[f"peak_flops.{dtype}"] for dtype in device.peak_flops)
    assert all(device.sources[f"efficiencies.{kind}"] for kind in device.efficiencies)
    assert all(0 < share <= 1 for share in device.efficiencies.values())
    assert all(level["source"] for level in describe(name)["levels"])
    assert 0 < device.reserve_fraction < 0.2
    assert {"float32", "float64"} <= set(device.peak_flops)


def test_nodes_and_network_of_a_cluster_string() -> None:
    cluster = parse_cluster("h100-sxm:8x4")
    assert (cluster.devices, cluster.per_node) == (32, 8)
    assert [(v.name, v.ranks, v.bytes_per_second) for v in cluster.levels] == [
        ("nvlink4", 8, 450e9),
        ("infiniband-3200", 32, 50e9),
    ]
    slower = parse_cluster("h100-sxm:8x4@800Gbps")
    assert slower.levels[1].bytes_per_second == pytest.approx(800e9 / 8 / 8)
    assert len(parse_cluster("h100-sxm:8").levels) == 1
    assert default_limit_bytes(cluster) == int(cluster.device.memory_bytes * (1 - cluster.device.reserve_fraction))
    assert default_limit_bytes(parse_cluster("h100-sxm:8", memory_limit="12GiB")) == 12 * 2**30


def test_a_switch_fabric_joins_several_nodes() -> None:
    assert len(parse_cluster("gb200:4x18").levels) == 1
    assert [v.ranks for v in parse_cluster("gb200:4x32").levels] == [64, 128]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("h100:8", ["'h100'", "h100-sxm"]),
        ("h100-sxm", ["how many", "h100-sxm:8"]),
        ("h100-sxm:16", ["one node", "h100-sxm:8x2"]),
        ("h100-sxm:0", ["at least 1"]),
        ("h100-sxm:8x0", ["at least 1"]),
        ("h100-sxm:8x4@3200", ["@RATE"]),
        ("h100-sxm:8x4@10Gb", ["10Gb", "Gbps"]),
        ("h100-sxm:8x4@0Gbps", ["more than 0"]),
        ("H100-SXM:8", ["h100-sxm"]),
        ("", ["expected"]),
        ("h100-sxm:8 x4", ["expected"]),
        ("nothing.toml", ["nothing.toml", "cannot be read"]),
        ("local:0", ["at least 1"]),
    ],
)
def test_malformed_clusters_say_what_would_do(spec: str, words: list[str]) -> None:
    with pytest.raises(ClusterError) as caught:
        parse_cluster(spec)
    for word in words:
        assert word in str(caught.value)


def test_naming_a_cluster_imports_no_torch() -> None:
    code = "import sys; from shardwright.profiles.devices import *; parse_cluster('h100-sxm:8x4'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(("text", "size"), [("12GiB", 12 * 2**30), ("80GB", 80 * 10**9), ("512 MiB", 2**29), ("7", 7)])
def test_memory_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12 parsecs", "-3GB", "0GB"])
def test_malformed_memory_sizes(text: str) -> None:
    with pytest.raises(ClusterError, match="memory size"):
        parse_bytes(text)


POOLED = "h100-sxm:8x2+a100-sxm-80gb:8x4"

FILE = """
name = "mine"
devices_per_node = 4
nodes = 2
[device]
preset = "a100-sxm-40gb"
memory_bytes = 48e9
[device.efficiencies]
matmul = 0.5
[[level]]
name = "inside"
ranks = 4
bytes_per_second = 100e9
latency_seconds = 2e-6
[[level]]
name = "outside"
ranks = 8
bytes_per_second = { value = 6e9, source = "measured by hand" }
"""


def test_a_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(FILE)
    cluster = parse_cluster(str(path))
    assert (cluster.name, cluster.devices, cluster.device.memory_bytes) == ("mine", 8, 48 * 10**9)
    assert cluster.device.efficiency("matmul") == 0.5
    assert cluster.device.peak("bfloat16") == 312e12
    assert "measured by hand" in cluster.levels[1].source
    path.write_text('device = "h100-sxm"\ndevices_per_node = 8\nnodes = 2\n')
    assert [v.name for v in parse_cluster(str(path)).levels] == ["nvlink4", "infiniband-3200"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("nodes = 2", "nodes = 0", ["nodes", "at least 1"]),
        ("nodes = 2", "", ["nodes"]),
        ("nodes = 2", "nods = 2", ["nods", "nodes"]),
        ("48e9", '"a lot"', ["memory_bytes", "a lot"]),
        ("48e9", "0", ["memory_bytes", "more than 0"]),
        ("ranks = 8", "ranks = 6", ["ranks", "multiple"]),
        ("nodes = 2", "nodes = 3", ["joins 8", "12"]),
        ("bytes_per_second = 100e9", "", ["level 1", "bytes_per_second", "missing"]),
        ("latency_seconds", "latency", ["latency_seconds"]),
        ('"a100-sxm-40gb"', '"a100"', ["cluster.toml", "field device", "a100-sxm-40gb"]),
        ("matmul = 0.5", "matmul = -1", ["efficiencies.matmul"]),
        ("[device]", "[device", ["not TOML"]),
    ],
)
def test_errors_in_a_cluster_file_name_file_and_field(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(FILE.replace(old, new, 1))
    with pytest.raises(ClusterError) as caught:
        parse_cluster(str(path))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("spec", ["h100-sxm:8x4", "gb200:4x32", "rtx-4090:2", "cpu:4", POOLED])
def test_clusters_round_trip_through_json(spec: str) -> None:
    cluster = parse_cluster(spec, memory_limit="10GiB")
    again = Cluster.from_dict(json.loads(json.dumps(cluster.to_dict())))
    assert again == cluster
    assert again.fingerprint() == cluster.fingerprint()
    with pytest.raises(ClusterError, match="levels"):
        Cluster.from_dict({k: v for k, v in cluster.to_dict().items() if k != "levels"})


def test_fingerprints_tell_machines_apart() -> None:
    specs = ["h100-sxm:8x4", "h100-sxm:8x2", "h100-sxm:4x8", "h100-sxm:8x4@800Gbps", "h200-sxm:8x4", POOLED]
    clusters = [parse_cluster(s) for s in specs]
    clusters += [replace(clusters[0], host=None), replace(clusters[-1], pools=clusters[-1].pools[::-1])]
    assert len({cluster.fingerprint() for cluster in clusters}) == len(clusters)


@pytest.mark.parametrize(
    ("stride", "size", "hops"),
    [
        (1, 8, [("nvlink4", 1, 8)]),
        (2, 4, [("nvlink4", 1, 4)]),
        (8, 4, [("infiniband-3200", 1, 4)]),
        (4, 8, [("nvlink4", 1, 2), ("infiniband-3200", 2, 8)]),
        (1, 32, [("nvlink4", 1, 8), ("infiniband-3200", 8, 32)]),
        (1, 1, []),
    ],
)
def test_levels_a_group_crosses(stride: int, size: int, hops: list[tuple[str, int, int]]) -> None:
    cluster = parse_cluster("h100-sxm:8x4")
    assert [(h.level.name, h.below, h.within) for h in cluster.route(stride, size).hops] == hops


def test_groups_that_straddle_nodes_use_the_network() -> None:
    cluster = parse_cluster("h100-sxm:6x2")
    assert cluster.level_of(1, 4).name == "infiniband-3200"
    assert cluster.level_of(1, 3).name == "nvlink4"
    with pytest.raises(ClusterError, match="do not fit"):
        cluster.route(4, 4)


def test_concurrent_groups_share_the_network() -> None:
    cluster = parse_cluster("h100-sxm:8x4")
    alone, all_ranks = cluster.route(8, 4).hops[-1], cluster.route(1, 32).hops[-1]
    assert all_ranks.ring_bytes_per_second == pytest.approx(8 * alone.ring_bytes_per_second)
    assert all_ranks.pair_bytes_per_second == pytest.approx(alone.pair_bytes_per_second)


ALPHA, BETA = 1e-6, 1e-9
PLAIN = Level("plain", 64, 1 / BETA, ALPHA)


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_alpha_beta_formulas(p: int) -> None:
    """techniques.md F6; large tensors, where the ring is the best all-reduce."""
    full, route = 1e9, level_route(PLAIN, p)
    ring = (p - 1) * ALPHA + (p - 1) / p * full * BETA
    assert collective_seconds("all_gather", full, route) == pytest.approx(ring)
    assert collective_seconds("reduce_scatter", full, route) == pytest.approx(ring)
    assert collective_seconds("all_reduce", full, route) == pytest.approx(2 * ring)
    assert collective_seconds("all_to_all", full, route) == pytest.approx(
        (p - 1) * ALPHA + (p - 1) / p**2 * full * BETA
    )


def test_small_all_reduces_go_up_a_tree() -> None:
    assert collective_seconds("all_reduce", 0.0, level_route(PLAIN, 8)) == pytest.approx(6 * ALPHA)  # ring: 14
    assert collective_seconds("all_reduce", 0.0, level_route(PLAIN, 64)) == pytest.approx(12 * ALPHA)


@pytest.mark.parametrize("p", [2, 4, 8])
def test_bytes_over_the_group(p: int) -> None:
    """techniques.md F7, summed over the group."""
    total = {name: p * wire_bytes(name, 1.0, p) for name in COLLECTIVES}
    assert total == pytest.approx(
        {"all_reduce": 2 * (p - 1), "all_gather": p - 1, "reduce_scatter": p - 1, "all_to_all": (p - 1) / p}
    )


@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize(("stride", "size"), [(1, 2), (1, 8), (8, 4), (1, 32), (4, 8)])
def test_collectives_are_monotone(name: str, stride: int, size: int) -> None:
    """More bytes never take less time, and a faster network never takes more."""
    slow, fast = parse_cluster("h100-sxm:8x4@400Gbps"), parse_cluster("h100-sxm:8x4")
    seconds = [collective_seconds(name, 2.0**b, slow.route(stride, size)) for b in range(0, 34)]
    assert seconds == sorted(seconds)
    assert collective_seconds(name, 1e8, fast.route(stride, size)) <= collective_seconds(
        name, 1e8, slow.route(stride, size)
    )


def test_measured_rows_come_first_and_are_interpolated() -> None:
    table = {("all_reduce", "gloo", 2): ((1024.0, 1e-4), (2.0**20, 1e-3))}
    middle = measured_seconds(table, "all_reduce", 2.0**15, 2, "gloo")
    assert middle == pytest.approx(math.sqrt(1e-4 * 1e-3))
    assert measured_seconds(table, "all_reduce", 1.0, 2, "gloo") == 1e-4
    assert measured_seconds(table, "all_reduce", 2.0**21, 2, "gloo") == pytest.approx(2e-3)
    assert measured_seconds(table, "all_reduce", 1.0, 4, "gloo") is None
    assert interpolate(((1.0, 5.0),), 2.0) == 10.0

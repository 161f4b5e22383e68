"""What clusters hold besides equal devices: host and disk tiers, overlap, pools of unlike devices, deep hierarchies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from shardwright.errors import ClusterError
from shardwright.planner.cluster import Cluster, default_limit_bytes
from shardwright.planner.collectives import cluster_seconds
from shardwright.profiles.devices import describe, list_clusters, load_device, parse_cluster

POOLED = "h100-sxm:8x2+a100-sxm-80gb:8x4"


@pytest.mark.parametrize("name", list_clusters())
def test_every_preset_tells_its_host_and_overlap_with_sources(name: str) -> None:
    told = describe(name)
    figures = told["figures"]
    assert all(figures[key][1] for key in ("overlap_fraction", "overlap_slowdown"))
    host = parse_cluster(f"{name}:{told['usual_node']}").host
    if name == "cpu":
        assert host is None
        assert not told["host_figures"]
        assert figures["overlap_fraction"][0] == 0.0
        return
    assert host is not None
    assert 0 < figures["overlap_fraction"][0] < 1 < figures["overlap_slowdown"][0] < 1.5
    assert {"host_bytes", "copy_bytes_per_second", "disk_bytes"} <= set(told["host_figures"])
    assert all(figures[key][0] > 0 and figures[key][1] for key in told["host_figures"])
    assert host.rank_host_bytes >= parse_cluster(f"{name}:1").device.memory_bytes  # else nothing is worth offloading
    assert 1e9 < host.copy_bytes_per_second < host.rank_host_memory_bytes_per_second
    assert host.rank_disk_bytes > host.rank_host_bytes
    assert 1e-10 < host.host_update_seconds_per_element < 1e-8


def test_nodes_of_other_sizes_are_slices() -> None:
    eight, two = parse_cluster("h100-sxm:8x2").host, parse_cluster("h100-sxm:2").host
    assert eight is not None
    assert two is not None
    assert (eight.ranks, two.ranks, two.host_bytes) == (8, 2, eight.host_bytes // 4)
    assert two.rank_disk_read_bytes_per_second == eight.rank_disk_read_bytes_per_second
    assert two.rank_cost_per_hour == eight.rank_cost_per_hour == pytest.approx(55.04 / 8)
    assert parse_cluster("h100-sxm:8x2").cost_per_hour == pytest.approx(2 * 55.04)
    assert parse_cluster("gb200:4").cost_per_hour is None


HOSTED = """
devices_per_node = 4
nodes = 2
[device]
preset = "a100-sxm-40gb"
[device.efficiencies]
matmul = 0.5
[host]
host_bytes = 1e12
cost_per_hour = { value = 3.5, source = "our own books" }
[[level]]
name = "all"
ranks = 8
bytes_per_second = 100e9
"""


def test_host_and_overlap_of_a_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(HOSTED.replace("[device.efficiencies]", "[device.overlap]\nslowdown = 1.3\n[device.efficiencies]"))
    cluster = parse_cluster(str(path))
    assert cluster.host is not None
    assert (cluster.host.host_bytes, cluster.host.ranks, cluster.host.cost_per_hour) == (10**12, 4, 3.5)
    assert cluster.host.source("cost_per_hour") == "our own books"
    usual = parse_cluster("a100-sxm-40gb:4").host
    assert usual is not None
    assert cluster.host.disk_bytes == usual.disk_bytes  # what is not said is the preset's
    assert (cluster.device.overlap_fraction, cluster.device.overlap_slowdown) == (0.9, 1.3)
    path.write_text('device = "h100-sxm"\ndevices_per_node = 8\nnodes = 2\nhost = false\n')
    assert parse_cluster(str(path)).host is None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("host_bytes = 1e12", "host_byte = 1e12", ["field host", "host_byte'", "host_bytes"]),
        ("host_bytes = 1e12", 'host_bytes = "much"', ["field host.host_bytes", "much"]),
        ("host_bytes = 1e12", "duplex_fraction = 2", ["host.duplex_fraction", "(0, 1]"]),
        ("host_bytes = 1e12", "disk_read_bytes_per_second = 0", ["field host", "disk_read"]),
        ("bytes_per_second = 100e9", "bytes_per_second = 1e9\noversubscription = 0.5", ["level 1", "oversubscription"]),
        ("[device.efficiencies]", "[device.overlap]\nfraction = 1.5\n[device.efficiencies]", ["overlap", "[0, 1]"]),
    ],
)
def test_errors_in_tiers_name_the_field(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(HOSTED.replace(old, new, 1))
    with pytest.raises(ClusterError) as caught:
        parse_cluster(str(path))
    for word in words:
        assert word in str(caught.value)


def test_pools_of_a_cluster_string() -> None:
    cluster = parse_cluster(POOLED, memory_limit="40GiB")
    first, second = cluster.pool_list()
    assert (cluster.devices, first.devices, second.devices) == (48, 16, 32)
    assert cluster.device == first.device == load_device("h100-sxm")
    sub = cluster.sub(second)
    alone = parse_cluster("a100-sxm-80gb:8x4", memory_limit="40GiB")
    assert replace(sub, name=alone.name, spec=alone.spec) == alone
    assert [(v.name, v.ranks) for v in cluster.levels] == [
        ("nvlink3", 8),
        ("infiniband-1600", 48),
    ]  # the slower of each
    assert cluster.cost_per_hour == pytest.approx(2 * 55.04 + 4 * 27.44705)
    small = default_limit_bytes(parse_cluster("a100-sxm-40gb:8"))
    assert default_limit_bytes(parse_cluster("h200-sxm:8+a100-sxm-40gb:8")) == small
    plain = parse_cluster("h100-sxm:8x2")
    assert [(p.device, p.devices) for p in plain.pool_list()] == [(plain.device, 16)]
    assert parse_cluster("h100-sxm:8+l4:8").levels[-1].name == "ethernet-100"
    assert parse_cluster("h100-sxm:8@100Gbps+a100-sxm-80gb:8").levels[-1].bytes_per_second == pytest.approx(100e9 / 64)


POOL_FILE = """
name = "two kinds"
[[pool]]
name = "new"
device = "h100-sxm"
devices_per_node = 8
nodes = 2
[[pool]]
device = "a100-sxm-80gb"
devices_per_node = 4
nodes = 3
[pool.host]
host_bytes = 1e12
[[pool.level]]
name = "inside"
ranks = 12
bytes_per_second = 100e9
[[level]]
name = "between"
bytes_per_second = 5e9
latency_seconds = 1e-5
"""


def test_pools_of_a_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(POOL_FILE)
    cluster = parse_cluster(str(path))
    assert [(p.name, p.devices, p.per_node) for p in cluster.pools] == [("new", 16, 8), ("two kinds-2", 12, 4)]
    assert [(v.name, v.ranks) for v in cluster.levels] == [("inside", 4), ("between", 28)]
    assert cluster.pools[1].host is not None
    assert cluster.pools[1].host.host_bytes == 10**12
    assert cluster.sub(cluster.pools[1]).route(1, 12).hops[-1].level.name == "inside"
    again = Cluster.from_dict(json.loads(json.dumps(cluster.to_dict())))
    assert (again, again.fingerprint()) == (cluster, cluster.fingerprint())
    path.write_text(POOL_FILE[: POOL_FILE.index("[[level]]")].replace("ranks = 12", "ranks = 24"))
    assert [v.name for v in parse_cluster(str(path)).levels] == ["inside", "infiniband-3200"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("h100-sxm:8x2+a100:8", ["pool 2", "'a100:8'", "a100-sxm"]),
        ("h100-sxm:8x2+", ["pool 2", "expected"]),
        ("h100-sxm+l4:8", ["pool 1", "how many"]),
        ("local:2+l4:8", ["pool 1", "local"]),
        ("h100-sxm:8+l4:8@9Gb", ["pool 2", "9Gb"]),
    ],
)
def test_malformed_pools_name_the_pool(spec: str, words: list[str]) -> None:
    with pytest.raises(ClusterError) as caught:
        parse_cluster(spec)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("nodes = 3", "nodes = 0", ["pool 2", "nodes", "at least 1"]),
        ("nodes = 3", "node = 3", ["pool 2", "node'", "nodes"]),
        ('device = "a100-sxm-80gb"', 'device = "a100"', ["pool 2", "field device"]),
        ("ranks = 12", "ranks = 10", ["pool 2", "joins 10", "12"]),
        ('name = "between"', 'name = "between"\nranks = 20', ["joins 20", "28"]),
        ('name = "two kinds"', "nodes = 4", ["a file of pools", "nodes"]),
        ('[[level]]\nname = "between"\nbytes_per_second = 5e9\nlatency_seconds = 1e-5', "", []),
    ],
)
def test_errors_in_a_file_of_pools_name_the_place(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(POOL_FILE.replace(old, new, 1))
    if not words:
        assert len(parse_cluster(str(path)).levels) == 2
        return
    with pytest.raises(ClusterError) as caught:
        parse_cluster(str(path))
    for word in words:
        assert word in str(caught.value)


DEEP = """
device = "mi250x"
devices_per_node = 8
nodes = 32
[[level]]
name = "package"
ranks = 2
bytes_per_second = 200e9
latency_seconds = 1e-6
[[level]]
name = "node"
ranks = 8
bytes_per_second = 50e9
latency_seconds = 2e-6
[[level]]
name = "rack"
ranks = 64
bytes_per_second = 12e9
latency_seconds = 4e-6
[[level]]
name = "spine"
ranks = 256
bytes_per_second = 12e9
oversubscription = 4
latency_seconds = 8e-6
"""


def test_four_levels_with_an_oversubscribed_spine(tmp_path: Path) -> None:
    """Package, node, rack and spine: what a ring and an all-to-all over all of them pay (techniques.md F6)."""
    path = tmp_path / "deep.toml"
    path.write_text(DEEP)
    cluster = parse_cluster(str(path))
    route = cluster.route(1, 256)
    assert [(h.level.name, h.below, h.within) for h in route.hops] == [
        ("package", 1, 2), ("node", 2, 8), ("rack", 8, 64), ("spine", 64, 256)
    ]  # fmt: skip
    assert cluster.level_of(8, 8).name == "rack"
    assert cluster.level_of(64, 4).name == "spine"
    full = 256e6
    # The ring: 64 ranks of a rack share their 64 uplinks of 3 GB/s, a node's 8 theirs, a package's 2 theirs.
    slowest = min(200e9, 50e9 * 2, 12e9 * 8, 12e9 / 4 * 64)
    latency = 128 * 1e-6 + 96 * 2e-6 + 28 * 4e-6 + 3 * 8e-6
    assert cluster_seconds(cluster, "all_gather", full, 1, 256) == pytest.approx(latency + 255 / 256 * full / slowest)
    # The all-to-all: three quarters of a rank's 1 MB cross the spine at its own 3 GB/s.
    hops = 1 * 1e-6 + 6 * 2e-6 + 56 * 4e-6 + 192 * 8e-6
    assert cluster_seconds(cluster, "all_to_all", full, 1, 256) == pytest.approx(1e6 * 192 / 256 / 3e9 + hops)
    # One rank of each rack: every group has one uplink of each rack to itself.
    far = cluster_seconds(cluster, "all_gather", full, 64, 4)
    assert far == pytest.approx(3 * 8e-6 + 0.75 * full / 3e9)
    assert far > 3.9 * cluster_seconds(cluster, "all_gather", full, 8, 4)

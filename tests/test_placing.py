"""Where the axes of a mesh land: strides, levels, sends between stages, and axis orders."""

from __future__ import annotations

from itertools import product

import pytest
from shardwright.errors import ClusterError
from shardwright.planner.cluster import Cluster
from shardwright.planner.placing import (
    axis_levels,
    axis_orders,
    axis_strides,
    join_seconds,
    send_level,
    send_seconds,
    wrap_seconds,
)
from shardwright.profiles.devices import parse_cluster

ORDER = ("pp", "dp", "ep", "cp", "tp")


def test_the_innermost_axis_is_fastest() -> None:
    assert axis_strides(ORDER, {"pp": 2, "dp": 4, "tp": 8}) == {"tp": 1, "cp": 8, "ep": 8, "dp": 8, "pp": 32}


def test_axes_land_on_levels() -> None:
    places = {p.name: p for p in axis_levels(parse_cluster("h100-sxm:8x4"), ORDER, {"pp": 2, "dp": 4, "tp": 4})}
    assert places["tp"].levels == ("nvlink4",)
    assert places["dp"].levels == ("nvlink4", "infiniband-3200")  # two of the four in each node
    assert places["pp"].levels == ("infiniband-3200",)
    assert places["cp"].levels == ()
    assert (places["dp"].stride, places["pp"].stride) == (4, 16)


@pytest.mark.parametrize(
    ("order", "sizes", "words"),
    [
        (ORDER, {"pp": 2, "tp": 8}, ["16 ranks", "32 devices"]),
        (("dp", "tp"), {"pp": 2, "dp": 2, "tp": 8}, ["leaves out pp"]),
    ],
)
def test_meshes_that_do_not_fit_are_refused(order: tuple[str, ...], sizes: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ClusterError) as caught:
        axis_levels(parse_cluster("h100-sxm:8x4"), order, sizes)
    for word in words:
        assert word in str(caught.value)


def test_orders_that_land_alike_are_given_once() -> None:
    cluster = parse_cluster("h100-sxm:8x4")
    assert axis_orders(cluster, {"tp": 8, "dp": 4}) == (("pp", "dp", "ep", "cp", "tp"),)
    both = axis_orders(cluster, {"pp": 4, "dp": 4, "tp": 2})
    assert [order[0] for order in both] == ["pp", "dp"]
    assert all(order[2:] == ("ep", "cp", "tp") for order in both)
    assert len(axis_orders(parse_cluster("h100-sxm:8"), {"pp": 2, "dp": 2, "tp": 2})) == 1  # one level: no difference
    assert len(axis_orders(cluster, {"pp": 2, "dp": 2, "tp": 8})) == 1  # both cross the network only


def test_pools_keep_the_pipeline_outermost() -> None:
    cluster = parse_cluster("h100-sxm:8x2+a100-sxm-80gb:8x2")
    assert axis_orders(cluster, {"pp": 4, "dp": 4, "tp": 2}) == (("pp", "dp", "ep", "cp", "tp"),)


def test_sends_between_stages() -> None:
    """alpha + T beta on the level crossed (techniques.md F6), a rank's share of the node's network."""
    cluster = parse_cluster("h100-sxm:8x4")
    inside, outside = cluster.levels
    assert send_level(cluster, 4, start=0) is inside
    assert send_level(cluster, 4, start=4) is outside
    assert send_level(cluster, 4) is outside
    assert send_level(cluster, 4, size=2) is inside  # pipelines of two stages, one to a node
    assert send_level(cluster, 8) is outside
    expected = outside.launch_seconds + outside.latency_seconds + 1e9 / (50e9 * outside.efficiency)
    assert send_seconds(cluster, 1e9, 8) == pytest.approx(expected)
    assert send_seconds(cluster, 0.0, 8) == 0.0
    assert join_seconds(cluster, 1e9) == pytest.approx(expected)
    with pytest.raises(ClusterError, match="no pipeline"):
        send_seconds(cluster, 1.0, 32)


def test_the_way_back_to_the_first_stage() -> None:
    cluster = parse_cluster("h100-sxm:8x4")
    assert wrap_seconds(cluster, 1e6, 2, 4) == pytest.approx(send_seconds(cluster, 1e6, 2, start=0))  # inside a node
    assert wrap_seconds(cluster, 1e6, 2, 8) == pytest.approx(send_seconds(cluster, 1e6, 8))
    assert wrap_seconds(cluster, 1e6, 2, 1) == 0.0


@pytest.mark.parametrize("spec", ["h100-sxm:8x4", "gb200:4x32", "h100-sxm:6x4"])
def test_the_level_of_a_send_by_looking_at_every_rank(spec: str) -> None:
    cluster = parse_cluster(spec)
    for stride, start in product((1, 2, 3, 4, 6, 8), range(0, 20)):
        if start + 2 * stride <= cluster.devices:
            assert send_level(cluster, stride, start) == _by_ranks(cluster, stride, start)


def _by_ranks(cluster: Cluster, stride: int, start: int) -> object:
    def level(a: int, b: int) -> int:
        return next(i for i, one in enumerate(cluster.levels) if a // one.ranks == b // one.ranks)

    return cluster.levels[max(level(rank, rank + stride) for rank in range(start, start + stride))]


def test_pools_meet_on_the_slower_network() -> None:
    cluster = parse_cluster("h100-sxm:8x2+a100-sxm-80gb:8x2")
    slow = parse_cluster("a100-sxm-80gb:8x2").levels[-1]
    expected = slow.launch_seconds + slow.latency_seconds + 1e8 / (slow.bytes_per_second * slow.efficiency)
    assert join_seconds(cluster, 1e8) == pytest.approx(expected)

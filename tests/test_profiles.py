"""Measurements on this machine: single ops, collectives, and this machine as a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shardwright.errors import ClusterError, LaunchError
from shardwright.planner.cluster import MEASURED, Cluster
from shardwright.planner.collectives import COLLECTIVES, SEND
from shardwright.planner.placing import send_price
from shardwright.planner.prices import Prices
from shardwright.planner.rule_types import Operand
from shardwright.profiles import local
from shardwright.profiles.comms import SEND_SIZES, SIZES, rising
from shardwright.profiles.devices import parse_cluster
from shardwright.profiles.jobs import run_ranks
from shardwright.profiles.ops import (
    OpRequest,
    argument_text,
    decode_request,
    encode_request,
    key_text,
    parse_key,
    time_requests,
)

LINEAR = OpRequest(
    "aten.linear", (((8, 16), "float32", True), ((4, 16), "float32", True)), (Operand(0), Operand(1)), {}, "[]"
)
SOFTMAX = OpRequest("aten.softmax", (((8, 16), "float32", True),), (Operand(0), -1), {"dtype": torch.float64})
TAKE = OpRequest("aten.embedding", (((9, 4), "float32", True), ((3, 5), "int64", False)), (Operand(0), Operand(1)), {})
LOSS = OpRequest(
    "aten.cross_entropy_loss",
    (((6, 50), "float32", True), ((6,), "int64", False)),
    (Operand(0), Operand(1), None, 2),
    {},
)
COS = OpRequest("aten.cos", (((5,), "float32", False),), (Operand(0),), {})
CAT = OpRequest("aten.cat", (((2, 3), "float32", True),) * 2, ([Operand(0), Operand(1)], 1), {})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles") / "profiles.sqlite"


@pytest.fixture(scope="module")
def pair(store: Path) -> Cluster:
    """Two CPU ranks of this machine, measured once for the module."""
    return parse_cluster("local-cpu:2", cache=store)


@pytest.mark.parametrize("request_", [LINEAR, SOFTMAX, TAKE, LOSS, CAT])
def test_requests_survive_json(request_: OpRequest) -> None:
    again = decode_request(json.loads(json.dumps(encode_request(request_))))
    assert again.key == request_.key
    assert parse_key(key_text(request_.key)) == request_.key
    assert argument_text(again.args, again.kwargs) == argument_text(request_.args, request_.kwargs)


def test_arguments_without_a_text() -> None:
    odd = OpRequest("aten.cos", (((5,), "float32", False),), (Operand(0), object()), {})
    assert encode_request(odd) is None
    assert argument_text(odd.args, odd.kwargs) == ""
    assert argument_text((Operand(0), 1e-5), {}) != argument_text((Operand(0), 1e-6), {})


def test_ops_are_timed_both_ways() -> None:
    rows = time_requests([LINEAR, SOFTMAX, TAKE, LOSS, CAT, COS], 30.0)
    assert set(rows) == {r.key for r in (LINEAR, SOFTMAX, TAKE, LOSS, CAT, COS)}
    assert all(0 < row.forward < 1 and row.error >= 0 for row in rows.values())
    assert all(row.backward > 0 for key, row in rows.items() if key != COS.key)
    assert rows[COS.key].backward == 0.0


def test_ops_that_cannot_be_called_are_left_out() -> None:
    unknown = OpRequest("aten.no_such_op", (((5,), "float32", False),), (Operand(0),), {})
    mismatched = OpRequest("aten.linear", (((8, 16), "float32", True), ((4, 15), "float32", True)), LINEAR.args, {})
    assert set(time_requests([unknown, mismatched, COS], 30.0)) == {COS.key}


def test_a_spent_budget_ends_the_timing() -> None:
    assert time_requests([COS, LINEAR], 0.0) == {}


def test_ranks_time_ops_together() -> None:
    encoded = [encode_request(r) for r in (LINEAR, COS)]
    found = run_ranks(2, 1, ["ops"], requests=encoded, budget=10.0)["ops"]
    assert {parse_key(text) for text in found} == {LINEAR.key, COS.key}


def test_a_failing_rank_is_reported() -> None:
    with pytest.raises(LaunchError, match=r"rank \d of 2 failed(.|\n)*no_such_task"):
        run_ranks(2, 1, ["no_such_task"])


def test_ranks_that_do_not_answer_are_ended() -> None:
    with pytest.raises(LaunchError, match="in time"):
        run_ranks(1, 1, ["machine"], timeout=0.1)


def test_disturbed_rows_are_mended() -> None:
    assert rising([(1, 5.0), (2, 1.0), (3, 3.0)]) == [(1, 1.0), (2, 1.0), (3, 3.0)]


def test_this_machine_as_a_cluster(pair: Cluster) -> None:
    device = pair.device
    assert (pair.devices, pair.per_node, device.kind) == (2, 2, "cpu")
    assert device.memory_bytes == local.memory_bytes() // 2
    assert {"float32", "float64", "bfloat16"} <= set(device.peak_flops)
    assert device.peak("float32") > 1e8
    assert device.source("memory_bytes_per_second").startswith("measured")
    assert device.source("peak_flops.float32").startswith("measured")
    assert Cluster.from_dict(json.loads(json.dumps(pair.to_dict()))) == pair


def test_measurements_are_kept_and_no_part_of_the_fingerprint(
    pair: Cluster, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_measuring(*_: object, **__: object) -> dict[str, object]:
        raise AssertionError("measured again")

    monkeypatch.setattr(local, "run_ranks", no_measuring)
    assert parse_cluster("local-cpu:2", cache=store) == pair
    slower = json.loads(json.dumps(pair.to_dict()))
    slower["device"]["peak_flops"]["float32"] /= 2
    slower["levels"][0]["bytes_per_second"] /= 2
    assert Cluster.from_dict(slower).fingerprint() == pair.fingerprint()
    slower["devices"] = 1
    assert Cluster.from_dict(slower).fingerprint() != pair.fingerprint()


def test_measured_collectives_price_this_machine(pair: Cluster, store: Path) -> None:
    table = local.local_collectives(pair, store=store)
    assert set(table) == {(name, "gloo", 2) for name in (*COLLECTIVES, SEND)}
    prices = Prices(pair, "float32", collectives=table)
    for (name, _, size), rows in table.items():
        sizes = SEND_SIZES if name == SEND else SIZES
        assert [row[0] for row in rows] == list(sizes)
        assert [s for _, s in rows] == sorted(s for _, s in rows)
        sent = float(sizes[2])
        found = send_price(prices, pair, sent, 1, size) if name == SEND else prices.collective(name, sent, 1, size)
        assert (found.seconds, found.source) == (rows[2][1], "measured")
    assert send_price(Prices(pair, "float32"), pair, 1e6, 1, 2).source == "datasheet"
    assert local.local_collectives(parse_cluster("h100-sxm:8"), store=store) == {}


def test_the_memory_and_disk_behind_cpu_ranks_are_measured(pair: Cluster) -> None:
    host = pair.host
    assert host is not None
    assert (host.ranks, host.host_bytes) == (2, local.memory_bytes())
    rates = ("copy_bytes_per_second", "host_memory_bytes_per_second", "host_update_seconds_per_element")
    for name in (*rates, "disk_bytes", "disk_read_bytes_per_second", "disk_write_bytes_per_second"):
        assert getattr(host, name) > 0
        assert host.source(name).startswith(MEASURED)


def test_too_many_ranks_for_the_memory() -> None:
    ranks = local.memory_bytes() // local.FLOOR + 1
    with pytest.raises(ClusterError, match="at most"):
        parse_cluster(f"local-cpu:{ranks}")


@pytest.mark.parametrize(
    ("title", "gigabytes", "preset"),
    [
        ("NVIDIA A100-SXM4-80GB", 85, "a100-sxm-80gb"),
        ("NVIDIA A100-PCIE-40GB", 42, "a100-pcie-40gb"),
        ("NVIDIA H100 80GB HBM3", 85, "h100-sxm"),
        ("NVIDIA H100 PCIe", 85, "h100-pcie"),
        ("NVIDIA GeForce RTX 4090", 25, "rtx-4090"),
        ("Tesla V100-SXM2-32GB", 34, "v100-sxm-32gb"),
        ("Tesla T4", 16, "t4"),
        ("NVIDIA GeForce GTX 1080", 8, None),
    ],
)
def test_presets_by_the_driver_s_name(title: str, gigabytes: int, preset: str | None) -> None:
    assert local.preset_name(title, gigabytes * 10**9) == preset

"""Calibrated clusters: every figure in seconds by one factor, so that predictions, bounds and gaps move together."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import runs
from shardwright.errors import ClusterError
from shardwright.planner.cluster import Cluster, Device, Host, Level, default_limit_bytes
from shardwright.planner.outline import Outline
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan
from shardwright.planner.planfile import dump_plan, parse_plan
from shardwright.planner.prices import OpRow, Prices, Rate
from shardwright.planner.repricing import reprice
from shardwright.planner.solve import Request, solve
from shardwright.planner.work import OpKey
from shardwright.profiles.calibrate import Calibration, Group, bare, calibrated, keep, release, scaled, with_stored
from shardwright.profiles.devices import parse_cluster
from shardwright.profiles.store import Store
from solver_outlines import FP32, SOURCE, transformer

FACTOR = 2.0
"""A power of two scales without rounding: equally good plans are told apart in the same way."""
NOTE = "calibrated x2 by 8 runs of the ledger, spread 4 %"
SPECS = ("h100-sxm:2", "a100-sxm-80gb:2x2", "l4:2", "cpu:2")


@cache
def model() -> Outline:
    return transformer(layers=4, batch=8, seq=512, hidden=512, heads=8, vocab=1024)


def planned(cluster: Cluster, *pins: str, limit: int | None = None) -> Plan:
    asked = Request(SOURCE, "adamw", FP32, limit or default_limit_bytes(cluster), parse_pins(pins))
    return solve(model(), cluster, Prices(cluster, "float32"), asked)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("pins", [(), ("offload=optimizer",), ("recompute=full", "zero=3")], ids=str)
def test_the_step_its_bound_and_every_second_scale(spec: str, pins: tuple[str, ...]) -> None:
    """All that a plan says in seconds is the factor times as long, so the gap and the decisions stay."""
    cluster = parse_cluster(spec)
    if cluster.host is None and pins == ("offload=optimizer",):
        pytest.skip("nothing lies behind this device")
    one, two = planned(cluster, *pins), planned(calibrated(cluster, FACTOR, NOTE), *pins)
    assert two.predicted.step_seconds == pytest.approx(FACTOR * one.predicted.step_seconds)
    assert two.search.bound_seconds == pytest.approx(FACTOR * one.search.bound_seconds)
    assert two.search.gap == pytest.approx(one.search.gap, abs=1e-9)
    assert two.predicted.mfu == pytest.approx(one.predicted.mfu / FACTOR)
    assert two.predicted.memory == one.predicted.memory
    assert two.regions == one.regions
    for name, seconds in one.predicted.seconds.items():
        assert two.predicted.seconds[name] == pytest.approx(FACTOR * seconds), name
    for a, b in zip(one.stages, two.stages, strict=True):
        assert b.forward_seconds == pytest.approx(FACTOR * a.forward_seconds)


def test_what_is_left_alone() -> None:
    """Peaks, memory and what has no unit of time stay; a field that is added must be decided upon here."""
    cluster = parse_cluster("h100-sxm:8x2")
    found = calibrated(cluster, FACTOR, NOTE)
    kept = {
        Device: {"name", "memory_bytes", "peak_flops", "memory_bytes_per_second", "compute_units", "contraction_half",
                 "context_bytes", "communicator_bytes", "reserve_fraction", "kind", "overlap_fraction", "overlap_slowdown",
                 "accuracy_low", "accuracy_high"},  # without runs of several plans
        Level: {"name", "ranks", "bytes_per_second"},
        Host: {"ranks", "host_bytes", "duplex_fraction", "disk_bytes", "cost_per_hour"},
    }  # fmt: skip
    moved = {
        Device: {"kernel_overhead_seconds", "issue_seconds", "efficiencies", "sources", "calibration"},
        Level: {"latency_seconds", "launch_seconds", "efficiency", "source"},
        Host: {"copy_bytes_per_second", "copy_latency_seconds", "host_memory_bytes_per_second", "sources",
               "host_update_seconds_per_element", "disk_read_bytes_per_second", "disk_write_bytes_per_second"},
    }  # fmt: skip
    pairs = [
        (cluster.device, found.device),
        (cluster.host, found.host),
        *zip(cluster.levels, found.levels, strict=True),
    ]
    for old, new in pairs:
        kind = type(old)
        assert {f.name for f in fields(kind)} == kept[kind] | moved[kind]  # type: ignore[arg-type,index]
        assert all(getattr(old, name) == getattr(new, name) for name in kept[kind])  # type: ignore[index]
    assert found.device.efficiency("matmul") == cluster.device.efficiency("matmul") / FACTOR
    assert found.device.efficiency("never seen") == cluster.device.efficiency("never seen") / FACTOR


def test_where_it_comes_from_is_said() -> None:
    found = calibrated(parse_cluster("h100-sxm:8x2"), FACTOR, NOTE)
    assert found.device.calibration == FACTOR
    assert found.device.source("calibration") == NOTE
    assert found.device.source("efficiencies.matmul").endswith(f", {NOTE}")
    assert NOTE not in found.device.source("peak_flops.bfloat16")
    assert all(level.source.endswith(NOTE) for level in found.levels)
    assert found.host is not None
    assert found.host.source("copy_bytes_per_second").endswith(NOTE)
    assert Cluster.from_dict(found.to_dict()) == found


def test_it_can_be_taken_off_again() -> None:
    cluster = parse_cluster("a100-sxm-80gb:8")
    again = bare(calibrated(cluster, 1.1, NOTE))
    assert again.device.calibration == pytest.approx(1.0)
    assert again.device.efficiency("matmul") == pytest.approx(cluster.device.efficiency("matmul"))
    assert again.levels[0].latency_seconds == pytest.approx(cluster.levels[0].latency_seconds)
    assert bare(cluster) is cluster
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="factor above zero"):
            calibrated(cluster, wrong, NOTE)


def test_measured_rows_scale_with_the_cluster() -> None:
    key = OpKey("aten.linear", (((8, 16), "float32", True),))
    prices = Prices(
        parse_cluster("l4:2"), "float32", ops={key: OpRow(1e-3, 2e-3, 0.05)}, rates={"matmul": Rate(1e9, 2e9, 1e-6, 0.1)},
        collectives={("all_reduce", "gloo", 2): ((1024, 1e-4), (4096, 2e-4))}, optimizer_rates={"adamw": 1e9}, copy_rate=2e9,
    )  # fmt: skip
    found = scaled(prices, 2.0)
    assert found.ops[key] == OpRow(2e-3, 4e-3, 0.05)
    assert found.rates["matmul"] == Rate(5e8, 1e9, 2e-6, 0.1)
    assert found.collectives["all_reduce", "gloo", 2] == ((1024, 2e-4), (4096, 4e-4))
    assert (found.optimizer_rates["adamw"], found.copy_rate) == (5e8, 1e9)
    untimed = {"cluster", "compute", "arguments", "fused", "products", "attention", "pieces"}
    timed = {"ops", "rates", "collectives", "optimizer_rates", "copy_rate"}
    assert {f.name for f in fields(Prices) if f.init} == untimed | timed  # a field that is added must be decided upon


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with a factor for one named device, from runs of three."""
    made = Store(tmp_path / "profiles.sqlite")
    keep(made, [Group("h100-sxm", "torch 2.11.0", runs.STACK, 3, 0, Calibration(1.12, 8, 0.04))])
    return made


def test_the_store_s_factor_is_used_for_its_device_stack_and_versions(store: Store) -> None:
    h100, a100 = parse_cluster("h100-sxm:8"), parse_cluster("a100-sxm-80gb:8")
    found = with_stored(h100, runs.STACK, "torch 2.11.0+cu130", store)
    assert found == calibrated(h100, 1.12, "calibrated x1.12 by 8 runs of the ledger, spread 4 %")
    assert with_stored(found, runs.STACK, "torch 2.11.0", store) is found  # not twice
    for other in (
        with_stored(a100, runs.STACK, "torch 2.11.0", store), with_stored(h100, "compiled", "torch 2.11.0", store),
        with_stored(h100, runs.STACK, "torch 2.12.0", store), with_stored(h100, runs.STACK, "torch 2.11.0", Store(None)),
    ):  # fmt: skip
        assert other.device.calibration == 1.0
    assert release("torch 2.11.0+cpu") == "torch 2.11.0"


def test_unlike_devices_get_each_their_own(store: Store) -> None:
    mixed = parse_cluster("h100-sxm:8+a100-sxm-80gb:8", "40GB")
    found = with_stored(mixed, runs.STACK, "torch 2.11.0", store)
    assert [pool.device.calibration for pool in found.pools] == [1.12, 1.0]
    assert found.pools[1] == mixed.pools[1]
    assert found.device == found.pools[0].device
    assert found.levels[-1] == mixed.levels[-1]
    assert (found.spec, found.devices, found.limit_bytes) == (mixed.spec, mixed.devices, mixed.limit_bytes)


def test_the_interval_is_that_of_the_runs_where_they_say_one(store: Store) -> None:
    cluster = parse_cluster("h100-sxm:8")
    kept = with_stored(cluster, runs.STACK, "torch 2.11.0", store).device
    assert (kept.accuracy_low, kept.accuracy_high) == (cluster.device.accuracy_low, cluster.device.accuracy_high)
    keep(store, [Group("h100-sxm", "torch 2.11.0", runs.STACK, 9, 0, Calibration(1.12, 9, 0.04, 0.93, 1.08))])
    found = with_stored(cluster, runs.STACK, "torch 2.11.0", store).device
    assert (found.accuracy_low, found.accuracy_high) == (0.93, 1.08)
    assert "9 runs of the ledger" in found.source("accuracy_high")
    assert "9 runs" not in kept.source("accuracy_high")


def test_machines_of_one_name_are_kept_apart(store: Store) -> None:
    here = replace(parse_cluster("l4:2"), device=replace(parse_cluster("l4:2").device, sources={"machine": "this one"}))
    keep(store, [Group("this one", "torch 2.11.0", runs.STACK, 3, 0, Calibration(2.0, 3, 0.0))])
    assert with_stored(here, runs.STACK, "torch 2.11.0", store).device.calibration == 2.0
    assert with_stored(parse_cluster("l4:2"), runs.STACK, "torch 2.11.0", store).device.calibration == 1.0


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.sqlite").write_text("notes " * 1000)
    with pytest.raises(ClusterError, match=r"p\.sqlite"):
        with_stored(parse_cluster("h100-sxm:8"), runs.STACK, "torch 2.11.0", Store(tmp_path / "p.sqlite"))


def test_plans_say_that_they_are_calibrated_and_are_priced_so_again(store: Store) -> None:
    cluster = with_stored(parse_cluster("h100-sxm:2"), runs.STACK, "torch 2.11.0", store)
    plan = planned(cluster)
    assert dump_plan(planned(cluster)) == dump_plan(plan)  # same inputs, same bytes
    read = parse_plan(dump_plan(plan))
    assert read.cluster["device"]["calibration"] == 1.12
    assert "8 runs of the ledger" in read.cluster["device"]["sources"]["calibration"]
    where = Cluster.from_dict(read.cluster)
    assert where == cluster
    again = reprice(read, model(), where, Prices(where, "float32"))
    assert again.predicted.step_seconds == pytest.approx(plan.predicted.step_seconds)


def test_a_calibration_is_no_part_of_a_measured_machine_s_fingerprint() -> None:
    cluster = parse_cluster("l4:2")
    told = dict.fromkeys(("kernel_overhead_seconds", "issue_seconds"), "measured")
    levels = (Level("gloo", 2, 1e9, 1e-5, source="measured here"),)
    measured = replace(cluster, levels=levels, device=replace(cluster.device, sources=told), host=None)
    assert calibrated(measured, FACTOR, NOTE).fingerprint() == measured.fingerprint()

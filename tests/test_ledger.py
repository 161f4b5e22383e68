"""The ledger: what a run leaves, what it is filed under, recalibration, and warnings where it cannot be kept."""

from __future__ import annotations

import json
import math
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import pytest
import runs
from shardwright.cli.ledger import RUNS, note_run, run_rows, runs_of
from shardwright.cli.results import comparison
from shardwright.errors import ClusterError
from shardwright.planner.pins import parse_pins
from shardwright.planner.planfile import digest
from shardwright.planner.precision import RECIPES
from shardwright.profiles import calibrate
from shardwright.profiles.calibrate import Calibration, recalibrate
from shardwright.profiles.ledger import append, entries, entry_of, parse_entry, stack_text
from shardwright.profiles.store import Run, Store, default_path


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The user's own store, in a folder of the test."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Store(default_path())


def test_a_row_has_both_sides() -> None:
    plan = runs.plan()
    row = entry_of(plan, runs.result(waited=0.025), runs.START)
    assert row is not None
    assert (row.plan, row.model, row.date) == (digest(plan), "hf:tiny", "2026-01-31T12:00:00.000000Z")
    assert (row.device, row.planned_device, row.versions) == (runs.MACHINE, runs.MACHINE, runs.VERSIONS)
    assert (row.stack, row.ranks, row.steps) == (runs.STACK, 2, 3)
    assert (row.predicted_seconds, row.measured_seconds) == (0.125, 0.15)
    assert row.waited_seconds == pytest.approx(0.025)
    assert row.own_seconds == pytest.approx(0.125)
    assert row.ratio == pytest.approx(1.0)
    assert row.measured_peak_bytes == (6_000_000_000, 6_500_000_000)
    assert set(row.measured_phases) == {"forward", "backward", "optimizer"}
    assert dict(row.predicted_causes) == plan.predicted.seconds
    assert row.usable
    assert parse_entry(json.loads(json.dumps(asdict(row)))) == row


def test_runs_that_time_nothing_leave_nothing() -> None:
    assert entry_of(runs.plan(), {"verify": [], "world_size": 2}) is None


def test_rows_come_back_in_order_by_plan(store: Store) -> None:
    first, second, other = runs.entry(day=1), runs.entry(day=2), runs.entry(of=runs.plan(0.2), day=0)
    append(store, [second, other])
    append(store, [first])
    append(store, [first])
    assert entries(store) == (other, first, second)
    assert entries(store, first.plan) == (first, second)
    assert entries(Store(None)) == ()


@pytest.mark.parametrize(
    ("change", "told"),
    [({"ranks": -1}, "ranks"), ({"date": ""}, "date"), ({"more": 1}, "unknown field 'more'"), ({"calibration": 0}, "calibration"),
     ({"measured_seconds": True}, "measured_seconds"), ({"measured_phases": {"a": "b"}}, "measured_phases"),
     ({"steps": 1.5}, "steps"), ({"measured_peak_bytes": 5}, "measured_peak_bytes")],
)  # fmt: skip
def test_rows_are_checked(store: Store, change: dict[str, object], told: str) -> None:
    value = {**asdict(runs.entry()), **change}
    with pytest.raises(ValueError, match=told):
        parse_entry(value)
    store.add(runs=[Run("1", "p", value)])
    with pytest.raises(ClusterError, match=told):
        entries(store)


def test_a_row_lacks_nothing() -> None:
    value = asdict(runs.entry())
    del value["stack"]
    with pytest.raises(ValueError, match="missing field 'stack'"):
        parse_entry(value)


def test_the_stack_is_said_by_pins() -> None:
    assert stack_text(RECIPES["fp32"].precision(), parse_pins([])) == runs.STACK
    given = RECIPES["megatron"].precision(), parse_pins(["attention=math"])
    assert stack_text(*given, compiled=True) == "compiled, attention=math, kernels=fused, bfloat16"


def test_the_median_of_the_ratios_calibrates() -> None:
    found = recalibrate([runs.entry(s, day=i) for i, s in enumerate((0.15, 0.1375, 0.125, 0.5))])
    (group,) = found
    assert (group.device, group.versions, group.stack) == (runs.MACHINE, "torch 2.11.0", runs.STACK)
    assert (group.runs, group.left_out) == (4, 0)
    assert group.found is not None
    assert group.found.factor == pytest.approx(1.15)
    assert group.found.spread == pytest.approx(1.4826 * 0.1 / 1.15, rel=1e-3)  # 1.2, 1.1, 1.0 and 4.0 around 1.15
    assert group.found.text.startswith("calibrated x1.15 by 4 runs of the ledger")


def test_recalibrating_twice_does_not_compound() -> None:
    """Runs of plans predicted under a calibration say the same factor as those before it."""
    before = [runs.entry(0.15, day=i) for i in range(3)]
    (first,) = recalibrate(before)
    assert first.found is not None
    factor = first.found.factor
    assert factor == 1.2
    after = [runs.entry(0.15, of=runs.plan(0.125 * factor, factor), day=i) for i in range(3, 6)]
    assert recalibrate([*before, *after])[0].found == Calibration(factor, 6, 0.0)
    assert recalibrate(after)[0].found == Calibration(factor, 3, 0.0)


def test_enough_plans_give_an_interval() -> None:
    """Five plans off by 0, 5 and 10 % either way: t(0.95; 4) * s * sqrt(1.2) of the logs, by hand."""
    offs = (0.9, 0.95, 1.0, 1.05, 1.1)
    rows = [runs.entry(0.125 * off, of=runs.plan(limit=10**10 + i), day=i) for i, off in enumerate(offs)]
    deviation = math.sqrt(sum(math.log(off) ** 2 for off in offs) / 4)
    reach = 2.132 * deviation * math.sqrt(1.2)
    (group,) = recalibrate(rows)
    assert group.found is not None
    assert group.found.factor == 1.0
    assert group.found.low == pytest.approx(math.exp(-reach), rel=0.005)
    assert group.found.high == pytest.approx(math.exp(reach), rel=0.005)
    (few,) = recalibrate(rows[:4])
    assert few.found is not None
    assert few.found.interval is None
    (same,) = recalibrate([runs.entry(0.15, day=i) for i in range(9)])
    assert same.found is not None
    assert same.found.interval is None  # one plan only


def test_rows_that_do_not_belong_are_left_out() -> None:
    here = [runs.entry(0.15, day=i) for i in range(3)]
    elsewhere = [runs.entry(9.0, of=runs.plan(machine="another"), day=i) for i in range(5)]
    waiting = [runs.entry(9.0, waited=8.0, day=i) for i in range(5)]
    unlike = [replace(runs.entry(9.0, day=i), calibration=None) for i in range(5)]
    (group,) = recalibrate([*here, *elsewhere, *waiting, *unlike])
    assert (group.runs, group.left_out) == (3, 15)
    assert group.found == Calibration(1.2, 3, 0.0)
    (few,) = recalibrate(here[:2])
    assert (few.runs, few.found) == (2, None)


def test_stacks_and_versions_stay_apart(store: Store) -> None:
    plain = [runs.entry(0.15, day=i) for i in range(3)]
    compiled = [runs.entry(0.1, compiled=True, day=i) for i in range(3)]
    newer = [runs.entry(0.2, versions="torch 2.12.0+cu130", day=i) for i in range(3)]
    groups = recalibrate([*newer, *compiled, *plain])
    assert [(g.versions, g.stack.partition(",")[0], g.found and g.found.factor) for g in groups] == [
        ("torch 2.11.0", "compiled", 0.8), ("torch 2.11.0", "eager", 1.2), ("torch 2.12.0", "eager", 1.6),
    ]  # fmt: skip
    calibrate.keep(store, groups)
    found = calibrate.stored(store, runs.MACHINE, "torch 2.11.0+cu128")
    assert {stack.partition(",")[0]: each.factor for stack, each in found.items()} == {"compiled": 0.8, "eager": 1.2}


def test_runs_are_noted_and_shown(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    plan = runs.plan()
    note_run(plan, runs.result())
    note_run(plan, {"verify": [], "world_size": 2})
    (row,) = runs_of(plan)
    assert row.measured_seconds == 0.15
    assert runs_of(runs.plan(0.3)) == ()
    (cells,) = run_rows([row])
    assert len(cells) == len(RUNS)
    assert cells[3:6] == ("125 ms", "150 ms", "+20.0 %")
    assert cells[6] == "forward 50.0 ms, backward 75.0 ms, optimizer 25.0 ms"
    assert cells[8] == "6.05 GiB"
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_waiting_for_processors_has_a_row_of_its_own() -> None:
    plan = runs.plan()
    assert comparison(plan, runs.result())[0] == ("step time", "125 ms", "150 ms", "+20.0 %")
    assert comparison(plan, runs.result())[1][0].startswith("peak")
    whole, own, _, *_ = comparison(plan, runs.result(waited=0.025))
    assert whole == ("step time", "125 ms", "150 ms", "+20.0 %")
    assert (own[0].strip(), *own[1:]) == ("when no other program takes processors", "125 ms", "125 ms", "+0.0 %")


@pytest.mark.parametrize("fault", ["foreign", "folder", "result"])
def test_a_ledger_that_cannot_be_used_is_one_line_of_warning(
    store: Store, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    assert store.path is not None
    store.path.parent.mkdir()
    measured = runs.result()
    if fault == "foreign":
        with sqlite3.connect(store.path) as connection:
            connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.close()
    elif fault == "folder":
        store.path.mkdir()
    else:
        measured["step_seconds"] = float("nan")
    note_run(runs.plan(), measured)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"warning: this run is not in the ledger {store.path}: ")
    assert captured.err.count("\n") == 1
    if fault != "result":
        assert runs_of(runs.plan()) == ()
        assert str(store.path) in capsys.readouterr().err


def test_unlike_devices_calibrate_nothing() -> None:
    from shardwright.profiles.devices import parse_cluster

    cluster = parse_cluster("h100-sxm:1+a100-sxm-80gb:1").to_dict()
    row = entry_of(msgspec.structs.replace(runs.plan(), cluster=cluster), runs.result(device="h100-sxm"))
    assert row is not None
    assert row.planned_device == "h100-sxm"
    assert not row.usable

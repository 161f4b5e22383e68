"""Plans asked again: `explain`, `explain --why-not` and `simulate --sweep` against fresh plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import browser
import pytest
from click.testing import CliRunner, Result
from shardwright.again import asked_again, with_devices
from shardwright.api import plan_model
from shardwright.cli.main import main
from shardwright.cli.report.sweep import chart
from shardwright.errors import PinError, UsageError
from shardwright.planner.planfile import load_plan, save_plan
from shardwright.profiles.devices import parse_cluster

TOY = f"{Path(__file__).parent / 'toy.py'}:build"
CLUSTER, BATCH = "h100-sxm:4", 16


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    save_plan(plan_model(TOY, CLUSTER, batch=BATCH).plan, path)
    return path


def ask(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def found(*words: str) -> Any:
    done = ask(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("pin", ["dp=4", "zero=3", "micro_batch=1"])
def test_why_not_has_the_numbers_of_a_fresh_plan(plan_file: Path, pin: str) -> None:
    fresh = plan_model(TOY, CLUSTER, batch=BATCH, pins=[pin]).plan.predicted
    told = found("explain", str(plan_file), "--why-not", pin)
    assert told["feasible"]
    assert told["step_seconds"] == fresh.step_seconds
    assert told["peak_bytes_per_device"] == fresh.peak_bytes_per_device
    assert told["plan_step_seconds"] == load_plan(plan_file).predicted.step_seconds


def test_why_not_says_what_makes_it_impossible(plan_file: Path) -> None:
    told = found("explain", str(plan_file), "--why-not", "memory=1MiB")
    assert not told["feasible"]
    assert "nothing fits" in told["why"]
    assert "does not divide" in found("explain", str(plan_file), "--why-not", "tp=3")["why"]


def test_the_sentences_hold_the_figures_of_the_plan(plan_file: Path) -> None:
    plan = load_plan(plan_file)
    told = found("explain", str(plan_file))["sentences"]
    assert len([line for line in told if line.startswith("Region ")]) == len(plan.regions)
    assert any("binds" in line or "bind" in line for line in told)
    assert any("within" in line for line in told)


def test_a_sweep_plans_every_point(plan_file: Path) -> None:
    points = found("simulate", str(plan_file), "--sweep", "devices=1,2", "--sweep", "batch=16,32")["points"]
    assert [p["changes"] for p in points] == [
        {"devices": d, "batch": b} for d in ("1", "2") for b in ("16", "32")
    ]  # fmt: skip
    fresh = plan_model(TOY, "h100-sxm:2", batch=32).plan.predicted
    assert points[-1]["step_seconds"] == fresh.step_seconds
    assert points[-1]["samples_per_second"] == 32 / fresh.step_seconds


def test_a_sweep_is_drawn(plan_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    points = found(
        "simulate", str(plan_file), "--sweep", "link=0.5,1", "--sweep", "memory=1MiB,2GiB,4GiB", "--report", str(page)
    )["points"]
    drawn = chart(points, "step_seconds")
    assert (drawn["key"], drawn["along"], [name for name, _ in drawn["lines"]]) == (
        "memory", ["1MiB", "2GiB", "4GiB"], ["link=0.5", "link=1"]
    )  # fmt: skip
    assert [[p and p[0] for p in line] for _, line in drawn["lines"]] == [
        [None, *(p["step_seconds"] for p in points[i : i + 2])] for i in (1, 4)
    ]
    document, console = browser.loaded(page, tmp_path)
    assert console == ""
    assert set(browser.drawn(document)) == {"sweep_step", "sweep_rate", "sweep_peak"}
    assert all(count > 3 for count in browser.drawn(document).values())
    text = page.read_text()
    assert all(f"{p['samples_per_second']:,.2f}" in text for p in points if "why" not in p)
    assert "nothing fits" in text
    done = ask("simulate", str(plan_file), "--report", str(page))
    assert (done.exit_code, "--report draws a --sweep" in done.output) == (2, True)


def test_what_does_not_fit_is_a_row_with_its_reason(plan_file: Path) -> None:
    points = found("simulate", str(plan_file), "--sweep", "memory=1MiB,4GiB")["points"]
    assert "nothing fits" in points[0]["why"]
    assert points[1]["step_seconds"] > 0


def test_a_slower_link_never_helps(plan_file: Path) -> None:
    points = found("simulate", str(plan_file), "--sweep", "link=0.25,1", "--sweep", "dp=4")["points"]
    assert points[0]["step_seconds"] > points[1]["step_seconds"]
    same = plan_model(TOY, CLUSTER, batch=BATCH, pins=["dp=4"]).plan
    assert points[1]["step_seconds"] == same.predicted.step_seconds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sweep", "devices"), "expected K=V,V"), (("--sweep", "foo=1"), "unknown pin"), (("--sweep", "batch=x"), "at least 1"),
        (("--sweep", "tp=1", "--sweep", "tp=2"), "stands twice"), (("--sweep", "link=-1"), "expected a factor"),
        (("--sweep", "seq=5"), "no sequence length"),
    ],
)  # fmt: skip
def test_what_is_no_sweep_is_refused(plan_file: Path, words: tuple[str, ...], message: str) -> None:
    done = ask("simulate", str(plan_file), *words)
    assert done.exit_code == 2
    assert message in done.output


def test_a_pin_replaces_the_plans_own() -> None:
    plan = plan_model(TOY, CLUSTER, batch=BATCH, pins=["dp=4", "zero=3"]).plan
    assert asked_again(plan, {"zero": "1"}).pins == ("dp=4", "zero=1")


def test_another_precision_is_planned_and_not_only_pinned() -> None:
    plan = plan_model(TOY, CLUSTER, batch=BATCH, pins=["dp=4", "zero=0"]).plan
    other = asked_again(plan, {"precision": "pure-bf16"})
    assert other.precision.recipe == "pure-bf16"
    assert other.predicted.memory == plan_model(
        TOY, CLUSTER, batch=BATCH, pins=["dp=4", "zero=0", "precision=pure-bf16"]
    ).plan.predicted.memory  # fmt: skip
    assert asked_again(plan, {"dtype": "fp32"}).precision.compute == "float32"
    assert asked_again(plan, {"zero": "1"}).precision == plan.precision


def test_devices_are_divisors_of_a_node_or_whole_nodes() -> None:
    cluster = parse_cluster("h100-sxm:8x2")
    assert with_devices(cluster, 4).devices == 4
    assert with_devices(cluster, 64).to_dict() == parse_cluster("h100-sxm:8x8").to_dict()
    with pytest.raises(PinError, match="whole nodes"):
        with_devices(cluster, 20)
    with pytest.raises(UsageError, match="describe one with more"):
        with_devices(parse_cluster("h100-sxm:8x2+a100-sxm-80gb:8x2"), 64)


def test_the_step_is_played_rank_by_rank_and_as_a_trace(plan_file: Path, tmp_path: Path) -> None:
    plan, trace = load_plan(plan_file), tmp_path / "trace.json"
    told = found("simulate", str(plan_file), "--trace", str(trace))
    assert told["step_seconds"] == pytest.approx(plan.predicted.step_seconds, rel=1e-12)
    assert [row["peak_bytes"] for row in told["ranks"]] == [
        max(s.peak_bytes for s in plan.stages if s.rank == row["rank"]) for row in told["ranks"]
    ]  # fmt: skip
    events = json.loads(trace.read_text())["traceEvents"]
    for row in told["ranks"]:
        mine = [e for e in events if e["ph"] == "X" and e["pid"] == row["rank"]]
        lane = [e["dur"] for e in mine if e["cat"] not in ("bubble", "send")]
        assert sum(lane) * 1e-6 == pytest.approx(row["busy_seconds"])
    data = plan.timeline()
    assert data["step_seconds"] == told["step_seconds"]
    assert sum(len(rank["spans"]) for rank in data["ranks"]) == sum(e["ph"] == "X" for e in events)
    done = ask("simulate", str(plan_file), "--trace", str(trace), "--sweep", "tp=1")
    assert (done.exit_code, "leave out --sweep" in done.output) == (2, True)

"""The command line: its frozen surface, exit status, one message a failure, results on stdout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import plans
import pytest
import stagedplans
from click.testing import CliRunner, Result
from rich.console import Console
from shardwright.cli.main import COMMANDS, Commands, main
from shardwright.cli.tables import plan_tables
from shardwright.errors import Infeasible, PinError
from shardwright.planner.plan import Plan, RunPlan
from shardwright.planner.plandiff import diff
from shardwright.planner.planfile import load_plan, save_plan

SURFACE = {
    "demo": {"--json"},
    "plan": {"MODEL", "--cluster", "--batch", "--seq", "--memory-limit", "--objective", "--phase", "--target-seconds",
             "--target-tokens-per-second", "--price-per-device-hour", "--frontier", "--pin", "--like", "--seed", "--output",
             "--report", "--json"},
    "run": {"PLAN", "SCRIPT", "--steps", "--verify", "--trace", "--nnodes", "--node-rank", "--rdzv-endpoint",
            "--nproc-per-node", "--max-restarts", "--elastic", "--timeout", "--save", "--every", "--resume", "--json"},
    "export": {"PLAN", "SCRIPT", "--to", "--output", "--steps", "--name", "--image", "--memory", "--json"},
    "check": {"MODEL", "--batch", "--seq", "--modules", "--passes", "--print-after", "--cluster", "--report", "--json"},
    "profile": {"MODEL", "--cluster", "--batch", "--seq", "--db", "--seconds", "--from-ledger", "--export", "--import", "--json"},
    "report": {"PLAN", "--output", "--measured", "--sensitivity", "--json"},
    "clusters": {"NAME", "--json"},
    "diff": {"A", "B", "--json"},
    "explain": {"PLAN", "REGION", "--why-not", "--json"},
    "simulate": {"PLAN", "--sweep", "--largest", "--trace", "--report", "--json"},
}  # fmt: skip
"""The command line is frozen: adding to it is a decision, recorded in docs/decisions.md."""
ESTIMATE = {"parameters": 1e8, "trainable": 1e8, "parameter_bytes": 4e8, "gradient_bytes": 4e8, "optimizer_bytes": 8e8,
            "batch": 16, "tokens": 8192, "devices": 4, "limit_bytes": 14.72e9}  # fmt: skip


def shardwright(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    save_plan(plans.plan(), path)
    return path


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`plan` answers with the hand-made plan; what it was asked is collected."""
    from shardwright import api

    asked: list[dict[str, Any]] = []

    def plan_model(
        spec: str, cluster: str, *, say: Callable[[str], None], show: Callable[..., None], **rest: Any
    ) -> Any:
        asked.append({"spec": spec, "cluster": cluster, **rest})
        show(ESTIMATE)
        say("solve")
        return api.PlanResult(plans.plan(), {"capture": 1.5, "solve": 0.5}, ESTIMATE)

    monkeypatch.setattr(api, "plan_model", plan_model)
    return asked


def _surface(command: click.Command) -> set[str]:
    return {
        max(p.opts, key=len) if isinstance(p, click.Option) else (p.name or "").upper() for p in command.params
    }  # fmt: skip


def test_surface_is_frozen() -> None:
    assert isinstance(main, Commands)
    context = click.Context(main)
    assert list(COMMANDS) == list(SURFACE)
    for name, wanted in SURFACE.items():
        command = main.get_command(context, name)
        assert command is not None
        assert _surface(command) == wanted, name
        assert command.help, name
    assert {o for p in main.params for o in p.opts} == {"--version"}


def test_help_and_version_start_at_once() -> None:
    for arguments in (["--help"], ["--version"], ["clusters"]):
        best = min(_seconds(arguments) for _ in range(2))
        assert best < 1.0, arguments


def _seconds(arguments: list[str]) -> float:
    """Processor seconds of a command (a machine that does other work at the same time changes nothing)."""
    start = os.times()
    subprocess.run([sys.executable, "-m", "shardwright.cli.main", *arguments], check=True, capture_output=True)
    end = os.times()
    return end.children_user + end.children_system - start.children_user - start.children_system


@pytest.mark.parametrize("name", SURFACE)
def test_every_command_has_help(name: str) -> None:
    done = shardwright(name, "--help")
    assert done.exit_code == 0
    assert "Usage:" in done.stdout


def test_plan_prints_tables_and_progress_apart(planned: list[dict[str, Any]]) -> None:
    done = shardwright(
        "plan", "hf:tiny", "--cluster", "toy:2x2", "--pin", "dp=2", "--pin", "zero!=3", "--batch", "auto"
    )
    assert done.exit_code == 0, done.stderr
    for fact in (
        "dp",
        "column, row",
        "saved activations",
        "3.73 GiB",
        "125 ms",
        "within 0.40 %",
        "S(1) on tp",
        "all_reduce",
    ):
        assert fact in done.stdout, fact
    assert "estimate: 100 M parameters; unsharded: parameters 381 MiB" in done.stderr
    assert "... solve" in done.stderr
    assert planned[0]["pins"] == ("dp=2", "zero!=3")
    assert planned[0]["batch"] == "auto"


def _printed(plan: Plan, width: int = 80) -> list[str]:
    made = Console(width=width, markup=False, highlight=False, emoji=False)
    with made.capture() as caught:
        made.print(plan_tables(plan))
    return [re.sub(r"\s+", " ", line).strip() for line in caught.get().splitlines()]


def test_a_pipeline_reads_well_at_80_columns() -> None:
    lines = _printed(stagedplans.plan())
    for line in (
        "cluster toy:2x4, 8 devices",
        "pipeline 2 ranks, interleaved, 2 chunks a rank",
        "pp 2 pipeline network",
        "0 0 embed, h.1 2.00 ms 4.00 ms 6.00 GiB",
        "1 1 h.2 x 2 2.00 ms 4.00 ms 7.00 GiB",
        "h.2 2 5 as h.1",
        "gathered weights 512 MiB 3.65 % █",
        "pp=2 dp=2 tp=2 interleaved x 2 4 of 2 124 ms 125 ms chosen",
        "pp=2 dp=2 tp=2 1f1b 8 of 1 200 ms cut",
        "18 more shapes: 18 cut",
    ):
        assert line in lines, line
    page = " ".join(lines)
    assert "2 ops, 1 gather searched optimizer (1 part" in page
    for cause in ("running again", "copies to and from the host", "waiting (bubble)"):
        assert cause in page
    assert not any(line.startswith(("Stages", "pipeline")) for line in _printed(plans.plan()))


def test_many_equal_stages_share_a_row() -> None:
    first, again, *_ = stagedplans.stages()
    many = [msgspec.structs.replace(again, rank=r + 1) for r in range(30)]
    plan = stagedplans.plan(stages=(msgspec.structs.replace(first, rank=0), *many))
    assert "1 to 30 1 to 30 h.2 x 2 2.00 ms 4.00 ms 7.00 GiB" in _printed(plan)


@pytest.mark.usefixtures("planned")
def test_plan_json_has_what_was_promised() -> None:
    done = shardwright("plan", "hf:tiny", "--cluster", "toy:2x2", "--json")
    found = json.loads(done.stdout)
    predicted = {"step_seconds", "tokens_per_second_per_device", "mfu", "peak_bytes_per_device", "memory"}
    assert predicted <= set(found["predicted"])
    assert {"bound_seconds", "gap", "seconds"} <= set(found["search"])
    assert found["search"]["seconds"] == {"capture": 1.5, "solve": 0.5}
    assert {"mesh", "pipeline", "semantics"} <= set(found)


def test_plan_writes_file_and_report(planned: list[dict[str, Any]], tmp_path: Path) -> None:
    file, report = tmp_path / "p.json", tmp_path / "r.html"
    limit = ("--memory-limit", "12GiB", "--seq", "512", "--batch", "16", "--seed", "3")
    done = shardwright("plan", "hf:tiny", "--cluster", "toy:2x2", *limit, "-o", str(file), "--report", str(report))
    assert done.exit_code == 0, done.stderr
    assert load_plan(file).source.model == "hf:tiny"
    assert "seconds" not in json.loads(file.read_text())["search"]  # no wall-clock figure enters the file
    assert report.read_text().startswith("<!doctype html>")
    asked = planned[0]
    assert (asked["memory_limit"], asked["seq"], asked["batch"], asked["seed"]) == (12 * 2**30, 512, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "hf:tiny"], "Missing option '--cluster'"),
        (["plan", "hf:tiny", "--cluster", "c", "--batch", "0"], "expected a number of at least 1, or auto"),
        (["plan", "hf:tiny", "--cluster", "c", "--batch", "many"], "expected a number of at least 1, or auto"),
        (["plan", "hf:tiny", "--cluster", "c", "--seq", "-1"], "--seq"),
        (["plan", "hf:tiny", "--cluster", "c", "--memory-limit", "12 parsecs"], "memory size"),
        (["plan", "hf:tiny", "--cluster", "c", "--objective", "fame"], "--objective"),
        (["plan", "hf:tiny", "--cluster", "c", "-o", "nowhere/plan.json"], "the folder nowhere does not exist"),
        (["plan", "hf:tiny", "--cluster", "c", "-o", "."], "is a folder"),
        (["run", "nowhere.json"], "nowhere.json: No such file"),
        (["report", "nowhere.json", "-o", "r.html"], "nowhere.json: No such file"),
        (["diff", "nowhere.json", "nowhere.json"], "nowhere.json: No such file"),
        (["clusters", "h100-sxn"], "h100-sxm"),
        (["fly"], "No such command 'fly'"),
    ],
)
@pytest.mark.usefixtures("planned")
def test_wrong_use_is_one_message_and_status_2(arguments: list[str], message: str) -> None:
    done = shardwright(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [(PinError("tp=3 does not divide"), 2), (Infeasible("does not fit", cause="saved", nearest=("batch 4",)), 1)],
)
def test_errors_are_one_message(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    from shardwright import api

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(api, "plan_model", refuse)
    out = tmp_path / "p.json"
    done = shardwright("plan", "hf:tiny", "--cluster", "c", "-o", str(out))
    assert done.exit_code == status
    assert done.stderr.strip() == f"error: {error}"
    assert not list(tmp_path.iterdir())


def test_diff_of_equal_and_different(plan_file: Path, tmp_path: Path) -> None:
    assert shardwright("diff", str(plan_file), str(plan_file)).exit_code == 0
    other = tmp_path / "other.json"
    save_plan(plans.plan(predicted=msgspec.structs.replace(plans.predicted(), step_seconds=0.25)), other)
    done = shardwright("diff", str(plan_file), str(other))
    assert done.exit_code == 1
    assert "+100.0 %" in done.stdout
    (only,) = json.loads(shardwright("diff", str(plan_file), str(other), "--json").stdout)
    assert only == {"dimension": "predicted", "where": "predicted.step_seconds", "a": 0.125, "b": 0.25, "change": 1.0}
    assert json.loads(shardwright("diff", str(plan_file), str(plan_file), "--json").stdout) == []


def test_differences_of_pipelines_have_their_dimensions(tmp_path: Path) -> None:
    one = stagedplans.plan()
    embed, kept, again, head = one.regions
    stages = list(one.stages)
    stages[1] = msgspec.structs.replace(stages[1], runs=(RunPlan("h.1", 1, 2),), peak_bytes=5 * 2**30)
    stages[2] = msgspec.structs.replace(stages[2], runs=(RunPlan("h.2", 3, 2),))
    two = stagedplans.plan(
        pipeline=msgspec.structs.replace(one.pipeline, schedule="zbv"),
        stages=tuple(stages),
        regions=(embed, kept, msgspec.structs.replace(again, recompute=(), offload=()), head),
    )
    assert [(d.dimension, d.where) for d in diff(one, two)] == [
        ("pipeline", "pipeline.schedule"),
        ("stages", "stages[1].runs"),
        ("stages", "stages[2].runs"),
        ("recompute", "regions[h.2].recompute"),
        ("offload", "regions[h.2].offload"),
        ("predicted", "stages[1].peak_bytes"),
    ]
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    save_plan(one, a)
    save_plan(two, b)
    done = shardwright("diff", str(a), str(b))
    assert re.search(r"stages\[1\]\.runs +h\.2 x 2 +h\.1 x 2", done.stdout)


def test_a_region_run_in_one_way_is_held_against_its_main_option() -> None:
    one, block = stagedplans.plan(), plans.regions()[1]
    alone = msgspec.structs.replace(block, repeats=6, policy="none")
    found = diff(one, stagedplans.plan(regions=(one.regions[0], alone, one.regions[3])))
    assert [d.where for d in found] == ["regions[h].repeats", "regions[h, option 2]"]
    assert (found[0].a, found[0].b) == (4, 6)


def test_an_axis_more_does_not_change_every_op() -> None:
    one = plans.plan()
    wider = []
    for region in one.regions:
        ops = tuple(
            msgspec.structs.replace(op, choice=(*op.choice, "R"), result=(*op.result, "R")) for op in region.ops
        )
        kept = tuple(msgspec.structs.replace(p, home=(*p.home, "R")) for p in region.parameters)
        wider.append(msgspec.structs.replace(region, ops=ops, parameters=kept))
    axis = msgspec.structs.replace(one.mesh[1], name="cp", role="context")
    assert [d.where for d in diff(one, plans.plan(mesh=(*one.mesh, axis), regions=tuple(wider)))] == ["mesh[cp]"]


def test_report_with_and_without_measurement(plan_file: Path, tmp_path: Path) -> None:
    page, measured = tmp_path / "r.html", tmp_path / "m.json"
    assert shardwright("report", str(plan_file), "-o", str(page)).exit_code == 0
    assert "No run of this plan is in the ledger" in page.read_text()
    measured.write_text(json.dumps({"step_seconds": 0.2, "peak_bytes": [1, 2], "losses": [1.0]}))
    done = shardwright("report", str(plan_file), "-o", str(page), "--measured", str(measured), "--json")
    assert json.loads(done.stdout)["report"] == str(page)
    assert "Predicted and measured" in page.read_text()
    measured.write_text("[]")
    done = shardwright("report", str(plan_file), "-o", str(page), "--measured", str(measured))
    assert done.exit_code == 2
    assert "expected what `run --json` printed" in done.stderr


def test_clusters_with_sources() -> None:
    listed = json.loads(shardwright("clusters", "--json").stdout)
    assert {"a100-sxm-40gb", "a100-sxm-80gb", "h100-sxm", "h200-sxm", "v100-sxm-32gb", "rtx-4090", "cpu"} <= {
        each["name"] for each in listed
    }
    done = shardwright("clusters", "h100-sxm")
    assert "84.9 GB" in done.stdout
    assert "data sheet" in done.stdout


def test_run_names_the_torchrun_command(
    plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from shardwright.cli import launch

    started: list[list[str]] = []
    monkeypatch.setattr(launch, "launch", lambda arguments: started.append(list(arguments)) or 0)
    done = shardwright("run", str(plan_file), "--steps", "2", "--verify")
    assert done.exit_code == 0, done.stderr
    command = f"torchrun --standalone --nproc-per-node=4 -m shardwright.runtime.execute {plan_file} --steps=2 --verify"
    assert command in done.stderr
    nodes = ("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "127.0.0.1:1")
    done = shardwright("run", str(plan_file), *nodes, "--", "t.py", "--lr", "1")
    assert done.exit_code == 0, done.stderr
    where = ["--node-rank=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:1", "--rdzv-conf=is_host=0"]
    assert started[-1] == [
        "--nnodes=2", *where, "--nproc-per-node=2", "t.py", "--lr", "1", "--plan", str(plan_file)
    ]  # fmt: skip
    elastic = ("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--timeout", "90")
    done = shardwright("run", str(plan_file), *nodes, *elastic)
    assert done.exit_code == 0, done.stderr
    own = ["-m", "shardwright.runtime.execute", str(plan_file), "--steps=5", "--elastic", "--timeout=90"]
    assert started[-1][:-1] == ["--nnodes=1:2", *where, "--max-restarts=3", "--nproc-per-node=1", *own]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nnodes", "3", "--rdzv-endpoint", "h:1"], "3 nodes cannot share equally"),
        (["--nnodes", "2"], "needs --rdzv-endpoint"),
        (["--nnodes", "2", "--rdzv-endpoint", "h"], "expected HOST:PORT"),
        (["--nnodes", "2:1"], "expected a number of machines of at least 1, or MIN:MAX"),
        (
            ["--nproc-per-node", "3"],
            "starts 3 ranks, the plan needs 4 (dp=2 x tp=2); choose numbers whose product is 4",
        ),
        (["--nproc-per-node", "2"], "starts 2 ranks, the plan needs 4 (dp=2 x tp=2); pass --nnodes 2"),
        (["--timeout", "0"], "expected a number above zero"),
        (["--node-rank", "1"], "--node-rank 1: expected 0 to 0"),
        (["--verify", "--", "train.py"], "belong to the built-in loop"),
    ],
)
def test_run_refuses_what_cannot_start(plan_file: Path, arguments: list[str], message: str) -> None:
    done = shardwright("run", str(plan_file), *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_run_under_torchrun_of_another_size(plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "0")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    done = shardwright("run", str(plan_file))
    assert done.exit_code == 2
    assert "torchrun started 2 ranks, the plan needs 4 (dp=2 x tp=2)" in done.stderr

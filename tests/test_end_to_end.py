"""The road by command line alone, with real ranks: plan, run, verify, report, edit, refuse."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace
from pool import Pool
from ranked import be_rank
from shardwright.cli.main import main
from shardwright.planner.planfile import load_plan, save_plan
from shardwright.profiles.ledger import entries
from shardwright.profiles.store import Store
from shardwright.runtime.state import latest

TOY = Path(__file__).with_name("toy.py")


class Shell:
    """Runs the command line in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache"), "OMP_NUM_THREADS": "1", **environment}
        program = [sys.executable, "-m", "shardwright.cli.main", *arguments]
        return subprocess.run(program, cwd=self.folder, env=own, capture_output=True, text=True, timeout=300)

    def here(self, *arguments: str, **environment: str) -> Result:
        """The same inside this process, where torch is loaded already: for what starts no ranks."""
        runner = CliRunner(env={"XDG_CACHE_HOME": str(self.folder / "cache"), **environment})
        with contextlib.chdir(self.folder):
            return runner.invoke(main, list(arguments))


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder with a plan of the toy model for two ranks."""
    made = Shell(tmp_path_factory.mktemp("road"))
    (made.folder / "toy.py").write_text(TOY.read_text())
    planned = made.here(
        "plan", "toy.py:build", "--cluster", "cpu:2", "--batch", "8", "--pin", "tp=2", "-o", "plan.json", "--json"
    )
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["mesh"][0]["size"] == 2
    return made


def test_planning_again_gives_the_same_bytes(shell: Shell) -> None:
    arguments = ("plan", "toy.py:build", "--cluster", "cpu:2", "--batch", "8", "--pin", "tp=2", "-o", "again.json")
    assert shell(*arguments, PYTHONHASHSEED="7").returncode == 0
    assert (shell.folder / "again.json").read_bytes() == (shell.folder / "plan.json").read_bytes()


def test_a_run_above_the_limit_says_so(shell: Shell, ranks2: Pool) -> None:
    """A limit below what the plan needs cannot be planned; this plan is signed with one, as if the prediction were wrong."""
    plan = load_plan(shell.folder / "plan.json")
    save_plan(replace(plan, memory_limit_bytes=10_000), shell.folder / "tight.json")
    (status, said, result), (other, silent, _) = ranks2.run(be_rank, str(shell.folder), ["tight.json", "--steps=1"])
    assert (status, other, silent) == (1, 1, "")
    assert "the plan's limit is 10,000" in said
    assert result["fits"] is False
    assert min(result["peak_bytes"]) > 10_000


def test_run_verifies_measures_and_reports(shell: Shell) -> None:
    done = shell("run", "plan.json", "--steps", "2", "--verify", "--save", "kept", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert latest(shell.folder / "kept") == shell.folder / "kept" / f"step-{result['checkpoints']['saved_step']:08d}"
    assert result["verify"]
    assert all(each["ok"] for each in result["verify"])
    predicted = load_plan(shell.folder / "plan.json").predicted
    assert {(r["collective"], r["axis"], r["count"], r["bytes"]) for r in result["collectives"]} == {
        (r.collective, r.axis, r.count, r.bytes) for r in predicted.traffic
    }
    (shell.folder / "result.json").write_text(done.stdout)
    assert shell.here("report", "plan.json", "-o", "r.html", "--measured", "result.json").exit_code == 0
    page = (shell.folder / "r.html").read_text()
    assert "Against the original module" in page
    assert "Runs of this plan" in page
    assert set(result["phase_seconds"]) == {"forward", "backward", "optimizer"}
    store = Store(shell.folder / "cache" / "shardwright" / "profiles.sqlite")
    (row,) = entries(store, load_plan(shell.folder / "plan.json").digest)
    assert (row.steps, row.ranks, row.measured_seconds) == (2, 2, result["step_seconds"])
    assert list(row.measured_peak_bytes) == result["peak_bytes"]
    assert 0 < sum(row.measured_phases.values()) < 3 * row.measured_seconds


def test_a_changed_model_file_is_refused_once(shell: Shell, ranks2: Pool) -> None:
    source = shell.folder / "toy.py"
    text = source.read_text()
    source.write_text(text + "\n# changed\n")
    try:
        found = ranks2.run(be_rank, str(shell.folder), ["plan.json", "--steps=1"])
    finally:
        source.write_text(text)
    assert [status for status, _, _ in found] == [2, 2]
    said = found[0][1] + found[1][1]
    assert said.count("error:") == 1
    assert "has changed since it was planned" in said


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("choice", ["zz"], "has no factor 'zz'"),
        ("result", ["S(0)"], "with result (S(0)); expected choice (n) with result (S(1))"),
    ],
    ids=["another loop", "another placement"],
)
def test_an_edit_is_held_against_the_model(shell: Shell, field: str, value: list[str], message: str) -> None:
    raw = json.loads((shell.folder / "plan.json").read_text())
    (op,) = [op for region in raw["regions"] for op in region["ops"] if op["op"] == "linear"]
    assert op[field] != value
    op[field] = value
    (shell.folder / "edited.json").write_text(json.dumps(raw))
    done = shell.here("run", "edited.json", "--steps", "1")
    assert done.exit_code == 2
    assert message in done.stderr
    assert "edited.json: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_legal_edit_is_priced_again_without_certificate(shell: Shell) -> None:
    raw = json.loads((shell.folder / "plan.json").read_text())
    for region in raw["regions"]:
        for op in region["ops"]:
            op["choice"], op["result"] = ["R"], ["R"]
        for parameter in region["parameters"]:
            parameter["home"] = ["R"]
    (shell.folder / "whole.json").write_text(json.dumps(raw))
    done = shell.here("diff", "plan.json", "whole.json", "--json")
    assert done.exit_code == 1, done.stderr
    found = {each["where"]: each for each in json.loads(done.stdout)}
    assert found["predicted.peak_bytes_per_device"]["b"] > found["predicted.peak_bytes_per_device"]["a"]
    assert found["edited"]["b"] is True


def test_another_world_size_is_refused(shell: Shell) -> None:
    done = shell.here("run", "plan.json", "--steps", "1", RANK="0", WORLD_SIZE="3")
    assert done.exit_code == 2
    assert "torchrun started 3 ranks, the plan needs 2 (tp=2)" in done.stderr

"""`shardwright profile`: what it does with a store, the ledger and text files; progress and results where they belong."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import runs
from click.testing import CliRunner, Result
from shardwright.cli.ledger import note_run
from shardwright.cli.main import main
from shardwright.planner.planfile import save_plan
from shardwright.profiles.calibrate import stored
from shardwright.profiles.ledger import append
from shardwright.profiles.store import Store, default_path


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "profiles.sqlite"


def profile(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["profile", *arguments])


def with_runs(db: Path, *seconds: float) -> Store:
    store = Store(db)
    append(store, [runs.entry(s, day=i) for i, s in enumerate(seconds)])
    return store


def test_recalibration_says_what_changed(db: Path) -> None:
    store = with_runs(db, 0.15, 0.1375, 0.1625)
    done = profile("--from-ledger", "--db", str(db))
    assert done.exit_code == 0, done.stderr
    for word in (runs.MACHINE, "torch 2.11.0", "none", "x1.2", str(db)):
        assert word in done.stdout, word
    assert stored(store, runs.MACHINE, runs.VERSIONS)[runs.STACK].factor == 1.2
    with_runs(db, 0.15, 0.1375, 0.1625, 0.4, 0.4)
    done = profile("--from-ledger", "--db", str(db), "--json")
    (found,) = json.loads(done.stdout)["calibrations"]
    assert (found["device"], found["stack"], found["runs"], found["left_out"]) == (runs.MACHINE, runs.STACK, 5, 0)
    assert found["before"]["factor"] == 1.2
    assert found["calibration"]["factor"] == 1.3
    assert done.stderr == ""


@pytest.mark.parametrize("seconds", [(), (0.15,), (0.15, 0.15)])
def test_too_few_runs_change_nothing(db: Path, seconds: tuple[float, ...]) -> None:
    store = with_runs(db, *seconds)
    done = profile("--from-ledger", "--db", str(db))
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: the ledger in {db} has too few runs")
    assert ("none at all" if not seconds else f"{len(seconds)} run") in done.stderr
    assert "needs 3" in done.stderr
    assert done.stdout == ""
    assert stored(store, runs.MACHINE, runs.VERSIONS) == {}


def test_groups_with_too_few_are_listed_beside_the_others(db: Path) -> None:
    store = with_runs(db, 0.15, 0.15, 0.15)
    append(store, [runs.entry(0.1, compiled=True)])
    done = profile("--from-ledger", "--db", str(db))
    assert done.exit_code == 0
    assert "too few runs" in done.stdout
    assert set(stored(store, runs.MACHINE, runs.VERSIONS)) == {runs.STACK}


def test_export_and_import(db: Path, tmp_path: Path) -> None:
    text, copy = tmp_path / "profiles.txt", tmp_path / "copy.sqlite"
    with_runs(db, 0.15, 0.15, 0.15)
    Store(db).write("cpu", "torch 2", "machine", {"memory": 1e10})
    done = profile("--export", str(text), "--db", str(db))
    assert done.stdout == f"wrote 4 rows to {text}\n"
    done = profile("--import", str(text), "--db", str(copy))
    assert done.stdout == f"{text}: 1 new figures, 0 in place of others, 0 as they were; 3 new runs; into {copy}\n"
    again = profile("--export", str(tmp_path / "again.txt"), "--db", str(copy), "--json")
    assert json.loads(again.stdout) == {"file": str(tmp_path / "again.txt"), "rows": 4}
    assert (tmp_path / "again.txt").read_bytes() == text.read_bytes()
    done = profile("--import", str(text), "--db", str(copy), "--json")
    assert json.loads(done.stdout) == {
        "file": str(text), "store": str(copy), "new": 0, "replaced": 0, "same": 1, "runs": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--from-ledger", "--export", "x.txt"], "--from-ledger stands alone: leave out --export"),
        (["hf:gpt2", "--from-ledger"], "--from-ledger stands alone: leave out MODEL"),
        (["--import", "nowhere.txt", "--cluster", "local"], "leave out --cluster"),
        (["--import", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--export", "nowhere/x.txt"], "the folder nowhere does not exist"),
        (["--export", "x.txt"], "there is no profile store"),
        (["--batch", "4"], "--batch and --seq belong to a MODEL"),
        (["--seconds", "0"], "expected a number above zero"),
        (["--cluster", "h100-sxm:8"], "h100-sxm:8"),
    ],
)
def test_wrong_use_is_one_message(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = profile(*arguments, "--db", str(tmp_path / "p.sqlite"))
    assert done.exit_code == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_wrong_line_changes_nothing(db: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('{"format": "shardwright profiles", "version": 1}\nnotes\n')
    done = profile("--import", str(tmp_path / "p.txt"), "--db", str(db))
    assert done.exit_code == 2
    assert f"{tmp_path / 'p.txt'}, line 2: not JSON" in done.stderr
    assert not db.exists()


def test_a_damaged_store_is_named_and_left(db: Path) -> None:
    db.write_text("notes " * 500)
    for arguments in (["--from-ledger"], ["--export", str(db.with_suffix(".txt"))]):
        done = profile(*arguments, "--db", str(db))
        assert done.exit_code == 2
        assert str(db) in done.stderr
    assert db.read_text() == "notes " * 500


def test_the_report_shows_the_runs_of_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plan, path, page = runs.plan(), tmp_path / "plan.json", tmp_path / "r.html"
    save_plan(plan, path)
    done = CliRunner().invoke(main, ["report", str(path), "-o", str(page), "--json"])
    assert json.loads(done.stdout)["runs"] == 0
    assert "Runs of this plan" not in page.read_text()
    note_run(plan, runs.result())
    note_run(runs.plan(0.3), runs.result())
    done = CliRunner().invoke(main, ["report", str(path), "-o", str(page), "--json"])
    assert json.loads(done.stdout)["runs"] == 1
    text = page.read_text()
    for word in ("Runs of this plan", runs.MACHINE, "eager, attention=flash", "150 ms", "+20.0 %", "backward 75.0 ms"):
        assert word in text, word
    default_path().write_text("notes " * 500)
    done = CliRunner().invoke(main, ["report", str(path), "-o", str(page)])
    assert done.exit_code == 0
    assert "warning: no runs are shown from the ledger" in done.stderr
    assert "Runs of this plan" not in page.read_text()


@dataclass
class Measured:
    """What a profile gives back."""

    cluster: str = "local-cpu:2"
    device: str = runs.MACHINE
    measured: dict[str, int] = field(default_factory=lambda: {"op": 12, "machine": 8})
    known: dict[str, int] = field(default_factory=lambda: {"op": 3, "collectives": 4})
    failures: dict[str, str] = field(default_factory=lambda: {"op [conv]": "out of memory: 1 GiB"})
    seconds: float = 12.5


def test_a_profile_says_what_was_measured_and_what_was_not(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwright.passes import profiling

    asked: list[tuple[Any, ...]] = []

    def measure(cluster: str, model: str | None, *, store: Store, say: Any, **limits: Any) -> Measured:
        asked.append((cluster, model, store, limits))
        say("timing 12 ops")
        return Measured()

    monkeypatch.setattr(profiling, "profile", measure)
    done = profile("hf:gpt2", "--cluster", "local-cpu:2", "--db", str(db), "--batch", "4", "--seconds", "60")
    assert asked == [("local-cpu:2", "hf:gpt2", Store(db), {"budget_seconds": 60.0, "batch": 4, "seq": None})]
    assert "timing 12 ops" in done.stderr
    for words in (r"op +12 +3", r"machine +8 +0", r"collectives +0 +4", r"op \[conv\]: out of memory", "12 s; kept in"):
        assert re.search(words, done.stdout), words
    done = profile("--db", str(db), "--json")
    assert asked[1][:2] == ("local", None)
    assert json.loads(done.stdout) == {"store": str(db), **asdict(Measured())}
    monkeypatch.setenv("RANK", "1")
    assert profile("--db", str(db), "--json").stdout == ""

"""Runs of the built-in loop that are saved, end early, and are gone on with."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pool import Pool
from ranked import be_rank
from shardwright.cli.run import kept
from shardwright.errors import UsageError
from shardwright.runtime.execute import batches
from shardwright.runtime.keeping import Goal
from test_end_to_end import TOY, Shell


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder with a plan of the toy model for two ranks."""
    made = Shell(tmp_path_factory.mktemp("saved"))
    (made.folder / "toy.py").write_text(TOY.read_text())
    arguments = ("plan", "toy.py:build", "--cluster", "cpu:2", "--batch", "8", "--pin", "tp=2", "-o", "plan.json")
    assert made.here(*arguments).exit_code == 0
    return made


def run(shell: Shell, pool: Pool, *arguments: str) -> dict[str, Any]:
    (status, said, result), _ = pool.run(be_rank, str(shell.folder), ["plan.json", *arguments])
    assert status == 0, said
    return result


def test_a_run_that_ended_early_is_brought_to_its_goal_by_the_same_command(shell: Shell, ranks2: Pool) -> None:
    command = ("--steps=7", *kept(Path("kept"), 6, Path("kept")))
    first = run(shell, ranks2, *command)
    assert first["checkpoints"] == {"resumed_from": None, "saved_step": 12}
    assert sorted(p.name for p in (shell.folder / "kept").iterdir()) == ["step-00000006", "step-00000012"]
    shutil.rmtree(shell.folder / "kept" / "step-00000012")  # as if it had been killed on the way there
    then = run(shell, ranks2, *command)
    assert then["checkpoints"] == {"resumed_from": "kept/step-00000006", "saved_step": 12}
    assert first["losses"][6:] == then["losses"]
    assert len(set(first["losses"])) == 12


def test_goals() -> None:
    begun = Goal.after(None, 7, 0, 2)
    assert begun == Goal(7, 9)
    assert Goal.after(begun, 7, 6, 2) == begun  # it ended at step 6
    assert Goal.after(begun, 7, 12, 2) == Goal(7, 21)  # it came to its end: as many further ones
    assert Goal.after(begun, 3, 6, 2) == Goal(3, 11)  # another wish
    assert Goal.after(Goal(7, 1 << 60), 7, 6, 2) == Goal(7, 15)  # no goal of ours
    assert Goal.of({"steps": 7, "until": 9}) == begun
    for other in (None, 3, {}, {"steps": 7}, {"steps": 7, "until": "9"}, {"steps": 7, "until": 9, "more": 1}):
        assert Goal.of(other) is None


def test_text_goes_on_behind_what_was_trained_on(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(26)))
    ids = torch.zeros(2, 4, dtype=torch.long)
    loaded: Any = SimpleNamespace(args=(), kwargs={"input_ids": ids, "labels": ids})
    plan: Any = None
    wanted = batches(loaded, plan, text)
    firsts = [next(wanted)[1]["input_ids"][0, 0].item() for _ in range(8)]
    assert firsts == [0, 8, 16, 0, 8, 16, 0, 8]  # three whole windows
    for start in range(8):
        assert next(batches(loaded, plan, text, start))[1]["input_ids"][0, 0].item() == firsts[start]
    text.write_bytes(b"short")
    with pytest.raises(UsageError, match="has 5 bytes; one batch needs 8"):
        next(batches(loaded, plan, text, 3))


def test_a_scripts_checkpoint_is_not_gone_on_with(shell: Shell, ranks2: Pool) -> None:
    run(shell, ranks2, "--steps=0", "--save=none")  # nothing is trained, so nothing is saved
    assert not (shell.folder / "none").exists()
    run(shell, ranks2, "--steps=1", "--save=own")
    path = shell.folder / "own" / "step-00000006" / "checkpoint.json"
    path.write_text(path.read_text().replace('"data_position": 6', '"data_position": {"epoch": 1}'))
    found = ranks2.run(be_rank, str(shell.folder), ["plan.json", "--steps=1", "--resume=own"])
    assert [status for status, _, _ in found] == [2, 2]
    assert "data_position: expected 6, the step, found {'epoch': 1}" in found[0][1]
    assert found[1][1] == ""


def test_wrong_use_is_refused(shell: Shell) -> None:
    done = shell.here("run", "plan.json", "--every", "3")
    assert done.exit_code == 2
    assert "--every N needs --save FOLDER" in done.stderr

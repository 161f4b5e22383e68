"""Runs that are saved, ended and gone on with by the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_end_to_end import TOY, Shell


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder with a plan of the toy model for two ranks."""
    made = Shell(tmp_path_factory.mktemp("saved"))
    (made.folder / "toy.py").write_text(TOY.read_text())
    arguments = ("plan", "toy.py:build", "--cluster", "cpu:2", "--batch", "8", "--pin", "tp=2", "-o", "plan.json")
    assert made.here(*arguments).exit_code == 0
    return made


def run(shell: Shell, *arguments: str) -> dict[str, Any]:
    done = shell("run", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_run_saves_and_goes_on(shell: Shell) -> None:
    wanted = run(shell, "plan.json", "--steps", "7")["losses"]
    kept = ("--save", "kept", "--every", "3", "--resume", "kept")
    first = run(shell, "plan.json", "--steps", "1", *kept)
    assert first["checkpoints"] == {"resumed_from": None, "saved_step": 6}
    assert sorted(p.name for p in (shell.folder / "kept").iterdir()) == ["step-00000003", "step-00000006"]
    then = run(shell, "plan.json", "--steps", "1", *kept)
    assert then["checkpoints"]["resumed_from"] == "kept/step-00000006"
    assert first["losses"] + then["losses"] == wanted


def test_wrong_use_is_refused(shell: Shell) -> None:
    done = shell.here("run", "plan.json", "--every", "3")
    assert done.exit_code == 2
    assert "--every N needs --save FOLDER" in done.stderr

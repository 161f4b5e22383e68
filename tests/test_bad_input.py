"""Bad input through the command line: one clear message each, exit status 2 (1 where it merely does not fit), no file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from shardwright.cli.main import main

TOY = Path(__file__).with_name("toy.py")
BUILD = f"{TOY}:build"

CASES = [
    (["nofile.py:build", "--cluster", "cpu:2"], "no such file: nofile.py"),
    ([f"{TOY}:nothing", "--cluster", "cpu:2"], "has no function 'nothing'"),
    ([f"{TOY}:raising", "--cluster", "cpu:2"], "RuntimeError: no such luck"),
    ([f"{TOY}:returning_a_number", "--cluster", "cpu:2"], "must return (model, inputs)"),
    (["hf:unknown.json", "--cluster", "cpu:2"], "knows no model_type 'nonesuch'"),
    (["hf:broken.json", "--cluster", "cpu:2"], "not JSON"),
    (["hf:gpt-twelve", "--cluster", "cpu:2"], "no shipped config 'gpt-twelve'"),
    (["something", "--cluster", "cpu:2"], "is not a model"),
    ([BUILD, "--cluster", "broken.toml"], "not TOML"),
    ([BUILD, "--cluster", "missing.toml"], "missing.toml"),
    ([BUILD, "--cluster", "h100:8"], "did you mean h100-pcie or h100-sxm?"),
    ([BUILD, "--cluster", "h100-sxm:0"], "at least 1"),
    ([BUILD, "--cluster", "h100-sxm:8x"], "expected DEVICE"),
    ([BUILD, "--cluster", "cpu:2", "--pin", "tpp=2"], "unknown pin 'tpp'"),
    ([BUILD, "--cluster", "cpu:2", "--pin", "tp"], "is not K=V"),
    ([BUILD, "--cluster", "cpu:4", "--pin", "zero=5"], "zero is one of 0, 1, 2, 3"),
    ([BUILD, "--cluster", "cpu:4", "--pin", "pp=2"], "pp=2 x 1 chunks is more stages than the model has units to cut"),
    ([BUILD, "--cluster", "cpu:4", "--pin", "tp=2", "--pin", "tp=4"], "contradict each other: tp=2 and tp=4"),
    ([BUILD, "--cluster", "cpu:4", "--pin", "tp=2", "--pin", "tp!=2"], "contradict each other"),
    ([BUILD, "--cluster", "cpu:4", "--pin", "tp=2", "--pin", "dp=4"], "needs 8 devices, the cluster has 4"),
    ([BUILD, "--cluster", "cpu:4+h100-sxm:4"], "make no common plan"),
    ([BUILD, "--cluster", "h100-sxm:8x1+a100-sxm-80gb:4x1", "--pin", "pp=2"], "pools of 8 and 4 devices"),
    ([BUILD, "--cluster", "cpu:4", "--pin", "tp=3"], "tp=3 does not divide the 4 devices"),
    ([BUILD, "--cluster", "cpu:4", "--batch", "7", "--pin", "dp=4"], "a batch of 7 does not divide over dp=4"),
    (
        [BUILD, "--cluster", "cpu:4", "--batch", "8", "--pin", "dp=4", "--pin", "micro_batch=3"],
        "micro_batch=3 does not divide",
    ),
]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder with broken input files in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "unknown.json").write_text(json.dumps({"model_type": "nonesuch"}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.toml").write_text("x = [")
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[message[:45] for _, message in CASES])
def test_refused(arguments: list[str], message: str, here: Path) -> None:
    before = set(here.iterdir())
    done = CliRunner().invoke(main, ["plan", *arguments, "-o", "out.json", "--report", "out.html"])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert set(here.iterdir()) == before


@pytest.mark.usefixtures("here")
def test_all_problems_of_a_capture_together() -> None:
    for command in (["plan", f"{TOY}:branching", "--cluster", "cpu:2"], ["check", f"{TOY}:branching"]):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 2
        assert "if x.sum() > 0" in done.stderr
        assert "x.numpy()" in done.stderr


def test_what_does_not_fit_names_what_would(here: Path) -> None:
    done = CliRunner().invoke(
        main, ["plan", BUILD, "--cluster", "cpu:2", "--batch", "8", "--memory-limit", "1KiB", "-o", "p.json"]
    )
    assert done.exit_code == 1
    assert "nearest settings that fit:" in done.stderr
    assert "--memory-limit" in done.stderr
    assert not (here / "p.json").exists()

"""The README does what it says: its Python runs, its commands exist, its planning example is what the planner prints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from shardwright.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def _commands() -> list[str]:
    """Commands shown in the README and in docs/."""
    pages = [README, *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))]
    blocks = [b for page in pages for b in re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ shardwright ")]
    return list(dict.fromkeys(line.partition("  # exit status")[0] for line in lines))


def test_python_runs() -> None:
    blocks = _blocks("python")
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("line", _commands())
def test_commands_exist(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every command parses (options, types, choices), without being run."""
    monkeypatch.chdir(tmp_path)
    program, name, *arguments = shlex.split(line)
    assert program == "shardwright"
    command = main.get_command(click.Context(main), name)  # type: ignore[attr-defined]
    assert command is not None
    command.make_context(name, arguments)


def test_make_targets_exist() -> None:
    named = set(re.findall(r"make (demo|test|check|nightly)", README))
    assert {"demo", "test"} <= named
    makefile = (ROOT / "Makefile").read_text()
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(((?!https?:)[^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.nightly
@pytest.mark.parametrize("line", [c for c in _commands() if "--objective" in c or "--frontier" in c])
def test_objectives_are_planned(line: str, tmp_path: Path) -> None:
    """Every command with an objective of its own prints a plan."""
    program = [sys.executable, "-m", "shardwright.cli.main", *shlex.split(line)[1:], "--json"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"predicted"' in done.stdout


@pytest.mark.nightly
def test_planning_example_is_real(tmp_path: Path) -> None:
    """The output shown under the first command is what it prints, as far as it is shown."""
    first, *shown = _blocks("console")[0].splitlines()
    program = [sys.executable, "-m", "shardwright.cli.main", *shlex.split(first[2:])[1:]]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    assert [line.rstrip() for line in shown if line != "..."] == printed[: len(shown) - shown.count("...")]


def test_the_limit_of_the_demo_is_one_that_one_process_breaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever planning comes to save: the demo is about two processes that hold what one cannot."""
    from shardwright.cli import demo, tables

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    demo.FOLDER.mkdir()
    with tables.progress() as tell:
        model, text = demo._inputs()
        limit = demo._limit(model, tell)
    assert text.stat().st_size > 10**5
    assert 25e6 * 16 < limit < 26e6 * 16
    assert "one process:" in capsys.readouterr().err


@pytest.mark.nightly
def test_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import json
    import os

    own = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "GLOO_SOCKET_IFNAME": "lo"}
    program = [sys.executable, "-m", "shardwright.cli.main", "demo", "--json"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=900, cwd=tmp_path, env=own)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["memory_limit_bytes"] > 25e6 * 16
    assert (tmp_path / "demo-report.html").stat().st_size > 10**4

"""The pages of docs/ do what they say: files they show are written, and their snippets and commands run, in order.

A fence `python title=FILE` (or `toml`) is a file; other Python is run, after what the same page showed before; lines of `console`
that begin with "$ " are run and must end with status 0, or with what stands behind "# exit status". Lines below one are in what
it prints.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
QUICK = ("how_to_add_a_device.md", "how_to_add_an_op.md")
"""Pages that every run follows; the others are for the night."""
SECONDS = 600

MODULES = {"shardwright": "from shardwright.cli.main import main; main()"}
PROGRAMS = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}
STATUS = re.compile(r"\s+# exit status (\d)$")


@dataclass(frozen=True)
class Block:
    """A fence: its language, the file it is to be written to ("" for none), its text."""

    language: str
    title: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """All fences of a page, in order."""
    pattern = r"^```(\w+)(?: title=(\S+))?\n(.*?)^```"
    for found in re.finditer(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        yield Block(found[1], found[2] or "", found[3])


def follow(page: Path, folder: Path) -> int:
    """Do in `folder` what a page says; the number of things done."""
    shown, done = "", 0
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            shown += block.text
            done += run([sys.executable, "-c", shown], 0, folder, block.text)
        elif block.language == "console":
            for part in block.text.split("$ ")[1:]:
                line, *below = part.splitlines()
                done += command(line, folder, below)
    return done


def command(line: str, folder: Path, below: Sequence[str] = ()) -> int:
    """Run a line of a console, which must print what stands below it."""
    status = STATUS.search(line)
    program, *arguments = shlex.split(STATUS.sub("", line))
    start = ["-c", MODULES[program]] if program in MODULES else PROGRAMS[program]
    return run([sys.executable, *start, *arguments], int(status[1]) if status else 0, folder, line, below)


def run(words: list[str], status: int, folder: Path, what: str, below: Sequence[str] = ()) -> int:
    """Run a process, which must end with `status` and print the lines `below` (spaces do not count); 1."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == status, (
        f"{what}\nended with {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    )
    printed = " ".join(done.stdout.split())
    for each in below:
        assert " ".join(each.split()) in printed, f"{what}\ndid not print\n{each}\nbut\n{done.stdout}"
    return 1


@pytest.mark.parametrize("name", QUICK)
def test_a_page_is_followed(name: str, tmp_path: Path) -> None:
    assert follow(DOCS / name, tmp_path) > 1


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(p.name for p in DOCS.glob("*.md") if p.name not in QUICK))
def test_every_other_page_is_followed(name: str, tmp_path: Path) -> None:
    follow(DOCS / name, tmp_path)

"""Headless Chromium for tests: what a page says of itself once it is loaded."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless-shell")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip


def chromium() -> str:
    """The browser's program; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


def loaded(page: Path, folder: Path, *options: str) -> tuple[str, str]:
    """(the document once loaded, as HTML; what the console says)."""
    program = [chromium(), *QUIET, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0",
               f"--log-net-log={folder / 'net.json'}", *options, "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, console


def fetched(folder: Path) -> list[str]:
    """What the page last loaded from a file asked the network for; what the browser asks of its own accord is left out."""
    events = json.loads((folder / "net.json").read_text())["events"]
    asked = [event["params"] for event in events if "url" in event.get("params", {})]
    return [one["url"] for one in asked if "file://" in one.get("network_isolation_key", "")]


def drawn(document: str) -> dict[str, int]:
    """By chart of a loaded page, how many shapes and texts it has."""
    parts = re.split(r'data-chart="(\w+)"', document)[1:]
    return {
        name: len(re.findall(r"<(?:path|rect|text|polyline)\b", body.split("<table")[0]))
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def timing(document: str) -> float:
    """Milliseconds from the start of loading to all charts drawn, as the page noted them."""
    found = re.search(r'data-drawn-after="([\d.]+)"', unescape(document))
    assert found is not None
    return float(found[1])

"""Measurements that need several processes at once: start fresh ranks, hand them a job, collect what rank 0 wrote.

Ranks are plain `python -m` processes, not spawned copies of the caller, so a caller's script needs no `__main__` guard
and may itself run under torchrun. They meet through a file, and are killed when the time is up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LaunchError
from .progress import Row, Tail

TIMEOUT_SECONDS = 600.0
"""Far more than a measurement takes on an idle machine: starting Python on a crowded one is slow."""


class TimeUp(LaunchError):
    """The ranks did not answer in time; what they were at is in the rows told last."""


def run_ranks(
    ranks: int, threads: int, tasks: Sequence[str], *, timeout: float = TIMEOUT_SECONDS,
    heard: Callable[[list[Row]], None] | None = None, **details: Any,
) -> dict[str, Any]:  # fmt: skip
    """Run `tasks` of profiles/tasks.py on `ranks` ranks (gloo; nccl with `gpu=True`) of `threads` threads; results by task.

    `heard` is told of rows while the ranks measure. Raises LaunchError with the end of a rank's error output when a rank fails,
    and TimeUp, one of its kinds, when the time is up.
    """
    with tempfile.TemporaryDirectory(prefix="shardwright-") as name:
        folder = Path(name)
        job = {"ranks": ranks, "threads": threads, "tasks": list(tasks), "timeout": timeout, **details}
        (folder / "job.json").write_text(json.dumps(job))
        tail = Tail(folder / "progress")
        processes = [_start(folder, rank) for rank in range(ranks)]
        try:
            _wait(
                processes,
                folder,
                time.monotonic() + timeout,
                lambda: heard(rows) if heard and (rows := tail.rows()) else None,
            )
        finally:
            for process in processes:
                process.kill()
                process.wait()
        found: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return found


def _start(folder: Path, rank: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"{__package__}.worker", str(folder), str(rank)]
    with (folder / f"errors{rank}").open("wb") as errors:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=_environment(os.environ)
        )


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment with its import path and loopback for gloo, without the marks of a torchrun around it."""
    kept = {
        k: v
        for k, v in given.items()
        if not k.startswith(("TORCHELASTIC", "MASTER_")) and k not in ("RANK", "WORLD_SIZE")
    }
    path = os.pathsep.join(p for p in sys.path if p)
    # Ranks talk through the loopback device where it has its usual Linux name.
    loopback = {"GLOO_SOCKET_IFNAME": kept.get("GLOO_SOCKET_IFNAME", "lo")} if sys.platform == "linux" else {}
    return {**kept, "PYTHONPATH": path, **loopback}


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], folder: Path, deadline: float, look: Callable[[], None]
) -> None:
    """Until every rank has ended well, looking at what they told; the first failure or the deadline raises."""
    while True:
        look()
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                raise LaunchError(f"measuring this machine: rank {rank} of {len(codes)} failed:\n{_tail(folder, rank)}")
        if all(code == 0 for code in codes):
            look()
            return
        if time.monotonic() > deadline:
            late = codes.index(None)
            raise TimeUp(
                f"measuring this machine: rank {late} of {len(codes)} did not answer in time\n{_tail(folder, late)}"
            )
        time.sleep(0.02)


def _tail(folder: Path, rank: int) -> str:
    return "\n".join((folder / f"errors{rank}").read_text(errors="replace").splitlines()[-8:])

"""Lost ranks: which rank is dead, stopped or elsewhere when a collective fails, instead of a wait without end.

Every rank has one thread that writes a beat into the store of the process group from time to time: where its main thread is,
and in which collective it waits. Nothing is read until a collective fails, by the process groups' own timeout or because a
connection broke. Then the thread looks at all beats twice: a rank whose beat stands still is dead or stopped, one that beats but
waits in no collective is busy elsewhere. What the first rank finds is what all report. A collective costs an assignment before
it and one after.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import select
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ..errors import LaunchError
from .torch_compat import store_of_group

WAIT_SHARE, BEAT_SHARE, LONGEST_BEAT = 0.7, 0.08, 5.0
"""Of the timeout: what a collective waits, and the time between two beats (at most so many seconds). Judging takes three beats."""
JUDGED_BEATS = 2.2
"""Beats between two looks: one that came late is not one that is missing."""
LOST = ("gloo", "onnection closed by peer", "onnection reset", "Timed out waiting", "NCCL", "Broken pipe")
"""Parts of what torch says when a collective fails for want of another rank."""
KEY = "shardwright/watch"


class RankFailure(LaunchError):
    """A rank is dead, stopped or elsewhere; `first` on the rank that found it, which is the one to print it."""

    def __init__(self, message: str, first: bool = True) -> None:
        self.first = first
        super().__init__(message)


@dataclass(frozen=True)
class Beat:
    """What a rank said of itself: the number of this beat, the collective it is in or was in last, and the line it runs."""

    number: int
    count: int
    collective: str
    inside: bool
    line: str

    def place(self) -> str:
        """Where it is, for a message."""
        if self.inside:
            return f"in {self.collective} (collective {self.count})"
        after = f", after {self.collective} (collective {self.count})" if self.count else ", before any collective"
        return f"at {self.line}{after}"


class RankWatch:
    """Beats of this rank, and the judgement when one of its collectives fails.

    `timeout` in seconds is when a rank counts as lost; process groups handed to `hold` wait for `WAIT_SHARE` of it. With `ends`
    the thread also ends the process on SIGTERM, saying in which collective it waited (the main thread cannot while it waits).
    """

    def __init__(self, rank: int, world: int, store: Any, timeout: float, *, ends: bool = False) -> None:
        self.rank, self.world, self.timeout, self.ends = rank, world, timeout, ends
        self.beat = min(LONGEST_BEAT, BEAT_SHARE * timeout)
        self.limit = timedelta(seconds=WAIT_SHARE * timeout)
        self.now: tuple[int, str, str, bool] = (0, "", "", False)
        self._begun = 0
        self.axes: dict[str, str] = {}
        self._store = store
        self._main = threading.get_ident()
        self._beats = 0
        self._asked: str | None = None
        self._found: tuple[str, bool] | None = None
        self._judged, self._over = threading.Event(), False
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._handler: Any = None
        self._thread = threading.Thread(target=self._serve, name="shardwright-watch", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._publish()
        if self.ends:
            self._handler = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(self._wake)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; nothing is judged any more."""
        self._over = True
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler[0])
            signal.set_wakeup_fd(self._handler[1])
        self._nudge()
        self._thread.join(timeout=2 * self.beat)
        if not self._thread.is_alive():
            os.close(self._wake)
            os.close(self._woken)

    def hold(self, group: Any, axis: str) -> None:
        """Give a process group the time limit (new groups have torch's own, half an hour), and its name in messages."""
        group.set_timeout(self.limit)
        self.axes[group.group_name] = axis

    def enter(self, collective: str, group: str) -> int:
        """A collective begins; returns its number."""
        self._begun += 1
        self.now = (self._begun, collective, group, True)
        return self._begun

    def resume(self, number: int, collective: str, group: str) -> None:
        """This rank waits in one that it began earlier, maybe before others."""
        self.now = (number, collective, group, True)

    def leave(self) -> None:
        """The one that this rank was in has ended, or is under way beside what the rank does."""
        count, collective, group, _ = self.now
        self.now = (count, collective, group, False)

    def failure(self, error: BaseException) -> RankFailure:
        """The error to raise for a collective that failed with `error`; takes three beats."""
        self._asked = str(error)
        self._nudge()
        answered = self._judged.wait(4 * self.beat + 1.0)
        text, first = self._found if answered and self._found else (self._unanswered(), True)
        if self.rank == 0:
            time.sleep(
                JUDGED_BEATS * self.beat
            )  # the store may end with this process, and others read the verdict there
        return RankFailure(text, first)

    def collective(self) -> str:
        """The collective that this rank is in, or was in last."""
        _, name, group, _ = self.now
        return f"{name} over {self.axes.get(group, 'all ranks')}" if name else "no collective"

    def _serve(self) -> None:
        while not self._over:
            ready, _, _ = select.select([self._woken], [], [], self.beat)
            if ready and signal.SIGTERM in os.read(self._woken, 64) and self.ends and not self._over:
                self._end()
            with contextlib.suppress(Exception):  # a lost store is told when a collective fails
                self._publish()
            if self._asked is not None and not self._judged.is_set():
                with contextlib.suppress(Exception):
                    self._found = self._judge(self._asked)
                    self._judged.set()

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake, b"\0")

    def _publish(self) -> None:
        self._beats += 1
        count, _, _, inside = self.now
        told = [self._beats, count, self.collective(), inside, _line(sys._current_frames().get(self._main))]
        self._store.set(f"{KEY}/beat/{self.rank}", json.dumps(told))

    def _read(self) -> dict[int, Beat]:
        found = {}
        for rank in range(self.world):
            key = f"{KEY}/beat/{rank}"
            if self._store.check([key]):
                found[rank] = Beat(*json.loads(self._store.get(key)))
        return found

    def _judge(self, error: str) -> tuple[str, bool]:
        """(verdict, whether it is this rank's own)."""
        before = {} if self._store.check([f"{KEY}/verdict"]) else self._read()
        looked = time.monotonic()
        while before and time.monotonic() < looked + JUDGED_BEATS * self.beat:
            time.sleep(self.beat / 2)
            self._publish()  # others look at this rank meanwhile
        if self._store.check([f"{KEY}/verdict"]):
            return self._store.get(f"{KEY}/verdict").decode(), False
        text = self._verdict(before, self._read(), error)
        told = self._store.compare_set(f"{KEY}/verdict", "", text).decode()
        return told, told == text

    def _verdict(self, before: dict[int, Beat], after: dict[int, Beat], error: str) -> str:
        waited = f"rank {self.rank} waited in {self.collective()} (collective {self.now[0]})"
        others = [r for r in range(self.world) if r != self.rank]
        silent = [r for r in others if r not in after or (r in before and before[r].number == after[r].number)]
        if silent:
            last = "; ".join(f"rank {r} was last seen {after[r].place()}" for r in silent[:3] if r in after)
            return (
                f"{_ranks(silent)} gave no sign of life for {JUDGED_BEATS * self.beat:.1f} s (dead or stopped) while {waited}"
                + (f"; {last}" if last else "")
            )
        away = [r for r in others if not after[r].inside]
        if away:
            told = "; ".join(f"rank {r} is {after[r].place()}" for r in away[:3])
            return f"{_ranks(away)} did not come within {self.limit.total_seconds():g} s while {waited}; {told}"
        elsewhere = [r for r in others if after[r].collective != self.collective() or after[r].count != self.now[0]]
        if elsewhere:
            told = "; ".join(f"rank {r} waits {after[r].place()}" for r in elsewhere[:3])
            return f"the ranks wait in different collectives: {waited}; {told}"
        return (
            f"every rank is alive, but the connection between them failed while {waited}: {error.splitlines()[0][:200]}"
        )

    def _unanswered(self) -> str:
        return (
            f"the store of the process group does not answer: the machine or the process that serves it (rank 0, or torchrun on "
            f"its machine) is dead or stopped; rank {self.rank} waited in {self.collective()} (collective {self.now[0]})"
        )

    def _end(self) -> None:
        """End the process as SIGTERM would, after the first rank of all has said where it was."""
        first = True
        with contextlib.suppress(Exception):
            first = self._store.add(f"{KEY}/ended", 1) == 1
        if first:
            where = "waiting in" if self.now[3] else "after"
            text = f"rank {self.rank} was told to end (SIGTERM) {where} {self.collective()} (collective {self.now[0]})"
            with contextlib.suppress(OSError):
                os.write(2, f"{text}\n".encode())
        os._exit(128 + signal.SIGTERM)


def watch_ranks(timeout: float, *, ends: bool = False) -> RankWatch | None:
    """Watch the ranks of the default process group from this rank on; None for one rank. All ranks call it.

    Raises LaunchError for a timeout below one second.
    """
    if timeout < 1:
        raise LaunchError(
            f"a timeout of {timeout:g} s is too short to tell a lost rank from a slow one; take at least 1"
        )
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    made = RankWatch(dist.get_rank(), dist.get_world_size(), store_of_group(), timeout, ends=ends)
    made.hold(dist.group.WORLD, "all ranks")
    made.start()
    _active.set(made)
    return made


def unwatch() -> None:
    """End the watch of this process, if there is one."""
    watch = _active.get()
    if watch is not None:
        watch.stop()
        _active.set(None)


def active_watch() -> RankWatch | None:
    """The watch of this process."""
    return _active.get()


_active: contextvars.ContextVar[RankWatch | None] = contextvars.ContextVar("shardwright_watch", default=None)


@contextlib.contextmanager
def waiting(collective: str, group: str = "") -> Iterator[None]:
    """Inside, this rank waits in `collective`; where that fails for want of a rank, RankFailure names it."""
    watch = _active.get()
    if watch is None:
        yield
        return
    watch.enter(collective, group)
    try:
        yield
    except RuntimeError as error:
        if is_lost(error):
            raise watch.failure(error) from error
        raise
    watch.leave()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside run collectives that nobody announces (those of compiled code): a failure of one is judged all the same."""
    watch = _active.get()
    try:
        yield
    except RuntimeError as error:
        if watch is not None and is_lost(error):
            raise watch.failure(error) from error
        raise


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed because a rank or a connection is lost (torch has one class for everything)."""
    return isinstance(error, dist.DistError) or any(part in str(error) for part in LOST)


def _ranks(found: list[int]) -> str:
    shown = ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    return f"rank {shown}" if len(found) == 1 else f"ranks {shown}"


def _line(frame: FrameType | None) -> str:
    """The innermost line of the user's own code, else of this package: "train.py:37"."""
    library = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"), "<frozen")
    package = str(Path(__file__).resolve().parent.parent)
    fallback = ""
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(library):
            here = f"{Path(code.co_filename).name}:{frame.f_lineno}"
            if not str(Path(code.co_filename).resolve()).startswith(package):
                return here
            fallback = fallback or here
        frame = frame.f_back
    return fallback or "an unknown line"

"""How long this process was kept waiting by others: wall time, and the part of it a thread stood ready but had no processor.

On a machine that others use too, wall time says how busy they were. Linux counts for every thread the nanoseconds it stood in
the run queue (/proc/PID/task/TID/schedstat); wall time less those is what the work takes on an idle machine. Elsewhere nothing is
known and nothing is taken off.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

TASKS = "/proc/self/task"


@dataclass(frozen=True, slots=True)
class Span:
    """Wall seconds, and how many of them this process waited for a processor."""

    seconds: float
    waited: float

    @property
    def own(self) -> float:
        """Seconds without the waiting; at least a tenth of the wall time, since counters are read a moment apart."""
        return max(self.seconds - self.waited, 0.1 * self.seconds)


class Watch:
    """A stopwatch that runs from its making, for the calling thread. `team`: other threads compute beside it.

    While the thread sleeps it waits for another of this process (the workers of a collective), so the longest wait of another
    counts too, as far as it slept. Threads of a team wait at the same time: the longest wait counts.
    """

    __slots__ = ("_begin", "_queued", "_team")

    def __init__(self, *, team: bool = False) -> None:
        self._team = team
        self._queued = queued()
        self._begin = time.perf_counter()

    def stop(self) -> Span:
        """What passed since the beginning; the watch runs on."""
        seconds = time.perf_counter() - self._begin
        passed = {thread: _since(self._queued.get(thread), now) for thread, now in queued().items()}
        ran, waited = passed.pop(str(threading.get_native_id()), (0.0, 0.0))
        others = [wait for _, wait in passed.values()]
        if self._team:
            waited = max([waited, *others])
        else:
            waited += min(max(0.0, seconds - ran - waited), max(others, default=0.0))
        return Span(seconds, min(seconds, waited))


def _since(before: tuple[int, int] | None, now: tuple[int, int]) -> tuple[float, float]:
    return tuple(max(0, b - a) * 1e-9 for a, b in zip(before or (0, 0), now, strict=True))  # type: ignore[return-value]


def queued() -> dict[str, tuple[int, int]]:
    """Nanoseconds run and nanoseconds in the run queue so far, by thread of this process; empty where the system does not tell."""
    found: dict[str, tuple[int, int]] = {}
    try:
        threads = os.listdir(TASKS)
    except OSError:
        return found
    for thread in threads:
        try:
            with open(f"{TASKS}/{thread}/schedstat", "rb", buffering=0) as file:
                ran, waited, _ = file.read().split()
            found[thread] = int(ran), int(waited)
        except (OSError, ValueError):  # the thread has just ended, or the kernel does not count
            continue
    return found

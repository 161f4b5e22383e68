"""Allocator events of a run as one timeline of bytes, those that gloo frees out of sight included.

gloo's reduce_scatter copies its operand on the calling thread. The copy belongs to the collective, and whoever lets go of
the collective last frees it: the caller, inside the wait, or gloo's worker thread, a moment later, where no profiler
looks (one time in ten on an idle machine). A copy not seen to go inside the wait has gone when the wait returns.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence

from .torch_compat import Event

ON_DEVICE = "shardwright::update_on_device"
"""The range in which states that lie elsewhere are updated on the device."""

COLLECTIVE, LAUNCH, WAIT = "_c10d_functional::", "c10d::", "_c10d_functional::wait_tensor"


def changes(threads: Iterable[Sequence[Event]], outside: str | None = None) -> list[tuple[float, int]]:
    """(microseconds, bytes) of every allocation (positive) and release (negative), in order of time.

    What happens inside ops whose name begins with `outside` is left out, but for what runs on the device there.
    """
    found = [change for events in threads for change in _thread(events, outside)]
    return sorted(found, key=lambda change: change[0])


def _thread(events: Sequence[Event], outside: str | None) -> list[tuple[float, int]]:
    found: list[tuple[float, int]] = []
    running: dict[int, str] = {}
    copies: deque[Counter[int]] = deque()  # sizes of the copies of each collective launched and not waited for
    for e in events:
        if e.kind == "begin":
            running[e.op] = e.name
            if e.name.startswith(COLLECTIVE) and e.name != WAIT:
                copies.append(Counter())
        elif e.kind == "end":
            if running.pop(e.op, "") == WAIT and copies:
                found += [(e.microseconds, -size) for size in copies.popleft().elements()]
        elif outside is None or not _apart(running.values(), outside):
            found.append((e.microseconds, e.bytes))
            if copies:
                _note(copies, running.values(), e.bytes)
    return found


def _apart(running: Collection[str], outside: str) -> bool:
    return ON_DEVICE not in running and any(name.startswith(outside) for name in running)


def _note(copies: deque[Counter[int]], running: Collection[str], size: int) -> None:
    """Count an allocation or a release among the copies, if it is one of those."""
    if WAIT in running:
        if size < 0 and copies[0][-size] > 0:
            copies[0][-size] -= 1
    elif any(name.startswith(LAUNCH) for name in running) and (size > 0 or copies[-1][-size] > 0):
        copies[-1][abs(size)] += 1 if size > 0 else -1

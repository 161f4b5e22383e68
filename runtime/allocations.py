"""Allocator events of a run as one timeline of bytes, those that gloo frees out of sight included.

gloo's reduce_scatter copies its operand on the calling thread. The copy belongs to the collective, and whoever lets go of
the collective last frees it: the caller, inside the wait, or gloo's worker thread, a moment later, where no profiler
looks (one time in ten on an idle machine). A copy not seen to go inside the wait has gone when the wait returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .torch_compat import Event

ON_DEVICE = "shardwright::update_on_device"
"""The range in which states that lie elsewhere are updated on the device."""

LAUNCHED, WAITED = "shardwright::launch ", "shardwright::wait "
"""Ranges around the launch of a collective and around the waits for its results; a number follows (runtime/monitor.py).

Several are under way at once and end in any order, and one of several tensors is waited for tensor by tensor. Those of compiled
code have no such range: there each wait is taken to be that of the oldest.
"""

COLLECTIVE, LAUNCH, WAIT = "_c10d_functional::", "c10d::", "_c10d_functional::wait_tensor"


def changes(threads: Iterable[Sequence[Event]], outside: str | None = None) -> list[tuple[float, int]]:
    """(microseconds, bytes) of every allocation (positive) and release (negative), in order of time.

    What happens inside ops whose name begins with `outside` is left out, but for what runs on the device there.
    """
    found = [change for events in threads for change in _Thread(outside).changes(events)]
    return sorted(found, key=lambda change: change[0])


class _Thread:
    """What one thread did. `copies` are sizes of those that each collective has under way, by its number, oldest first."""

    def __init__(self, outside: str | None) -> None:
        self.outside = outside
        self.running: dict[int, str] = {}
        self.copies: dict[str, Counter[int]] = {}
        self.unmarked = 0

    def changes(self, events: Iterable[Event]) -> list[tuple[float, int]]:
        """Its allocations and releases, those out of sight included."""
        found: list[tuple[float, int]] = []
        for e in events:
            if e.kind == "begin":
                self._begin(e)
            elif e.kind == "end":
                found += [(e.microseconds, -size) for size in self._end(e).elements()]
            elif self.outside is None or not self._apart(self.outside):
                found.append((e.microseconds, e.bytes))
                self._note(e.bytes)
        return found

    def _begin(self, e: Event) -> None:
        if e.name.startswith(LAUNCHED):
            self.copies[e.name.removeprefix(LAUNCHED)] = Counter()
        elif e.name.startswith(COLLECTIVE) and e.name != WAIT and self._number(LAUNCHED) is None:
            self.unmarked += 1
            self.copies[f"unmarked {self.unmarked}"] = Counter()
        self.running[e.op] = e.name

    def _end(self, e: Event) -> Counter[int]:
        """The copies of a collective whose wait ends, which nobody saw going."""
        name = self.running.pop(e.op, "")
        if name.startswith(WAITED):
            return self.copies.pop(name.removeprefix(WAITED), Counter())
        oldest = self._waited() if name == WAIT and self._number(WAITED) is None else None
        return Counter() if oldest is None else self.copies.pop(oldest)

    def _note(self, size: int) -> None:
        """Count an allocation or a release among the copies, if it is one of those."""
        if WAIT in self.running.values():
            copies = self.copies.get(self._waited() or "", Counter())
            if size < 0 and copies[-size] > 0:
                copies[-size] -= 1
        elif self.copies and any(name.startswith(LAUNCH) for name in self.running.values()):
            newest = self.copies[next(reversed(self.copies))]
            if size > 0 or newest[-size] > 0:
                newest[abs(size)] += 1 if size > 0 else -1

    def _waited(self) -> str | None:
        """The collective that is waited for now."""
        return self._number(WAITED) or next((n for n in self.copies if n.startswith("unmarked")), None)

    def _number(self, mark: str) -> str | None:
        return next((name.removeprefix(mark) for name in self.running.values() if name.startswith(mark)), None)

    def _apart(self, outside: str) -> bool:
        names = self.running.values()
        return ON_DEVICE not in names and any(name.startswith(outside) for name in names)

"""A slow network for tests: collectives that complete no earlier than a link of given latency and bandwidth would let them.

A wait sleeps until the collective's time has come, so the slowness takes no processor, and what runs meanwhile runs undisturbed.
Collectives of a link go one after the other, as on a real one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from shardwright.runtime.collectives import Pending


@dataclass
class SlowLink:
    """An observer of collectives: each takes `alpha` seconds, and its bytes over `bandwidth` a second.

    `blocked` are the seconds that the rank has waited.
    """

    alpha: float
    bandwidth: float
    blocked: float = 0.0
    _free: dict[str, float] = field(default_factory=dict)
    _due: dict[Pending, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def launching(self, pending: Pending) -> Iterator[None]:
        yield
        begin = max(time.monotonic(), self._free.get(pending.group, 0.0))
        self._due[pending] = self._free[pending.group] = begin + self.alpha + pending.bytes / self.bandwidth

    @contextlib.contextmanager
    def waiting(self, pending: Pending) -> Iterator[None]:
        begin = time.monotonic()
        yield
        time.sleep(max(self._due.pop(pending, begin) - time.monotonic(), 0.0))
        self.blocked += time.monotonic() - begin

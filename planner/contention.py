"""Replay of a timeline in which tasks that overlap on a rank slow each other.

Rates are progressive: whenever a task of a rank starts or ends, the others of that rank go on with what is left of them at
their new speed. Tasks that share a lane share its speed evenly; across lanes each task is slowed by the factor of every
other kind of lane that is busy. The step time found is the model's error against fixed durations, no part of a plan's gap.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import UsageError


def lane_kind(lane: str) -> str:
    """ "compute", "copy" (device to host or back), "disk", "host", or "comm" for all lanes that go over links."""
    if lane in ("copy-out", "copy-in"):
        return "copy"
    return lane if lane in ("compute", "disk", "host") else "comm"


@dataclass(frozen=True, slots=True)
class Contention:
    """`factors[kind, other]` is how much longer a task of `kind` takes while one of kind `other` runs beside it (1 if absent).

    Factors of several kinds multiply.
    """

    factors: Mapping[tuple[str, str], float]


@dataclass(frozen=True, slots=True)
class Job:
    """A task by rank and lane, its seconds when alone, and the jobs (indices) it waits for."""

    rank: int
    lane: str
    seconds: float
    waits: tuple[int, ...]


@dataclass(slots=True)
class _Rank:
    """What runs on a rank: seconds left by job as of time `at`, the slowdown of each job, and a stamp for stale events."""

    at: float = 0.0
    left: dict[int, float] = field(default_factory=dict)
    slow: dict[int, float] = field(default_factory=dict)
    stamp: int = 0


def replay(jobs: Sequence[Job], contention: Contention) -> float:
    """Seconds until the last job ends."""
    return _Replay(jobs, contention).run()


class _Replay:
    def __init__(self, jobs: Sequence[Job], contention: Contention) -> None:
        if any(factor < 1.0 for factor in contention.factors.values()):
            raise UsageError("contention factors say how much longer a task takes: they are at least 1")
        self.jobs, self.factors = jobs, contention.factors
        self.kinds = [lane_kind(job.lane) for job in jobs]
        self.open = [len(set(job.waits)) for job in jobs]
        self.heirs: list[list[int]] = [[] for _ in jobs]
        for i, job in enumerate(jobs):
            for before in set(job.waits):
                self.heirs[before].append(i)
        self.ranks = [_Rank() for _ in range(1 + max(job.rank for job in jobs))]
        self.events: list[tuple[float, int, int, int]] = []  # (end, job, rank, stamp)

    def run(self) -> float:
        now = 0.0
        changed = self._release([i for i, n in enumerate(self.open) if not n], now)
        self._retime(changed)
        while self.events:
            due, job, rank, stamp = heapq.heappop(self.events)
            state = self.ranks[rank]
            if stamp != state.stamp:
                continue
            now = due
            self._advance(state, now)
            del state.left[job]
            self._retime({rank} | self._end(job, now))
        return now

    def _end(self, job: int, now: float) -> set[int]:
        """Let the heirs of a finished job start; returns the ranks on which something new runs."""
        ready = []
        for heir in self.heirs[job]:
            self.open[heir] -= 1
            if not self.open[heir]:
                ready.append(heir)
        return self._release(ready, now)

    def _release(self, ready: list[int], now: float) -> set[int]:
        """Start jobs; those that take no time end at once."""
        changed: set[int] = set()
        while ready:
            i = ready.pop()
            job = self.jobs[i]
            if job.seconds > 0.0:
                state = self.ranks[job.rank]
                self._advance(state, now)
                state.left[i] = job.seconds
                changed.add(job.rank)
                continue
            for heir in self.heirs[i]:
                self.open[heir] -= 1
                if not self.open[heir]:
                    ready.append(heir)
        return changed

    def _advance(self, state: _Rank, now: float) -> None:
        """Take off what was done since the last event of the rank."""
        if now > state.at:
            for i in state.left:
                state.left[i] -= (now - state.at) / state.slow[i]
        state.at = now

    def _retime(self, ranks: set[int]) -> None:
        """New speeds and expected ends of everything on these ranks; earlier expectations become stale."""
        for rank in ranks:
            state = self.ranks[rank]
            state.stamp += 1
            lanes: dict[str, int] = {}
            for i in state.left:
                lanes[self.jobs[i].lane] = lanes.get(self.jobs[i].lane, 0) + 1
            kinds = {lane: lane_kind(lane) for lane in lanes}
            state.slow = {}
            for i, left in state.left.items():
                lane = self.jobs[i].lane
                slow = float(lanes[lane])
                for other in {kinds[name] for name in lanes if name != lane}:
                    slow *= self.factors.get((self.kinds[i], other), 1.0)
                state.slow[i] = slow
                heapq.heappush(self.events, (state.at + max(left, 0.0) * slow, i, rank, state.stamp))

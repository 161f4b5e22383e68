"""What branches that run at once take: placed on several workers, or side by side on one device.

Several workers (pipeline ranks). Those away from the fork are sent its results, once each; what a branch leaves is sent to the
worker of the join as soon as it is done, in order. All branches are done when everything is there:

    end of w   = start of w + sum of its branches,   start = 0 at the fork, else the seconds of sending the fork's results
    arrival    = max over w of (end of w at the join, else the end of its queue of sends)

With the sends as second machine each worker is a flow shop of two machines: Johnson's rule orders its branches best (S. M.
Johnson 1954). Which worker takes which branch is tried out where that is few (exact), else listed longest first (R. L. Graham 1969)
and improved by moves. Two equal branches take one of them and the sends: two workers pay iff a branch takes longer than those do.

One device. Branches share its units and memory: while several run, those that fill more of the device than there is are slowed down
alike. Starting kernels goes on in one host thread, whatever the number of streams.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from .outline import Outline
from .prices import Prices
from .waterline import Moment, waterline

EXACT = 4096
"""Assignments of branches to workers up to which all are tried."""


@dataclass(frozen=True, slots=True)
class Branch:
    """Seconds of a branch on one worker, and of sending what it leaves to another one."""

    seconds: float
    sends: float = 0.0


@dataclass(frozen=True, slots=True)
class Placed:
    """Branches, as indices, by worker in the order in which they run, and when all of their results are at the join."""

    workers: tuple[tuple[int, ...], ...]
    seconds: float


def place(
    branches: Sequence[Branch], workers: int, *, entry: float = 0.0, fork: int = 0, join: int = 0, overhead: float = 0.0
) -> Placed:
    """The quickest placement found; the one of all branches on the fork's worker where no other is quicker.

    `entry` are the seconds of sending the fork's results to a worker, `overhead` those of starting several workers and waiting
    for them. Exact up to `EXACT` assignments.
    """
    shop, count = _Shop(branches, entry, fork, join, overhead), len(branches)
    home = shop.placed([fork] * count, workers)
    if workers**count <= EXACT:
        tried = [shop.placed(at, workers) for at in product(range(workers), repeat=count)]
    else:
        tried = [shop.listed(workers), shop.placed([join] * count, workers)]
    found = min(tried, key=lambda placed: placed.seconds)
    return found if found.seconds < home.seconds else home


@dataclass(frozen=True, slots=True)
class _Shop:
    branches: Sequence[Branch]
    entry: float
    fork: int
    join: int
    overhead: float

    def placed(self, at: Sequence[int], workers: int) -> Placed:
        """The best orders for given workers, and what they take."""
        mine = [self._ordered([b for b, w in enumerate(at) if w == worker]) for worker in range(workers)]
        arrival = max(self._arrival(worker, order) for worker, order in enumerate(mine))
        several = sum(map(bool, mine)) > 1
        return Placed(tuple(map(tuple, mine)), arrival + (self.overhead if several else 0.0))

    def _ordered(self, mine: Iterable[int]) -> list[int]:
        """Johnson's rule: those that send longer than they run first, the quickest of them before; then by what they send."""

        def key(b: int) -> tuple[bool, float, int]:
            branch = self.branches[b]
            first = branch.seconds < branch.sends
            return not first, branch.seconds if first else -branch.sends, b

        return sorted(mine, key=key)

    def _arrival(self, worker: int, order: Sequence[int]) -> float:
        done = queue = self.entry if worker != self.fork and order else 0.0
        for b in order:
            done += self.branches[b].seconds
            queue = max(queue, done) + self.branches[b].sends
        return done if worker == self.join else queue if order else 0.0

    def listed(self, workers: int) -> Placed:
        """The longest branch first, each where all are done soonest; then single branches are moved while that helps."""
        order = sorted(range(len(self.branches)), key=lambda b: (-self.branches[b].seconds, b))
        at: dict[int, int] = {}
        for b in order:
            at[b] = min(range(workers), key=lambda w: (self._part({**at, b: w}, workers).seconds, w != self.fork, w))
        best, moved = self._part(at, workers), True
        while moved:
            moved = False
            for b, w in product(order, range(workers)):
                other = self._part({**at, b: w}, workers)
                if other.seconds < best.seconds * (1 - 1e-12):
                    at[b], best, moved = w, other, True
        return best

    def _part(self, at: Mapping[int, int], workers: int) -> Placed:
        return self.placed([at.get(b, -1) for b in range(len(self.branches))], workers)


@dataclass(frozen=True, slots=True)
class Load:
    """What ops do to a device alone: seconds, those in which they would fill it whole, and those of the host that starts them."""

    seconds: float
    filled: float
    issue: float = 0.0

    @property
    def share(self) -> float:
        """The share of the device that they fill on average; 0 of nothing."""
        return self.filled / self.seconds if self.seconds else 0.0


def loads(outline: Outline, prices: Prices, branches: Sequence[Sequence[str]]) -> tuple[Load, ...]:
    """The load of each branch, forward and backward, of ops of a whole outline.

    An op fills its device for as long as its FLOPs or bytes take at the best rate that kernels of its kind reach there; starting
    it, tiles that leave units idle and contractions too short to fill their pipeline do not.
    """
    kinds = {op.name: op.kind for op in outline.ops}
    moments: dict[str, list[Moment]] = {}
    for moment in waterline(outline, prices).moments:
        moments.setdefault(moment.op, []).append(moment)
    device, found = prices.cluster.device, list[Load]()
    for branch in branches:
        mine = [m for name in branch for m in moments.get(name, ())]
        filled = [min(sum(m.parts[:2]) / device.efficiency(kinds[m.op]), m.seconds - m.parts[2]) for m in mine]
        kernels = sum(m.parts[2] for m in mine)
        started = device.issue_seconds / device.kernel_overhead_seconds if device.kernel_overhead_seconds else 0.0
        found.append(Load(math.fsum(m.seconds for m in mine), math.fsum(filled), kernels * started))
    return tuple(found)


def side_by_side(branches: Sequence[Load], overhead: float = 0.0) -> float:
    """Seconds of branches that start together on one device; `overhead` is what starting and joining them takes.

    With t in ascending order: sum over i of (t[i] - t[i-1]) * max(1, shares of all that are not done), and no less than the host
    takes to start everything.
    """
    order = sorted(branches, key=lambda load: load.seconds)
    steps = _steps(order)
    fluid = math.fsum(t * max(1.0, math.fsum(load.share for load in order[i:])) for i, t in steps)
    return max(fluid, math.fsum(load.issue for load in order)) + overhead


def _steps(order: Sequence[Load]) -> Iterator[tuple[int, float]]:
    before = 0.0
    for i, load in enumerate(order):
        yield i, load.seconds - before
        before = load.seconds

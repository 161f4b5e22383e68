"""The joint search: every shape by its bound, the stage solve on those that may be the best, and the global certificate.

    1  a bound from the least compute of every unit
    2  a bound from its options, memory and pipeline (planner/screen.py)
    3  the stage solve, limited by the best plan so far

The smallest bound among the shapes that were closed or cut is a bound for the whole space (planners.md 12, outer search).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import PinError
from .plan import ShapeRecord
from .progress import Event, Progress
from .shapes import Arrangement
from .stages import StageSolution, StageSolve
from .workbench import Workbench

CLOSE = 5e-4
"""Gap asked of one shape on fewer than 64 devices, and `WIDE` on more (a plan's gap may be twice that)."""

WIDE = 3e-3

PLAIN = 3
"""Shapes of one stage that come before all others: quick to solve, often good, and nothing of their time is outside the bound."""

TOLD = 100
"""Shapes bounded between two lines of progress."""


@dataclass(frozen=True)
class Solved:
    """A shape with its solution."""

    shape: Arrangement
    solution: StageSolution

    @property
    def seconds(self) -> float:
        return self.solution.step_seconds


@dataclass
class Found:
    """The outcome of a search: the best, records of all shapes, and a proven bound.

    `roomy` has bounds of shapes that hold with host memory and disk too, whether they were offered or not.
    """

    best: Solved | None
    records: list[ShapeRecord]
    bound_seconds: float
    interrupted: bool = False
    roomy: Mapping[Arrangement, float] = field(default_factory=dict)

    def after(self, first: Found) -> Found:
        """These bounds, with the plans of a search before that offered less."""
        best: dict[tuple[object, ...], ShapeRecord] = {}
        for record in sorted([*self.records, *(r for r in first.records if r.status == "solved")], key=_rank):
            best.setdefault(_key(record), record)
        return replace(self, records=list(best.values()))


def _key(record: ShapeRecord) -> tuple[object, ...]:
    """The shape of a record."""
    mesh = tuple(sorted(record.mesh.items()))
    return mesh, record.schedule, record.chunks, record.microbatches, record.micro_batch, record.pools


def _rank(record: ShapeRecord) -> tuple[float, float, str, str, int]:
    """Plans first, the fastest before the others; then the least bound."""
    seconds = record.step_seconds if record.step_seconds is not None else math.inf
    bound = record.bound_seconds if record.bound_seconds is not None else math.inf
    return seconds, bound, str(sorted(record.mesh.items())), record.schedule, record.microbatches


NOTHING = Found(None, [], math.inf)
"""Before any search."""


@dataclass(order=True)
class _Open:
    """A queue entry: by what the shape may take (its bound, and a little for what its axes cost), then by the shape.

    `solution` is that of a quick solve.
    """

    likely: float
    shape: Arrangement
    bound: float = field(compare=False, default=0.0)
    screened: bool = field(compare=False, default=False)
    solution: StageSolution | None = field(compare=False, default=None)


TALK = {"tp": 0.03, "cp": 0.06, "ep": 0.02, "pp": 0.03, "chunks": 0.01}
"""What each doubling of an axis is taken to cost where the order of the search is decided; nothing else depends on it."""


class JointSearch:
    """One search over shapes, for better plans than that of a search `before`.

    `onward`: another search follows that offers host memory and disk, so bounds are looked for that hold for it as well.
    """

    def __init__(
        self, bench: Workbench, shapes: Sequence[Arrangement], tell: Progress, before: Found = NOTHING, *,
        onward: bool = False,
    ) -> None:  # fmt: skip
        self.bench, self.shapes, self.tell = bench, shapes, tell
        self.gap = CLOSE if bench.task.cluster.devices < 64 else WIDE
        self.best, self.known, self.onward = before.best, before.roomy, onward
        self.roomy: dict[Arrangement, float] = {}
        self.records: list[ShapeRecord] = []
        self.refused: list[PinError] = []
        self.closed = math.inf
        self.raised = 0

    def run(self) -> Found:
        """Search to the end, or an interrupt once there is a plan. Raises PinError where no shape meets the pins."""
        queue, interrupted = list[_Open](), False
        item: _Open | None = None
        try:
            for shape in self.shapes:
                bound = self.roomy[shape] = self.known.get(shape) or self.bench.bound(shape)
                queue.append(_Open(bound * _talk(shape), shape, bound))
            for plain in heapq.nsmallest(PLAIN, (i for i in queue if i.shape.pp == 1)):
                plain.likely = 0.0
            heapq.heapify(queue)
            while queue:
                item = heapq.heappop(queue)
                if not item.screened and item.bound < self.seconds * (1 - self.gap):
                    self._raise(item, queue)
                    continue
                again = self._step(item)
                if again is not None:
                    heapq.heappush(queue, again)
        except KeyboardInterrupt:
            if self.best is None:
                raise
            interrupted = True
            waiting = queue if item is None else [item, *queue]
            # Interrupted before all shapes stood in the queue, nothing is known of the others.
            unknown = [] if len(self.roomy) == len(self.shapes) else [0.0]
            self.closed = min([self.closed, *unknown, *(left.bound for left in waiting)])
            for left in waiting:
                if left.solution is not None and left.solution.stages is not None:
                    self._record(left.shape, "solved", left.bound, left.solution)
        if self.best is None and self.refused and len(self.refused) == len(self.records):
            raise self.refused[0]
        return Found(self.best, sorted(self.records, key=_rank), self.closed, interrupted, self.roomy)

    def _raise(self, item: _Open, queue: list[_Open]) -> None:
        if self.raised % TOLD == 0:
            self.tell(Event("bound", item.shape.told(), self.seconds if self.best is not None else None))
        self.raised += 1
        try:
            bound = item.bound
            if item.shape not in self.known:
                bound = self.roomy[item.shape] = self._roomy(item)
            if bound < self.seconds * (1 - self.gap):
                bound = max(bound, self.bench.screened(item.shape, bound, self.seconds))
        except PinError as error:
            self._refuse(item.shape, error)
            return
        likely = item.likely and bound * (1 + (_talk(item.shape) - 1) / 4)
        heapq.heappush(queue, _Open(likely, item.shape, bound, True))

    def _roomy(self, item: _Open) -> float:
        """A bound of a shape that looks at no memory."""
        bound = max(item.bound, self.bench.talk_bound(item.shape))
        if not self.onward or bound >= self.seconds * (1 - self.gap):
            return bound
        return max(bound, self.bench.roomy(item.shape, bound, self.seconds))

    def _refuse(self, shape: Arrangement, error: PinError) -> None:
        self.refused.append(error)
        self.records.append(_told(shape, "refused", None, None, str(error)))

    @property
    def seconds(self) -> float:
        return self.best.seconds if self.best is not None else math.inf

    def _step(self, item: _Open) -> _Open | None:
        """Solve a shape, quickly at first; returns it where a longer solve may tell more."""
        if item.bound >= self.seconds * (1 - self.gap):
            self._close(item, item.bound)
            return None
        self.tell(Event("solve", item.shape.told(), self.seconds if self.seconds < math.inf else None))
        try:
            problem = self.bench.problem(item.shape)
        except PinError as error:
            self._refuse(item.shape, error)
            return None
        limit, ready = self.seconds * (1 - self.gap / 2), self.bench.ready(item.shape)
        quick = item.solution is None
        found = StageSolve(problem, gap=self.gap, limit_seconds=limit, ready=ready, quick=quick).run()
        if found.stages is not None and found.step_seconds < self.seconds:
            self.best = Solved(item.shape, found)
        bound = max(item.bound, min(found.bound_seconds, found.step_seconds))
        known = item.solution
        best = found if known is None or found.step_seconds < known.step_seconds else known
        if found.open:
            return _Open(bound, item.shape, bound, True, best)
        self._close(replace(item, solution=best), bound)
        return None

    def _close(self, item: _Open, bound: float) -> None:
        """Nothing more is asked of a shape."""
        self.closed = min(self.closed, bound)
        if item.solution is not None and item.solution.stages is not None:
            self._record(item.shape, "solved", min(bound, item.solution.step_seconds), item.solution)
            return
        self._record(item.shape, "cut" if bound < math.inf else "does not fit", bound)

    def _record(self, shape: Arrangement, status: str, bound: float, solution: StageSolution | None = None) -> None:
        known = bound if 0 < bound < math.inf else None
        self.records.append(_told(shape, status, known, solution.step_seconds if solution is not None else None))


def search(
    bench: Workbench, shapes: Sequence[Arrangement], tell: Progress, offered: Sequence[bool]
) -> tuple[Workbench, Found]:  # fmt: skip
    """One search after the other, without and with host memory and disk as `offered` says, each for better plans than before.

    Plans without them are quick to find, and nearly all others are then cut by their bounds. Returns the bench that offers the
    most. Raises PinError where no shape meets the pins.
    """
    found = NOTHING
    for k, tiers in enumerate(offered):
        bench = bench.offering(tiers)
        onward = k + 1 < len(offered)
        found = JointSearch(bench, shapes, tell, found, onward=onward).run().after(found)
        if found.interrupted:
            least = min([found.bound_seconds, *found.roomy.values()] if onward else [found.bound_seconds])
            return bench.offering(offered[-1]), replace(found, bound_seconds=least)
    return bench, found


def _talk(shape: Arrangement) -> float:
    return 1.0 + sum(cost * math.log2(getattr(shape, name)) for name, cost in TALK.items())


def _told(shape: Arrangement, status: str, bound: float | None, seconds: float | None, reason: str = "") -> ShapeRecord:
    return ShapeRecord(
        shape.mesh(), shape.microbatches, status, bound, seconds, reason=reason, schedule=shape.schedule,
        chunks=shape.chunks, micro_batch=shape.micro_batch, pools=shape.pool_order,
    )  # fmt: skip

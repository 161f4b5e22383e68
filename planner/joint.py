"""The joint search: every shape by its bound, the stage solve on those that may be the best, and the global certificate.

    1  a bound from the least compute of every unit
    2  a bound from its options, memory and pipeline (planner/screen.py)
    3  the stage solve, limited by the best plan so far

The smallest bound among the shapes that were closed or cut is a bound for the whole space (planners.md 12, outer search).
"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import PinError
from .arcs import Line
from .cluster import Cluster, Device
from .costs import PriceBook
from .front import Design, crossing_state, ways_of
from .fronts import Fronts, Named
from .memory import Setting
from .options import Data, Option, Storing
from .outline import Outline
from .overlap import Overlap
from .part import Chain, chain
from .pins import Pins
from .placing import axis_strides, send_seconds
from .plan import ShapeRecord
from .progress import Event, Progress
from .prune import undominated
from .ready import Ready, make_ready
from .residual import residual_factors
from .schedules import SCHEDULES
from .screen import Screen
from .shapes import Arrangement
from .stages import Memory, Pipeline, StageProblem, StageSolution, StageSolve

CLOSE = 5e-4
"""Gap asked of one shape on fewer than 64 devices, and `WIDE` on more (a plan's gap may be twice that)."""

WIDE = 3e-3

TOLD = 100
"""Shapes bounded between two lines of progress."""


@dataclass(frozen=True)
class Task:
    """What is planned, ready for the search."""

    outline: Outline
    cluster: Cluster
    prices: PriceBook
    pins: Pins
    setting: Setting
    limit_bytes: int

    @property
    def device(self) -> Device:
        return self.cluster.device


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
    """The outcome of a search: the best, records of all shapes, the proven bound; and a bound whatever memory there is."""

    best: Solved | None
    records: list[ShapeRecord]
    bound_seconds: float
    interrupted: bool = False
    unlimited_seconds: float = 0.0

    def after(self, first: Found) -> Found:
        """These bounds, with the plans of a search before that offered less."""
        told = {_key(r) for r in self.records if r.status == "solved"}
        solved = {_key(r): r for r in first.records if r.status == "solved" and _key(r) not in told}
        records = [*solved.values(), *(r for r in self.records if _key(r) not in solved)]
        return replace(self, records=sorted(records, key=_rank))


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
    """A queue entry: by what the shape may take (its bound, and a little for what its axes cost), then by the shape."""

    likely: float
    shape: Arrangement
    bound: float = field(compare=False, default=0.0)
    screened: bool = field(compare=False, default=False)


TALK = {"tp": 0.03, "cp": 0.06, "ep": 0.02, "pp": 0.03, "chunks": 0.01}
"""What each doubling of an axis is taken to cost where the order of the search is decided; nothing else depends on it."""


class Workbench:
    """Prices of units, options and borders, shared by all shapes of one task."""

    def __init__(self, task: Task, tell: Progress, *, tiers: bool = False) -> None:
        self.task, self.tell, self.tiers = task, tell, tiers
        self.chain: Chain = chain(task.outline)
        self.residual = residual_factors(task.outline)
        self.overlap = Overlap.of(task.device)
        self.fronts = Fronts(
            self.chain, task.prices, task.pins, task.setting, self.residual,
            lambda text: tell(Event("front", text)), overlap=self.overlap,
        )  # fmt: skip
        self.storing = self._storing()
        self.regions = tuple(r for r, _ in self.chain.units)
        self._least: dict[tuple[int, int, int], tuple[float, float]] = {}
        self._options: dict[tuple[object, ...], list[Option]] = {}
        self._slowest: dict[tuple[tuple[float, ...], int], float] = {}
        self._ready: dict[tuple[str, int, int, int], Ready] = {}
        self.screen = Screen()

    def _storing(self) -> Storing:
        task, precision, optimizer = self.task, self.task.setting.precision, self.task.setting.optimizer
        return Storing(
            task.prices, task.device, precision, optimizer, task.outline.training, task.setting.foreach,
            task.cluster.host if self.tiers else None, task.pins,
        )  # fmt: skip

    def offering(self, tiers: bool) -> Workbench:
        """This bench with or without host memory and disk; what they do not change is shared."""
        if tiers == self.tiers:
            return self
        made = copy.copy(self)
        made.tiers = tiers
        made.storing, made._options, made.screen = made._storing(), {}, Screen()
        return made

    def on(self, shape: Arrangement, rank: int) -> Workbench:
        """The bench of a pipeline rank's devices: this one where all are equal."""
        return self

    # -- bounds

    def least(self, region: int, shape: Arrangement) -> tuple[float, float]:
        """The least forward and backward compute of a unit: every op by its fastest strategy, nothing communicated."""
        key = (region, shape.tp, shape.pieces)
        if key not in self._least:
            part = self.chain.at(region, shape.pieces)
            costs, tensors = self.fronts.costs(shape.tp), part.outline.tensors
            forward = backward = 0.0
            for op in part.outline.ops:
                ways = ways_of(op, tensors, costs, Pins(), frozenset())
                forward += min(w.forward for w in ways)
                backward += min(w.backward for w in ways)
            self._least[key] = forward, backward
        forward, backward = self._least[key]
        return forward / shape.cp, backward / shape.cp

    def bound(self, shape: Arrangement) -> float:
        """No plan of this shape takes less: the compute of its slowest rank, each op by its fastest strategy."""
        return self._bound(shape, Line.of(self.regions, [[self.least(r, shape)] for r in range(len(self.chain.parts))]))

    def _bound(self, shape: Arrangement, line: Line) -> float:
        m, total = shape.microbatches, line.before[-1]
        # One microbatch passes every unit and comes back; where weight halves are put off, they may run side by side.
        alone = line.forward(0, len(line)) if SCHEDULES[schedule_of(shape)].splits_backward else total
        if shape.chunks > 1 or shape.pp == 1:
            return max(m * total / shape.pp, alone)
        key = (line.least, shape.pp)
        if key not in self._slowest:
            self._slowest[key] = line.bottleneck(shape.pp)
        return max(m * self._slowest[key], alone)

    def talk_bound(self, shape: Arrangement) -> float:
        """A higher bound: designs with their communication."""
        times = [self.fronts.least(r, shape.tp, shape.pieces, shape.cp) for r in range(len(self.chain.parts))]
        if any(t is None for t in times):
            return 0.0  # the solve says why
        line = Line.of(self.regions, [[t] for t in times if t is not None])
        return self._bound(shape, line)

    def screened(self, shape: Arrangement, low: float, most: float) -> float:
        """A bound with memory and what passes before a rank can begin, between `low` and `most`; raises PinError."""
        key = (shape.tp, shape.cp, shape.pieces, self.data(shape))
        return self.screen.seconds(self.problem(shape), key, low, most)

    def ready(self, shape: Arrangement) -> Ready:
        """The schedule of a shape, made once."""
        name = schedule_of(shape) if self.task.outline.training else "forward"
        key = (name, shape.pp, shape.chunks, shape.microbatches)
        if key not in self._ready:
            self._ready[key] = make_ready(*key)
        return self._ready[key]

    # -- options

    def options(self, region: int, shape: Arrangement) -> list[Option]:
        """Every option of a unit; raises PinError where the pins leave none."""
        data = self.data(shape)
        key = (region, shape.tp, shape.cp, shape.pieces, data)
        if key not in self._options:
            measured = self.fronts.numbers(region, shape.tp, shape.pieces, shape.cp)
            levels = self._levels(data)
            found = [o for named, n in measured for o in self.storing.options(region, named, n, data, levels)]
            self._options[key] = undominated(found)
        return self._options[key]

    def option(self, region: int, shape: Arrangement, design: Design, zero: int, offload: str) -> Option | None:
        """The option of one design, ZeRO level and offload; None where it is not possible."""
        numbers = self.fronts.bench(region, shape.tp, shape.pieces, shape.cp).measure(design)
        if numbers is None:
            return None
        found = self.storing.options(region, Named(design, "", "none"), numbers, self.data(shape), (zero,))
        return next((o for o in found if o.offload == offload), None)

    def data(self, shape: Arrangement) -> Data:
        """The data axes around the inner mesh of a shape."""
        strides = axis_strides(shape.order, shape.sizes())
        stride = strides["cp"] if shape.cp > 1 else strides["ep"] if shape.ep > 1 else strides["dp"]
        return Data(
            shape.dp * shape.cp, stride, shape.tp, shape.microbatches, shape.pp, shape.ep, strides["ep"]
        )  # fmt: skip

    def _levels(self, data: Data) -> tuple[int, ...]:
        pins = self.task.pins
        if data.ranks == 1:
            if pins.zero:
                raise PinError(
                    f"zero={pins.zero} shares out parameters that several ranks hold whole; there are none without a data "
                    "axis: use zero=0, or dp=N with N > 1"
                )
            return (0,)
        levels: tuple[int, ...] = (0, 1, 2, 3) if self.task.outline.training else (0, 3)
        if pins.zero is not None:
            levels = (pins.zero,) if pins.zero in levels else (0,)
        kept = tuple(z for z in levels if not pins.forbids("zero", z))
        if not kept:
            raise PinError(f"the pins {', '.join(pins.texts)} leave no ZeRO level")
        return kept

    def problem(self, shape: Arrangement) -> StageProblem:
        """The stage solve of a shape."""
        options = [self.options(r, shape) for r in range(len(self.chain.parts))]
        for r, found in enumerate(options):
            if not found:
                blockers = self.fronts.context(shape.cp).blockers if shape.cp > 1 else ()
                raise PinError(
                    f"cp={shape.cp}: {blockers[0]}"
                    if blockers
                    else f"ep={shape.ep} does not divide the experts"
                    if shape.ep > 1
                    else f"region {self.task.outline.regions[r].name} cannot run on {shape.told()}"
                )
        line = Line.of(self.regions, [[(o.forward, o.backward) for o in found] for found in options])
        return StageProblem(
            line, options, self.change(shape), Pipeline(shape.pp, shape.chunks, schedule_of(shape), shape.microbatches),
            self.memory(), lambda at, layout: self.send(shape, at, layout), self.task.outline.training,
        )  # fmt: skip

    def given_bytes(self) -> float:
        """Bytes of buffers and constants, which every rank has."""
        tensors = self.task.outline.tensors.values()
        return float(sum(t.bytes for t in tensors if t.role in ("buffer", "constant") and t.storage == t.name))

    def memory(self) -> Memory:
        """What a rank may use: the limit less the context, and its share of the host."""
        host = self.task.cluster.host
        cap = max(self.task.limit_bytes - self.task.setting.reserve - self.given_bytes(), 0.0)
        if host is None or not self.tiers:
            return Memory(cap, 0.0, 0.0)
        return Memory(cap, float(host.rank_host_bytes), float(host.rank_disk_bytes))

    def crossing_bytes(self, shape: Arrangement, at: int, layout: str) -> float:
        """Bytes of one rank's part of what crosses before unit `at`, for one microbatch."""
        total = 0.0
        for name in self.chain.borders[at - 1]:
            tensor = self.task.outline.tensors[name]
            state = crossing_state(tensor, layout, self.chain.places.get(name, ()), shape.tp)
            total += tensor.bytes / shape.pieces / shape.cp / (shape.tp if state.is_split else 1)
        return total

    def send(self, shape: Arrangement, at: int, layout: str) -> tuple[float, float]:
        """Seconds of handing on what crosses before unit `at`, forward and back."""
        if shape.pp == 1:
            return 0.0, 0.0
        stride = axis_strides(shape.order, shape.sizes())["pp"]
        seconds = send_seconds(self.task.cluster, self.crossing_bytes(shape, at, layout), stride, size=shape.pp)
        return seconds, seconds if self.task.outline.training else 0.0

    def hand(self, shape: Arrangement, stage: int, at: int, layout: str) -> tuple[float, float]:
        """As `send`, for what crosses into a stage."""
        return self.send(shape, at, layout)

    def change(self, shape: Arrangement) -> Mapping[tuple[str, str], tuple[float, float]]:
        """Seconds of changing the layout of what crosses between units: a gather one way, a slice the other."""
        if shape.tp == 1 or not self.chain.borders:
            return {}
        most = max(self.crossing_bytes(shape, at, "R") for at in range(1, len(self.chain)))
        gather = self.task.prices.collective("all_gather", most, 1, shape.tp).seconds
        back = gather if self.task.outline.training else 0.0
        return {("R", "S"): (0.0, back), ("S", "R"): (gather, 0.0)}


def schedule_of(shape: Arrangement) -> str:
    """The schedule that is simulated."""
    return "1f1b" if shape.schedule == "none" else shape.schedule


class JointSearch:
    """One search over shapes, for better plans than `best`."""

    def __init__(
        self, bench: Workbench, shapes: Sequence[Arrangement], tell: Progress, best: Solved | None = None
    ) -> None:  # fmt: skip
        self.bench, self.shapes, self.tell = bench, shapes, tell
        self.gap = CLOSE if bench.task.cluster.devices < 64 else WIDE
        self.best = best
        self.records: list[ShapeRecord] = []
        self.refused: list[PinError] = []
        self.closed = self.unlimited = math.inf
        self.raised = 0

    def run(self) -> Found:
        """Search to the end, or an interrupt once there is a plan. Raises PinError where no shape meets the pins."""
        queue, interrupted = list[_Open](), False
        try:
            for shape in self.shapes:
                bound = self.bench.bound(shape)
                queue.append(_Open(bound * _talk(shape), shape, bound))
            heapq.heapify(queue)
            while queue:
                item = heapq.heappop(queue)
                if not item.screened and item.bound < self.seconds * (1 - self.gap):
                    self._raise(item, queue)
                    continue
                self._step(item)
        except KeyboardInterrupt:
            if self.best is None:
                raise
            interrupted = True
            self.closed = min(self.closed, item.bound, *(left.bound for left in queue))
            self.unlimited = 0.0
        if self.best is None and self.refused and len(self.refused) == len(self.records):
            raise self.refused[0]
        return Found(self.best, sorted(self.records, key=_rank), self.closed, interrupted, self.unlimited)

    def _raise(self, item: _Open, queue: list[_Open]) -> None:
        if self.raised % TOLD == 0:
            self.tell(Event("bound", item.shape.told(), self.seconds if self.best is not None else None))
        self.raised += 1
        try:
            bound = max(item.bound, self.bench.talk_bound(item.shape))
            self.unlimited = min(self.unlimited, bound)
            if bound < self.seconds * (1 - self.gap):
                bound = max(bound, self.bench.screened(item.shape, bound, self.seconds))
        except PinError as error:
            self._refuse(item.shape, error)
            return
        heapq.heappush(queue, _Open(bound * (1 + (_talk(item.shape) - 1) / 4), item.shape, bound, True))

    def _refuse(self, shape: Arrangement, error: PinError) -> None:
        self.refused.append(error)
        self.records.append(_told(shape, "refused", None, None, str(error)))

    @property
    def seconds(self) -> float:
        return self.best.seconds if self.best is not None else math.inf

    def _step(self, item: _Open) -> None:
        if not item.screened:
            self.unlimited = min(self.unlimited, item.bound)
        if item.bound >= self.seconds * (1 - self.gap):
            self._record(item.shape, "cut" if item.bound < math.inf else "does not fit", item.bound)
            self.closed = min(self.closed, item.bound)
            return
        self.tell(Event("solve", item.shape.told(), self.seconds if self.seconds < math.inf else None))
        try:
            problem = self.bench.problem(item.shape)
        except PinError as error:
            self._refuse(item.shape, error)
            return
        limit, ready = self.seconds * (1 - self.gap / 2), self.bench.ready(item.shape)
        solution = StageSolve(problem, gap=self.gap, limit_seconds=limit, ready=ready).run()
        if solution.stages is None:
            slower = solution.bound_seconds < math.inf
            if slower:
                self.closed = min(self.closed, max(solution.bound_seconds, item.bound))
            self._record(
                item.shape, "cut" if slower else "does not fit", solution.bound_seconds if slower else item.bound
            )
            return
        bound = max(item.bound, min(solution.bound_seconds, solution.step_seconds))
        self.closed = min(self.closed, bound)
        self._record(item.shape, "solved", bound, solution)
        if solution.step_seconds < self.seconds:
            self.best = Solved(item.shape, solution)

    def _record(self, shape: Arrangement, status: str, bound: float, solution: StageSolution | None = None) -> None:
        known = bound if 0 < bound < math.inf else None
        self.records.append(_told(shape, status, known, solution.step_seconds if solution is not None else None))


def _talk(shape: Arrangement) -> float:
    return 1.0 + sum(cost * math.log2(getattr(shape, name)) for name, cost in TALK.items())


def _told(shape: Arrangement, status: str, bound: float | None, seconds: float | None, reason: str = "") -> ShapeRecord:
    return ShapeRecord(
        shape.mesh(), shape.microbatches, status, bound, seconds, reason=reason, schedule=shape.schedule,
        chunks=shape.chunks, micro_batch=shape.micro_batch, pools=shape.pool_order,
    )  # fmt: skip

"""The shape search: every factorisation of the devices and number of microbatches, best bound first.

A candidate is first solved without memory: a bound on what it can reach, and the answer where it fits. Where it does not,
rows for the time points it breaks are added and it goes back into the queue with its new bound. More microbatches only cost
time, so the next number of a shape is opened when the one before does not fit. A candidate whose bound is not below the best
plan found is cut. The search ends when nothing open is better: its bound is then proven for the whole space.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import PinError
from .assign import Assignment, Storage, parameter_groups
from .costs import Costs, PriceBook, Shape
from .evaluate import Evaluation, Evaluator
from .memory import Facts, Point, Setting
from .outline import Outline
from .pins import Pins
from .plan import ShapeRecord
from .precision import sum_ratio
from .progress import Event, Progress
from .region import Choice, Form, RegionProgram, Solution
from .rows import Group, Rows, Savers, savers
from .shapes import microbatch_counts
from .space import Space
from .template import Template, build

ROWS_PER_ROUND = 6
"""Time points added after one solve: the worst of as many kinds and regions."""


@dataclass(frozen=True)
class Problem:
    """Everything a candidate needs: the outline at its compute dtype, what does not depend on the mesh, prices, pins, limit."""

    outline: Outline
    facts: Facts
    prices: PriceBook
    pins: Pins
    setting: Setting
    limit: int | None
    gap: float = 1e-4
    residual: Mapping[str, frozenset[str]] = field(default_factory=dict)
    _made: dict[int, tuple[Template, Savers]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def template(self, microbatches: int) -> tuple[Template, Savers]:
        """The outline with its repeats tied at this number of microbatches, made once."""
        if microbatches not in self._made:
            template = build(self.outline, microbatches)
            self._made[microbatches] = template, savers(template, self.facts)
        return self._made[microbatches]


class Candidate:
    """One mesh shape with one number of microbatches."""

    def __init__(
        self, problem: Problem, shape: Shape, microbatches: int, fixed: Mapping[str, Storage] | None = None
    ) -> None:
        self.problem, self.shape, self.m = problem, shape, microbatches
        training = bool(problem.outline.loss)
        self.template, known = problem.template(microbatches)
        costs = Costs(problem.prices, shape, training, summed=sum_ratio(problem.setting.precision))
        setting = problem.setting
        self.space = Space(
            self.template, costs, problem.pins, setting.precision, setting.optimizer, fixed, problem.residual
        )
        self.rows = Rows(self.space, problem.facts, setting, known)
        self.evaluator = Evaluator(self.template, problem.facts, costs, setting)
        self.program = RegionProgram(self.space, gap=problem.gap)
        self.bound = 0.0
        self.solution: Solution | None = None
        self.evaluation: Evaluation | None = None
        self._added: set[tuple[Point, Group | None]] = set()

    def advance(self) -> bool:
        """Solve with the rows so far; True when the answer is final (it fits, or nothing does)."""
        self.solution = self.program.solve()
        self.bound = max(self.bound, self.solution.bound)
        if self.solution.choice is None:
            return True
        assignment = self.assignment(self.solution.choice)
        self.evaluation = self.evaluator.evaluate(assignment)
        limit = self.problem.limit
        if limit is None or self.evaluation.peak_bytes <= limit:
            return True
        if not self._restrict(assignment, limit):
            raise AssertionError("a memory row that holds in the program is broken in the evaluation")
        return False

    @property
    def chosen(self) -> Choice:
        """The point found; call only where one was."""
        assert self.solution is not None
        assert self.solution.choice is not None
        return self.solution.choice

    def _restrict(self, assignment: Assignment, limit: int) -> bool:
        assert self.evaluation is not None
        added = False
        for point, group in self.worst(self.evaluation, assignment, limit):
            if (point, group) not in self._added:
                self._added.add((point, group))
                self.program.limit(self.form(point, group), limit)
                added = True
        return added

    def form(self, point: Point, group: Group | None) -> Form:
        """The linear form of a time point named by `worst`."""
        return self.rows.form(point, group)

    def worst(self, evaluation: Evaluation, assignment: Assignment, limit: float) -> list[tuple[Point, Group | None]]:
        """The broken time points, the worst of each kind and region first."""
        found: dict[tuple[object, ...], tuple[float, Point, Group | None]] = {}
        for point, amount in evaluation.points.items():
            if amount <= limit:
                continue
            named, group = self._named(point, assignment)
            where = self.problem.facts.instance[point[1]][0] if point[0] == "op" else (group.region if group else -1)
            known = found.get((point[0], where))
            if known is None or amount > known[0]:
                found[point[0], where] = (amount, named, group)
        ordered = sorted(found.values(), key=lambda f: (-f[0], f[1]))
        return [(point, group) for _, point, group in ordered[:ROWS_PER_ROUND]]

    def _named(self, point: Point, assignment: Assignment) -> tuple[Point, Group | None]:
        """The point as rows know it: a group by what its members have in common, at the op where it is reduced."""
        kind, at = point
        if kind not in ("gather", "reduce", "finish"):
            return point, None
        name = assignment.groups[at][0]
        w = self.template.parameter_of[name]
        item = self.template.parameters[w]
        storage = assignment.storage[name]
        region = self.problem.outline.regions[item.region]
        instance = next(k for k, members in enumerate(region.parameters) if name in members)
        key = (item.region, storage.zero, storage.zero_axes, item.parameter.trainable, item.tensor.dtype)
        found = self.problem.facts
        where = found.high if kind == "gather" else found.low
        return (kind, where[name]), Group(item.region, instance, key)

    def assignment(self, choice: Choice) -> Assignment:
        """The point of the space spread over all concrete ops and parameters."""
        template, space = self.template, self.space
        choices = {name: space.strategies[v][choice.strategies[v]].choice for name, v in template.class_of.items()}
        storage = {}
        for name, w in template.parameter_of.items():
            option = space.options[w][choice.options[w]]
            storage[name] = Storage(option.home, option.zero, option.zero_axes)
        return Assignment(choices, storage, parameter_groups(self.problem.outline, storage))


@dataclass
class Found:
    """The outcome: the best candidate (solved, fitting), the records of all, and the proven bound in seconds."""

    best: Candidate | None
    records: list[ShapeRecord]
    bound: float


@dataclass(order=True)
class _Open:
    """A queue entry, ordered by bound, then larger data axis, then fewer microbatches."""

    bound: float
    order: tuple[int, int]
    shape: Shape = field(compare=False)
    m: int = field(compare=False)
    rest: tuple[int, ...] = field(compare=False)
    candidate: Candidate | None = field(compare=False, default=None)


class Search:
    """One run of the search over `shapes`."""

    def __init__(self, problem: Problem, shapes: tuple[Shape, ...], progress: Progress) -> None:
        self.problem, self.shapes, self.progress = problem, shapes, progress
        self.best: Candidate | None = None
        self.records: list[ShapeRecord] = []
        self.refused: list[PinError] = []
        self.closed = float("inf")

    def run(self) -> Found:
        """Search to the end; raises PinError where the pins can be met on no shape."""
        queue: list[_Open] = []
        for shape in self.shapes:
            data = shape.axis("data")
            ranks = shape.sizes[data] if data is not None else 1
            try:
                counts = microbatch_counts(
                    self.problem.pins, self.problem.outline.batch, ranks, self.problem.outline.microbatch_blockers
                )
            except PinError as error:
                self._refuse(shape, 1, error)
                continue
            if not self.problem.outline.loss:
                counts = counts[:1]
            heapq.heappush(queue, _Open(0.0, (-ranks, counts[0]), shape, counts[0], counts[1:]))
        while queue:
            self._step(heapq.heappop(queue), queue)
        if self.best is None and self.refused and len(self.refused) == len(self.records):
            raise self.refused[0]
        return Found(self.best, self._ranked(), self.closed)

    def _value(self) -> float:
        if self.best is None or self.best.evaluation is None:
            return float("inf")
        return self.best.evaluation.step_seconds

    def _step(self, item: _Open, queue: list[_Open]) -> None:
        if item.bound >= self._value() * (1 - self.problem.gap):
            self._close(item, "cut")
            return
        if item.candidate is None:
            try:
                item.candidate = Candidate(self.problem, item.shape, item.m)
            except PinError as error:
                self._refuse(item.shape, item.m, error)
                return
            self._tell("solve", item)
            if self.problem.limit is not None and item.candidate.rows.floor() > self.problem.limit:
                self._close(item, "does not fit", "parameters, gradients and optimizer states alone exceed the limit")
                return
            first = True
        else:
            self._tell("rows", item)
            first = False
        done = item.candidate.advance()
        problem = self._unmet(item.candidate, first)
        if problem:
            self._refuse(item.shape, item.m, PinError(problem))
            return
        fits = done and item.candidate.solution is not None and item.candidate.solution.choice is not None
        item.bound = max(item.bound, item.candidate.bound)
        if first and not fits and item.rest:
            data = item.shape.axis("data")
            order = (-(item.shape.sizes[data] if data is not None else 1), item.rest[0])
            lower = item.bound if item.bound < float("inf") else 0.0
            heapq.heappush(queue, _Open(lower, order, item.shape, item.rest[0], item.rest[1:]))
        if not done:
            heapq.heappush(queue, item)
            return
        self._close(item, "solved" if fits else "does not fit")
        if fits and item.candidate.evaluation is not None and item.candidate.evaluation.step_seconds < self._value():
            self.best = item.candidate

    def _unmet(self, candidate: Candidate, first: bool) -> str:
        """What the pins ask that this mesh cannot give, "" if nothing."""
        assert candidate.solution is not None
        choice, pins = candidate.solution.choice, self.problem.pins
        if choice is None:
            return f"no plan on {self._named(candidate.shape)} meets the pins {', '.join(pins.texts)}" if first else ""
        if not pins.zero or not self.problem.outline.loss:
            return ""
        levels = (options[o].zero for options, o in zip(candidate.space.options, choice.options, strict=True))
        if pins.zero in levels or not any(p.trainable for p in self.problem.outline.parameters):
            return ""
        return (
            f"zero={pins.zero} shares out parameters that several ranks hold whole; on {self._named(candidate.shape)} there are "
            "none: use zero=0, or a data axis (dp=N with N > 1)"
        )

    def _named(self, shape: Shape) -> str:
        return " x ".join(f"{n}={s}" for n, s in self._mesh(shape).items())

    def _close(self, item: _Open, status: str, reason: str = "") -> None:
        candidate = item.candidate
        evaluation = candidate.evaluation if candidate is not None and status == "solved" else None
        if status != "does not fit":
            self.closed = min(self.closed, item.bound)
        self.records.append(
            ShapeRecord(
                self._mesh(item.shape), item.m, status, item.bound if 0 < item.bound < float("inf") else None,
                evaluation.step_seconds if evaluation else None, evaluation.peak_bytes if evaluation else None, reason,
            )
        )  # fmt: skip

    def _refuse(self, shape: Shape, m: int, error: PinError) -> None:
        self.refused.append(error)
        self.records.append(ShapeRecord(self._mesh(shape), m, "refused", reason=str(error)))

    def _mesh(self, shape: Shape) -> dict[str, int]:
        return dict(zip(shape.names, shape.sizes, strict=True))

    def _ranked(self) -> list[ShapeRecord]:
        def key(record: ShapeRecord) -> tuple[float, float, str, int]:
            infinite = float("inf")
            seconds = record.step_seconds if record.step_seconds is not None else infinite
            bound = record.bound_seconds if record.bound_seconds is not None else infinite
            return seconds, bound, str(sorted(record.mesh.items())), record.microbatches

        return sorted(self.records, key=key)

    def _tell(self, phase: str, item: _Open) -> None:
        best = self._value()
        self.progress(
            Event(phase, f"{self._named(item.shape)}, {item.m} microbatches", best if best < float("inf") else None)
        )

"""A bound of every shape, memory included, before its action lists are laid out: milliseconds where a solve takes a second.

Of an interval [i, j) of units on a stage with k live microbatches, no mixture is quicker than

    max over the price p of a byte of:  sum over units of min over options of (seconds + p x bytes(k))  -  p x room

(Lagrange; one memory row at a time), and there is none where the least bytes alone exceed the room. With sums over the chain for
every price at hand, an interval costs one subtraction. A rank needs that and what passes before its first unit can begin, so the
least T that some division into stages keeps is a bound of the step: of two divisions the one that reaches further stays ahead, so
the furthest reach of every stage decides. Several chunks a rank have one division (planner/even.py), and share their rank's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .even import apart
from .labels import Floats, MemoryRows, unit_bytes
from .live import live_vectors, local_chunks
from .options import Option
from .program import INFINITE
from .schedules import SCHEDULES, actions, stage_rank
from .stageproblem import StageProblem
from .trial import merged

PRICES: Floats = np.concatenate([[0.0], 1.5 ** np.arange(-18.0, 20.0)])
"""Prices of a byte that are tried, as multiples of the seconds of a unit for the whole of the memory."""

CLOSE = 2e-3
"""To what share of itself a bound is found where divisions are free."""

FAR = 1e300
"""Seconds that leave only memory to break."""

BYTES_CLOSE = 1e-9
"""Share of the room by which rounding may miss a sum of bytes."""

KEPT = 64
"""Meshes whose tables are kept; shapes of one mesh come one after the other."""

STEP_ROW = -1
"""In place of live microbatches: what the optimizer's step holds."""

Vectors = tuple[tuple[tuple[int, ...], ...], ...]


HeldKey = tuple[str, int, int, int]
"""A schedule, ranks, chunks a rank and microbatches."""


@dataclass(frozen=True)
class Held:
    """Who holds what in a schedule: the stages of every rank, and their live microbatches at the worst moments."""

    local: tuple[tuple[int, ...], ...]
    live: Vectors


def held_of(name: str, ranks: int, chunks: int, microbatches: int) -> Held:
    """Read off the action lists. More microbatches than fill the schedule twice repeat it, and hold no more."""
    placement = stage_rank(name, ranks, chunks)
    most = 2 * ranks
    enough = min(microbatches, most) if chunks == 1 or microbatches % ranks == 0 else microbatches
    live = live_vectors(actions(name, ranks, chunks, enough), placement)
    return Held(local_chunks(placement), tuple(merged(v) for v in live))


@dataclass
class Tables:
    """Sums over the chain for the options of one mesh and size of microbatch; a unit may end `spare` seconds sooner."""

    problem: StageProblem
    splits: bool
    spare: float = 0.0
    sums: dict[int, Floats] = field(default_factory=dict)
    bytes: dict[int, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        m, pipeline = float(self.problem.pipeline.microbatches), self.problem.pipeline
        # One rank has its finish too; of several, what passes before a rank may stand beside it instead (Line.beside).
        end = 1.0 if self.splits or pipeline.stages == 1 else 0.0
        # Bytes with no and one live microbatch, and at the optimizer's step.
        once = pipeline.microbatches == 1 and pipeline.stages == 1
        self.rows = MemoryRows((0, 1), self.problem.memory.cap_bytes, once=once)
        used = sorted(set(self.problem.line.regions))
        self.seconds = {
            r: _column(self.problem.options[r], lambda o: m * o.seconds + end * (o.finish - self.spare)) for r in used
        }
        room = self.problem.memory.cap_bytes - min(o.work for r in used for o in self.problem.options[r])
        self.bounded = room < float("inf")
        self.room = max(room, 1.0) if self.bounded else 0.0
        scale = max(float(s.max()) for s in self.seconds.values()) / self.room if self.bounded else 0.0
        self.prices = PRICES * scale if self.bounded else PRICES[:1]
        self.width = len(self.prices) + 1 if self.bounded else 1

    def along(self, live: int) -> Floats:
        """Sums over the chain, (units + 1) x (prices, bytes), of the least of every unit with so many microbatches alive."""
        if live not in self.sums:
            least = {r: self.least(r, live) for r in self.seconds}
            units = np.stack([least[r] for r in self.problem.line.regions])
            self.sums[live] = np.vstack([np.zeros((1, self.width)), np.cumsum(units, axis=0)])
        return self.sums[live]

    def least(self, region: int, live: int) -> Floats:
        """By price, the least seconds and bytes of a unit with so many microbatches alive; last its least bytes."""
        seconds, found = self.seconds[region], self.problem.options[region]
        if not self.bounded:
            return np.array([float(seconds.min())])
        if region not in self.bytes:
            self.bytes[region] = np.array([unit_bytes(o, self.rows)[:3] for o in found])
        none, one, step = self.bytes[region].T
        held = step if live == STEP_ROW else none + live * (one - none)
        least: Floats = (seconds[None, :] + self.prices[:, None] * held[None, :]).min(axis=1)
        return np.append(least, held.min())

    def room_of(self, live: int) -> float:
        """Bytes for what units hold: work, which any plan has beside live microbatches, has ended when the step is taken."""
        return max(self.problem.memory.cap_bytes, 1.0) if live == STEP_ROW and self.bounded else self.room

    def _limits(self, live: int) -> Floats:
        room = self.room_of(live)
        return np.append(self.prices * room, room) if self.bounded else np.zeros(1)

    def _spans(self, sums: Floats, live: int) -> Floats:
        """The least seconds of intervals, from sums over them; inf where their bytes alone are too many."""
        spans = sums - self._limits(live)
        if not self.bounded:
            return np.asarray(spans[:, 0])
        return np.where(self._over(spans), INFINITE, spans[:, :-1].max(axis=1))

    def _over(self, spans: Floats) -> npt.NDArray[np.bool_]:
        return np.asarray(spans[..., -1] > BYTES_CLOSE * self.room)

    def rank(self, intervals: Sequence[tuple[int, int]], vectors: Sequence[Sequence[int]]) -> tuple[float, bool]:
        """The least seconds of a rank that holds these intervals, memory at its best price, and whether its least bytes fit.

        Each of `vectors` says how many microbatches are alive in them at one moment (`STEP_ROW` in all: the optimizer's step).
        """
        found = sorted({k for vector in vectors for k in vector})
        place = {k: n for n, k in enumerate(found)}
        starts, ends = np.array(intervals).T
        held = np.stack([sums[ends] - sums[starts] for sums in map(self.along, found)])
        alive = np.array([[place[k] for k in vector] for vector in vectors])
        limits = np.stack([self._limits(vector[0]) for vector in vectors])
        spans: Floats = held[alive, np.arange(len(starts))].sum(axis=1) - limits
        if not self.bounded:
            return float(spans.max()), True
        return float(spans[:, :-1].max()), not bool(self._over(spans).any())

    def reach(self, start: int, live: Sequence[int], beside: float, most: float) -> int:
        """The furthest end of an interval from `start` that may be done within `most` seconds."""
        count, fits = len(self.problem.line), None
        for k in live:
            sums = self.along(k)
            spans = self._spans(sums[start + 1 :] - sums[start], k)
            good: npt.NDArray[np.bool_] = spans + beside <= most * (1 + 1e-12)
            fits = good if fits is None else fits & good
        return count if fits is None or fits.all() else start + int(fits.argmin())

    def back(self, end: int, live: Sequence[int], beside: Floats, most: float) -> int:
        """The first start of an interval up to `end` that may be done within `most` seconds; `end` where there is none.

        `beside` are the seconds of what comes before each position: they rise by no more than a unit takes.
        """
        fits = np.ones(end, dtype=bool)
        for k in live:
            sums = self.along(k)
            fits &= self._spans(sums[end] - sums[:end], k) + beside[:end] <= most * (1 + 1e-12)
        return int(fits.argmax()) if fits.any() else end


def _column(options: Sequence[Option], value: Callable[[Option], float]) -> Floats:
    return np.array([value(o) for o in options])


class Screen:
    """Bounds of shapes; what shapes share is kept."""

    def __init__(self, held: dict[HeldKey, Held] | None = None, spare: float = 0.0) -> None:
        """`held` is what another screen has read off action lists, `spare` what the end of a unit's step may take less."""
        self.held: dict[HeldKey, Held] = {} if held is None else held
        self.spare = spare
        self.pooled: dict[object, Tables] = {}
        self.tables: dict[object, Tables] = {}

    def seconds(self, problem: StageProblem, key: object, low: float, most: float) -> float:
        """No plan of the problem takes less; inf where none fits. Looked for between `low` and `most` seconds.

        `key` stands for the options of the problem.
        """
        p = problem.pipeline
        name = p.schedule if problem.training else "forward"
        splits = SCHEDULES[name].splits_backward
        tables = self.tables.get((key, splits, p.stages == 1))
        if tables is None:
            if len(self.tables) >= KEPT:
                self.tables.clear()
            tables = self.tables[key, splits, p.stages == 1] = Tables(problem, splits, self.spare)
        held = self.held_by(name, p.ranks, p.chunks, p.microbatches) if problem.training else None
        return Bounded(problem, tables, held, splits).seconds(low, most)

    def held_by(self, name: str, ranks: int, chunks: int, microbatches: int) -> Held:
        """Who holds what, read once."""
        key = (name, ranks, chunks, microbatches)
        if key not in self.held:
            self.held[key] = held_of(*key)
        return self.held[key]


class Bounded:
    """One problem bounded."""

    def __init__(self, problem: StageProblem, tables: Tables, held: Held | None, splits: bool) -> None:
        self.problem, self.tables, self.held, self.splits = problem, tables, held, splits

    def seconds(self, low: float, most: float) -> float:
        p = self.problem.pipeline
        if len(self.problem.line) < p.stages:
            return low
        if p.chunks > 1:
            return max(low, self._fixed())
        return self._free(low, most)

    def _live(self, rank: int) -> list[tuple[int, ...]]:
        stages = self.problem.pipeline.chunks
        found = list(self.held.live[rank]) if self.held is not None else [(1,) * stages]
        return [*found, (STEP_ROW,) * stages]

    def _fixed(self) -> float:
        p = self.problem.pipeline
        placement = stage_rank(p.schedule if self.problem.training else "forward", p.ranks, p.chunks)
        local = local_chunks(placement)
        spans = list(pairwise(self.problem.division(local)))
        found = 0.0
        for rank, stages in enumerate(local):
            mine = [spans[s] for s in stages]
            least, fits = self.tables.rank(mine, self._live(rank))
            if not fits:
                return INFINITE
            found = max(found, least + self.problem.beside(mine[0][0], self.splits))
        return found

    def _free(self, low: float, most: float) -> float:
        """Between a time that no division keeps and one that some does: the first is a bound."""
        if self._divides(low):
            return low
        if not self._divides(FAR):
            return INFINITE
        step = low or self.problem.line.before[-1] or most
        while low < most:
            high = min(low + step, most)
            if self._divides(high):
                break
            low, step = high, 2 * step
        else:
            return most
        while high - low > CLOSE * low:
            middle = (low + high) / 2
            low, high = (low, middle) if self._divides(middle) else (middle, high)
        return low

    def _divides(self, most: float) -> bool:
        """Whether intervals that each may be done within `most` seconds cover the chain."""
        return self._ends(most) is not None

    def _ends(self, most: float) -> list[int] | None:
        """Cuts that reach as far as `most` seconds let them; None where they do not reach the end."""
        line, ranks, cuts = self.problem.line, self.problem.pipeline.ranks, [0]
        for rank in range(ranks):
            live = [v[0] for v in self._live(rank)]
            end = self.tables.reach(cuts[-1], live, line.beside(cuts[-1], self.splits), most)
            if end == cuts[-1]:
                return None
            cuts.append(min(end, len(line) - (ranks - 1 - rank)))
        return cuts if cuts[-1] == len(line) else None

    def even(self, low: float, most: float) -> tuple[float, list[int] | None]:
        """The bound, and cuts even in seconds and memory: half way between the last and the first that little more allows."""
        found = self._free(low, most)
        ends = self._ends(found * (1 + 2 * CLOSE)) if found < most else None
        if ends is None:
            return found, None
        line = self.problem.line
        beside = np.array([line.beside(at, self.splits) for at in range(len(line))])
        starts = [len(line)]
        for rank in range(self.problem.pipeline.ranks - 1, 0, -1):
            live = [v[0] for v in self._live(rank)]
            starts.append(self.tables.back(starts[-1], live, beside, found * (1 + 2 * CLOSE)))
        middle = [(a + b) // 2 for a, b in zip(ends, [0, *reversed(starts)], strict=True)]
        return found, apart(middle, len(line))

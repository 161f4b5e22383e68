"""The stage solve: which units each virtual stage holds and under which options, for one schedule and number of microbatches.

    minimise   T
    variables  x[s, arc, mixture]   stage s holds the units of the arc under this mixture of options          binary
    rows       one path of arcs from the first unit to the last, one per stage (flow by position and layout)
               per rank: bytes of its chunks on every memory row + working memory <= cap
               T >= sum of path coefficients x seconds                                   (added until they say no more)

Mixtures come from planner/labels.py: complete within what a known plan leaves open, so the bound holds for all of them. Path rows
are critical paths of the simulator, one per rank, on each plan found; every one is a valid bound for all plans (planner/paths.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .arcs import Line, spare
from .counts import best_counts
from .labels import FEW, GRID, MOST, Bag, Bags, Layouts, Limit, MemoryRows
from .options import Option
from .paths import Path, makespan, rank_paths
from .program import INFINITE, Program
from .ramps import Ready, make_ready, seed_paths

MOST_ROWS = 6
"""Maximal vectors of live microbatches a rank's memory is checked at; more are merged, which only asks for more memory."""

SLOWER = (1.1, 1.5, 4.0)
"""How much slower one rank is made to find the paths that run through it."""

NEAR = (0.0, 0.1, 0.3)
"""Which mixtures of an arc the first search for a better plan looks at (0: the quickest)."""

POLISH = 4
"""Solves of that search."""

EXACT = 1e-6
"""Below such a gap bags are not thinned."""

ROUNDS = 8
"""Solves per shape: each adds the critical paths of the plan found before."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Ranks of the pipeline, chunks per rank, schedule and microbatches."""

    ranks: int
    chunks: int
    schedule: str
    microbatches: int

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks


@dataclass(frozen=True, slots=True)
class Memory:
    """What a rank may use: device bytes without the reserve, and its share of host and disk."""

    cap_bytes: float
    host_bytes: float = INFINITE
    disk_bytes: float = INFINITE


@dataclass(frozen=True)
class StageProblem:
    """All that the stage solve needs. `send(position, layout)`: seconds of handing on what crosses there, each way.

    `options` by stage pool and region: stages on another device type have another list; `pool[s]` names it.
    """

    line: Line
    options: Sequence[Sequence[Option]]
    change: Mapping[Layouts, tuple[float, float]]
    pipeline: Pipeline
    memory: Memory
    send: Callable[[int, str], tuple[float, float]]
    training: bool = True
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """One virtual stage of a solution: its units, the option of each (index into the flat list), layouts and seconds."""

    start: int
    end: int
    picks: tuple[int, ...]
    entry: str
    exit: str
    forward: float
    backward: float
    weight: float
    finish: float


@dataclass(frozen=True)
class StageSolution:
    """The best division found (None: nothing fits), its step time, the proven bound, and the options `picks` point into."""

    stages: tuple[Held, ...] | None
    step_seconds: float
    bound_seconds: float
    flat: Sequence[Option] = ()
    rounds: int = 0

    @property
    def gap(self) -> float:
        if self.stages is None or not self.step_seconds:
            return 0.0
        return max(0.0, 1.0 - self.bound_seconds / self.step_seconds)


@dataclass(frozen=True, slots=True)
class _Column:
    stage: int
    start: int
    end: int
    layouts: Layouts
    time: tuple[float, float, float, float]
    bytes: tuple[float, ...]
    work: float
    picks: tuple[int, ...]
    sends: tuple[float, float]


@dataclass
class _Found:
    """Columns by stage, and how much seconds their thinning may hide."""

    columns: list[list[_Column]] = field(default_factory=list)
    slack: float = 0.0


class StageSolve:
    """One run of the stage solve."""

    def __init__(
        self, problem: StageProblem, *, gap: float = 1e-3, limit_seconds: float = INFINITE, ready: Ready | None = None
    ) -> None:  # fmt: skip
        self.problem, self.gap, self.limit = problem, gap, limit_seconds
        self.p = problem.pipeline
        name = self.p.schedule if problem.training else "forward"
        self.ready = ready or make_ready(name, self.p.ranks, self.p.chunks, self.p.microbatches)
        self.compiled, self.placement, self.local = self.ready.compiled, self.ready.placement, self.ready.local
        self.rows = self._memory_rows()
        m = float(self.p.microbatches)
        self.busy = (m, m, 0.0, 1.0)
        # Work of a rank that comes, with what `_beside` says of the stages before it, one after the other.
        self.alone = self.busy if self.ready.splits else (m, m, 0.0, 0.0)
        self.best: tuple[_Column, ...] | None = None
        self.seconds = INFINITE
        self.paths: list[Path] = []
        self.division: list[list[tuple[int, int]]] = []
        self.slow = False
        self.least = 0.0
        self.coarse = Bags(problem.options, problem.change, [self.busy], coarse=True)

    def _memory_rows(self) -> list[MemoryRows]:
        once = self.p.microbatches == 1 and self.p.stages == 1
        vectors = [_merged(v) for v in self.ready.live]
        found = []
        for stage, rank in enumerate(self.placement):
            chunk = self.local[rank].index(stage)
            live = tuple(v[chunk] for v in vectors[rank]) if self.problem.training else (1,)
            memory = self.problem.memory
            found.append(MemoryRows(live, memory.cap_bytes, memory.host_bytes, memory.disk_bytes, once))
        return found

    # -- the whole of it

    def run(self) -> StageSolution:
        """Solve; deterministic. Stops when the gap is met, or no more paths are found."""
        line, count = self.problem.line, self.p.stages
        if len(line) < count:
            return StageSolution(None, INFINITE, INFINITE)
        if count == 1:
            if (
                self.limit < INFINITE
                and self.coarse.floor([(line.runs(0, len(line)), self.rows[0])], self.busy) > self.limit
            ):
                return StageSolution(None, INFINITE, self.limit)
            return self._single()
        if self.limit < INFINITE and self._hopeless():
            return StageSolution(None, INFINITE, self.limit)
        arcs = self._first() or ([] if self.slow else self._fitting())
        if self.best is None:
            return StageSolution(None, INFINITE, self.limit if self.slow else INFINITE)
        self._seed()
        limit = min(self.seconds, self.limit)
        found = self._columns(limit)
        if all(found.columns) and self._relaxed(found, limit) < limit * (1 - self.gap):
            self._program(self._near(arcs), limit, rounds=POLISH, gap=max(self.gap, 2e-3))
            if self.seconds < limit:
                limit = self.seconds
                found = self._columns(limit)
        if not all(found.columns):
            # Nothing beats the known plan: its value is the bound, up to the limit that was asked for.
            return self._solution(limit - found.slack, 0)
        return self._close(found, limit)

    def _floor(self, stage: int, start: int, end: int, ranks: int = 1) -> float:
        return self.coarse.floor([(self.problem.line.runs(start, end), self.rows[stage])], self.alone, ranks)

    def _beside(self, start: int) -> float:
        """Least seconds of a step before and after the work of a rank whose first stage starts at a position.

        The first microbatch passes the units before. The last one passes them on its way back, while the rank has its finish
        and the weight halves it put off: so either may count, not both.
        """
        line = self.problem.line
        return line.forward(0, start) if self.ready.splits else line.before[start]

    def _hopeless(self) -> bool:
        """Whether no division has every rank done within the limit, each unit by itself and memory at its best price."""
        line, m = self.problem.line, self.p.microbatches
        if self.p.chunks > 1:
            # The division is not known yet: the busiest rank has at least its share of the least any stage may take.
            least = min(self._floor(s, 0, len(line), self.p.ranks) for s in range(self.p.stages))
            return least / self.p.ranks > self.limit
        ends = {0}
        for s, mine in enumerate(line.arcs(self.p.stages, self.limit / m)):
            ends = {j for i, j in mine if i in ends and self._floor(s, i, j) + self._beside(i) <= self.limit}
        return len(line) not in ends

    def _solution(self, bound: float, rounds: int) -> StageSolution:
        if self.best is None:
            return StageSolution(None, INFINITE, bound)
        stages = tuple(Held(c.start, c.end, c.picks, *c.layouts, *c.time) for c in self.best)
        return StageSolution(stages, self.seconds, min(max(bound, self.least), self.seconds), self.coarse.flat, rounds)

    def _single(self) -> StageSolution:
        """One stage: the step is microbatches x (forward + backward) + finish, so one column of seconds is exact."""
        problem = self.problem
        if not problem.exact and len(problem.line) > FEW_UNITS:
            return self._counted()
        # One objective first, then what fits if anything does, then all that may be faster.
        for bags in (self.coarse, Bags(problem.options, problem.change, [])):
            if self.best is None:
                self._quickest(bags, None)
        if self.best is None:
            return StageSolution(None, INFINITE, INFINITE)
        known = min(self.seconds, self.limit)
        # One column of seconds takes a fine grid at little cost.
        lost = self._quickest(self._bags([self.busy], [known / 100]), Limit(self.busy, known))
        return self._solution(min(self.seconds, self.limit) - lost, 0)

    def _counted(self) -> StageSolution:
        """A long chain on one stage: counts instead of mixtures."""
        problem, m = self.problem, self.p.microbatches
        found = best_counts(problem.line.regions, problem.options, self.rows[0], m, problem.change)
        if not found.units or found.bound > self.limit:
            return StageSolution(None, INFINITE, INFINITE if not found.units else self.limit)
        place = {id(o): k for k, o in enumerate(self.coarse.flat)}
        units, seconds = found.units, [0.0, 0.0, 0.0, 0.0]
        for one, two in zip(units, (*units[1:], None), strict=True):
            extra = problem.change[one.exit, two.entry] if two is not None and one.exit != two.entry else (0.0, 0.0)
            for i, part in enumerate((one.forward + extra[0], one.backward + extra[1], one.weight, one.finish)):
                seconds[i] += part
        held = Held(0, len(units), tuple(place[id(o)] for o in units), units[0].entry, units[-1].exit, *seconds)
        return StageSolution((held,), found.seconds, min(found.bound, found.seconds), self.coarse.flat, 1)

    def _quickest(self, bags: Bags, room: Limit | None) -> float:
        """Keep the quickest mixture of the only stage where it is the best; returns seconds that thinning may hide."""
        line = self.problem.line
        found = bags.interval(line.runs(0, len(line)), self.rows[0], room)
        columns = [c for sides, bag in found.items() for c in self._made(0, 0, len(line), sides, bag)]
        best = min(columns, key=lambda c: (self._value(c), c.picks), default=None)
        if best is not None and self._value(best) <= self.seconds:
            self.best, self.seconds = (best,), self._value(best)
        return max((b.slack for b in found.values()), default=0.0) * (
            0.0 if bags.cells is None else float(bags.cells[0])
        )

    def _value(self, column: _Column) -> float:
        return sum(w * t for w, t in zip(self.busy, column.time, strict=True))

    # -- a first plan

    def _first(self) -> list[list[tuple[int, int]]]:
        """A good plan: per interval the mixture with the least busy seconds, divided so that the slowest stage is fastest.

        Returns the arcs it was looked for among. Where chunks share a rank's memory, smaller and smaller mixtures are tried.
        """
        line = self.problem.line
        base, extra = line.bottleneck(self.p.stages), spare(line, line.regions)
        for times in (1.0, 3.0, 10.0, INFINITE):
            most = base + times * extra if times < INFINITE else line.before[-1]
            arcs = line.arcs(self.p.stages, most)
            if self.p.chunks > 1:
                if not self.division:
                    self.division = self._even(arcs)
                    self._share()
                arcs = self.division
                if self._slow(arcs):
                    return []
            for level in (0.0, 0.15, 0.3, 0.5, 0.75, 1.0) if self.p.chunks > 1 else (0.0,):
                columns = [[c for i, j in mine for c in self._cheap(s, i, j, level)] for s, mine in enumerate(arcs)]
                if all(columns):
                    self._divide(columns)
                if self.best is not None:
                    return arcs
            if most >= line.before[-1]:
                break
        return []

    def _slow(self, division: list[list[tuple[int, int]]]) -> bool:
        """Whether some rank cannot be done within the limit under a division, each unit by itself."""
        line = self.problem.line
        for stages in self.local:
            parts = [(line.runs(*division[s][0]), self.rows[s]) for s in stages]
            busy = self.coarse.floor(parts, self.alone) + self._beside(division[min(stages)][0][0])
            self.slow = self.slow or busy > self.limit
            self.least = max(self.least, min(busy, self.limit))
        return self.slow

    def _fitting(self) -> list[list[tuple[int, int]]]:
        """A plan from the mixtures that fit if any does; nothing where none does. Returns the arcs it was looked for among."""
        line, problem = self.problem.line, self.problem
        bags = Bags(problem.options, problem.change, [])
        arcs = self.division if self.p.chunks > 1 else line.arcs(self.p.stages, line.before[-1])
        columns = []
        for s, mine in enumerate(arcs):
            found = [(i, j, bags.interval(line.runs(i, j), self.rows[s])) for i, j in mine]
            columns.append(
                [c for i, j, made in found for sides, bag in made.items() for c in self._made(s, i, j, sides, bag)]
            )
            if not columns[-1]:
                return []
        if self.p.chunks == 1:
            self._divide(columns)
        else:
            most = sum(max(self._value(c) for c in mine) for mine in columns)
            self._program(columns, max(most, 1e-12), rounds=1, gap=1.0)
        return arcs

    def _share(self) -> None:
        """Once the units of every chunk are known: what the chunks of a rank may hold beside each other."""
        held = []
        for rows, ((start, end),) in zip(self.rows, self.division, strict=True):
            total = np.zeros(rows.activations + 3)
            work = 0.0
            for region, count in self.problem.line.runs(start, end):
                bags = self.coarse.single(region, rows).values()
                total += count * np.max([b.bytes.max(axis=0) for b in bags], axis=0)
                work = max(work, *(float(b.work.max()) for b in bags))
            total[: rows.activations] += work
            held.append(total)
        for stages in self.local:
            total = np.sum([held[s] for s in stages], axis=0)
            for s in stages:
                self.rows[s] = replace(self.rows[s], beside=tuple((total - held[s]).tolist()))

    def _even(self, arcs: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
        """One division for several chunks a rank: even by least seconds, then borders moved while that makes the step shorter.

        Units are taken with their least seconds; memory is left to the mixtures.
        """
        line, count = self.problem.line, self.p.stages
        share = line.before[-1] / count
        cuts = [0]
        for s in range(1, count):
            low, high = cuts[-1] + 1, len(line) - (count - s)
            cuts.append(min(range(low, high + 1), key=lambda k: (abs(line.before[k] - s * share), k)))
        cuts.append(len(line))
        best = self._rough(cuts)
        moved = True
        while moved:
            moved = False
            for s in range(1, count):
                for step in (-1, 1):
                    other = [*cuts[:s], cuts[s] + step, *cuts[s + 1 :]]
                    if other[s - 1] < other[s] < other[s + 1] and (seconds := self._rough(other)) < best * (1 - 1e-6):
                        cuts, best, moved = other, seconds, True
        return [[(cuts[s], cuts[s + 1])] for s in range(count)]

    def _rough(self, cuts: Sequence[int]) -> float:
        """Step time of the busiest rank with the least seconds of every unit, and what passes before it can begin."""
        line, m = self.problem.line, self.p.microbatches
        slowest = 0.0
        for stages in self.local:
            busy = sum(line.seconds(cuts[s], cuts[s + 1]) for s in stages)
            slowest = max(slowest, m * busy + line.before[cuts[stages[0]]])
        return slowest

    def _near(self, arcs: list[list[tuple[int, int]]]) -> list[list[_Column]]:
        """A few mixtures of every arc that may beat the plan so far: what a better plan is looked for among first."""
        rows = self._rows()
        return [
            [
                c for i, j in mine if self._room(rows, s, i, j, self.seconds) is not None
                for level in NEAR for c in self._cheap(s, i, j, level)
            ]
            for s, mine in enumerate(arcs)
        ]  # fmt: skip

    def _cheap(self, stage: int, start: int, end: int, level: float) -> list[_Column]:
        """Per pair of layouts one mixture, from the quickest (level 0) to the one that holds the least (level 1)."""
        found = []
        bags = self.coarse.interval(self.problem.line.runs(start, end), self.rows[stage])
        for layouts, bag in bags.items():
            made = sorted(self._made(stage, start, end, layouts, bag), key=lambda c: (self._value(c), c.picks))
            if made:
                found.append(made[round(level * (len(made) - 1))])
        return found

    def _made(self, stage: int, start: int, end: int, layouts: Layouts, bag: Bag) -> list[_Column]:
        last = len(self.problem.line)
        sends = (
            self.problem.send(end, layouts[1])[0] if end < last else 0.0,
            self.problem.send(start, layouts[0])[1] if start > 0 else 0.0,
        )
        return [
            _Column(
                stage, start, end, layouts, (t[0], t[1], t[2], t[3]), tuple(b), float(w), tuple(p), sends
            )
            for t, b, w, p in zip(
                bag.time.tolist(), bag.bytes.tolist(), bag.work.tolist(), bag.picks.tolist(), strict=True
            )
        ]  # fmt: skip

    def _divide(self, columns: list[list[_Column]]) -> None:
        """Divisions whose slowest stage is the fastest possible, then a little slower ones with less in all; each simulated."""
        values = sorted({self._value(c) for mine in columns for c in mine})
        low, high = 0, len(values) - 1
        if self._path(columns, values[high]) is None:
            return
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._path(columns, values[middle]) is not None else (middle + 1, high)
        for times in (1.0, 1.005, 1.02, 1.05):
            path = self._path(columns, values[low] * times)
            if path is not None:
                self._try(path)

    def _path(self, columns: list[list[_Column]], most: float) -> tuple[_Column, ...] | None:
        """The path of arcs, none above `most` busy seconds, with the least seconds in all."""
        here: dict[tuple[int, str], tuple[float, tuple[_Column, ...]]] = {}
        for s, mine in enumerate(columns):
            there: dict[tuple[int, str], tuple[float, tuple[_Column, ...]]] = {}
            for c in mine:
                value = self._value(c)
                if value > most:
                    continue
                before = (0.0, ()) if s == 0 else here.get((c.start, c.layouts[0]))
                if before is None:
                    continue
                total = before[0] + value + c.sends[0] + c.sends[1]
                known = there.get((c.end, c.layouts[1]))
                if known is None or total < known[0]:
                    there[c.end, c.layouts[1]] = (total, (*before[1], c))
            here = there
        ends = [v for (end, _), v in here.items() if end == len(self.problem.line)]
        return min(ends, key=lambda v: v[0])[1] if ends else None

    def _try(self, path: tuple[_Column, ...]) -> float:
        """Simulate a plan, keep it if it fits and is the best, and take its critical paths as rows; returns its step time."""
        if not self._fits(path):
            return INFINITE
        table = self._table(path)
        seconds, critical = makespan(self.compiled, self.placement, *table)
        self.paths.append(critical)
        self.paths += [row for _, row in rank_paths(self.compiled, self.placement, *table)]
        if seconds < self.seconds:
            self.seconds, self.best = seconds, path
        return seconds

    def _seed(self) -> None:
        """Paths that become critical where one rank is slower than the others: rows that bind before a solve finds them."""
        assert self.best is not None
        self.paths += seed_paths(self.ready, self._table(self.best), SLOWER)

    def _fits(self, path: tuple[_Column, ...]) -> bool:
        """Whether the chunks of every rank fit together."""
        if self.p.chunks == 1:
            return True
        for stages in self.local:
            rows = self.rows[stages[0]]
            total = np.sum([path[s].bytes for s in stages], axis=0)
            total[: rows.activations] += max(path[s].work for s in stages)
            caps = [rows.cap_bytes] * (rows.activations + 1) + [rows.host_bytes, rows.disk_bytes]
            if (total > np.array(caps) * (1 + 1e-9)).any():
                return False
        return True

    def _table(self, path: tuple[_Column, ...]) -> tuple[list[float], ...]:
        return (
            [c.time[0] for c in path], [c.time[1] for c in path], [c.time[2] for c in path],
            [c.sends[0] for c in path], [c.sends[1] for c in path], [c.time[3] for c in path],
        )  # fmt: skip

    # -- the proof

    def _columns(self, limit: float) -> _Found:
        """Every mixture of every arc that a plan below `limit` may use; empty where no path of arcs is left."""
        line, m = self.problem.line, self.p.microbatches
        found, several = _Found(), self.p.chunks > 1
        arcs = self.division if several else line.arcs(self.p.stages, limit / m)
        rows = self._rows()
        rooms = [
            {(i, j): room for i, j in mine if (room := self._room(rows, s, i, j, limit)) is not None}
            for s, mine in enumerate(arcs)
        ]  # fmt: skip
        if not several:
            rooms = self._reachable(rooms, limit)
        bags, lost = self._exact(limit), [0.0] * self.p.stages
        for s, mine in enumerate(rooms):
            made: list[_Column] = []
            for (i, j), room in mine.items():
                for layouts, bag in bags.interval(line.runs(i, j), self.rows[s], room).items():
                    made += self._made(s, i, j, layouts, bag)
                    lost[s] = max(lost[s], bag.slack)
            found.columns.append(made)
            if not made:
                found.columns = [[] for _ in rooms]
                break
        found.slack = self._lost(lost, bags)
        return found

    def _reachable(self, rooms: list[dict[tuple[int, int], Limit]], limit: float) -> list[dict[tuple[int, int], Limit]]:
        """Arcs that still lie on a division once the least busy seconds *within memory* of each are known."""
        line = self.problem.line
        bags = Bags(self.problem.options, self.problem.change, [self.alone])
        kept: list[dict[tuple[int, int], Limit]] = []
        for s, mine in enumerate(rooms):
            alive = {}
            for (i, j), room in mine.items():
                busy = Limit(self.alone, _rounded(limit - self._beside(i), limit))
                if any(len(bag) for bag in bags.interval(line.runs(i, j), self.rows[s], busy).values()):
                    alive[i, j] = room
            kept.append(alive)
        ahead = [{0}]
        for mine in kept:
            ahead.append({j for i, j in mine if i in ahead[-1]})
        behind = [{len(line)}]
        for mine in reversed(kept):
            behind.append({i for i, j in mine if j in behind[-1]})
        behind.reverse()
        return [
            {(i, j): room for (i, j), room in mine.items() if i in ahead[s] and j in behind[s + 1]}
            for s, mine in enumerate(kept)
        ]  # fmt: skip

    def _rows(self) -> list[_Row]:
        unique = {tuple(sorted(path.counts.items())): path for path in self.paths}
        return [_Row(path, self.p.stages) for path in unique.values()]

    def _room(self, rows: Sequence[_Row], stage: int, start: int, end: int, limit: float) -> Limit | None:
        """The tightest limit that a path puts on the seconds of one arc; None where even the least breaks it."""
        line, best, tightest = self.problem.line, None, INFINITE
        for row in rows:
            weights = row.weights[stage]
            least = float(row.least[stage] @ (line.forward(start, end), line.backward(start, end)))
            left = limit - row.others(stage, line, start, end)
            if least <= 0.0:
                continue
            if left < least * (1 - 1e-9):
                return None
            if left / least < tightest:
                best, tightest = (weights, left), left / least
        if best is None:
            return Limit(self.busy, limit)
        return Limit(tuple(float(w) for w in best[0]), _rounded(best[1], limit))  # type: ignore[arg-type]

    def _exact(self, limit: float) -> Bags:
        """Bags of all mixtures that any path may want: the step never falls with one of the seconds compared.

        Where the backward pass is split, paths run through its halves: less of one may be more of the other.
        """
        m = float(self.p.microbatches)
        forward, finish = (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0)
        halves = [(0.0, 1.0, -1.0, 0.0), (0.0, 0.0, 1.0, 0.0)] if self.ready.splits else [(0.0, 1.0, 0.0, 0.0)]
        columns = [forward, *halves, finish]
        return self._bags(columns, [limit / len(columns) / times for times in (*(m for _ in columns[1:]), 1.0)])

    def _bags(self, columns: Sequence[Sequence[float]], cells: Sequence[float]) -> Bags:
        """Bags thinned on a grid of shares of `cells` seconds; not at all where no gap is left for it."""
        grid = [GRID * self.gap * c for c in cells] if self.gap > EXACT else None
        return Bags(
            self.problem.options, self.problem.change, columns, cells=grid, most=MOST if self.gap <= 2e-3 else FEW
        )  # fmt: skip

    def _lost(self, lost: Sequence[float], bags: Bags) -> float:
        """Seconds of the step that thinning may hide, from the cells lost in each stage.

        The step is the greatest of sums of durations: it grows by at most the step that what they grow by makes.
        """
        if bags.cells is None or not any(lost):
            return 0.0
        forward, *halves, finish = bags.cells.tolist()
        parts = (forward, sum(halves), halves[-1] if self.ready.splits else 0.0, 0.0, 0.0, finish)
        return makespan(self.compiled, self.placement, *([n * part for n in lost] for part in parts))[0]

    def _close(self, found: _Found, limit: float) -> StageSolution:
        low = self._relaxed(found, limit)
        if low >= limit * (1 - self.gap):
            return self._solution(low, 1)
        bound, rounds = self._program(found.columns, limit, rounds=ROUNDS, gap=self.gap)
        # What stands for a thinned mixture may lie above the limit where the mixture did not.
        return self._solution(max(0.0, low, min(bound, limit) - found.slack), rounds)

    def _relaxed(self, found: _Found, limit: float) -> float:
        """The bound of the relaxed program over all paths known."""
        master = _Master(self, found.columns, limit)
        for path in self.paths:
            master.path(path)
        return min(master.relaxed(), limit) - found.slack

    def _program(self, columns: list[list[_Column]], limit: float, rounds: int, gap: float) -> tuple[float, int]:
        """Solve over the columns, adding paths; returns the proven bound and the number of solves."""
        if not all(columns):
            return min(limit, self.seconds), 0
        master = _Master(self, columns, limit)
        done, bound = 0, 0.0
        taken = 0
        while done < rounds:
            for path in self.paths[taken:]:
                master.path(path)
            taken = len(self.paths)
            done += 1
            answer = master.solve(gap / 2)
            if answer is None:
                return (min(limit, self.seconds), done) if done == 1 else (max(bound, min(limit, self.seconds)), done)
            picked, low = answer
            bound = max(bound, low)
            if picked is None:
                break
            value = self._try(picked)
            if min(value, self.seconds) <= bound * (1 + gap) or len(self.paths) == taken:
                break
        return bound, done


class _Row:
    """A path as weights of each stage's seconds, with what units before and after a stage add to it at the least."""

    def __init__(self, path: Path, stages: int) -> None:
        self.weights = np.zeros((stages, 4))
        for (stage, part), n in path.counts.items():
            self.weights[stage] += n * _PARTS[part][:4]
        # Of a split backward pass a path may take one half more often than the other, and the other may be nearly all of it.
        self.least = self.weights[:, :2].copy()
        self.least[:, 1] += np.minimum(self.weights[:, 2], 0.0)
        # A unit before stage s lies in one of the stages before it, under at least the smallest of their weights.
        self._before = [self.least[:s].min(axis=0) if s else np.zeros(2) for s in range(stages)]
        self._after = [self.least[s + 1 :].min(axis=0) if s + 1 < stages else np.zeros(2) for s in range(stages)]

    def others(self, stage: int, line: Line, start: int, end: int) -> float:
        """Least seconds of the path outside the units [start, end) of `stage`."""
        before, after, last = self._before[stage], self._after[stage], len(line)
        early = before[0] * line.forward(0, start) + before[1] * line.backward(0, start)
        late = after[0] * line.forward(end, last) + after[1] * line.backward(end, last)
        return float(max(early, 0.0) + max(late, 0.0))


class _Master:
    """The program over columns."""

    def __init__(self, owner: StageSolve, columns: list[list[_Column]], scale: float) -> None:
        self.owner, self.columns, self.scale = owner, columns, 1e3 / scale
        self.program = Program()
        self.time = self.program.add(1.0, upper=INFINITE)
        self.x = [[self.program.add(whole=True) for _ in mine] for mine in columns]
        self.seen: set[tuple[tuple[tuple[int, str], int], ...]] = set()
        self._flow()
        if owner.p.chunks > 1:
            self._memory()

    def _flow(self) -> None:
        nodes: dict[tuple[int, int, str], list[tuple[int, float]]] = {}
        for s, mine in enumerate(self.columns):
            self.program.row([(v, 1.0) for v in self.x[s]], 1.0, 1.0)
            for c, v in zip(mine, self.x[s], strict=True):
                if s:
                    nodes.setdefault((s, c.start, c.layouts[0]), []).append((v, -1.0))
                if s + 1 < len(self.columns):
                    nodes.setdefault((s + 1, c.end, c.layouts[1]), []).append((v, 1.0))
        for node in sorted(nodes):
            self.program.row(nodes[node], 0.0, 0.0)

    def _memory(self) -> None:
        cap = self.owner.problem.memory.cap_bytes
        for stages in self.owner.local:
            rows = self.owner.rows[stages[0]].activations
            held = [(c, v) for s in stages for c, v in zip(self.columns[s], self.x[s], strict=True)]
            work = self.program.add(upper=INFINITE)
            for s in stages:
                terms = [(v, -c.work / cap) for c, v in zip(self.columns[s], self.x[s], strict=True)]
                self.program.row([(work, 1.0), *terms], low=0.0)
            for row in range(rows):
                self.program.row([(work, 1.0), *((v, c.bytes[row] / cap) for c, v in held)], high=1.0)
            self.program.row([(v, c.bytes[rows] / cap) for c, v in held], high=1.0)
            for extra, most in ((1, self.owner.problem.memory.host_bytes), (2, self.owner.problem.memory.disk_bytes)):
                if most < INFINITE and any(c.bytes[rows + extra] for c, _ in held):
                    self.program.row([(v, c.bytes[rows + extra] / max(most, 1.0)) for c, v in held], high=1.0)

    def path(self, path: Path) -> None:
        """Add T >= the length of a path."""
        key = tuple(sorted(path.counts.items()))
        if key in self.seen:
            return
        self.seen.add(key)
        weights = np.zeros((len(self.columns), 6))
        for (stage, part), n in key:
            weights[stage] += n * _PARTS[part]
        terms = [(self.time, 1.0)]
        for s, mine in enumerate(self.columns):
            w = weights[s] * self.scale
            if w.any():
                for c, v in zip(mine, self.x[s], strict=True):
                    t = c.time
                    length = (
                        w[0] * t[0] + w[1] * t[1] + w[2] * t[2] + w[3] * t[3] + w[4] * c.sends[0] + w[5] * c.sends[1]
                    )
                    terms.append((v, -length))
        self.program.row(terms, low=path.constant * self.scale)

    def relaxed(self) -> float:
        """The bound of the relaxation, in seconds."""
        return self.program.solve(relaxed=True).objective / self.scale

    def solve(self, gap: float) -> tuple[tuple[_Column, ...] | None, float] | None:
        """(the plan, the bound in seconds); None where nothing is feasible, no plan where none was found in time."""
        answer = self.program.solve(gap=gap, nodes=NODES)
        if not answer.values:
            return None if answer.bound == INFINITE else (None, answer.bound / self.scale)
        picked = tuple(
            mine[max(range(len(mine)), key=lambda k: answer.values[xs[k]])]
            for mine, xs in zip(self.columns, self.x, strict=True)
        )
        return picked, answer.bound / self.scale


FEW_UNITS = 12
"""Units of one stage up to which all its mixtures are listed; beyond, a program over counts is quicker."""

NODES = 60
"""Nodes of one solve over columns."""

_PARTS = {
    "forward": np.array([1.0, 0, 0, 0, 0, 0]), "backward": np.array([0, 1.0, 0, 0, 0, 0]),
    "input": np.array([0, 1.0, -1.0, 0, 0, 0]), "weight": np.array([0, 0, 1.0, 0, 0, 0]),
    "finish": np.array([0, 0, 0, 1.0, 0, 0]), "finish0": np.array([0, 0, 0, 1.0, 0, 0]),
    "send_forward": np.array([0, 0, 0, 0, 1.0, 0]), "send_backward": np.array([0, 0, 0, 0, 0, 1.0]),
}  # fmt: skip
"""What each part of a path counts of a column: forward, backward, weight, finish, send forward, send backward."""


def _rounded(seconds: float, limit: float) -> float:
    """A little more than `seconds`, on a grid: so that arcs of equal units share their mixtures."""
    step = limit / 400
    return (int(seconds / step) + 1) * step


def _merged(vectors: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """At most `MOST_ROWS` vectors that no given one exceeds: neighbours are merged by their greatest entries."""
    kept = sorted(vectors)
    while len(kept) > MOST_ROWS:
        pairs = range(len(kept) - 1)
        k = min(pairs, key=lambda i: sum(abs(a - b) for a, b in zip(kept[i], kept[i + 1], strict=True)))
        merged = tuple(max(a, b) for a, b in zip(kept[k], kept[k + 1], strict=True))
        kept[k : k + 2] = [merged]
    return tuple(kept)

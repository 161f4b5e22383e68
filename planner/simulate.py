"""The event simulator: what each queue of each rank does when, and how many bytes are alive, for given action lists.

Per rank: lane "compute", a "send" lane per rank it sends to, "copy-out" and "copy-in" for offloaded activations, and the lanes
that costs name (collectives of a mesh axis, "disk", "host", ...). Orders are fixed by the lists (planner/engine.py), so with
fixed durations the times are exact and the step time is a maximum of linear path functions. Contention is not in them:
`contended` replays the same precedences with tasks that slow each other (planner/contention.py) and gives a second number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import UsageError
from .contention import Contention, Job, replay
from .engine import COPY_IN, COPY_OUT, FORWARD, GATE, PARTS, SEND_BACKWARD, SEND_FORWARD, Compiled, compile_lists
from .footprint import MemoryCurve, memory_curves
from .paths import Path, Solved, duration_table, finish_nodes, makespan, rank_paths, solve_times
from .schedules import Lists
from .stagecosts import Lanes, Links, RankCost, StageCost

__all__ = ["Links", "RankCost", "StageCost", "Task", "Timeline", "makespan", "rank_paths", "simulate"]


@dataclass(frozen=True, slots=True)
class Task:
    """One thing a lane of a rank does, in seconds from the start of the step; microbatch -1 for finishes."""

    rank: int
    lane: str
    name: str
    start: float
    end: float
    stage: int
    microbatch: int

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """A simulated step. `contended_seconds` is the step under contention, None where it was not asked for."""

    solved: Solved
    costs: tuple[StageCost, ...]
    ranks: tuple[RankCost, ...]
    contended_seconds: float | None = field(default=None)

    @property
    def compiled(self) -> Compiled:
        return self.solved.compiled

    @cached_property
    def step_seconds(self) -> float:
        """When the last rank is done."""
        return max(self.solved.ends)

    @cached_property
    def tasks(self) -> tuple[tuple[Task, ...], ...]:
        """By rank, what its lanes do, in order of start; hidden collectives included."""
        by_rank: list[list[Task]] = [[] for _ in range(self.compiled.ranks)]
        for node in range(1, len(self.solved.ends)):
            task = self._task(node)
            if task is not None:
                by_rank[task.rank].append(task)
                by_rank[task.rank] += self._hidden(node, task)
        return tuple(tuple(sorted(tasks, key=lambda t: (t.start, t.end, t.lane))) for tasks in by_rank)

    @cached_property
    def bubble(self) -> tuple[float, ...]:
        """By rank, the fraction of the step in which it computes nothing."""
        if not self.step_seconds:
            return (0.0,) * self.compiled.ranks
        return tuple(1.0 - busy / self.step_seconds for busy in self.busy_seconds)

    @cached_property
    def busy_seconds(self) -> tuple[float, ...]:
        """By rank, seconds of its compute lane."""
        return tuple(sum(t.seconds for t in tasks if t.lane == "compute") for tasks in self.tasks)

    @cached_property
    def memory(self) -> tuple[MemoryCurve, ...]:
        """By rank, its bytes over time."""
        return memory_curves(self.solved, self.costs, self.ranks)

    def critical_path(self) -> list[Task]:
        """Tasks of a longest path, first one first: each starts when the one before it ends."""
        nodes = list(self.solved.backward_from(self.solved.last_node()))
        return [task for task in map(self._task, reversed(nodes)) if task is not None]

    def path_coefficients(self) -> Path:
        """The critical path as a linear function of durations, equal to `step_seconds` at those of this timeline."""
        return self.solved.path(self.solved.last_node())

    def _task(self, node: int) -> Task | None:
        """The task of a node, None for a gate."""
        compiled, solved = self.compiled, self.solved
        base = len(compiled.code)
        start, end = solved.start(node), solved.ends[node]
        if node >= base:
            stage, lane = solved.finish.stage[node - base], solved.finish.lane[node - base]
            name = f"finish {stage}.{solved.finish.index[node - base]}"
            return Task(compiled.placement[stage], lane, name, start, end, stage, -1) if stage >= 0 else None
        part, stage = divmod(compiled.code[node], compiled.stages)
        if part == GATE:
            return None
        rank, m = compiled.rank[node], compiled.microbatch[node]
        lane, kind = self._lane(part, stage)
        return Task(rank, lane, f"{stage}{kind}{m}", start, end, stage, m)

    def _lane(self, part: int, stage: int) -> tuple[str, str]:
        """(lane, kind as spelled in names) of a part."""
        if part in (COPY_OUT, COPY_IN):
            return ("copy-out", " out ") if part == COPY_OUT else ("copy-in", " in ")
        if part in (SEND_FORWARD, SEND_BACKWARD):
            target = self.compiled.sent_to(stage, part == SEND_BACKWARD)
            return f"send {target}", "SEND_F" if part == SEND_FORWARD else "SEND_B"
        return "compute", {"forward": "F", "backward": "B", "input": "I", "weight": "W"}[PARTS[part]]

    def _hidden(self, node: int, task: Task) -> Iterator[Task]:
        """Collectives under an action: from its start, one after the other on each lane."""
        if task.lane != "compute" or task.microbatch < 0:
            return
        at: dict[str, float] = {}
        for lane, seconds in hidden_lanes(self.compiled, self.costs, node):
            start = at.get(lane, task.start)
            at[lane] = start + seconds
            yield Task(task.rank, lane, f"{task.name} {lane}", start, start + seconds, task.stage, task.microbatch)


def hidden_lanes(compiled: Compiled, costs: Sequence[StageCost], node: int) -> Lanes:
    """Collectives hidden under an action: its forward's or its backward's (a weight half's stand with the input half)."""
    part, stage = divmod(compiled.code[node], compiled.stages)
    if part == FORWARD:
        return costs[stage].lanes_forward
    return costs[stage].lanes_backward if PARTS[part] in ("backward", "input") else ()


def simulate(
    lists: Lists | Compiled, placement: Sequence[int], costs: Sequence[StageCost], links: Links,
    *, ranks: Sequence[RankCost] = (), contended: Contention | None = None,
) -> Timeline:  # fmt: skip
    """Time the lists under these costs (one `StageCost` per virtual stage).

    `lists` may be compiled for the same stages with copies. Raises ScheduleError where the lists cannot run, and UsageError
    where costs or links are not of as many stages as `placement`.
    """
    costs, copied = tuple(costs), frozenset(s for s, cost in enumerate(costs) if cost.copies)
    compiled = lists if isinstance(lists, Compiled) else compile_lists(lists, placement, copied)
    if len(costs) != compiled.stages or compiled.copied != copied:
        raise UsageError(f"{len(costs)} stage costs, copies {sorted(copied)}: the lists are of {compiled.stages} stages, "
                         f"copies {sorted(compiled.copied)}")  # fmt: skip
    if len(links.send_forward) != compiled.stages or (ranks and len(ranks) != compiled.ranks):
        raise UsageError(f"links and ranks must be of {compiled.stages} stages and {compiled.ranks} ranks")
    table = duration_table(
        [c.forward for c in costs], [c.backward for c in costs], [c.weight for c in costs],
        links.send_forward, links.send_backward,
        [c.copy_out_seconds for c in costs], [c.copy_in_seconds for c in costs],
    )  # fmt: skip
    solved = solve_times(compiled, table, finish_nodes(compiled, [c.finish for c in costs]))
    timeline = Timeline(solved, costs, tuple(ranks) or (RankCost(),) * compiled.ranks)
    if contended is None:
        return timeline
    return Timeline(solved, timeline.costs, timeline.ranks, replay(_jobs(timeline, table), contended))


def _jobs(timeline: Timeline, table: Sequence[float]) -> list[Job]:
    """Nodes as jobs of the contended replay; a hidden collective starts with its action, and the next action waits for it."""
    compiled, solved = timeline.compiled, timeline.solved
    base = len(compiled.code)
    jobs, under = [Job(0, "", 0.0, ())], dict[int, tuple[int, ...]]()
    beside: list[Job] = []
    for node in range(1, len(solved.ends)):
        task = timeline._task(node)
        waits = tuple(p for p in solved.predecessors(node) if p)
        waits += tuple(j for p in waits for j in under.get(p, ()))
        if task is None:
            jobs.append(Job(0, "", 0.0, waits))
            continue
        seconds = table[compiled.code[node]] if node < base else solved.finish.seconds[node - base]
        jobs.append(Job(task.rank, task.lane, seconds, waits))
        if node < base:
            last: dict[str, int] = {}
            for lane, hidden in hidden_lanes(compiled, timeline.costs, node):
                beside.append(Job(task.rank, lane, hidden, (last[lane],) if lane in last else waits))
                last[lane] = len(solved.ends) + len(beside) - 1
            if last:
                under[node] = tuple(last.values())
    return jobs + beside

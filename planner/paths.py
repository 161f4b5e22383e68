"""Step time of compiled action lists: the longest path, and the path itself as a linear function of the durations.

What comes after a stage's last backward is its *finish*: (lane, seconds) entries that run one after the other. Lane "compute"
comes after all actions of the rank; other lanes are queues of the rank and run beside them. The first entries of all stages
of a rank go first, in the order in which the stages end, then the second ones, and so on. Lane "world" is a queue of all
ranks: its entries start together, once every stage that has one at that place is there (a global gradient norm).

A path is a chain of precedences, so its length is a lower bound of the step time for *any* durations that leave the
precedences as they are: always for compute, sends and finishes of the same lanes; a path through copies holds where the same
stages are copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import UsageError
from .engine import GATE, PARTS, Compiled, compile_lists
from .schedules import Lists

WORLD = "world"
"""The lane of finish entries that all ranks enter together."""

FinishChain = Sequence[tuple[str, float]]
"""(lane, seconds) in order."""


@dataclass(frozen=True, slots=True)
class Path:
    """A linear lower bound of the step time: `constant + sum(counts[stage, part] * duration of that part of that stage)`.

    Parts are those of `engine.PARTS` ("input" lasts backward - weight) and "finish", the whole finish of a stage, or
    "finish0", "finish1", ... where only some of its entries lie on the path. `copies` says that it runs through copies.
    """

    counts: Mapping[tuple[int, str], int]
    constant: float = 0.0

    @property
    def copies(self) -> bool:
        return any(part in ("copy_out", "copy_in") for _, part in self.counts)

    def seconds(self, durations: Mapping[str, Sequence[float]]) -> float:
        """Its length under other durations, by part and stage."""
        return self.constant + sum(n * durations[part][stage] for (stage, part), n in self.counts.items())


@dataclass(frozen=True, slots=True)
class Finish:
    """Nodes of the finishes, numbered on from those of the lists; `stage`, `index` and `lane` are -1 and "" for gates."""

    first: list[int] = field(default_factory=list)
    second: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stage: list[int] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    lane: list[str] = field(default_factory=list)

    def add(
        self, node: tuple[int, int], seconds: float = 0.0, stage: int = -1, index: int = -1, lane: str = ""
    ) -> None:
        """Append a node with its two predecessors."""
        self.first.append(node[0])
        self.second.append(node[1])
        self.seconds.append(seconds)
        self.stage.append(stage)
        self.index.append(index)
        self.lane.append(lane)


def finish_nodes(compiled: Compiled, chains: Sequence[FinishChain]) -> Finish:
    """Lay out the finishes of all stages."""
    made = Finish()
    base = len(compiled.code)
    tail = list(compiled.final)
    lanes = {(r, "compute"): node for r, node in enumerate(compiled.last)}
    for r, (out, back) in enumerate(compiled.copies):
        lanes[r, "copy-out"], lanes[r, "copy-in"] = out, back
    order = sorted(range(compiled.stages), key=lambda s: compiled.final[s])
    for index in range(max((len(c) for c in chains), default=0)):
        entering = [s for s in order if len(chains[s]) > index]
        meeting = 0
        for s in entering:
            if chains[s][index][0] == WORLD:
                made.add((meeting, tail[s]))
                meeting = base + len(made.first) - 1
        for s in entering:
            lane, seconds = chains[s][index]
            rank = compiled.placement[s]
            before = meeting if lane == WORLD else tail[s]
            made.add((before, lanes.get((rank, lane), 0)), seconds, s, index, lane)
            tail[s] = lanes[rank, lane] = base + len(made.first) - 1
    return made


@dataclass(frozen=True, eq=False)
class Solved:
    """When every node ends; `ends[0]` is the start of the step, nodes of the finishes come last."""

    compiled: Compiled
    finish: Finish
    ends: list[float]

    def before(self, node: int) -> int:
        """The predecessor that a node waited for longest (0: the start of the step); the first one on a tie."""
        a, b = self.predecessors(node)
        return a if self.ends[a] >= self.ends[b] else b

    def predecessors(self, node: int) -> tuple[int, int]:
        base = len(self.compiled.code)
        if node < base:
            return self.compiled.first[node], self.compiled.second[node]
        return self.finish.first[node - base], self.finish.second[node - base]

    def start(self, node: int) -> float:
        a, b = self.predecessors(node)
        return max(self.ends[a], self.ends[b])

    def last_node(self) -> int:
        """The first node that ends with the step."""
        return self.ends.index(max(self.ends))

    def backward_from(self, node: int) -> Iterator[int]:
        """The longest path to a node, from its end."""
        while node:
            yield node
            node = self.before(node)

    def path(self, node: int) -> Path:
        """The longest path to a node as counts."""
        base, stages = len(self.compiled.code), self.compiled.stages
        codes: Counter[int] = Counter()
        finished: dict[int, list[int]] = {}
        for step in self.backward_from(node):
            if step < base:
                codes[self.compiled.code[step]] += 1
            elif self.finish.stage[step - base] >= 0:
                finished.setdefault(self.finish.stage[step - base], []).append(self.finish.index[step - base])
        counts = {(c % stages, PARTS[c // stages]): n for c, n in sorted(codes.items()) if c // stages != GATE}
        length = Counter(self.finish.stage)
        for stage, indices in sorted(finished.items()):
            whole = len(indices) == length[stage]
            counts |= {(stage, "finish"): 1} if whole else {(stage, f"finish{i}"): 1 for i in sorted(indices)}
        return Path(counts)


def solve_times(compiled: Compiled, table: Sequence[float], finish: Finish) -> Solved:
    """When every node ends; `table` holds the duration of each code (`part * stages + stage`)."""
    ends = [0.0]
    append = ends.append
    codes = zip(compiled.first, compiled.second, compiled.code, strict=True)
    next(codes)
    for a, b, code in codes:
        x, y = ends[a], ends[b]
        append((x if x > y else y) + table[code])
    for a, b, seconds in zip(finish.first, finish.second, finish.seconds, strict=True):
        append(max(ends[a], ends[b]) + seconds)
    return Solved(compiled, finish, ends)


def duration_table(
    forward: Sequence[float], backward: Sequence[float], weight: Sequence[float],
    send_forward: Sequence[float], send_backward: Sequence[float],
    copy_out: Sequence[float] = (), copy_in: Sequence[float] = (),
) -> list[float]:  # fmt: skip
    """Durations by code; the input half of a backward is what its weight half leaves."""
    stages = len(forward)
    table = [*forward, *backward, *(b - w for b, w in zip(backward, weight, strict=True)), *weight]
    for part in (send_forward, send_backward, copy_out or [0.0] * stages, copy_in or [0.0] * stages):
        if len(part) != stages:
            raise UsageError(f"durations of {len(part)} stages beside those of {stages}")
        table += part
    return table + [0.0] * stages


def makespan(
    lists: Lists | Compiled, placement: Sequence[int], forward: Sequence[float], backward: Sequence[float],
    weight: Sequence[float], send_f: Sequence[float], send_b: Sequence[float],
    finish: Sequence[float | FinishChain] = (),
) -> tuple[float, Path]:  # fmt: skip
    """Seconds of a step without copies, and a critical path; all durations by stage, in seconds.

    `lists` may be compiled once and used for any number of calls. `weight` is the part of `backward` that W runs, `send_f[s]`
    the time from s to s + 1, `send_b[s]` from s to s - 1 (not used between stages of one rank). A bare number in `finish`
    stands for one entry on lane "compute".
    """
    solved = _solved(lists, placement, forward, backward, weight, send_f, send_b, finish)
    node = solved.last_node()
    return solved.ends[node], solved.path(node)


def rank_paths(
    lists: Lists | Compiled, placement: Sequence[int], forward: Sequence[float], backward: Sequence[float],
    weight: Sequence[float], send_f: Sequence[float], send_b: Sequence[float],
    finish: Sequence[float | FinishChain] = (),
) -> tuple[tuple[float, Path], ...]:  # fmt: skip
    """As `makespan`, but one path per rank, to where that rank is done: several valid rows from one evaluation."""
    solved = _solved(lists, placement, forward, backward, weight, send_f, send_b, finish)
    compiled, base = solved.compiled, len(solved.compiled.code)
    done = list(compiled.last)
    for i, stage in enumerate(solved.finish.stage):
        if stage >= 0 and solved.ends[base + i] >= solved.ends[done[compiled.placement[stage]]]:
            done[compiled.placement[stage]] = base + i
    return tuple((solved.ends[node], solved.path(node)) for node in done)


def _solved(
    lists: Lists | Compiled, placement: Sequence[int], forward: Sequence[float], backward: Sequence[float],
    weight: Sequence[float], send_f: Sequence[float], send_b: Sequence[float], finish: Sequence[float | FinishChain],
) -> Solved:  # fmt: skip
    compiled = lists if isinstance(lists, Compiled) else compile_lists(lists, placement)
    if compiled.copied or len(forward) != compiled.stages:
        raise UsageError(
            f"makespan takes lists without copies and durations of {compiled.stages} stages, not {len(forward)}"
        )
    chains = [(("compute", f),) if isinstance(f, int | float) else f for f in finish]
    table = duration_table(forward, backward, weight, send_f, send_b)
    return solve_times(compiled, table, finish_nodes(compiled, chains))

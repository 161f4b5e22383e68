"""What the stage solve is asked and what it answers: pipeline, memory, units with options, and the division found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .arcs import Line
from .even import even_cuts
from .labels import Layouts
from .options import Option
from .program import INFINITE


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
class Pool:
    """One kind of device among several: the chain as it sees it (regions numbered as its options are), layouts, memory."""

    line: Line
    change: Mapping[Layouts, tuple[float, float]]
    memory: Memory


@dataclass(frozen=True)
class StageProblem:
    """All that the stage solve needs. `send(position, layout)`: seconds of handing on what crosses there, each way.

    On unlike devices `pools` are the kinds and `at` says whose a pipeline rank is; `options` has the regions of every kind, one
    kind after the other, and `hand(stage, position, layout)` replaces `send` for what crosses into a stage. `cuts` are those of a
    fork, two branches and their join, where the schedule is for them.
    """

    line: Line
    options: Sequence[Sequence[Option]]
    change: Mapping[Layouts, tuple[float, float]]
    pipeline: Pipeline
    memory: Memory
    send: Callable[[int, str], tuple[float, float]]
    training: bool = True
    exact: bool = False
    pools: tuple[Pool, ...] = ()
    at: tuple[int, ...] = ()
    hand: Callable[[int, int, str], tuple[float, float]] | None = None
    cuts: tuple[int, ...] = ()

    def of(self, pool: int) -> StageProblem:
        """The problem as one kind of device sees it; itself where all are equal."""
        if not self.pools:
            return self
        mine = self.pools[pool]
        return replace(self, line=mine.line, change=mine.change, memory=mine.memory)

    def division(self, local: Sequence[Sequence[int]]) -> list[int]:
        """The one division that several chunks a rank are tried in."""
        return list(self.cuts) or even_cuts(self.line, local, self.pipeline.microbatches)

    def beside(self, start: int, splits: bool) -> float:
        """Least seconds before and after the work of what starts at a position: what it waits for (Line.beside)."""
        if not self.cuts or start < self.cuts[2]:
            return self.line.beside(start, splits)
        _, p, q, r, _ = self.cuts
        branches = max(self.line.seconds(p, q), self.line.seconds(q, r)) if start >= r else 0.0
        return self.line.beside(p, splits) + branches

    def handing(self, stage: int, position: int, layout: str) -> tuple[float, float]:
        """Seconds of handing on what crosses into a stage, forward and back."""
        return self.send(position, layout) if self.hand is None else self.hand(stage, position, layout)


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
    """The best division found (None: nothing fits), its step time, the proven bound, and the options `picks` point into.

    `open`: a solve that is not quick may find a better one, or prove more.
    """

    stages: tuple[Held, ...] | None
    step_seconds: float
    bound_seconds: float
    flat: Sequence[Option] = ()
    rounds: int = 0
    open: bool = False

    @property
    def gap(self) -> float:
        if self.stages is None or not self.step_seconds:
            return 0.0
        return max(0.0, 1.0 - self.bound_seconds / self.step_seconds)


@dataclass(frozen=True, slots=True)
class Column:
    """One mixture of one arc for one stage: seconds, bytes on every memory row, and seconds of handing on, each way."""

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
class Columns:
    """Columns by stage, and how much seconds their thinning may hide."""

    columns: list[list[Column]] = field(default_factory=list)
    slack: float = 0.0

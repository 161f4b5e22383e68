"""Bytes of one pipeline rank over its list of actions: what its stages keep, what is between them, and what runs now.

A microbatch that went forward through a stage leaves what its backward needs there, what the stage took, and what it gave; all of
it goes when its backward pass through the stage is over. What was received waits for the action that takes it, gradients that
were handed back wait for theirs, and the last few tensors that were sent stay until others follow (runtime/p2p.py). Beside that
every stage has its gathered parameters throughout and its gradients from its first backward on, which makes them one by one. The
running action adds what its stage's time line says (planner/timeline.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from .exchanges import Message, Receive, Send, Step
from .halved import Halved
from .memory import CAUSES, Held, Point
from .schedules import Action
from .timeline import Timeline

IN_FLIGHT = 8
"""Sends whose tensors a rank may hold (runtime/p2p.py)."""

Key = tuple[str, int, int, str]
"""What, the stage it belongs to, microbatch, tensor."""


@dataclass(frozen=True)
class Halves:
    """A divided backward pass: bytes by cause over its first half, over the second one, the stage's first and a later one, and
    the bytes `owed` between the halves."""

    inputs: Sequence[Mapping[str, float]]
    first: Sequence[Mapping[str, float]]
    weights: Sequence[Mapping[str, float]]
    owed: float

    @classmethod
    def of(cls, line: Halved) -> Halves:
        """By the time line of a stage."""
        points = {point: causes for point, causes in line.changing().items() if point[0] != "reduce"}
        return cls(_beside(line.standing, points), line.weights(first=True), line.weights(first=False), line.owed)


@dataclass(frozen=True)
class StageMemory:
    """One stage: what it keeps of a microbatch beside what it takes, what crosses, and bytes by cause over a backward pass.

    `fixed` are gradients and copies that stay from microbatch to microbatch; `passes` has what a backward pass holds beside these,
    `first` what the stage's first one does, which has less of the gradients to begin with.
    """

    kept: float
    fixed: Mapping[str, float]
    first: Sequence[Mapping[str, float]]
    passes: Sequence[Mapping[str, float]]
    held: Mapping[str, Held]
    waiting: float
    ends: Sequence[Mapping[str, float]]
    halves: Halves | None = None

    @classmethod
    def of(cls, first: Timeline, line: Timeline, took: float, halved: Halved | None) -> StageMemory:
        """Of a stage that takes `took` bytes with every microbatch, by the time lines of its first one and of a later one, and
        that of a divided one."""
        begins, points = first.changing(), line.changing()
        last = list(accumulate(line.lanes["saved"]))[line.count - 1] if line.count else 0.0
        ends = [causes for (kind, _), causes in points.items() if kind == "finish"]
        fixed = dict(line.standing)
        kept, begun, later = last - took - line.returned, _beside(fixed, begins), _beside(fixed, points)
        halves = Halves.of(halved) if halved is not None else None
        return cls(kept, fixed, begun, later, line.held, line.waiting, ends, halves)


def _beside(fixed: Mapping[str, float], points: Mapping[Point, Mapping[str, float]]) -> list[dict[str, float]]:
    """Bytes by cause at every moment of a backward pass, beyond those that are `fixed`."""
    return [
        {c: b - fixed.get(c, 0.0) for c, b in causes.items()}
        for (kind, _), causes in points.items() if kind in ("op", "gather", "reduce")
    ]  # fmt: skip


@dataclass
class RankMemory:
    """Plays one rank's steps. `sizes` are bytes of crossing tensors, `edges` what a message from one stage to another holds."""

    stages: Mapping[int, StageMemory]
    steps: Sequence[Step]
    rank_of: Sequence[int]
    edges: Mapping[tuple[int, int], tuple[str, ...]]
    back: Mapping[tuple[int, int], tuple[str, ...]]
    sizes: Mapping[str, float]
    alive: dict[Key, float] = field(default_factory=dict)
    sending: deque[Key] = field(default_factory=deque)
    done: set[Key] = field(default_factory=set)
    begun: set[int] = field(default_factory=set)
    peaks: list[dict[str, float]] = field(default_factory=list)

    def play(self) -> list[dict[str, float]]:
        """Bytes by cause at every action, beside what is there all the time."""
        for step in self.steps:
            if isinstance(step, Action):
                {"F": self._forward, "W": self._weights}.get(step.kind, self._backward)(step)
            elif isinstance(step, Send):
                for key in self._sent(step.message):
                    self._flown(IN_FLIGHT - 1)
                    self.sending.append(key)
            elif isinstance(step, Receive):
                self.alive |= {key: self.sizes[key[3]] for key in self._received(step.message)}
        return self.peaks

    def _forward(self, step: Action) -> None:
        stage, i = step.stage, step.microbatch
        self.alive["kept", stage, i, ""] = self.stages[stage].kept
        self._note({})

    def _backward(self, step: Action) -> None:
        stage, i = step.stage, step.microbatch
        mine = [k for k in self.alive if k[1:3] == (stage, i) and k[0] in ("kept", "take", "come")]
        for key in mine:
            del self.alive[key]
        for causes in self._moments(step):
            self._note(causes)
        halves = self.stages[stage].halves
        if step.kind == "I" and halves is not None:
            self.alive["owed", stage, i, ""] = halves.owed
        for (source, target), names in self.back.items():
            if target == stage:
                kind = "come" if self.rank_of[source] == self.rank_of[stage] else "back"
                self.alive |= {(kind, source, i, name): self.sizes[name] for name in names}
        self.done |= {("give", stage, i, name) for name in self._given(stage)}

    def _moments(self, step: Action) -> Sequence[Mapping[str, float]]:
        """What a whole backward pass or its first half holds."""
        stage = self.stages[step.stage]
        if step.kind == "I":
            assert stage.halves is not None
            return stage.halves.inputs
        begun = step.stage in self.begun
        self.begun.add(step.stage)
        return stage.passes if begun else stage.first

    def _weights(self, step: Action) -> None:
        halves = self.stages[step.stage].halves
        assert halves is not None
        del self.alive["owed", step.stage, step.microbatch, ""]
        begun = step.stage in self.begun
        self.begun.add(step.stage)
        for causes in halves.weights if begun else halves.first:
            self._note(causes)

    def _given(self, stage: int) -> Iterable[str]:
        return {name for (source, _), names in self.edges.items() if source == stage for name in names}

    def _sent(self, message: Message) -> list[Key]:
        names = self._names(message)
        if message.back:
            return [("back", message.target, message.microbatch, name) for name in names]
        return [("give", message.source, message.microbatch, name) for name in names]

    def _received(self, message: Message) -> list[Key]:
        kind = "come" if message.back else "take"
        return [(kind, message.target, message.microbatch, name) for name in self._names(message)]

    def _names(self, message: Message) -> tuple[str, ...]:
        if message.back:
            return self.back[message.target, message.source]
        return self.edges[message.source, message.target]

    def _flown(self, left: int) -> None:
        while len(self.sending) > left:
            self.alive.pop(self.sending.popleft(), None)

    def _note(self, causes: Mapping[str, float]) -> None:
        """One moment: what is alive, with what the running action holds."""
        late = sum(self.sizes[k[3]] for k in self.sending if k in self.done)
        found = {c: 0.0 for c in CAUSES}
        found["saved"] = math.fsum(b for k, b in self.alive.items() if k[0] in ("kept", "take", "owed"))
        found["temporaries"] = math.fsum(b for k, b in self.alive.items() if k[0] in ("come", "back")) + late
        for s, stage in self.stages.items():
            found["gathered"] += stage.fixed["gathered"]
            found["gradients"] += stage.fixed["gradients"] if s in self.begun else 0.0
        for cause, amount in causes.items():
            found[cause] += amount
        self.peaks.append(found)


def endings(stages: Iterable[StageMemory], tied: float, *, foreach: bool) -> list[dict[str, float]]:
    """Bytes by cause after the last action: the reductions that come once a step, stage after stage, and the optimizer step.

    `foreach`: the step is one moment for all parameters. `tied` are bytes of the largest gradient that is then summed with that of
    other pipeline ranks.
    """
    stages = list(stages)
    held = {name: h for stage in stages for name, h in stage.held.items()}
    final = sum(h.final for h in held.values())
    found: list[dict[str, float]] = []
    for k, stage in enumerate(stages):
        before = sum(h.final for done in stages[:k] for h in done.held.values())
        others = before + sum(later.waiting for later in stages[k + 1 :])
        found += [{**end, "gradients": end["gradients"] + others} for end in stage.ends]
    found.append({"gradients": final + tied})
    steps = [float(h.step) for h in held.values() if h.step]
    if foreach:
        return [*found, {"gradients": final, "temporaries": sum(steps)}]
    return [*found, *({"gradients": final, "temporaries": size} for size in steps)]

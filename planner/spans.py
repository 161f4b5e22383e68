"""What the lanes of every pipeline rank do when, in one step: the tasks of the simulator, each divided by what takes its time.

Lanes are those of a measured trace (runtime/tracing.py): computing, one per axis for the communication that computing waits for,
waiting, and copies to and from memory behind the device. What hides under computing is in no lane. Seconds of a cause, over the
ranks' mean, are those that the plan predicts for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .causes import Causes, StageCauses
from .plan import Plan
from .simulate import Task, Timeline

COMPUTE, WAITING, COPIES = "compute", "waiting", "copies"
BUBBLE, SEND = "bubble", "send"

FORWARD = ("parameter_communication", "compute", "activation_communication", "offload")
BACKWARD = ("recompute", "compute", "activation_communication", "parameter_communication", "offload")
FINISH = ("parameter_communication", "offload", "optimizer")
"""Causes in the order in which they are drawn inside a task; the planner prices their sum."""

LANE_OF: Mapping[str, str] = {
    "compute": COMPUTE, "recompute": COMPUTE, "optimizer": COMPUTE, "offload": COPIES, BUBBLE: WAITING, SEND: "pp",
}  # fmt: skip
"""Lanes of causes; those of communication are named by their axes."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a lane of a pipeline rank, in seconds from the start of the step; stage and microbatch -1 where of none."""

    rank: int
    lane: str
    name: str
    cause: str
    start: float
    end: float
    stage: int
    microbatch: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.start


def spans_of(plan: Plan, timeline: Timeline, stages: Sequence[StageCauses]) -> tuple[tuple[Span, ...], ...]:
    """By pipeline rank, the spans of a step in order of start; `stages` are what the timeline's stages take, by cause."""
    lanes = {**LANE_OF, **communication_lanes(plan)}
    found = []
    for rank, tasks in enumerate(timeline.tasks):
        own = [s for task in tasks for s in _divided(task, stages, lanes)]
        own += waiting(rank, [t for t in tasks if t.lane == COMPUTE], timeline.step_seconds)
        found.append(tuple(sorted(own, key=lambda s: (s.start, s.end, s.lane))))
    return tuple(found)


def communication_lanes(plan: Plan) -> dict[str, str]:
    """The lanes of communication, named by the axes of the plan that it runs over."""
    inner = [axis.name for axis in plan.mesh if axis.role in ("context", "model") and axis.size > 1]
    inner += ["ep"] * (plan.pipeline.experts > 1)
    outer = [axis.name for axis in plan.mesh if axis.role in ("data", "context") and axis.size > 1]
    return {"activation_communication": "+".join(inner), "parameter_communication": "+".join(outer or inner)}


def waiting(rank: int, busy: Iterable[Task], seconds: float) -> Iterator[Span]:
    """The gaps between tasks that follow each other in a step of `seconds`."""
    at = 0.0
    for task in busy:
        yield from _span(rank, "waiting", BUBBLE, at, task.start, -1, -1, LANE_OF)
        at = max(at, task.end)
    yield from _span(rank, "waiting", BUBBLE, at, seconds, -1, -1, LANE_OF)


def _divided(task: Task, stages: Sequence[StageCauses], lanes: Mapping[str, str]) -> Iterator[Span]:
    """The spans of one task."""
    if task.lane != COMPUTE:
        cause = SEND if task.lane.startswith(SEND) else "offload"
        yield from _span(task.rank, task.name, cause, task.start, task.end, task.stage, task.microbatch, lanes)
        return
    order, parts = _parts(task, stages[task.stage])
    at = task.start
    for cause in order:
        end = at + getattr(parts, cause)
        yield from _span(task.rank, task.name, cause, at, end, task.stage, task.microbatch, lanes)
        at = end


def _parts(task: Task, stage: StageCauses) -> tuple[tuple[str, ...], Causes]:
    """(order, seconds by cause) of what a rank's queue of computing does."""
    if task.microbatch < 0:
        return FINISH, stage.finish
    kind = next(letter for letter in task.name if letter in "FBIW")
    if kind == "F":
        return FORWARD, stage.forward
    if kind == "B":
        return BACKWARD, stage.backward
    inputs, weights = stage.backward.apart(stage.weight)
    return BACKWARD, inputs if kind == "I" else weights


def _span(
    rank: int, name: str, cause: str, start: float, end: float, stage: int, microbatch: int, lanes: Mapping[str, str]
) -> Iterator[Span]:  # fmt: skip
    """A span, none where it takes no time."""
    if end > start:
        yield Span(rank, lanes[cause], name, cause, start, end, stage, microbatch)

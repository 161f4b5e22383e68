"""Why nothing fits, and the nearest settings that do: the least memory any plan of the space needs, found by the same program."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import Infeasible, PinError, ShardwrightError
from .cluster import Cluster
from .costs import Shape
from .evaluate import Evaluation
from .pins import microbatch_counts
from .progress import Event, Progress
from .rebatch import rebatch
from .search import Candidate, Problem

ROUNDS = 12
"""Solves spent on one least-memory plan; what is found is a plan, so its peak is an honest figure even when cut short."""


@dataclass(frozen=True, slots=True)
class Least:
    """The least memory found on one shape: its evaluation and number of microbatches."""

    evaluation: Evaluation
    shape: Shape
    microbatches: int


def least_memory(problem: Problem, shape: Shape, limit: int | None = None) -> Least | None:
    """The plan of `shape` that needs the least memory (or one within `limit`), over the largest number of microbatches."""
    data = shape.axis("data")
    ranks = shape.sizes[data] if data is not None else 1
    try:
        counts = microbatch_counts(problem.pins, problem.outline.batch, ranks, problem.outline.microbatch_blockers)
        candidate = Candidate(replace(problem, limit=None), shape, counts[-1] if problem.outline.loss else counts[0])
    except PinError:
        return None
    best: Evaluation | None = None
    floor = 0.0  # no peak below this is possible given the rows so far
    for _ in range(ROUNDS):
        if not candidate.advance() or candidate.evaluation is None or candidate.solution is None:
            break
        choice = candidate.solution.choice
        if choice is None:
            break
        floor = 0.0 if best is None else candidate.solution.seconds * (1 + 1e-4)
        evaluation = candidate.evaluation
        if best is None or evaluation.peak_bytes < best.peak_bytes:
            best = evaluation
        if limit is not None and best.peak_bytes <= limit:
            break
        worst = candidate.worst(evaluation, candidate.assignment(choice), floor)
        if not worst:
            break
        candidate.program.minimise_peak([candidate.form(point, group) for point, group in worst])
    return None if best is None else Least(best, shape, candidate.m)


def explain(problem: Problem, shapes: tuple[Shape, ...], cluster: Cluster, progress: Progress) -> Infeasible:
    """The error to raise: the binding cause at the least-memory plan and what would fit, each checked by a solve."""
    found = []
    for shape in shapes:
        progress(Event("fit", "least memory on " + " x ".join(f"{a.name}={a.size}" for a in shape.axes)))
        least = least_memory(problem, shape)
        if least is not None:
            found.append(least)
    if not found:
        raise ShardwrightError("no mesh shape can run this model under the pins")
    best = min(found, key=lambda f: f.evaluation.peak_bytes)
    memory = best.evaluation.memory
    cause = max(memory, key=lambda c: memory[c])
    assert problem.limit is not None
    message = (
        f"nothing fits in {_size(problem.limit)} per device: the least any plan needs is {_size(best.evaluation.peak_bytes)}, "
        f"of which {cause} take {_size(memory[cause])}"
    )
    nearest = [f"--memory-limit {_up(best.evaluation.peak_bytes)}"]
    return Infeasible(message, cause=cause, nearest=nearest)


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _up(count: int) -> str:
    """A limit that fits, rounded up in MiB or GiB."""
    if count >= 2**30:
        return f"{-(-count * 10 // 2**30) / 10:.1f}GiB"
    return f"{-(-count // 2**20)}MiB"


__all__ = ["Least", "explain", "least_memory", "rebatch"]

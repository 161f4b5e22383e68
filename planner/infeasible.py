"""Why nothing fits, and the nearest settings that do.

The same program with another objective finds the least memory any plan of a shape needs; every setting that is named was
solved for and fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..errors import Infeasible, PinError
from .costs import Shape
from .evaluate import Evaluation
from .memory import facts
from .outline import Op, Tensor
from .pins import Pins
from .plan import MeshAxis, Precision
from .prices import FREE, Price
from .progress import Event, Progress
from .rebatch import rebatch
from .search import Candidate, Problem
from .shapes import microbatch_counts

ROUNDS = 10
"""Solves spent on one least-memory plan; what is found is a plan, so its peak is an honest figure even when cut short."""

COARSE = 5e-3
"""Gap of these solves: a figure to within half a percent is enough to name a setting."""

MORE_DEVICES = (2, 4, 8, 16, 32, 64, 128)


class _Free:
    """Everything costs nothing: only memory is looked at."""

    pieces = False

    def op(self, op: Op, local_sizes: tuple[int, ...], tensors: Mapping[str, Tensor]) -> tuple[Price, Price]:
        return FREE, FREE

    def collective(self, name: str, full_bytes: float, stride: int, size: int) -> Price:
        return FREE

    def copy(self, bytes_read: float) -> Price:
        return FREE

    def optimizer_seconds(self, elements: float, optimizer: str, precision: Precision) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class Least:
    """The least memory found on one shape: its evaluation and number of microbatches."""

    evaluation: Evaluation
    shape: Shape
    microbatches: int


def least_memory(problem: Problem, shape: Shape, limit: int | None = None) -> Least | None:
    """The plan of `shape` that needs the least memory, or one within `limit`; None where there is none.

    Looks at the fewest and the most microbatches: the ends between activations and accumulated gradients.
    """
    data = shape.axis("data")
    ranks = shape.sizes[data] if data is not None else 1
    outline = problem.outline
    if outline.batch % ranks:
        return None
    try:
        counts = microbatch_counts(problem.pins, outline.batch, ranks, outline.microbatch_blockers)
    except PinError:
        return None
    found: Least | None = None
    for m in dict.fromkeys((counts[-1], counts[0]) if outline.loss else counts[:1]):
        evaluation = _least(problem, shape, m, limit)
        if evaluation is None or (found is not None and evaluation.peak_bytes >= found.evaluation.peak_bytes):
            continue
        found = Least(evaluation, shape, m)
        if limit is not None and evaluation.peak_bytes <= limit:
            break
    return found


def _least(problem: Problem, shape: Shape, m: int, limit: int | None) -> Evaluation | None:
    try:
        candidate = Candidate(problem, shape, m)
    except PinError:
        return None
    if limit is not None and candidate.rows.floor() > limit:
        return None
    candidate.program.gap = COARSE
    best: Evaluation | None = None
    floor = 0.0  # no plan has its peak below this; known once the peak is the objective
    for _ in range(ROUNDS):
        candidate.advance()
        if candidate.evaluation is None or candidate.solution is None or candidate.solution.choice is None:
            break
        if best is not None:
            floor = candidate.solution.seconds * (1 + COARSE)
        if best is None or candidate.evaluation.peak_bytes < best.peak_bytes:
            best = candidate.evaluation
        if limit is not None and (best.peak_bytes <= limit or (floor and candidate.solution.bound > limit)):
            break
        worst = candidate.worst(candidate.evaluation, candidate.assignment(candidate.chosen), floor)
        if not worst:
            break
        candidate.program.minimise_peak([candidate.form(point, group) for point, group in worst])
    return best


def explain(problem: Problem, shapes: tuple[Shape, ...], progress: Progress) -> Infeasible:
    """The error to raise: the binding cause at the least-memory plan, and what would fit, cheapest change first."""
    limit = problem.limit
    assert limit is not None
    free = replace(problem, prices=_Free(), limit=None)
    found = [least for least in (_told(free, shape, progress) for shape in shapes) if least is not None]
    if not found:
        return Infeasible("no mesh shape can hold this model under the pins")
    best = min(found, key=lambda f: f.evaluation.peak_bytes)
    memory = best.evaluation.memory
    cause = max(memory, key=lambda c: memory[c])
    message = (
        f"nothing fits in {size_text(limit)} per device: the least any plan needs is {size_text(best.evaluation.peak_bytes)} "
        f"({_mesh(best.shape)}, {best.microbatches} microbatches), most of it {cause} ({size_text(memory[cause])})"
    )
    nearest = [*_pins(free, shapes, limit), *_batches(free, best.shape, limit)]
    nearest += [
        *_devices(free, best.shape, limit),
        f"devices with {limit_text(best.evaluation.peak_bytes)} for the plan (--memory-limit)",
    ]
    return Infeasible(message, cause=cause, nearest=nearest)


def _told(problem: Problem, shape: Shape, progress: Progress) -> Least | None:
    progress(Event("fit", f"least memory on {_mesh(shape)}"))
    return least_memory(problem, shape)


def _fits(problem: Problem, shape: Shape, limit: int) -> bool:
    least = least_memory(problem, shape, limit)
    return least is not None and least.evaluation.peak_bytes <= limit


def _pins(problem: Problem, shapes: tuple[Shape, ...], limit: int) -> Iterator[str]:
    """Pins that stand in the way: more microbatches, a higher ZeRO level."""
    pins = problem.pins
    changes: list[tuple[str, Pins]] = []
    if pins.micro_batch is not None and pins.micro_batch > 1:
        changes.append(("--pin micro_batch=1", replace(pins, micro_batch=1)))
    if pins.zero is not None and pins.zero < 3:
        changes.append(("--pin zero=3", replace(pins, zero=3)))
    for text, changed in changes:
        if any(_fits(replace(problem, pins=changed), shape, limit) for shape in shapes):
            yield text


def _batches(problem: Problem, shape: Shape, limit: int) -> Iterator[str]:
    """The largest of the halved batches that fits on the best shape."""
    data = shape.axis("data")
    ranks = shape.sizes[data] if data is not None else 1
    batch, smaller = problem.outline.batch, []
    while batch % 2 == 0 and (batch // 2) % ranks == 0:
        batch //= 2
        smaller.append(batch)
    fitting = None
    for size in reversed(smaller):
        try:
            outline = rebatch(problem.outline, size)
        except ValueError:
            continue
        if not _fits(replace(problem, outline=outline, facts=facts(outline)), shape, limit):
            break
        fitting = size
    if fitting is not None:
        yield f"--batch {fitting}"


def _devices(problem: Problem, shape: Shape, limit: int) -> Iterator[str]:
    """The fewest devices, in doublings, on which something fits at the same batch."""
    data, model = shape.axis("data"), shape.axis("model")
    d = shape.sizes[data] if data is not None else 1
    t = shape.sizes[model] if model is not None else 1
    pins = problem.pins
    for times in MORE_DEVICES:
        for sizes in ((d * times, t), (d, t * times)):
            if (pins.dp is not None and sizes[0] != d) or (pins.tp is not None and sizes[1] != t):
                continue
            axes = [MeshAxis(n, s, r, "") for n, s, r in (("dp", sizes[0], "data"), ("tp", sizes[1], "model")) if s > 1]
            if _fits(problem, Shape(tuple(axes)), limit):
                yield f"{shape.devices * times} devices"
                return


def _mesh(shape: Shape) -> str:
    return " x ".join(f"{a.name}={a.size}" for a in shape.axes)


def size_text(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def limit_text(count: int) -> str:
    """A limit that fits, rounded up."""
    if count >= 2**33:
        return f"{-(-count // 2**30)}GiB"
    return f"{-(-count // 2**20)}MiB"

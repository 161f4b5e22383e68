"""A bound of the step over all divisions without listing mixtures: each interval by its Lagrangian floors.

A path that counts the forward and backward seconds of a stage a and b times is, on an interval, at least

    min(a, b) x (least forward + backward within memory) + the rest x (least forward, or least backward, of its units)

so the least T over divisions with T >= every path is a bound for all plans. Chunks of a rank share its memory in the floor. For
long intervals this is as tight as a unit is short, and takes milliseconds where listing mixtures takes minutes.
"""

from __future__ import annotations

from collections.abc import Sequence

from .master import PathRow
from .program import INFINITE, Program
from .trial import Trial

CYCLE = (1.0, 1.0, 0.0, 0.0)


def outer_bound(trial: Trial, rows: Sequence[PathRow], limit: float) -> float:
    """Seconds that no plan below `limit` is below; at least `limit` where there is none."""
    if trial.p.chunks > 1:
        return max((_fixed(trial, row) for row in rows), default=0.0)
    line, m = trial.problem.line, trial.p.microbatches
    program = Program()
    scale = 1e3 / limit
    time = program.add(1.0, upper=INFINITE)
    nodes: dict[tuple[int, int], list[tuple[int, float]]] = {}
    terms: list[list[tuple[int, float]]] = [[(time, 1.0)] for _ in rows]
    for s, mine in enumerate(line.arcs(trial.p.stages, limit / m)):
        here = []
        for i, j in mine:
            lengths = [_length(trial, row, s, i, j) for row in rows]
            if any(a + row.others(s, line, i, j) > limit for a, row in zip(lengths, rows, strict=True)):
                continue
            variable = program.add(whole=True)
            here.append((variable, 1.0))
            if s:
                nodes.setdefault((s, i), []).append((variable, -1.0))
            if s + 1 < trial.p.stages:
                nodes.setdefault((s + 1, j), []).append((variable, 1.0))
            for k, length in enumerate(lengths):
                terms[k].append((variable, -length * scale))
        if not here:
            return limit
        program.row(here, 1.0, 1.0)
    for node in sorted(nodes):
        program.row(nodes[node], 0.0, 0.0)
    for row in terms:
        program.row(row, low=0.0)
    answer = program.solve(gap=1e-3, nodes=60)
    return min(answer.bound / scale, limit)


def _parts(row: PathRow, stage: int) -> tuple[float, float, float]:
    """(times both halves count, forward alone, backward alone) of a path on a stage."""
    a, b = (float(x) for x in row.least[stage])
    both = max(min(a, b), 0.0)
    return both, max(a - both, 0.0), max(b - both, 0.0)


def _length(trial: Trial, row: PathRow, stage: int, start: int, end: int) -> float:
    line, m = trial.here[stage].line, float(trial.p.microbatches)
    both, ahead, back = _parts(row, stage)
    cycle = trial.cycle_floor(stage, start, end)
    found = both * cycle
    if row.weights[stage, 3] > 0:
        busy = trial.busy_floor(stage, start, end)
        found = max(found, busy + (both - m) * cycle if both >= m else both / m * busy)
    return found + ahead * line.forward(start, end) + back * line.backward(start, end)


def _fixed(trial: Trial, row: PathRow) -> float:
    """The length of a path where every stage's units are known."""
    line, total = trial.problem.line, 0.0
    for stages in trial.local:
        parts = {s: _parts(row, s) for s in stages}
        shared = min(both for both, _, _ in parts.values())
        intervals = [(line.runs(*trial.division[s][0]), trial.rows[s]) for s in stages]
        total += shared * trial.coarse.floor(intervals, CYCLE)
        for s, (both, ahead, back) in parts.items():
            start, end = trial.division[s][0]
            total += (both - shared) * line.seconds(start, end)
            total += ahead * line.forward(start, end) + back * line.backward(start, end)
    return total

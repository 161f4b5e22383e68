"""The program over columns, and paths as rows of it (planner/stages.py says what it solves)."""

from __future__ import annotations

import numpy as np

from .arcs import Line
from .labels import Floats
from .paths import Path
from .program import INFINITE, Program
from .stageproblem import Column
from .trial import Trial

NODES = 60
"""Nodes of one solve over columns."""

PARTS = {
    "forward": np.array([1.0, 0, 0, 0, 0, 0]), "backward": np.array([0, 1.0, 0, 0, 0, 0]),
    "input": np.array([0, 1.0, -1.0, 0, 0, 0]), "weight": np.array([0, 0, 1.0, 0, 0, 0]),
    "finish": np.array([0, 0, 0, 1.0, 0, 0]), "finish0": np.array([0, 0, 0, 1.0, 0, 0]),
    "send_forward": np.array([0, 0, 0, 0, 1.0, 0]), "send_backward": np.array([0, 0, 0, 0, 0, 1.0]),
}  # fmt: skip
"""What each part of a path counts of a column: forward, backward, weight, finish, send forward, send backward."""


def path_weights(path: Path, stages: int) -> Floats:
    """What a path counts of the seconds of each stage (stages x parts, as in `PARTS`)."""
    found = np.zeros((stages, 6))
    for (stage, part), n in path.counts.items():
        found[stage] += n * PARTS[part]
    return found


class PathRow:
    """A path as weights of each stage's seconds, with what units before and after a stage add to it at the least."""

    def __init__(self, path: Path, stages: int) -> None:
        self.weights = path_weights(path, stages)[:, :4]
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


class Master:
    """The program over columns."""

    def __init__(self, owner: Trial, columns: list[list[Column]], scale: float) -> None:
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
            weights[stage] += n * PARTS[part]
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

    def solve(self, gap: float) -> tuple[tuple[Column, ...] | None, float] | None:
        """(the plan, the bound in seconds); None where nothing is feasible, no plan where none was found in time."""
        answer = self.program.solve(gap=gap, nodes=NODES)
        if not answer.values:
            return None if answer.bound == INFINITE else (None, answer.bound / self.scale)
        picked = tuple(
            mine[max(range(len(mine)), key=lambda k: answer.values[xs[k]])]
            for mine, xs in zip(self.columns, self.x, strict=True)
        )
        return picked, answer.bound / self.scale

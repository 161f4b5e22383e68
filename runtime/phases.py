"""Seconds of the parts of a step, without making the parts wait for each other.

On a CPU the clock is read between them; on a GPU events are recorded on the stream, so that the host runs ahead as it does
without timing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median

import torch

FORWARD, BACKWARD, BOTH, OPTIMIZER = "forward", "backward", "forward and backward", "optimizer"


class Phases:
    """Marks of one step after another: `start` before it, `end(name)` after each part, `seconds` of the step since `start`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a step."""
        self._marks = [("", self._now())]

    def end(self, name: str) -> None:
        """The part called `name` ends here; parts of one name are added up."""
        self._marks.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds by part of the step that was just run; waits for the device."""
        found: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(begin, torch.cuda.Event):
                end.synchronize()  # type: ignore[union-attr]
                part = begin.elapsed_time(end) * 1e-3  # type: ignore[arg-type]
            else:
                part = end - begin  # type: ignore[operator]
            found[name] = found.get(name, 0.0) + part
        return found

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # type: ignore[no-untyped-call]
        return event


def slowest(ranks: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """By part: the median over steps of the slowest rank, from each rank's steps."""
    names = dict.fromkeys(name for steps in ranks for step in steps for name in step)
    return {name: median(max(r[i][name] for r in ranks) for i in range(len(ranks[0]))) for name in names}

"""A replayed step in the trace format that Chrome and Perfetto open; measured traces have the same lanes (runtime/tracing.py)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .replay import Replay
from .spans import COMPUTE, COPIES, WAITING

MICROSECONDS = 1e6
"""A trace counts in them."""

Event = dict[str, Any]


def trace_events(step: Replay) -> dict[str, Any]:
    """Plain values for a JSON file: a process per pipeline rank, a thread per lane, and counters of the rank's bytes by cause."""
    events: list[Event] = []
    for rank, (spans, curve) in enumerate(zip(step.spans, step.memory, strict=True)):
        lanes = lane_order(s.lane for s in spans)
        events += lane_names(rank, f"rank {rank} (predicted)", lanes)
        events += [
            {
                "ph": "X", "name": s.name, "cat": s.cause, "pid": rank, "tid": lanes.index(s.lane),
                "ts": s.start * MICROSECONDS, "dur": s.seconds * MICROSECONDS,
                "args": {"cause": s.cause, "stage": s.stage, "microbatch": s.microbatch},
            }
            for s in spans
        ]  # fmt: skip
        events += [
            {
                "ph": "C", "name": "memory in bytes", "pid": rank, "tid": 0, "ts": at * MICROSECONDS,
                "args": {cause: amounts[i] for cause, amounts in curve.causes.items()},
            }
            for i, at in enumerate(curve.seconds)
        ]  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def lane_order(lanes: Iterable[str]) -> list[str]:
    """Lanes from top to bottom: computing, the axes that communicate, waiting, copies."""
    axes = sorted(set(lanes) - {COMPUTE, WAITING, COPIES})
    return [COMPUTE, *axes, WAITING, COPIES]


def lane_names(pid: int, process: str, lanes: Sequence[str]) -> list[Event]:
    """What names and orders the lanes of one process."""
    found: list[Event] = [{"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": process}}]
    for tid, lane in enumerate(lanes):
        found.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}})
        found.append({"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}})
    return found

"""A simulated step in the trace format that Chrome and Perfetto open."""

from __future__ import annotations

from typing import Any

from .simulate import Timeline

MICROSECONDS = 1e6
"""A trace counts in them."""


def trace_events(timeline: Timeline) -> dict[str, Any]:
    """Plain values for a JSON file: a process per rank, a thread per lane, and a counter of the rank's bytes."""
    events: list[dict[str, Any]] = []
    for rank, (tasks, curve) in enumerate(zip(timeline.tasks, timeline.memory, strict=True)):
        lanes = ["compute", *sorted({t.lane for t in tasks} - {"compute"})]
        events.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        for tid, lane in enumerate(lanes):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": lane}})
        events += [
            {
                "ph": "X", "name": t.name, "cat": t.lane, "pid": rank, "tid": lanes.index(t.lane),
                "ts": t.start * MICROSECONDS, "dur": t.seconds * MICROSECONDS,
                "args": {"stage": t.stage, "microbatch": t.microbatch},
            }
            for t in tasks
        ]  # fmt: skip
        events += [
            {"ph": "C", "name": "memory", "pid": rank, "tid": 0, "ts": at * MICROSECONDS, "args": {"bytes": amount}}
            for at, amount in zip(curve.seconds, curve.bytes, strict=True)
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}

"""Chrome trace of one step, in the lanes of a predicted one (planner/trace.py): compute, one per axis that talks, waiting, copies.

The profiler writes what ran on every thread and queue. Lanes put the same spans where they can be compared: a collective from its
launch to its completion on the lane of its axis, the ops of the model on one lane, the time in which the rank waited for a
collective on another, and copies to and from memory behind the device on a fourth.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..planner.spans import COMPUTE, COPIES, WAITING
from ..planner.trace import Event, lane_names, lane_order
from .collectives import Pending, observed, phase
from .torch_compat import profile_of_threads

LANES = 1_000_000
"""The process that lanes stand under; no process of the system, nor a rank of a predicted trace, has this number."""
LAUNCH, WAIT = "shardwright launch", "shardwright wait"


@dataclass(frozen=True)
class Noted:
    """One collective that a tracer saw."""

    collective: str
    axis: str
    bytes: int
    phase: str


@dataclass
class Tracer:
    """An observer of collectives (runtime/collectives.py) that leaves marks in a profiler's trace. `axes`: by group name."""

    axes: Mapping[str, str]
    noted: list[Noted] = field(default_factory=list)
    _numbers: dict[Pending, int] = field(default_factory=dict)

    def launching(self, pending: Pending) -> contextlib.AbstractContextManager[Any]:
        """Mark the launch."""
        self._numbers[pending] = len(self.noted)
        axis = self.axes.get(pending.group, pending.group)
        self.noted.append(Noted(pending.collective, axis, pending.bytes, phase()))
        return torch.profiler.record_function(f"{LAUNCH} {self._numbers[pending]}")

    def waiting(self, pending: Pending) -> contextlib.AbstractContextManager[Any]:
        """Mark the wait; of one that was launched before the trace began nothing is known."""
        number = self._numbers.pop(pending, None)
        return contextlib.nullcontext() if number is None else torch.profiler.record_function(f"{WAIT} {number}")


def trace_step(step: Callable[[], object], axes: Mapping[str, str]) -> dict[str, Any]:
    """Run `step`; the document of its Chrome trace. `axes`: mesh axis by process group name."""
    tracer = Tracer(axes)
    with profile_of_threads() as profile, observed(tracer):
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        document: dict[str, Any] = json.loads(path.read_text())
    document["traceEvents"] += lanes(document["traceEvents"], tracer.noted)
    return document


@dataclass(frozen=True)
class Span:
    """A stretch of time in microseconds."""

    start: float
    end: float


@dataclass(frozen=True)
class Collective:
    """One collective of a trace: from launch to completion, and the wait for it."""

    noted: Noted
    flight: Span
    wait: Span | None


def collectives(events: Sequence[Event], noted: Sequence[Noted]) -> list[Collective]:
    """The collectives of a trace. One has completed when gloo's thread was through with it, else when its wait was over."""
    launched, waited = _marks(events, LAUNCH), _marks(events, WAIT)
    done = dict(_completions(events, noted, launched, waited))
    found = []
    for number, start in sorted(launched.items()):
        wait = waited.get(number)
        end = done.get(number, wait.end if wait is not None else start.end)
        found.append(Collective(noted[number], Span(start.start, max(end, start.end)), wait))
    return found


def _marks(events: Sequence[Event], kind: str) -> dict[int, Span]:
    found = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("ph") == "X" and event.get("cat") == "user_annotation" and name.startswith(kind):
            found[int(name.rpartition(" ")[2])] = _span(event)
    return found


def _span(event: Event) -> Span:
    return Span(float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0.0)))


SPELT = {"reduce_scatter": ("gloo:all_reduce", "gloo:reduce_scatter")}
"""What gloo's threads call a collective, where not by its name (a reduce-scatter is an all-reduce there)."""


def _completions(
    events: Sequence[Event], noted: Sequence[Noted], launched: Mapping[int, Span], waited: Mapping[int, Span]
) -> Iterator[tuple[int, float]]:
    """(number, end) of collectives that gloo's threads ran: a run is of the first launch that fits, a thread's are of one axis."""
    left, axis_of = sorted(launched), dict[Any, str]()
    runs = [e for e in events if e.get("ph") == "X" and str(e.get("name", "")).startswith("gloo:")]
    for run in sorted(runs, key=lambda e: float(e["ts"])):
        span = _span(run)
        for number in left:
            one = noted[number]
            spelt = SPELT.get(one.collective, (f"gloo:{one.collective}",))
            own = axis_of.get(run["tid"], one.axis) == one.axis
            late = number in waited and waited[number].end < span.start
            if own and run["name"] in spelt and launched[number].start <= span.start and not late:
                axis_of[run["tid"]] = one.axis
                left.remove(number)
                yield number, span.end
                break


def lanes(events: Sequence[Event], noted: Sequence[Noted]) -> list[Event]:
    """The events of the lanes."""
    found = collectives(events, noted)
    order = lane_order(c.noted.axis for c in found)
    made = lane_names(LANES, "rank 0 (measured)", order)

    def add(lane: str, name: str, span: Span, **args: Any) -> None:
        made.append({
            "ph": "X", "cat": "lane", "name": name, "pid": LANES, "tid": order.index(lane), "ts": span.start,
            "dur": span.end - span.start, "args": args,
        })  # fmt: skip

    for c in found:
        blocked = c.wait.end - c.wait.start if c.wait is not None else 0.0
        add(c.noted.axis, c.noted.collective, c.flight, bytes=c.noted.bytes, phase=c.noted.phase, waited_us=blocked)
        if c.wait is not None:
            add(WAITING, f"{c.noted.collective} over {c.noted.axis}", c.wait)
    talking = [_span(e) for e in events if str(e.get("name", "")).startswith((LAUNCH, WAIT))]
    for name, span in computing(events, talking):
        add(COMPUTE, name, span)
    for event in _copies(events):
        add(COPIES, str(event["name"]), _span(event))
    return made


def computing(events: Sequence[Event], talking: Sequence[Span]) -> Iterator[tuple[str, Span]]:
    """The ops of the model: a GPU's kernels where there are any, else the outermost ops of the thread that has most of them."""
    kernels = [e for e in events if e.get("cat") == "kernel" and "nccl" not in str(e.get("name", "")).lower()]
    if kernels:
        yield from ((str(e["name"]), _span(e)) for e in kernels)
        return
    ops = [e for e in events if e.get("cat") == "cpu_op" and e.get("ph") == "X"]
    busiest = next((tid for tid, _ in Counter(e["tid"] for e in ops).most_common(1)), None)
    end, at = 0.0, 0
    apart = sorted(talking, key=lambda s: s.start)
    for event in sorted((e for e in ops if e["tid"] == busiest), key=lambda e: (float(e["ts"]), -float(e["dur"]))):
        span = _span(event)
        while at < len(apart) and apart[at].end <= span.start:
            at += 1
        inside = at < len(apart) and apart[at].start <= span.start
        if span.start >= end and not inside:
            end = span.end
            yield str(event["name"]), span


def _copies(events: Sequence[Event]) -> Iterator[Event]:
    """Copies between device and host."""
    yield from (e for e in events if e.get("cat") == "gpu_memcpy" or str(e.get("name", "")).startswith("offload "))

"""A plan played again: what every pipeline rank does when, and the bytes on it over time, as the joint model counts them.

Times are those of the event simulator (planner/simulate.py) under the durations that price the plan, so that the last task ends
with the predicted step. Collectives within a microbatch are part of its forward and backward pass. Bytes follow the same model
as the predicted peak (planner/appraise.py): what stands all the time, what every microbatch in flight keeps, which comes unit by
unit with the forward pass and goes with the backward pass, and the largest working memory of a unit while anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .appraise import durations
from .assign import assign
from .cluster import Cluster, has_host
from .costs import PriceBook
from .legal import check_choices
from .options import Option
from .outline import Outline
from .pins import parse_pins
from .plan import Plan
from .progress import silent
from .shapes import Arrangement
from .simulate import Links, StageCost, Task, Timeline, simulate
from .solve import Request, make_task, workbench
from .spell import shape_in, units_in
from .workbench import Workbench

CAUSES = ("parameters", "optimizer", "gathered", "buffers", "reserve", "gradients", "saved", "temporaries")
"""What takes memory, from the bottom of a stack to its top."""


@dataclass(frozen=True)
class Curve:
    """Bytes of one pipeline rank by cause: `bytes[cause][i]` from `seconds[i]` on. `alive` has the largest (what, bytes) at the peak."""

    seconds: tuple[float, ...]
    bytes: dict[str, tuple[float, ...]]
    alive: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Playback:
    """A step: tasks and curve of every pipeline rank, and its seconds."""

    seconds: float
    tasks: tuple[tuple[Task, ...], ...]
    curves: tuple[Curve, ...]


def playback(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook) -> Playback:
    """Play a training plan of the joint search (one with stages) again. Raises PlanError where it is not one of `outline`."""
    request = Request(plan.source, plan.optimizer, plan.precision, plan.memory_limit_bytes, parse_pins(plan.pins))
    limits = {pool.name: pool.memory_limit_bytes for pool in plan.pools}
    bench = workbench(make_task(outline, cluster, prices, request), silent, tiers=has_host(cluster), limits=limits)
    shape, own = shape_in(plan), assign(plan, outline)
    check_choices(bench.task.outline, own, tuple(axis.size for axis in plan.mesh))
    cuts, options = units_in(bench, plan)
    ready = bench.ready(shape)
    forward, backward, weight, finish, sends, backs = durations(bench, shape, cuts, options)
    costs = [
        StageCost(f, b, w, finish=(("compute", end),))
        for f, b, w, end in zip(forward, backward, weight, finish, strict=True)
    ]
    line = simulate(ready.compiled, ready.placement, costs, Links(tuple(sends), tuple(backs)))
    curves = [_curve(bench, shape, line, rank, cuts, options) for rank in range(shape.pp)]
    return Playback(line.step_seconds, line.tasks, tuple(curves))


def _curve(
    bench: Workbench, shape: Arrangement, line: Timeline, rank: int, cuts: Sequence[int], options: Sequence[Option]
) -> Curve:  # fmt: skip
    """One rank's bytes: events are what a task gains or frees, unit by unit over its duration."""
    here, stages = bench.on(shape, rank), bench.ready(shape).local[rank]
    chunks = {s: options[cuts[s] : cuts[s + 1]] for s in stages}
    mine = [option for chunk in chunks.values() for option in chunk]
    standing = {
        "parameters": math.fsum(o.memory["parameters"] for o in mine),
        "optimizer": math.fsum(o.memory["optimizer"] for o in mine),
        "gathered": math.fsum(o.memory["copies"] for o in mine),
        "buffers": float(here.given_bytes), "reserve": float(here.reserve(shape)),
    }  # fmt: skip
    tasks = [t for t in line.tasks[rank] if t.lane == "compute"]
    gradients, once = math.fsum(o.gradient for o in mine), here.data(shape).once
    work, step = max((o.work for o in mine), default=0.0), math.fsum(o.step for o in mine)
    first = min((t.start for t in tasks if t.microbatch < 0), default=line.step_seconds)
    events = [event for t in tasks if t.microbatch >= 0 for event in _events(t, chunks[t.stage], bench.task.outline.training)]
    saved, rows = 0.0, [(0.0, 0.0)]
    for at, amount in sorted(events):
        saved = max(0.0, saved + amount)
        if rows[-1][0] == at:
            rows[-1] = (at, saved)
        else:
            rows.append((at, saved))
    running = [row for row in rows if row[0] < first]
    began = min((t.start for t in tasks if t.microbatch >= 0 and " " not in t.name and _ends(t)), default=first)
    found: dict[str, list[float]] = {cause: [standing.get(cause, 0.0)] * (len(running) + 2) for cause in CAUSES}
    found["saved"] = [*(value for _, value in running), 0.0, 0.0]
    found["temporaries"] = [*(work for _ in running), step, 0.0]
    found["gradients"] = [*(0.0 if once or at < began else gradients for at, _ in running), gradients, 0.0]
    seconds = (*(at for at, _ in running), first, line.step_seconds)
    return Curve(seconds, {c: tuple(values) for c, values in found.items()}, _alive(bench, mine, found))


def _ends(task: Task) -> bool:
    """Whether an action is part of a backward pass."""
    return any(letter in task.name for letter in "BIW")


def _events(task: Task, chunk: Sequence[Option], training: bool) -> list[tuple[float, float]]:
    """(seconds, bytes gained): a forward pass keeps what its units save one after the other; a backward pass frees it from the end."""
    if not training or "I" in task.name:
        return []
    back = _ends(task)
    units = list(reversed(chunk)) if back else list(chunk)
    spans = [o.weight if "W" in task.name else o.backward if back else o.forward for o in units]
    whole, at, events = math.fsum(spans) or 1.0, 0.0, []
    for option, span in zip(units, spans, strict=True):
        at += span
        moment = task.start + task.seconds * at / whole
        events.append((moment, -option.saved if back else option.saved))
    return events


def _alive(bench: Workbench, mine: Sequence[Option], found: dict[str, list[float]]) -> tuple[tuple[str, float], ...]:
    """What is there at the fullest moment: saved activations by region, in shares of what one microbatch of each keeps, and the rest."""
    moments = list(zip(*found.values(), strict=True))
    peak = max(range(len(moments)), key=lambda i: (sum(moments[i]), -i))
    rows = {cause: values[peak] for cause, values in found.items() if cause != "saved"}
    whole = math.fsum(o.saved for o in mine)
    for option in mine:
        if whole and option.saved:
            name = f"saved by {bench.task.outline.regions[option.region].name}"
            rows[name] = rows.get(name, 0.0) + found["saved"][peak] * option.saved / whole
    return tuple(sorted(((k, v) for k, v in rows.items() if v > 0), key=lambda row: (-row[1], row[0])))

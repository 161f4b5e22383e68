"""The figures of a plan: seconds by cause, bytes by cause and stage, collectives, from the options its units take.

The same for a plan that was just solved and for one that was read from a file, so that an edited plan is priced as it runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .causes import StageCauses, added, stage_causes
from .cluster import MEASURED
from .interval import step_interval
from .options import Option, end_to_end
from .paths import makespan
from .plan import Prediction, Traffic
from .shapes import Arrangement
from .work import FLOPS_KINDS
from .workbench import Workbench


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One virtual stage: units [start, end), seconds of a microbatch, and bytes by cause at the peak of its rank."""

    start: int
    end: int
    rank: int
    forward: float
    backward: float
    weight: float
    finish: float
    peak_bytes: int


@dataclass(frozen=True)
class Appraisal:
    """A plan's figures. `memory` is by cause at the peak of the fullest rank, as a share of its limit, `limit_bytes`."""

    step_seconds: float
    seconds: dict[str, float]
    memory: dict[str, int]
    stages: tuple[StageFigures, ...]
    traffic: tuple[Traffic, ...]
    limit_bytes: int
    host_bytes: int
    disk_bytes: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of every virtual stage: of a microbatch forward, backward, of the weight half of it, at the step's end; of sends."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    finish: tuple[float, ...]
    send_forward: tuple[float, ...]
    send_backward: tuple[float, ...]


def stage_seconds(
    bench: Workbench, shape: Arrangement, cuts: Sequence[int], options: Sequence[Option]
) -> StageSeconds:  # fmt: skip
    """What the stages of a shape take, each unit under its option."""
    ready, count = bench.ready(shape), shape.pp * shape.chunks
    changes = [bench.on(shape, rank).change(shape) for rank in ready.placement]
    times = [end_to_end(options[cuts[s] : cuts[s + 1]], changes[s]) for s in range(count)]
    handed = [
        (0.0, 0.0),
        *(bench.hand(shape, s, cuts, options[cuts[s] - 1].exit) for s in range(1, count)),
        (0.0, 0.0),
    ]
    sends = tuple(handed[s + 1][0] for s in range(count))
    backs = tuple(bench.hand(shape, s, cuts, options[cuts[s]].entry)[1] if s else 0.0 for s in range(count))
    forward, backward, weight, finish = (tuple(t[k] for t in times) for k in range(4))
    return StageSeconds(forward, backward, weight, finish, sends, backs)


def causes_of(
    bench: Workbench, shape: Arrangement, cuts: Sequence[int], options: Sequence[Option]
) -> list[StageCauses]:  # fmt: skip
    """Of every virtual stage, what `stage_seconds` has, by cause."""
    return [
        stage_causes(options[a:b], bench.on(shape, rank).change(shape))
        for (a, b), rank in zip(pairwise(cuts), bench.ready(shape).placement, strict=True)
    ]


def appraise(bench: Workbench, shape: Arrangement, cuts: Sequence[int], options: Sequence[Option]) -> Appraisal:
    """Figures of a shape whose stage s holds units [cuts[s], cuts[s+1]) and whose unit u runs under options[u]."""
    ready, count, t = bench.ready(shape), shape.pp * shape.chunks, stage_seconds(bench, shape, cuts, options)
    step, _ = makespan(
        ready.compiled, ready.placement, t.forward, t.backward, t.weight, t.send_forward, t.send_backward, t.finish
    )
    memory = [_memory(bench.on(shape, r), shape, ready.live[r], ready.local[r], cuts, options) for r in range(shape.pp)]
    peaks, limits = [sum(m.values()) for m in memory], [bench.on(shape, r).task.limit_bytes for r in range(shape.pp)]
    fullest = max(range(shape.pp), key=lambda r: (peaks[r] / limits[r], peaks[r], -r))
    stages = tuple(
        StageFigures(
            cuts[s],
            cuts[s + 1],
            ready.placement[s],
            t.forward[s],
            t.backward[s],
            t.weight[s],
            t.finish[s],
            math.ceil(peaks[ready.placement[s]]),
        )
        for s in range(count)
    )
    busiest = max(range(shape.pp), key=lambda r: (sum(t.forward[s] + t.backward[s] for s in ready.local[r]), -r))
    parts = causes_of(bench, shape, cuts, options)
    return Appraisal(
        step, _causes(parts, shape, step), {c: math.ceil(b) for c, b in memory[fullest].items()}, stages,
        (
            *_traffic(
                bench.on(shape, busiest), shape, [options[u] for s in ready.local[busiest] for u in range(cuts[s], cuts[s + 1])]
            ),
            *_handed(bench, shape, ready.local[busiest], ready.placement, cuts, options),
        ),
        limits[fullest], *(math.ceil(max(found)) for found in zip(*behind(bench, shape, cuts, options), strict=True)),
    )  # fmt: skip


def behind(
    bench: Workbench, shape: Arrangement, cuts: Sequence[int], options: Sequence[Option]
) -> list[tuple[float, float]]:  # fmt: skip
    """Bytes of every rank in host memory and on disk."""
    ready, found = bench.ready(shape), list[tuple[float, float]]()
    for stages, live in zip(ready.local, ready.live, strict=True):
        host = disk = 0.0
        for c, s in enumerate(stages):
            alive = max((vector[c] for vector in live), default=1)
            mine = options[cuts[s] : cuts[s + 1]]
            host += sum(o.host + alive * o.host_saved for o in mine)
            disk += sum(o.disk for o in mine)
        found.append((host, disk))
    return found


def _causes(parts: Sequence[StageCauses], shape: Arrangement, step: float) -> dict[str, float]:
    """Seconds of the mean rank by cause; what is left of the step is waiting."""
    found = added([part.of_step(shape.microbatches) for part in parts]).times(1 / shape.pp)
    return {**found._asdict(), "bubble": max(0.0, step - found.seconds)}


def standing_bytes(
    bench: Workbench, shape: Arrangement, stages: Sequence[int], cuts: Sequence[int], options: Sequence[Option]
) -> dict[str, float]:
    """Bytes by cause that a rank with these stages has all the time; "gradients" are those that add up over microbatches."""
    mine = [options[u] for s in stages for u in range(cuts[s], cuts[s + 1])]
    total = {c: math.fsum(o.memory[c] for o in mine) for c in ("parameters", "optimizer", "copies")}
    return {
        "parameters": total["parameters"], "optimizer": total["optimizer"], "gathered": total["copies"],
        "buffers": bench.given_bytes, "reserve": bench.reserve(shape),
        "gradients": math.fsum(o.gradient for o in mine),
    }  # fmt: skip


def _memory(
    bench: Workbench, shape: Arrangement, live: Sequence[tuple[int, ...]], stages: Sequence[int], cuts: Sequence[int],
    options: Sequence[Option],
) -> dict[str, float]:  # fmt: skip
    """Bytes by cause at the fullest moment of one rank: a live vector with its working memory, or the optimizer step."""
    mine = [options[u] for s in stages for u in range(cuts[s], cuts[s + 1])]
    per_chunk = [[options[u] for u in range(cuts[s], cuts[s + 1])] for s in stages]
    held = standing_bytes(bench, shape, stages, cuts, options)
    gradients, work = held.pop("gradients"), max(o.work for o in mine)
    training = bench.task.outline.training
    vectors = live if training else [(1,) * len(stages)]
    saved = max(
        (math.fsum(k * o.saved for k, chunk in zip(v, per_chunk, strict=True) for o in chunk) for v in vectors), default=0.0
    )  # fmt: skip
    once = bench.data(shape).once
    kept = "saved" if training else "cache"
    running = {**held, "gradients": 0.0 if once else gradients, kept: saved, "temporaries": work}
    stepping = {**held, "gradients": gradients, kept: 0.0, "temporaries": math.fsum(o.step for o in mine)}
    return max((running, stepping), key=lambda m: sum(m.values()))


def _traffic(bench: Workbench, shape: Arrangement, options: Sequence[Option]) -> tuple[Traffic, ...]:
    """Collectives of the busiest rank inside its stages."""
    total: dict[tuple[str, str], list[float]] = {}
    names = ("cp", "tp") if shape.cp > 1 else ("tp",)
    for option in options:
        for call, times in option.calls:
            entry = total.setdefault((call.collective, names[call.axis]), [0.0, 0.0, 0.0])
            costs = bench.fronts.costs(shape.tp, shape.cp)
            entry[0] += times * shape.microbatches
            entry[1] += times * shape.microbatches * call.bytes
            entry[2] += times * shape.microbatches * costs.collective(call)
    outer = "+".join(n for n, size in (("dp", shape.dp), ("cp", shape.cp)) if size > 1)
    for option in options:
        for name, times, size, seconds in option.shared:
            entry = total.setdefault((name, outer), [0.0, 0.0, 0.0])
            entry[0] += times
            entry[1] += times * size
            entry[2] += times * seconds
    return tuple(
        Traffic(name, axis, round(count), round(size), seconds)
        for (name, axis), (count, size, seconds) in sorted(total.items())
    )


def _handed(
    bench: Workbench, shape: Arrangement, stages: Sequence[int], placement: Sequence[int], cuts: Sequence[int],
    options: Sequence[Option],
) -> tuple[Traffic, ...]:  # fmt: skip
    """What a rank sends to the ranks of the stages after and before its own; bytes are its own part."""
    count = size = seconds = 0.0
    for s in stages:
        borders = []
        if s + 1 < len(placement) and placement[s + 1] != placement[s]:
            borders.append((cuts[s + 1], options[cuts[s + 1] - 1].exit, 0))
        if s and placement[s - 1] != placement[s] and bench.task.outline.training:
            borders.append((cuts[s], options[cuts[s]].entry, 1))
        for at, layout, way in borders:
            count += shape.microbatches
            size += shape.microbatches * bench.crossing_bytes(shape, at, layout)
            seconds += shape.microbatches * bench.send(shape, at, layout)[way]
    return (Traffic("send", "pp", round(count), round(size), seconds),) if count else ()


def predict(bench: Workbench, shape: Arrangement, found: Appraisal) -> Prediction:
    """The figures a plan reports."""
    outline, seconds, devices = bench.task.outline, found.step_seconds, shape.devices
    flops = sum(op.flops + op.backward_flops for op in outline.ops if op.kind in FLOPS_KINDS)
    costs = bench.on(shape, 0).fronts.costs(shape.tp, shape.cp)
    sources = {cause: " and ".join(sorted(known)) for cause, known in costs.sources.items() if known}
    sources |= _of_links(bench, shape, found)
    errors = [e for known in costs.sources.values() for e in known.values()]
    compute = bench.task.setting.precision.compute
    peaks = [pool.device.peak(compute) * pool.devices for pool in bench.task.cluster.pool_list()]
    peak = math.fsum(peaks) / bench.task.cluster.devices
    low, high = step_interval(bench.task.cluster, seconds)
    return Prediction(
        step_seconds=seconds,
        tokens_per_second_per_device=outline.tokens / seconds / devices if seconds else 0.0,
        mfu=flops / seconds / devices / peak if seconds else 0.0,
        peak_bytes_per_device=found.peak_bytes, memory=found.memory, seconds=found.seconds, traffic=found.traffic,
        sources=sources, error=max(errors, default=0.0), host_bytes_per_device=found.host_bytes,
        disk_bytes_per_device=found.disk_bytes, step_seconds_low=low, step_seconds_high=high,
    )  # fmt: skip


def _of_links(bench: Workbench, shape: Arrangement, found: Appraisal) -> dict[str, str]:
    """Where the seconds of messages between stages and of copies behind the device come from."""
    sources, host = {}, bench.task.cluster.host
    sent = next((t for t in found.traffic if t.collective == "send"), None)
    if sent is not None and not shape.pools:
        sources["send"] = bench.sending(shape, sent.bytes / sent.count).source
    if host is not None and (found.host_bytes or found.disk_bytes):
        measured = host.source("copy_bytes_per_second").startswith(MEASURED)
        sources["offload"] = "measured" if measured else "datasheet"
    return sources

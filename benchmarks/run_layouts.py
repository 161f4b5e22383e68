"""A published run's own division: what its framework or its row lays down and no pin can say, priced as it stands.

    stages     as many layers on every stage where the layers divide (Megatron, DeepSpeed), or one fewer on the first and the last
               where the row says so (Qi et al. 2023); otherwise the planner's own
    layers     "fraction F of layers checkpointed": the first int(F x layers) run again (Slapo's `checkpoint`)
    copies     with sequence parallelism what is gathered for a product is gathered again in the backward pass (Megatron)
    buckets    DeepSpeed's ZeRO 1 and 2 reduce and gather through flat buffers of 5e8 elements each (its `reduce_bucket_size` and
               `allgather_bucket_size`), or of all a rank has
    gradients  leave for the host with the optimizer that lies there (DeepSpeed's ZeRO-Offload); where a row says "sync gradient
               flush", into memory that is not pinned and with the backward pass waiting

The search chooses everything else, within the memory limit where it can. A row's memory metric says what its bytes count:

    allocated  tensors, as torch.cuda.max_memory_allocated
    reserved   what the caching allocator keeps for them
    total      the whole device, as nvidia-smi: reserved bytes, the context and communicators
    first      the total of a device of the first stage
    states     parameters, gradients, optimizer and saved activations, as papers count them
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from published_runs import Run
from run_jobs import UNBOUNDED
from shardwright.errors import Infeasible
from shardwright.job import Job
from shardwright.planner.appraise import Appraisal, appraise, predict
from shardwright.planner.away import offload_classes
from shardwright.planner.joint import search
from shardwright.planner.options import Option
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Prediction
from shardwright.planner.progress import silent
from shardwright.planner.shapes import Arrangement
from shardwright.planner.solve import make_bench, tiers_of
from shardwright.planner.workbench import Workbench

KEPT = 1.19
"""Bytes reserved over bytes allocated at a run's peak, where there is room: the median over the 59 runs of the set dos, which state
both (1.08 to 1.46)."""

BUCKET_ELEMENTS = 5e8
"""The default of DeepSpeed's `reduce_bucket_size` and of its `allgather_bucket_size`."""

PAGEABLE_BYTES_PER_SECOND = 3.5e9
"""Copies from a device into host memory that is not pinned: phases of the set dos (backward passes of 5.9e9 parameters take 3.3 to
3.4 s longer with a blocking flush of bf16 gradients than with an asynchronous one, whatever the number of microbatches)."""

_FRACTION = re.compile(r"fraction ([\d.]+) of layers")


@dataclass(frozen=True)
class Laid:
    """A run as it is divided: its prediction, and bytes by metric. `fits` is whether its peak is within the limit."""

    predicted: Prediction
    fits: bool
    limit_bytes: int
    bytes: dict[str, float]


def lay(job: Job, run: Run) -> Laid:
    """Price a run under its own pins and division; raises ShardwrightError."""
    limit, share = job.request.memory_limit_bytes, _fraction(run)
    try:
        bench, shape, cuts, options = _searched(job, run, limit if share is None else UNBOUNDED)
    except Infeasible:
        bench, shape, cuts, options = _searched(job, run, UNBOUNDED)
    options = _own_options(bench, shape, options, run, share)
    cuts = _own_cuts(bench, shape, cuts, "first/last stage" in str(run.knobs.get("other")))
    figures = appraise(bench, shape, cuts, options)
    elements = job.estimate()["parameters"] / shape.tp / shape.pp
    buckets = _buckets(run, elements)
    counted = _bytes(bench, shape, cuts, options, figures, job.cluster.device.memory_bytes, buckets)
    flush = _flush_seconds(run, elements / shape.dp)
    if flush:
        by_cause = {**figures.seconds, "offload": figures.seconds.get("offload", 0.0) + flush}
        figures = replace(figures, step_seconds=figures.step_seconds + flush, seconds=by_cause)
    return Laid(predict(bench, shape, figures), figures.peak_bytes + buckets <= limit, limit, counted)


def _flush_seconds(run: Run, elements: float) -> float:
    """Seconds the backward pass waits while a rank's gradients in half precision are copied out; 0 where they are not so."""
    blocking = re.search(r"\bsync gradient flush", str(run.knobs.get("offload")))
    return 2 * elements / PAGEABLE_BYTES_PER_SECOND if blocking else 0.0


def _buckets(run: Run, elements: float) -> float:
    """Bytes of the two flat buffers, in half precision, beside a rank's parameters."""
    deepspeed = "deepspeed" in " ".join(run.stack).lower() and run.knobs.get("zero_stage") != 3
    return 2 * 2 * min(BUCKET_ELEMENTS, elements) if deepspeed else 0.0


def _searched(job: Job, run: Run, limit: int) -> tuple[Workbench, Arrangement, list[int], list[Option]]:
    """The best plan's bench, shape, cuts and options."""
    request = replace(job.request, pins=parse_pins(run.pins), memory_limit_bytes=limit)
    made, shapes = make_bench(job.outline, job.cluster, job.prices, request, tiers=False)
    bench, found = search(made, shapes, silent, tiers_of(job.cluster, request.pins))
    if found.best is None or found.best.solution.stages is None:
        raise Infeasible("does not fit", cause="memory")
    stages, flat = found.best.solution.stages, found.best.solution.flat
    options = [flat[k] for held in stages for k in held.picks]
    return bench, found.best.shape, [*(held.start for held in stages), len(bench.chain)], options


def _fraction(run: Run) -> float | None:
    found = _FRACTION.match(str(run.knobs.get("recompute") or ""))
    return float(found[1]) if found and float(found[1]) < 1 else None


def _layers(bench: Workbench) -> list[int]:
    """Units of the region repeated most."""
    most = max(range(len(bench.chain.parts)), key=bench.regions.count)
    return [u for u, r in enumerate(bench.regions) if r == most]


def _own_cuts(bench: Workbench, shape: Arrangement, cuts: Sequence[int], fewer: bool) -> list[int]:
    """Even stages, counted in layers; what comes before and after them is the first and the last stage's."""
    layers, count = _layers(bench), shape.pp * shape.chunks
    each, left = divmod(len(layers) + 2 * fewer, count)
    if count == 1 or left or each < 1:
        return list(cuts)
    starts = [*layers, layers[-1] + 1]
    made = [0, *(starts[each * s - fewer] for s in range(1, count)), len(bench.chain)]
    return made if all(a < b for a, b in pairwise(made)) else list(cuts)


def _own_options(
    bench: Workbench, shape: Arrangement, options: Sequence[Option], run: Run, share: float | None
) -> list[Option]:  # fmt: skip
    """The options as the framework has them."""
    made, layers = list(options), _layers(bench)
    again = set(layers[: int(share * len(layers))]) if share is not None else set()
    for u, option in enumerate(options):
        alike = [o for o in bench.options(option.region, shape) if _same(o, option)]
        if share is not None and u in layers:
            order = min if u in again else max
            made[u] = order(alike, key=lambda o: o.saved + o.host_saved)
            continue
        kept = [o for o in alike if (o.policy, o.offload) == (option.policy, option.offload)]
        if "sequence_parallel=on" in run.pins and option.policy in ("none", "selective"):
            made[u] = min(kept, key=lambda o: o.saved)
        elif "offload=optimizer" in run.pins:
            leaving = [o for o in alike if o.design == option.design and _zero_offload(o)]
            made[u] = min(leaving, key=lambda o: o.seconds + o.finish, default=option)
    return made


def _zero_offload(option: Option) -> bool:
    """Whether the optimizer and gradients of a unit lie in host memory, and nothing else."""
    return offload_classes(option.offload) == {"optimizer"} and "gradients" in option.offload.split("+")


def _same(one: Option, other: Option) -> bool:
    return (one.style, one.zero, one.entry, one.exit) == (other.style, other.zero, other.entry, other.exit)


def _bytes(
    bench: Workbench, shape: Arrangement, cuts: Sequence[int], options: Sequence[Option], figures: Appraisal, room: int,
    buckets: float,
) -> dict[str, float]:  # fmt: skip
    """A device's bytes by metric."""
    reserve = bench.reserve(shape)

    def reserved(allocated: float) -> float:
        return min(KEPT * allocated, max(room - reserve, allocated))

    allocated, first = (peak + buckets - reserve for peak in (figures.peak_bytes, figures.stages[0].peak_bytes))
    return {
        "allocated": allocated, "reserved": reserved(allocated), "total": reserved(allocated) + reserve,
        "first": reserved(first) + reserve,
        "states": max(_states(bench, shape, rank, cuts, options) for rank in range(shape.pp)),
    }  # fmt: skip


def _states(bench: Workbench, shape: Arrangement, rank: int, cuts: Sequence[int], options: Sequence[Option]) -> float:
    """Bytes of one rank that live between passes."""
    ready = bench.ready(shape)
    mine = [options[cuts[s] : cuts[s + 1]] for s in ready.local[rank]]
    held = math.fsum(o.static + o.gradient for stage in mine for o in stage)
    alive = (math.fsum(k * o.saved for k, stage in zip(v, mine, strict=True) for o in stage) for v in ready.live[rank])
    return held + max(alive, default=0.0)

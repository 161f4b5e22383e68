"""The step of a plan over time: what every lane of every pipeline rank does when, and the bytes that are alive, by cause.

Seconds and bytes are those that the joint search compared plans by, run through the simulator that its bound is of. Plans whose
bytes are counted op by op (planner/counted.py) predict a peak of their own beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from ..errors import PlanError
from .alive import Alive, alive_at_peak
from .appraise import causes_of, stage_seconds, standing_bytes
from .cluster import Cluster
from .costs import PriceBook
from .footprint import MemoryCurve, memory_curves
from .outline import Outline
from .plan import Plan
from .repricing import bench_of
from .simulate import Timeline, simulate
from .spans import Span, spans_of
from .spell import shape_in, units_in
from .stagecosts import Links, RankCost, StageCost


@dataclass(frozen=True)
class BytesOverTime:
    """Bytes of one rank by cause: `causes[c][i]` are alive from `seconds[i]` on."""

    seconds: tuple[float, ...]
    causes: Mapping[str, tuple[float, ...]]

    @property
    def peak_bytes(self) -> float:
        """The most at once."""
        return max(map(sum, zip(*self.causes.values(), strict=True)))


@dataclass(frozen=True)
class Replay:
    """A simulated step and the bytes of every pipeline rank; each rank stands for `alike` devices that do the same.

    `spans` are what the lanes of each rank do, by cause (planner/spans.py); `alive` is what each has at its fullest moment.
    """

    timeline: Timeline
    memory: tuple[BytesOverTime, ...]
    alike: int
    spans: tuple[tuple[Span, ...], ...]
    alive: tuple[Alive, ...]


def as_data(step: Replay) -> dict[str, Any]:
    """A replayed step in plain values: spans and bytes by cause of every pipeline rank, in seconds from its start."""
    ranks = [
        {
            "rank": rank,
            "spans": [
                {
                    "lane": s.lane, "name": s.name, "cause": s.cause, "start_seconds": s.start, "end_seconds": s.end,
                    "stage": s.stage, "microbatch": s.microbatch,
                }
                for s in spans
            ],
            "memory": {
                "seconds": list(memory.seconds), "bytes": {cause: list(amounts) for cause, amounts in memory.causes.items()}
            },
            "alive_at_peak": [{"region": name, "bytes": dict(own)} for name, own in alive.items()],
        }
        for rank, (spans, memory, alive) in enumerate(zip(step.spans, step.memory, step.alive, strict=True))
    ]  # fmt: skip
    return {"step_seconds": step.timeline.step_seconds, "devices_per_rank": step.alike, "ranks": ranks}


def replay(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook) -> Replay:
    """Simulate a plan of the joint search; `outline` is its model's, at the compute dtype.

    Raises PlanError for a plan that is no such one (it lists no stages), or not of this model.
    """
    if not plan.stages:
        raise PlanError("the plan lists no stages: it is of the search over one plain stage, which has no timeline")
    bench, shape = bench_of(plan, outline, cluster, prices), shape_in(plan)
    cuts, options = units_in(bench, plan)
    ready, t = bench.ready(shape), stage_seconds(bench, shape, cuts, options)
    # Saved activations of split backward passes stay until the weight half is done, as the search counts them.
    saved = [math.fsum(o.saved for o in options[a:b]) for a, b in pairwise(cuts)]
    work = [max(o.work for o in options[a:b]) for a, b in pairwise(cuts)]
    costs = tuple(
        StageCost(
            t.forward[s], t.backward[s], t.weight[s], saved[s], saved[s] if ready.splits else 0.0, work[s], work[s],
            finish=(("compute", t.finish[s]),) if t.finish[s] else (),
        )
        for s in range(len(saved))
    )  # fmt: skip
    held = [standing_bytes(bench.on(shape, r), shape, ready.local[r], cuts, options) for r in range(shape.pp)]
    once, ranks = bench.data(shape).once, []
    for stages, amounts in zip(ready.local, held, strict=True):
        step = math.fsum(o.step for s in stages for o in options[cuts[s] : cuts[s + 1]])
        ranks.append(RankCost(0.0, step + (amounts["gradients"] if once else 0.0)))
        amounts["gradients"] *= not once
    timeline = simulate(ready.compiled, ready.placement, costs, Links(t.send_forward, t.send_backward), ranks=ranks)
    quiet = [replace(c, work_forward_bytes=0.0, work_backward_bytes=0.0) for c in costs]
    kept = memory_curves(timeline.solved, quiet, (RankCost(),) * shape.pp)
    memory = tuple(map(partial(_over_time, training=outline.training), held, timeline.memory, kept))
    alike = math.prod(axis.size for axis in plan.mesh) * plan.pipeline.ranks // shape.pp
    alive = tuple(
        alive_at_peak(plan, r, cuts, options, timeline.tasks[r], memory[r]) for r in range(shape.pp)
    )  # fmt: skip
    return Replay(timeline, memory, alike, spans_of(plan, timeline, causes_of(bench, shape, cuts, options)), alive)


def _over_time(held: Mapping[str, float], both: MemoryCurve, saved: MemoryCurve, training: bool) -> BytesOverTime:
    """Curves by cause, from those of everything that comes and goes and of what is saved alone (at the same moments)."""
    count = len(both.seconds)
    causes = {cause: (amount,) * count for cause, amount in held.items()}
    causes["saved" if training else "cache"] = saved.bytes
    causes["temporaries"] = tuple(a - b for a, b in zip(both.bytes, saved.bytes, strict=True))
    return BytesOverTime(both.seconds, causes)

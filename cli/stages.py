"""A plan's pipeline in words: its line, its stages, and what of the regions runs again, lies elsewhere or changes layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..planner.plan import Plan, RegionPlan, StagePlan
from .figures import bytes_text, seconds_text

_LAYOUTS = {"R": "whole", "S": "by positions"}
_AWAY = {"params": "parameters"}


@dataclass(frozen=True, slots=True)
class StageRow:
    """Neighbouring stages that run the same: their numbers, ranks, runs, seconds of a microbatch, the larger peak.

    `pool` names their devices where a cluster has several kinds.
    """

    stages: str
    ranks: str
    runs: str
    forward: str
    backward: str
    finish: str
    peak: str
    pool: str = ""


@dataclass(frozen=True, slots=True)
class VariantRow:
    """How a region departs from keeping everything on the device: each "" where it does not."""

    name: str
    again: str
    away: str
    layout: str
    policy: str


def pipeline_text(plan: Plan) -> str:
    """ "2 ranks, zbv, 2 chunks a rank"; "" without a pipeline."""
    pipeline = plan.pipeline
    if pipeline.ranks == 1:
        return ""
    chunks = f", {pipeline.chunks} chunks a rank" if pipeline.chunks > 1 else ""
    return f"{pipeline.ranks} ranks, {pipeline.schedule}{chunks}"


def microbatch_text(plan: Plan) -> str:
    """ "2 microbatches of 4 samples per data-parallel rank"."""
    count, size = plan.pipeline.microbatches, plan.pipeline.micro_batch
    samples = "1 sample" if size == 1 else f"{size} samples"
    return (
        f"{count} microbatches of {samples} per data-parallel rank"
        if count > 1
        else f"{samples} per data-parallel rank"
    )


def mesh_rows(plan: Plan) -> list[tuple[str, int, str, str]]:
    """(axis, ranks, role, link) outermost first, with the pipeline and the experts' share of the data ranks."""
    rows = {axis.name: (axis.name, axis.size, axis.role, axis.link) for axis in plan.mesh}
    pipeline = plan.pipeline
    if pipeline.ranks > 1:
        rows["pp"] = ("pp", pipeline.ranks, "pipeline", _crossed(plan))
    if pipeline.experts > 1:
        rows["ep"] = ("ep", pipeline.experts, "experts, in dp", "")
    order = [name for name in pipeline.order if name in rows]
    return [rows[name] for name in [*order, *(n for n in rows if n not in order)]]


def _crossed(plan: Plan) -> str:
    """The innermost level of the cluster that holds all ranks of one pipeline."""
    order, sizes = plan.pipeline.order, {axis.name: axis.size for axis in plan.mesh}
    inner = order[order.index("pp") + 1 :] if "pp" in order else tuple(sizes)
    span = plan.pipeline.ranks
    for name in inner:
        span *= sizes.get(name, 1)
    levels: Sequence[Mapping[str, Any]] = plan.cluster.get("levels") or ()
    return next((str(level["name"]) for level in levels if level.get("ranks", 0) >= span), "")


def stage_rows(plan: Plan, most: int | None = None) -> list[StageRow]:
    """The stages in order; none where one stage runs every region in one way.

    Where there are more than `most`, neighbours that run the same share a row.
    """
    if len(plan.stages) < 2 and all(not region.region for region in plan.regions):
        return []
    groups: list[list[int]] = []
    for i, stage in enumerate(plan.stages):
        if groups and most is not None and len(plan.stages) > most and _goes_on(plan, groups[-1], stage):
            groups[-1].append(i)
        else:
            groups.append([i])
    return [_row(plan, group) for group in groups]


def _goes_on(plan: Plan, group: Sequence[int], stage: StagePlan) -> bool:
    """Whether a stage runs as the group before it, on the rank that comes next."""
    ranks = [*(plan.stages[i].rank for i in group), stage.rank]
    steps = {b - a for a, b in pairwise(ranks)}
    return _alike(plan.stages[group[0]]) == _alike(stage) and (steps in ({1}, {-1}))


def _alike(stage: StagePlan) -> tuple[str, ...]:
    seconds = (stage.forward_seconds, stage.backward_seconds, stage.finish_seconds)
    return (_stage_runs(stage), *map(seconds_text, seconds), stage.pool)


def _row(plan: Plan, group: Sequence[int]) -> StageRow:
    first, last = plan.stages[group[0]], plan.stages[group[-1]]
    peak = max(plan.stages[i].peak_bytes for i in group)
    runs, forward, backward, finish, pool = _alike(first)
    return StageRow(
        _span(group[0], group[-1]),
        _span(first.rank, last.rank),
        runs,
        forward,
        backward,
        finish,
        bytes_text(peak),
        pool,
    )


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _stage_runs(stage: StagePlan) -> str:
    return runs_text([(run.use, run.count) for run in stage.runs])


def runs_text(runs: Sequence[tuple[str, int]]) -> str:
    """ "r0, r1 x 7": what runs after what."""
    return ", ".join(use if count == 1 else f"{use} x {count}" for use, count in runs)


def variant_rows(plan: Plan) -> list[VariantRow]:
    """The regions that run something again, have something off the device, or take or hand on a split layout."""
    rows = [
        VariantRow(r.name, again_text(r.recompute), away_text(r.offload), _layout(r), policy_text(r)) for r in plan.regions
    ]  # fmt: skip
    return [row for row in rows if row.again or row.away or row.layout]


def again_text(recompute: Sequence[str]) -> str:
    """ "13 ops, 2 gathers": what the backward pass runs again; "" for nothing."""
    gathers = sum(" -> " in name for name in recompute)
    parts = ((len(recompute) - gathers, "op"), (gathers, "gather"))
    return ", ".join(f"{count} {name}" if count == 1 else f"{count} {name}s" for count, name in parts if count)


def away_text(offload: Sequence[str]) -> str:
    """What lies in host memory or on disk, in words; `optimizer/k` updates one part in k on the device."""
    return ", ".join(map(_away, offload))


def _away(label: str) -> str:
    name, _, place = label.partition("@")
    name, _, stride = name.partition("/")
    where = f" on {place}" if place else ""
    how = "" if not stride else " (updated here)" if stride == "1" else f" (1 part in {stride} updated here)"
    return f"{_AWAY.get(name, name)}{where}{how}"


def _layout(region: RegionPlan) -> str:
    if region.entry == region.exit == "R":
        return ""
    entry, leaves = _LAYOUTS.get(region.entry, region.entry), _LAYOUTS.get(region.exit, region.exit)
    return f"split {entry}" if entry == leaves else f"{entry}, then {leaves}"


def policy_text(region: RegionPlan) -> str:
    """The name of the policy that runs something again, "searched" for a choice of the front that has none."""
    return (region.policy or "searched") if region.recompute else ""

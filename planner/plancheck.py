"""What must hold inside a plan, whatever the model: names, counts and placements that fit the mesh.

Whether a plan fits a *model* is checked where the model is known (planner/assign.py); here the plan is held against itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from ..errors import ClusterError
from .cluster import Cluster, pool_names
from .placement import parse_state
from .plan import OpPlan, ParameterPlan, Plan, RegionPlan
from .updates import ALONE, BACKWARD, STEP, why_not_in_backward

ROLES = ("data", "context", "model")
SEMANTICS = ("EXACT", "VALID", "STALE", "LOSSY", "ARCH")
SOURCES = ("hf", "function", "module")


def first_problem(plan: Plan) -> str | None:
    """The first thing wrong, as "field: what was found; what was expected", or None."""
    return next(problems(plan), None)


def problems(plan: Plan) -> Iterator[str]:
    """Everything wrong with a plan on its own, in field order."""
    yield from _source(plan)
    if plan.semantics not in SEMANTICS:
        yield f"semantics: {plan.semantics!r}; expected one of {', '.join(SEMANTICS)}"
    yield from _mesh(plan)
    yield from _pipeline(plan)
    yield from _update(plan)
    yield from _regions(plan)
    if plan.memory_limit_bytes < 1:
        yield f"memory_limit_bytes: {plan.memory_limit_bytes}; expected a positive number of bytes"
    for field in ("prefetch", "reductions"):
        if getattr(plan.overlap, field) < 0:
            yield f"overlap.{field}: {getattr(plan.overlap, field)}; expected 0 or more"
    yield from _numbers(plan)


def _source(plan: Plan) -> Iterator[str]:
    source = plan.source
    if source.kind not in SOURCES:
        yield f"source.kind: {source.kind!r}; expected one of {', '.join(SOURCES)}"
    if source.batch < 1:
        yield f"source.batch: {source.batch}; expected at least 1"
    if source.seq is not None and source.seq < 1:
        yield f"source.seq: {source.seq}; expected at least 1"
    if source.kind == "hf" and source.config is None:
        yield "source.config: missing; a plan for an hf: model embeds its configuration"
    if source.kind == "function" and not (source.file and source.function and source.sha256):
        yield "source: file, function and sha256 are needed to rebuild a model from a file"


def _mesh(plan: Plan) -> Iterator[str]:
    if not plan.mesh:
        yield "mesh: empty; expected at least one axis (of size 1 for one device)"
    for i, axis in enumerate(plan.mesh):
        if axis.size < 1:
            yield f"mesh[{i}].size: {axis.size}; expected at least 1"
        if axis.role not in ROLES:
            yield f"mesh[{i}].role: {axis.role!r}; expected one of {', '.join(ROLES)}"
    yield from _twice("mesh", "name", [axis.name for axis in plan.mesh])
    devices = plan.cluster.get("devices")
    ranks = plan.ranks
    if isinstance(devices, int) and devices != ranks:
        sizes = " x ".join(f"{axis.name}={axis.size}" for axis in plan.mesh)
        yield f"mesh: {sizes} is {ranks} ranks; expected the cluster's {devices}"


def _update(plan: Plan) -> Iterator[str]:
    if plan.update not in (STEP, BACKWARD):
        yield f"update: {plan.update!r}; expected {STEP!r} or {BACKWARD!r}"
    elif plan.update == BACKWARD and (problem := why_not_in_backward(plan)):
        yield f"update: {BACKWARD!r}: {problem}"
    elif plan.update == BACKWARD and plan.overlap != ALONE:
        yield f"overlap: expected prefetch 0 and reductions 0 where update is {BACKWARD!r}"


def _pipeline(plan: Plan) -> Iterator[str]:
    pipeline = plan.pipeline
    for field in ("stages", "chunks", "microbatches", "micro_batch", "ranks"):
        if getattr(pipeline, field) < 1:
            yield f"pipeline.{field}: {getattr(pipeline, field)}; expected at least 1"
    if pipeline.stages != pipeline.ranks * pipeline.chunks:
        yield f"pipeline.stages: {pipeline.stages}; expected ranks x chunks, {pipeline.ranks * pipeline.chunks}"
    if (pipeline.ranks == 1) != (pipeline.schedule == "none"):
        yield f'pipeline.schedule: {pipeline.schedule!r}; expected "none" on one rank, a schedule on several'
    if plan.stages and len(plan.stages) != pipeline.stages:
        yield f"stages: {len(plan.stages)} of them; expected the pipeline's {pipeline.stages}"
    yield from _runs(plan)
    yield from _pools(plan)
    data = math.prod(axis.size for axis in plan.mesh if axis.role == "data")
    samples = pipeline.micro_batch * pipeline.microbatches * data
    if samples != plan.source.batch:
        yield (
            f"pipeline: {pipeline.microbatches} microbatches of {pipeline.micro_batch} on {data} data-parallel ranks are "
            f"{samples} samples; expected the batch of {plan.source.batch}"
        )


def _runs(plan: Plan) -> Iterator[str]:
    """Every instance of a region is held once, by entries that exist."""
    known = {region.name: region for region in plan.regions}
    held: dict[str, int] = {}
    for s, stage in enumerate(plan.stages):
        if not 0 <= stage.rank < plan.pipeline.ranks:
            yield f"stages[{s}].rank: {stage.rank}; expected 0 to {plan.pipeline.ranks - 1}"
        for r, run in enumerate(stage.runs):
            if run.use not in known:
                yield f"stages[{s}].runs[{r}].use: {run.use!r}; expected one of {', '.join(known)}"
            elif run.count < 1 or run.first < 0:
                yield f"stages[{s}].runs[{r}]: {run.count} instances from {run.first}; expected at least 1, from 0 on"
            held[run.use] = held.get(run.use, 0) + run.count
    for name, region in known.items() if plan.stages else ():
        if held.get(name, 0) != region.repeats:
            yield f"stages: {held.get(name, 0)} instances of {name}; expected its {region.repeats} repeats"


def _pools(plan: Plan) -> Iterator[str]:
    """Every stage lies in the pool of its rank, and the ranks of the pools are the pipeline's."""
    given = plan.cluster.get("pools") or ()
    if len(given) < 2:
        if plan.pools:
            yield f"pools: {len(plan.pools)} of them; the cluster's devices are all equal"
        for s, stage in enumerate(plan.stages):
            if stage.pool:
                yield f'stages[{s}].pool: {stage.pool!r}; expected "", the cluster\'s devices are all equal'
        return
    if not plan.stages:
        return
    try:
        cluster = Cluster.from_dict(plan.cluster)
    except ClusterError as error:
        yield f"cluster: {error}"
        return
    size = math.prod(axis.size for axis in plan.mesh)
    devices = {name: pool.devices for name, pool in zip(pool_names(cluster), cluster.pools, strict=True)}
    if sorted(pool.name for pool in plan.pools) != sorted(devices):
        yield f"pools: {', '.join(p.name for p in plan.pools) or 'none'}; expected each of {', '.join(devices)} once"
        return
    for i, pool in enumerate(plan.pools):
        if pool.ranks * size != devices[pool.name]:
            yield f"pools[{i}].ranks: {pool.ranks} ranks of {size} devices; expected the pool's {devices[pool.name]} devices"
        if pool.memory_limit_bytes < 1:
            yield f"pools[{i}].memory_limit_bytes: {pool.memory_limit_bytes}; expected a positive number of bytes"
    owner = [pool.name for pool in plan.pools for _ in range(max(pool.ranks, 0))]
    for s, stage in enumerate(plan.stages):
        if 0 <= stage.rank < len(owner) and stage.pool != owner[stage.rank]:
            yield f"stages[{s}].pool: {stage.pool!r}; rank {stage.rank} is one of {owner[stage.rank]}"


def _regions(plan: Plan) -> Iterator[str]:
    axes = [axis.name for axis in plan.mesh]
    yield from _twice("regions", "name", [region.name for region in plan.regions])
    first = {region.region or region.name: region for region in reversed(plan.regions)}
    owned = [name for region in first.values() for parameter in region.parameters for name in parameter.names]
    yield from _twice("regions", "parameter", owned)
    for i, region in enumerate(plan.regions):
        yield from _region(f"regions[{i}]", region, axes, bool(plan.stages))


def _region(where: str, region: RegionPlan, axes: Sequence[str], staged: bool) -> Iterator[str]:
    if region.repeats < 1:
        yield f"{where}.repeats: {region.repeats}; expected at least 1"
    for field in ("recompute", "offload"):
        if getattr(region, field) and not staged:
            yield f"{where}.{field}: {getattr(region, field)[0]!r}; expected an empty list (everything is kept)"
    if not 0 <= region.borrowed_zero <= 3:
        yield f"{where}.borrowed_zero: {region.borrowed_zero}; expected 0, 1, 2 or 3"
    yield from _twice(f"{where}.ops", "op", [op.op for op in region.ops])
    for j, op in enumerate(region.ops):
        yield from _op(f"{where}.ops[{j}]", op, axes)
    for j, parameter in enumerate(region.parameters):
        yield from _parameter(f"{where}.parameters[{j}]", parameter, axes)


def _op(where: str, op: OpPlan, axes: Sequence[str]) -> Iterator[str]:
    yield from _per_axis(f"{where}.choice", op.choice, axes)
    for a, choice in enumerate(op.choice):
        if not choice:
            yield f"{where}.choice[{a}]: empty; expected a factor of {op.op}, R, V or P and a number"
    if op.result:
        yield from _per_axis(f"{where}.result", op.result, axes)
        yield from _states(f"{where}.result", op.result)


def _parameter(where: str, parameter: ParameterPlan, axes: Sequence[str]) -> Iterator[str]:
    if not parameter.names:
        yield f"{where}.names: empty; expected the names of a parameter"
    yield from _per_axis(f"{where}.home", parameter.home, axes)
    yield from _states(f"{where}.home", parameter.home)
    for a, state in enumerate(parameter.home):
        if state in ("V", "P"):
            yield f"{where}.home[{a}]: {state!r}; a parameter is stored whole (R) or split, S(dim)"
    if not 0 <= parameter.zero <= 3:
        yield f"{where}.zero: {parameter.zero}; expected 0, 1, 2 or 3"
    for a, name in enumerate(parameter.zero_axes):
        if name not in axes:
            yield f"{where}.zero_axes[{a}]: {name!r}; expected one of the mesh axes {', '.join(axes)}"
    if bool(parameter.zero) != bool(parameter.zero_axes):
        yield f"{where}.zero_axes: {list(parameter.zero_axes)} at zero={parameter.zero}; levels 1 to 3 need an axis, 0 has none"
    yield from _twice(f"{where}.zero_axes", "axis", parameter.zero_axes)


def _per_axis(where: str, given: Sequence[str], axes: Sequence[str]) -> Iterator[str]:
    if len(given) != len(axes):
        yield f"{where}: {list(given)}; expected one entry per mesh axis ({', '.join(axes)})"


def _states(where: str, given: Sequence[str]) -> Iterator[str]:
    for a, state in enumerate(given):
        try:
            parse_state(state)
        except ValueError as error:
            yield f"{where}[{a}]: {error}"


def _twice(where: str, what: str, names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield f"{where}: {what} {name!r} stands twice"
        seen.add(name)


def _numbers(plan: Plan) -> Iterator[str]:
    predicted, search = plan.predicted, plan.search
    seconds = {f"predicted.seconds.{cause}": value for cause, value in predicted.seconds.items()}
    scalars = {
        "predicted.step_seconds": predicted.step_seconds,
        "predicted.tokens_per_second_per_device": predicted.tokens_per_second_per_device,
        "predicted.mfu": predicted.mfu,
        "predicted.error": predicted.error,
        "search.bound_seconds": search.bound_seconds,
        "search.gap": search.gap,
    }
    for where, value in (scalars | seconds).items():
        if not math.isfinite(value):
            yield f"{where}: {value}; expected a finite number"

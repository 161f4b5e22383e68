"""A solved shape written out as a Plan, and a Plan read back as a shape with an option for every unit."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import PlanError
from .appraise import Appraisal, appraise, predict
from .bench import home_of
from .choices import states
from .cluster import Cluster, pool_names
from .counted import Ground, with_counts
from .front import Design
from .joint import Found, Solved
from .options import Option
from .outline import Outline
from .placement import R, State
from .placing import axis_levels
from .plan import (
    VERSION,
    MeshAxis,
    OpPlan,
    ParameterPlan,
    Pipeline,
    Plan,
    PoolPlan,
    RegionPlan,
    RunPlan,
    Search,
    ShapeRecord,
    StagePlan,
)  # fmt: skip
from .precision import semantics_of
from .schedules import fault
from .shapes import Arrangement
from .workbench import Workbench

if TYPE_CHECKING:
    from .solve import Request

GIVEN_UP = (
    "options: the sharding of each style, with what is kept at a few budgets and the named policies",
    "stages are cut between regions; schedules are those of the library",
    "with several chunks a rank, one division of the units, even by time",
)

POOLED = (
    "stages on unlike devices: divisions next to the best found; with one chunk a rank the bound is of all divisions"
)

FORKED = "branches: one division of the units, that of the shortest step by least times"

ROUTED = "bytes of all-to-alls of experts are those of the mean rank: those of each rank depend on routing"

MOST_RECORDS = 60
"""Shapes listed in a plan: the best, and of those that were cut the ones with the smallest bounds."""


def plan_of(
    bench: Workbench, found: Found, best: Solved, request: Request, outline: Outline, limit_bytes: int | None = None
) -> Plan:
    """The plan of a search's best shape, within the request's limit if no other is given."""
    shape, task = best.shape, bench.task
    limit = request.memory_limit_bytes if limit_bytes is None else limit_bytes
    assert best.solution.stages is not None
    options = [best.solution.flat[k] for held in best.solution.stages for k in held.picks]
    cuts = [held.start for held in best.solution.stages] + [len(bench.chain)]
    figures = appraise(bench, shape, cuts, options)
    bound = min(found.bound_seconds, figures.step_seconds)
    gap = (figures.step_seconds - bound) / figures.step_seconds if figures.step_seconds else 0.0
    entries, stages = _entries(bench, shape, cuts, options, figures)
    given_up = (*GIVEN_UP, *((POOLED,) if shape.pools else ()), *((FORKED,) if shape.schedule == "branches" else ()))
    solver = f"ortools {importlib.metadata.version('ortools')} HiGHS"
    plan = Plan(
        version=VERSION, source=request.source, graph=outline.fingerprint, cluster=task.cluster.to_dict(),
        cluster_fingerprint=task.cluster.fingerprint(), objective=request.objective, optimizer=task.setting.optimizer,
        precision=task.setting.precision, semantics=semantics_of(task.setting.precision),
        mesh=mesh_of(bench, shape), pipeline=_pipeline(shape),
        regions=entries, memory_limit_bytes=figures.limit_bytes if shape.pools else limit,
        predicted=predict(bench, shape, figures),
        search=Search(bound, max(gap, 0.0), _listed(found.records), found.interrupted, solver, given_up), pins=request.pins.texts,
        runners_up=tuple(r for r in found.records if r.status == "solved")[1:4], stages=stages, pools=_pools(bench, shape),
        notes=(*outline.notes, *_unpriced(bench, shape)),
    )  # fmt: skip
    return with_counts(plan, task.outline, task.cluster, grounds(bench, shape))


def grounds(bench: Workbench, shape: Arrangement) -> tuple[Ground, ...]:
    """What the ranks of every pool stand on, in the order of the pipeline."""
    first = [shape.pools.index(p) for p in shape.pool_order] or [0]
    tasks = [bench.on(shape, rank).task for rank in first]
    return tuple(Ground(task.cluster, task.prices, task.setting) for task in tasks)


def _unpriced(bench: Workbench, shape: Arrangement) -> tuple[str, ...]:
    """What the predicted seconds leave out, said in the plan."""
    found = []
    if shape.pp > 1 and bench.chain.ties:
        found.append("the exchange of tied parameters' gradients between stages is not in the predicted seconds")
    if shape.ep > 1:
        found.append(ROUTED)
    return tuple(found)


def _listed(records: Sequence[ShapeRecord]) -> tuple[ShapeRecord, ...]:
    solved = [r for r in records if r.status == "solved"]
    others = [r for r in records if r.status != "solved"]
    return tuple([*solved, *others][:MOST_RECORDS])


def mesh_of(bench: Workbench, shape: Arrangement) -> tuple[MeshAxis, ...]:
    """The axes inside a pipeline rank, outermost first; one data axis where there is none."""
    if shape.pools:
        return _mesh_over(bench, shape)
    places = {p.name: p for p in axis_levels(bench.task.cluster, shape.order, shape.sizes())}
    roles = (("dp", "data", shape.dp), ("cp", "context", shape.cp), ("tp", "model", shape.tp))
    inner = [(name, role, size) for name, role, size in roles if size > 1] or [("dp", "data", 1)]
    levels = bench.task.cluster.pool_list()[0].levels
    return tuple(
        MeshAxis(name, size, role, places[name].levels[-1] if places[name].levels else levels[0].name)
        for name, role, size in inner
    )


def _mesh_over(bench: Workbench, shape: Arrangement) -> tuple[MeshAxis, ...]:
    """The mesh of a rank on unlike devices; `link` names the levels that an axis crosses in one pool or another."""
    made: list[tuple[MeshAxis, ...]] = []
    for p in shape.pool_order:
        first, ranks = shape.pools.index(p), shape.pools.count(p)
        made.append(mesh_of(bench.on(shape, first), replace(shape, pp=ranks, pools=())))
    axes = []
    for same in zip(*made, strict=True):
        links = sorted({axis.link for axis in same})
        axes.append(MeshAxis(same[0].name, same[0].size, same[0].role, " or ".join(links)))
    return tuple(axes)


def _pools(bench: Workbench, shape: Arrangement) -> tuple[PoolPlan, ...]:
    """The pools in the order of the pipeline."""
    names, found = pool_names(bench.task.cluster), []
    for p in shape.pool_order:
        task = bench.on(shape, shape.pools.index(p)).task
        found.append(PoolPlan(names[p], task.device.name, shape.pools.count(p), task.limit_bytes))
    return tuple(found)


def _pipeline(shape: Arrangement) -> Pipeline:
    schedule = shape.schedule if shape.pp > 1 else "none"
    order = tuple(name for name in shape.order if shape.sizes()[name] > 1)
    return Pipeline(
        shape.pp * shape.chunks,
        schedule,
        shape.chunks,
        shape.microbatches,
        shape.micro_batch,
        shape.pp,
        order,
        shape.ep,
    )


def _entries(
    bench: Workbench, shape: Arrangement, cuts: Sequence[int], options: Sequence[Option], figures: Appraisal
) -> tuple[tuple[RegionPlan, ...], tuple[StagePlan, ...]]:
    """One entry per region and option in use, and the runs of the stages over them."""
    units, regions = bench.chain.units, bench.task.outline.regions
    uses: dict[int, dict[tuple[object, ...], list[int]]] = {r: {} for r in range(len(regions))}
    for u, (r, _) in enumerate(units):
        uses[r].setdefault(_same(options[u]), []).append(u)
    names: dict[int, str] = {}
    entries: list[RegionPlan] = []
    for r, found in uses.items():
        for i, members in enumerate(found.values()):
            name = regions[r].name if len(found) == 1 else f"{regions[r].name}.{i + 1}"
            names |= dict.fromkeys(members, name)
            base = "" if len(found) == 1 else regions[r].name
            entries.append(entry_of(bench, shape, name, base, len(members), options[members[0]]))
    stages, names_of_pools = [], pool_names(bench.task.cluster)
    for stage in figures.stages:
        runs: list[RunPlan] = []
        for u in range(stage.start, stage.end):
            k = units[u][1]
            if runs and runs[-1].use == names[u] and runs[-1].first + runs[-1].count == k:
                runs[-1] = RunPlan(names[u], runs[-1].first, runs[-1].count + 1)
            else:
                runs.append(RunPlan(names[u], k, 1))
        stages.append(
            StagePlan(
                stage.rank, tuple(runs), stage.forward, stage.backward, stage.finish, stage.peak_bytes,
                names_of_pools[shape.pools[stage.rank]] if shape.pools else "",
            )
        )  # fmt: skip
    return tuple(entries), tuple(stages)


def _same(option: Option) -> tuple[object, ...]:
    return option.region, option.design, option.zero, option.offload


def entry_of(bench: Workbench, shape: Arrangement, name: str, base: str, repeats: int, option: Option) -> RegionPlan:
    """How a plan spells that a region runs under an option."""
    part, outline = bench.chain.parts[option.region], bench.task.outline
    region = outline.regions[option.region]
    axes, tensors = mesh_of(bench, shape), dict(outline.tensors)
    cut, context = bench.chain.cut[0], bench.fronts.context(shape.cp).choice if shape.cp > 1 else {}
    spelled = {op.name: first for op, first in zip(part.outline.ops, region.instances[0], strict=True)}
    ops: list[OpPlan] = []
    wants: dict[str, set[State]] = {}
    for op, choice in zip(part.outline.ops, option.design.choices, strict=True):
        by_role = {
            "data": cut.choice[op.name] if shape.dp > 1 else "R",
            "context": context.get(op.name, "R"),
            "model": choice,
        }
        picked = tuple(by_role[a.role] for a in axes)
        sides = [states(op, tensors, c) for c in picked]
        result = tuple(str(s[1][0]) for s in sides) if op.results else ()
        ops.append(OpPlan(spelled[op.name], op.target, picked, result))
        for use, want in zip(op.operands, states(op, tensors, choice)[0], strict=True):
            wants.setdefault(use.tensor, set()).add(want)
    parameters = _parameters(bench, shape, option, wants)
    again = [spelled[n] for n in spelled if n in option.design.again]
    copies = [f"{_tensor(root, spelled)} -> {state}" for root, state in sorted(option.design.regather)]
    return RegionPlan(
        name, repeats, tuple(ops), parameters, tuple([*again, *copies]), tuple(p for p in option.offload.split("+") if p),
        base, option.entry, option.exit, option.policy, option.style, option.zero if part.borrowed else 0,
    )  # fmt: skip


def _parameters(
    bench: Workbench, shape: Arrangement, option: Option, wants: Mapping[str, set[State]]
) -> tuple[ParameterPlan, ...]:
    """The parameters a region owns, named as in its first instance."""
    outline = bench.task.outline
    region = outline.regions[option.region]
    if not region.parameters:
        return ()
    axes = mesh_of(bench, shape)
    shared = tuple(a.name for a in axes if a.role in ("data", "context") and a.size > 1)
    known = {p.tensor: p for p in outline.parameters}
    k = 1 if region.repeats > 1 else 0
    found = []
    for mine, first in zip(region.parameters[k], region.parameters[0], strict=True):
        home = home_of(wants.get(mine, {R}))
        zero = option.zero if outline.tensors[mine].dims else 0
        found.append(
            ParameterPlan(
                known[first].names, tuple(str(home if a.role == "model" else R) for a in axes), zero,
                shared if zero else (), known[first].trainable,
            )
        )  # fmt: skip
    return tuple(found)


# -- back from a plan


def stages_of(figures: Appraisal, stages: Sequence[StagePlan]) -> tuple[StagePlan, ...]:
    """Stages with the same runs and the seconds and bytes of `figures`."""
    return tuple(
        StagePlan(f.rank, s.runs, f.forward, f.backward, f.finish, f.peak_bytes, s.pool)
        for f, s in zip(figures.stages, stages, strict=True)
    )


def shape_in(plan: Plan) -> Arrangement:
    """The shape of a plan."""
    pools: tuple[int, ...] = ()
    if plan.pools:
        names = pool_names(Cluster.from_dict(plan.cluster))
        pools = tuple(names.index(pool.name) for pool in plan.pools for _ in range(pool.ranks))
    sizes = {axis.role: axis.size for axis in plan.mesh}
    p = plan.pipeline
    order = tuple(p.order) + tuple(n for n in ("pp", "dp", "ep", "cp", "tp") if n not in p.order)
    return Arrangement(
        p.ranks, sizes.get("data", 1), p.experts, sizes.get("context", 1), sizes.get("model", 1), p.chunks, p.schedule,
        p.microbatches, p.micro_batch, order, pools,
    )  # fmt: skip


def units_in(bench: Workbench, plan: Plan) -> tuple[list[int], list[Option]]:
    """(cuts, option of every unit) of a plan; raises PlanError naming what cannot be."""
    shape = shape_in(plan)
    _check_pipeline(bench, shape, plan)
    regions = {region.name: r for r, region in enumerate(bench.task.outline.regions)}
    for entry in plan.regions:
        if (entry.region or entry.name) not in regions:
            raise PlanError(f"region {entry.name}: the model has no such region; expected one of {', '.join(regions)}")
    owner = {entry.name: regions[entry.region or entry.name] for entry in plan.regions}
    entries = {entry.name: entry for entry in plan.regions}
    known: dict[tuple[str, int], Option] = {}

    def option(name: str, rank: int) -> Option:
        key = name, shape.pools[rank] if shape.pools else 0
        if key not in known:
            known[key] = _option(bench.on(shape, rank), bench, shape, entries[name], owner[name])
        return known[key]

    cuts: list[int] = [0]
    options: list[Option] = []
    for s, stage in enumerate(plan.stages):
        for run in stage.runs:
            for k in range(run.first, run.first + run.count):
                u = len(options)
                if u >= len(bench.chain) or bench.chain.units[u] != (owner[run.use], k):
                    raise PlanError(f"stages[{s}]: instance {k} of {run.use} does not come next in the model")
                options.append(option(run.use, stage.rank))
        cuts.append(len(options))
    if shape.schedule == "branches" and (problem := bench.forked.wrong(cuts)):
        raise PlanError(f"stages: {problem}")
    if len(options) != len(bench.chain):
        raise PlanError(f"stages: they hold {len(options)} of the model's {len(bench.chain)} units")
    return cuts, options


def _check_pipeline(bench: Workbench, shape: Arrangement, plan: Plan) -> None:
    """Raise PlanError where a plan's schedule cannot be made, or its stages lie on other ranks than the schedule puts them."""
    order = plan.pipeline.order
    if len(set(order)) < len(order) or not set(order) <= set(shape.sizes()):
        raise PlanError(f"pipeline.order: {_told(order)}; expected each axis once, of {', '.join(shape.sizes())}")
    if shape.pp == 1:
        return
    problem = fault(shape.schedule, shape.pp, shape.chunks, shape.microbatches)
    if problem:
        raise PlanError(f"pipeline.schedule: {problem}")
    for s, (stage, rank) in enumerate(zip(plan.stages, bench.ready(shape).placement, strict=True)):
        if stage.rank != rank:
            raise PlanError(f"stages[{s}].rank: {stage.rank}; {shape.schedule} has stage {s} on rank {rank}")


def _option(mine: Workbench, bench: Workbench, shape: Arrangement, entry: RegionPlan, r: int) -> Option:
    """The option of an entry on the bench of its devices.

    Raises PlanError where it is not possible, or where the entry says what does not follow from it.
    """
    outline = bench.task.outline
    part, region = bench.chain.parts[r], outline.regions[r]
    axes = [axis.role for axis in mesh_of(bench, shape)]
    model = axes.index("model") if "model" in axes else None
    choices = tuple(op.choice[model] if model is not None else "R" for op in entry.ops)
    named = {first: op.name for op, first in zip(part.outline.ops, region.instances[0], strict=True)}
    again: set[str] = set()
    copies: set[tuple[str, str]] = set()
    for name, arrow, state in (text.partition(" -> ") for text in entry.recompute):
        found = _tensor(name, named) if arrow else named.get(name, "")
        if found not in (part.outline.tensors if arrow else named.values()):
            raise PlanError(f"region {entry.name}.recompute: {name!r} is not in the region")
        if arrow:
            copies.add((found, state))
        else:
            again.add(found)
    for border in (entry.entry, entry.exit):
        if border not in ("R", "S"):
            raise PlanError(f"region {entry.name}: {border!r} at a border; expected R or S")
    design = Design(entry.entry, entry.exit, choices, frozenset(again), frozenset(copies))
    zero = max((p.zero for p in entry.parameters), default=0) or entry.borrowed_zero
    option = mine.option(r, shape, design, zero, "+".join(entry.offload))
    if option is None:
        raise PlanError(f"region {entry.name}: its choices, storage or offload are not possible on this mesh")
    _check_follows(entry, entry_of(bench, shape, entry.name, entry.region, entry.repeats, option))
    return option


def _check_follows(entry: RegionPlan, follows: RegionPlan) -> None:
    """Raise PlanError where an entry's other axes, results or storage are not what its choices on the model axis make of them."""
    for op, made in zip(entry.ops, follows.ops, strict=True):
        if (op.choice, op.result) != (made.choice, made.result):
            raise PlanError(
                f"region {entry.name}, op {op.op}: choice {_told(op.choice)} with result {_told(op.result)}; expected "
                f"choice {_told(made.choice)} with result {_told(made.result)}"
            )
    if entry.borrowed_zero != follows.borrowed_zero:
        raise PlanError(
            f"region {entry.name}.borrowed_zero: {entry.borrowed_zero}; its other parameters make that {follows.borrowed_zero}"
        )
    for mine, other in zip(entry.parameters, follows.parameters, strict=True):
        if (mine.home, mine.zero, mine.zero_axes) != (other.home, other.zero, other.zero_axes):
            raise PlanError(
                f"region {entry.name}, parameter {mine.names[0]}: home {_told(mine.home)}, zero={mine.zero} over "
                f"{_told(mine.zero_axes)}; the region's choices make that home {_told(other.home)}, zero={other.zero} over "
                f"{_told(other.zero_axes)}"
            )


def _told(words: Sequence[str]) -> str:
    return f"({', '.join(words)})"


def _tensor(name: str, ops: Mapping[str, str]) -> str:
    """A tensor's name with its op called as in another instance; results beyond the first are "op:1"."""
    op, colon, index = name.partition(":")
    return ops.get(op, op) + colon + index

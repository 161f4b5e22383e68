"""From an outline to a plan: search the shapes, assemble the plan, price edited plans again, solve for other inputs."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import ClusterError, PinError, PlanError
from .assign import Assignment, Storage
from .attention import GENERATIONS, byte_masks, fused_attention, math_attention
from .behind import lying
from .beside import as_found, beside, closely
from .capability import check_pins
from .cluster import Cluster, has_host, pool_names, unlike
from .costs import Costs, PriceBook, Shape
from .evaluate import Evaluation, Evaluator
from .fitting import fitting
from .fusedsaves import fused_saves
from .fusing import fusions
from .infeasible import explain
from .interval import step_interval
from .joint import search
from .losses import cast_loss
from .memory import Setting, facts
from .objectives import limited
from .onestage import NARROW, beyond_one_stage, explain_here, solve_here
from .outline import Outline
from .pins import Pins
from .plan import (
    VERSION,
    MeshAxis,
    OpPlan,
    ParameterPlan,
    Pipeline,
    Plan,
    Precision,
    Prediction,
    RegionPlan,
    Search,
    Source,
)  # fmt: skip
from .precision import RECIPES, sum_ratio
from .prices import Prices
from .progress import Progress, silent
from .relax import explain_joint
from .residual import residual_factors
from .search import Candidate, Found, Problem
from .search import Search as ShapeSearch
from .shapes import Arrangement, Room, arrangements, mesh_shapes
from .spell import plan_of
from .template import build, retyped
from .unitexperts import expert_sizes
from .unlike import UnlikeBench, pool_limits, pool_prices
from .updates import BACKWARD, STEP, pins_in_backward
from .work import FLOPS_KINDS
from .workbench import Task, Workbench


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: where the model comes from, how it is trained, the memory limit, and what is pinned."""

    source: Source
    optimizer: str
    precision: Precision
    memory_limit_bytes: int
    pins: Pins = field(default_factory=Pins)
    objective: str = "throughput"
    seed: int = 0
    progress: Progress = silent
    runnable: bool = False
    dropping: frozenset[str] = frozenset()


def solve(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Plan:
    """The best plan that fits. Raises Infeasible with the nearest settings that fit, PinError for impossible pins.

    The whole space is searched (planner/joint.py), or what the runtime executes of it where the plan is to be run.
    """
    if unlike(cluster) and request.runnable:
        raise ClusterError(
            f"{cluster.name}: plans over several kinds of devices are not executed yet; plan for one of "
            + " or ".join(pool_names(cluster))
        )
    if request.pins.update == BACKWARD:
        pins = pins_in_backward(
            request.pins, request.precision.compute, training=outline.training, runnable=request.runnable
        )
        request = replace(request, pins=pins)
    if not request.runnable:
        return solve_joint(outline, cluster, prices, request)
    check_pins(request.pins)
    early = request.pins.update == BACKWARD
    if beyond_one_stage(request.pins, training=outline.training):
        plan = solve_here(outline, cluster, prices, request)
        if plan is None:
            raise explain_here(outline, cluster, prices, request)
        return plan
    problem = make_problem(outline, cluster, prices, request)
    shapes = tuple(shape_of(cluster, d, t) for d, t in mesh_shapes(request.pins, cluster.devices, outline.batch))
    plan = _one_stage(problem, shapes, outline, cluster, request)
    if plan is None and outline.training and not early:
        plan = _wider(outline, cluster, prices, request)
    if plan is None:
        raise explain(problem, shapes, request.progress)
    return plan


CLOSER = 6
"""Searches at most, each allowed less than the one before, until what is found, counted closely, is within the limit."""


def _one_stage(
    problem: Problem, shapes: tuple[Shape, ...], outline: Outline, cluster: Cluster, request: Request
) -> Plan | None:  # fmt: skip
    """The fastest plan of one plain stage within the limit; None where there is none.

    A search counts a little less closely than its plan is counted in the end. The bound is that of the first search, which is
    allowed the most.
    """
    limit = asked = request.memory_limit_bytes
    bound: float | None = None
    for _ in range(CLOSER):
        found = ShapeSearch(replace(problem, limit=asked), shapes, request.progress).run()
        if found.best is None:
            return None
        bound = found.bound if bound is None else bound
        plan = _plan(outline, cluster, request, replace(found, bound=bound), found.best)
        if plan.predicted.peak_bytes_per_device <= limit:
            return plan
        asked = math.floor(asked * limit / plan.predicted.peak_bytes_per_device)
    return None


def _wider(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Plan | None:
    """A plan of the dimensions that one plain stage leaves out; None where they help nothing."""
    try:
        return solve_here(outline, cluster, prices, request)
    except PinError:
        return None


def one_kind(cluster: Cluster, what: str) -> None:
    """Raise ClusterError where `what` is asked of a cluster of several kinds of devices."""
    if unlike(cluster):
        raise ClusterError(
            f"{cluster.name}: {what} is not supported yet for several kinds of devices; use the objective throughput, or one of "
            + " or ".join(pool_names(cluster))
        )


def solve_joint(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Plan:
    """The best plan of the whole space; raises Infeasible where nothing fits."""
    plan = search_joint(outline, cluster, prices, request)
    if plan is None:
        raise explain_joint(outline, cluster, prices, request)
    return plan


def search_joint(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Plan | None:
    """The same, None where nothing fits."""
    made, shapes = make_bench(outline, cluster, prices, request, tiers=False)

    def within(limit: int) -> Plan | None:
        under = made if limit == request.memory_limit_bytes else limited(made, limit)
        bench, found = search(under, shapes, request.progress, tiers_of(cluster, request.pins))
        return None if found.best is None else plan_of(bench, found, found.best, request, outline, limit)

    return fitting(within, request.memory_limit_bytes)


def make_bench(
    outline: Outline, cluster: Cluster, prices: PriceBook, request: Request, *, tiers: bool
) -> tuple[Workbench, tuple[Arrangement, ...]]:
    """The joint search's prices and shapes; `tiers` offers the host memory and disk of the cluster."""
    bench = workbench(make_task(outline, cluster, prices, request), request.progress, tiers=tiers)
    experts = expert_sizes(bench.task.outline, cluster.devices)
    training = outline.training
    room = Room(
        len(bench.chain), outline.batch, training, outline.microbatch_blockers, experts, training, bench.forked.worth
    )
    return bench, arrangements(cluster, room, request.pins)


def workbench(
    task: Task, progress: Progress, *, tiers: bool, limits: Mapping[str, int] | None = None
) -> Workbench:  # fmt: skip
    """The bench of a task; on unlike devices one with a bench for every pool, whose `limits` in bytes may be given by name."""
    cluster = task.cluster
    if not unlike(cluster):
        return Workbench(task, progress, tiers=tiers)
    known = dict(zip(pool_names(cluster), pool_limits(cluster, task.limit_bytes), strict=True)) | dict(limits or {})
    mine = []
    for name, pool in zip(pool_names(cluster), cluster.pools, strict=True):
        part = cluster.sub(pool)
        setting = _setting(part, task.setting.precision, task.setting.optimizer)
        prices = pool_prices(task.prices, part)
        mine.append(replace(task, cluster=part, prices=prices, setting=setting, limit_bytes=known[name]))
    return UnlikeBench(task, mine, progress, tiers=tiers)


def tiers_of(cluster: Cluster, pins: Pins) -> tuple[bool, ...]:
    """Whether each search offers the host: none does, only one that does where something is pinned there, or both in turn."""
    if pins.offload not in (None, "none"):
        return (True,)
    return (False,) if pins.offload == "none" or not has_host(cluster) else (False, True)


def make_task(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Task:
    """The joint search's task: the outline at its compute dtype, with the attention kernels that are asked for."""
    ready = retyped(outline, request.precision.compute)
    if request.pins.attention == "math":
        ready = byte_masks(math_attention(ready, request.dropping))
    elif cluster.device.kind == "gpu":
        ready = byte_masks(fused_attention(ready))
    ready = cast_loss(ready, request.pins.loss or "float")
    if request.pins.kernels == "fused":
        ready = fused_saves(ready)
    setting = _setting(cluster, request.precision, request.optimizer)
    mine = _by_stack(prices, ready, request)
    return Task(ready, cluster, mine, request.pins, setting, request.memory_limit_bytes, request.runnable)


def _by_stack(prices: PriceBook, outline: Outline, request: Request) -> PriceBook:
    """Prices under the software that is asked for: attention kernels, fused kernels, products in 8 bits."""
    recipe = RECIPES.get(request.precision.recipe)
    if not isinstance(prices, Prices):
        return prices
    return replace(
        prices, products=recipe.products if recipe is not None else "",
        fused=fusions(outline) if request.pins.kernels == "fused" else {},
        attention=GENERATIONS.get(request.pins.attention or "flash", "attention"), pieces=bool(request.pins.tp_overlap),
    )  # fmt: skip


def make_problem(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Problem:
    """The search problem of a request."""
    ready = retyped(outline, request.precision.compute)
    setting = _setting(cluster, request.precision, request.optimizer, request.pins.update or STEP)
    residual = residual_factors(ready)
    return Problem(ready, facts(ready), prices, request.pins, setting, request.memory_limit_bytes, residual=residual)


def _setting(cluster: Cluster, precision: Precision, optimizer: str, update: str = STEP) -> Setting:
    gpu = cluster.device.kind == "gpu"
    return Setting(
        precision, optimizer, cluster.device.context_bytes, foreach=gpu,
        staged=not gpu, unfolds=not gpu,
        early=update == BACKWARD,
    )  # fmt: skip


def shape_of(cluster: Cluster, data: int, model: int) -> Shape:
    """The mesh of `data` x `model` ranks; axes of one rank are left out (a single device keeps one data axis)."""
    axes = []
    if data > 1 or model == 1:
        axes.append(MeshAxis("dp", data, "data", cluster.level_of(model, data).name))
    if model > 1:
        axes.append(MeshAxis("tp", model, "model", cluster.level_of(1, model).name))
    return Shape(tuple(axes))


def solve_fixed(
    outline: Outline,
    prices: PriceBook,
    axes: tuple[MeshAxis, ...],
    storage: Mapping[str, Storage],
    precision: Precision,
) -> dict[str, tuple[str, ...]]:
    """Choices by op name for an outline whose parameters (by tensor) are stored already; no memory limit."""
    ready = retyped(outline, precision.compute)
    problem = Problem(ready, facts(ready), prices, Pins(), Setting(precision, "sgd"), None)
    candidate = Candidate(problem, Shape(axes), 1, storage)
    candidate.advance()
    if candidate.solution is None or candidate.solution.choice is None:
        raise PlanError("these inputs cannot be placed on the plan's mesh with its parameters where they are")
    return dict(candidate.assignment(candidate.solution.choice).choices)


def evaluated(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook, assignment: Assignment) -> Evaluation:
    """What a plan of one stage comes to, op by op; raises PlanError where a choice is not possible."""
    ready = retyped(outline, plan.precision.compute)
    costs = Costs(prices, Shape(plan.mesh), bool(outline.loss), summed=sum_ratio(plan.precision))
    setting = closely(beside(_setting(cluster, plan.precision, plan.optimizer, plan.update), plan.overlap))
    evaluator = Evaluator(build(ready, plan.pipeline.microbatches), facts(ready), costs, setting)
    try:
        behind = lying(plan, outline) if any(region.offload for region in plan.regions) else None
        return evaluator.evaluate(assignment, behind)
    except ValueError as error:
        raise PlanError(f"the edited plan is not legal: {error}") from None


def predict(
    outline: Outline, cluster: Cluster, precision: Precision, evaluation: Evaluation, devices: int,
    sources: Mapping[str, str], error: float,
) -> Prediction:  # fmt: skip
    """The figures a plan reports."""
    seconds = evaluation.step_seconds
    low, high = step_interval(cluster, seconds)
    flops = sum(op.flops + op.backward_flops for op in outline.ops if op.kind in FLOPS_KINDS)
    return Prediction(
        step_seconds=seconds,
        tokens_per_second_per_device=outline.tokens / seconds / devices if seconds else 0.0,
        mfu=flops / seconds / devices / cluster.device.peak(precision.compute) if seconds else 0.0,
        peak_bytes_per_device=evaluation.peak_bytes,
        memory=dict(evaluation.memory),
        seconds=dict(evaluation.seconds),
        traffic=evaluation.traffic,
        sources=dict(sources),
        error=error,
        step_seconds_low=low,
        step_seconds_high=high,
    )


def _plan(outline: Outline, cluster: Cluster, request: Request, found: Found, best: Candidate) -> Plan:
    assert best.evaluation is not None
    overlap, evaluation = as_found(best, request.memory_limit_bytes, request.objective)
    costs = best.space.costs
    sources = {cause: " and ".join(sorted(known)) for cause, known in costs.sources.items() if known}
    errors = [e for known in costs.sources.values() for e in known.values()]
    predicted = predict(
        outline, cluster, request.precision, evaluation, best.shape.devices, sources, max(errors, default=0.0)
    )
    data = best.shape.axis("data")
    local = outline.batch // (best.shape.sizes[data] if data is not None else 1)
    bound = min(found.bound, evaluation.step_seconds)
    gap = (evaluation.step_seconds - bound) / evaluation.step_seconds if evaluation.step_seconds else 0.0
    solved = [r for r in found.records if r.status == "solved"]
    return Plan(
        version=VERSION, source=request.source, graph=outline.fingerprint, cluster=cluster.to_dict(),
        cluster_fingerprint=cluster.fingerprint(), objective=request.objective, optimizer=request.optimizer,
        precision=request.precision, semantics="EXACT", mesh=best.shape.axes,
        pipeline=Pipeline(microbatches=best.m, micro_batch=local // best.m), regions=_regions(outline, best),
        memory_limit_bytes=request.memory_limit_bytes, predicted=predicted,
        search=Search(
            bound, gap, tuple(found.records), solver=f"ortools {importlib.metadata.version('ortools')} HiGHS", given_up=(NARROW,)
        ),
        pins=request.pins.texts, runners_up=tuple(solved[1:4]), notes=outline.notes, overlap=overlap,
        update=request.pins.update or STEP,
    )  # fmt: skip


def _regions(outline: Outline, best: Candidate) -> tuple[RegionPlan, ...]:
    choice, space, template = best.chosen, best.space, best.template
    names = best.shape.names
    ops: list[list[OpPlan]] = [[] for _ in outline.regions]
    for v, item in enumerate(template.ops):
        strategy = space.strategies[v][choice.strategies[v]]
        result = tuple(str(s) for s in strategy.results[0]) if strategy.results else ()
        ops[item.region].append(OpPlan(item.op.name, item.op.target, strategy.choice, result))
    parameters: list[list[ParameterPlan]] = [[] for _ in outline.regions]
    for w, found in enumerate(template.parameters):
        option = space.options[w][choice.options[w]]
        parameters[found.region].append(
            ParameterPlan(
                found.parameter.names, tuple(str(s) for s in option.home), option.zero,
                tuple(names[a] for a in option.zero_axes), found.parameter.trainable,
            )
        )  # fmt: skip
    return tuple(
        RegionPlan(region.name, region.repeats, tuple(ops[r]), tuple(parameters[r]))
        for r, region in enumerate(outline.regions)
    )

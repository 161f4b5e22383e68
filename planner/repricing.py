"""Plans that were changed by hand, priced again: legal edits get new figures and no certificate."""

from __future__ import annotations

import msgspec

from ..errors import Infeasible, PlanError
from .appraise import appraise
from .appraise import predict as predict_joint
from .assign import Assignment, assign
from .cluster import Cluster, has_host
from .costs import PriceBook, Shape
from .counted import with_counts
from .fitting import within_limit
from .legal import check_choices
from .objectives import housed
from .onestage import COUNTED, recounted
from .outline import Outline
from .pins import parse_pins
from .plan import Plan, Search
from .plancheck import first_problem
from .progress import silent
from .solve import Request, evaluated, make_task, predict, workbench
from .spell import grounds, shape_in, stages_of, units_in
from .workbench import Workbench


def reprice(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook) -> Plan:
    """An edited plan, checked and priced again, without a certificate.

    Raises PlanError naming the first illegal choice or placement, Infeasible where it breaks its memory limit.
    """
    return within_limit(priced_anew(plan, outline, cluster, prices))


def priced_anew(
    plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook, bench: Workbench | None = None
) -> Plan:  # fmt: skip
    """The same, whatever its memory limit; a `bench` that was made for the plan (`bench_of`) spares making another."""
    if plan.stages:
        return _joint(plan, outline, cluster, prices, bench or bench_of(plan, outline, cluster, prices))
    assignment = assign(plan, outline)
    shape = Shape(plan.mesh)
    check_choices(outline, assignment, shape.sizes)
    _check_roles(outline, assignment, shape)
    evaluation = evaluated(plan, outline, cluster, prices, assignment)
    predicted = predict(
        outline, cluster, plan.precision, evaluation, shape.devices, plan.predicted.sources, plan.predicted.error
    )
    search = Search(0.0, 1.0, plan.search.shapes, solver=plan.search.solver, given_up=("edited: no certificate",))
    return msgspec.structs.replace(plan, predicted=predicted, search=search, edited=True)


def _joint(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook, bench: Workbench) -> Plan:
    """As `priced_anew`, for a plan of the joint search; raises Infeasible where host memory or disk do not hold it."""
    problem = first_problem(plan)
    if problem is not None:
        raise PlanError(problem)
    assignment = assign(plan, outline)
    shape = shape_in(plan)
    check_choices(bench.task.outline, assignment, Shape(plan.mesh).sizes)
    cuts, options = units_in(bench, plan)
    figures = appraise(bench, shape, cuts, options)
    if not housed(bench, shape, cuts, options):
        raise Infeasible("the edited plan offloads more than a rank's share of host memory and disk", cause="offload")
    op_by_op = (COUNTED,) if COUNTED in plan.search.given_up else ()
    given_up = ("edited: no certificate", *op_by_op)
    search = Search(0.0, 1.0, plan.search.shapes, solver=plan.search.solver, given_up=given_up)
    predicted, stages = predict_joint(bench, shape, figures), stages_of(figures, plan.stages)
    priced = msgspec.structs.replace(
        plan, predicted=predicted, stages=stages, search=search, memory_limit_bytes=figures.limit_bytes, edited=True
    )
    if op_by_op:
        return recounted(priced, outline, cluster, prices)
    return with_counts(priced, bench.task.outline, cluster, grounds(bench, shape), edited=True)


def bench_of(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook) -> Workbench:
    """The prices that the joint search had when it made a plan."""
    request = Request(plan.source, plan.optimizer, plan.precision, plan.memory_limit_bytes, parse_pins(plan.pins))
    limits = {pool.name: pool.memory_limit_bytes for pool in plan.pools}
    return workbench(make_task(outline, cluster, prices, request), silent, tiers=has_host(cluster), limits=limits)


def _check_roles(outline: Outline, assignment: Assignment, shape: Shape) -> None:
    """A data axis splits the batch only; ZeRO chunks a dim 0 that its axis does not split already."""
    for op in outline.ops:
        factors = {f.name: f for f in op.factors}
        for axis, choice in zip(shape.axes, assignment.choices[op.name], strict=True):
            if axis.role == "data" and axis.size > 1 and choice in factors and not factors[choice].batch:
                raise PlanError(f"op {op.name}: {choice} is not the batch, and axis {axis.name} splits the batch only")
    for name, storage in assignment.storage.items():
        for a in storage.zero_axes:
            if storage.home[a].is_split:
                raise PlanError(
                    f"parameter {name}: zero_axes has {shape.names[a]}, which splits it already ({storage.home[a]})"
                )
        if storage.zero and not outline.tensors[name].dims:
            raise PlanError(f"parameter {name}: zero={storage.zero}, but a parameter without dims cannot be chunked")

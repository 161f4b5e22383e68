"""Put a plan onto a module: capture, check that they agree, lower on demand, distribute the parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import nn

from ..errors import LaunchError, PlanMismatch, UsageError
from ..passes import lowerings
from ..passes.choose import listed
from ..passes.prepare import cast_inputs, in_dtype, other_dtypes, prepare, prepare_bare
from ..passes.skeleton import skeleton
from ..passes.summarize import Summary
from ..planner.around import choices_around
from ..planner.assign import Assignment, Storage, assign, transfer
from ..planner.capability import check_plan
from ..planner.cluster import Cluster
from ..planner.dispatch import expert_stacks, spread_experts
from ..planner.legal import check_choices
from ..planner.outline import Outline
from ..planner.plan import MeshAxis, Plan, Precision
from ..planner.planfile import dump_plan, parse_plan
from ..planner.prices import Prices
from ..planner.schedules import SCHEDULES
from ..planner.solve import solve_fixed
from .mesh import Mesh, check_world, rank, world_size
from .module import ParallelModule
from .offload.engine import offloader
from .programs import Programs, signature
from .ranks import everywhere, from_first
from .staged import Stages, stages_of
from .watch import waiting


def apply(
    model: nn.Module, args: Any, kwargs: Any, plan: Plan, *, compile: bool = False,
    loss_fn: Callable[..., Any] | None = None, device: torch.device | str | None = None, data: str = "global",
    exact: str | None = None, offload_folder: Path | None = None,
) -> ParallelModule:  # fmt: skip
    """`api.apply_plan` with split inputs.

    `exact` is for verification: everything is computed in that dtype instead of the plan's, with dropout off and, in
    float64, the float32 casts inside the model lifted.
    """
    if data not in ("global", "local"):
        raise UsageError(f'data={data!r}: pass "global" or "local"')
    check_plan(plan, training=False)
    check_world(plan.mesh, plan.pipeline.ranks)
    if compile and plan.pipeline.experts > 1:
        raise UsageError(
            "expert parallelism sends uneven numbers of tokens, which a compiled graph cannot: use compile=False"
        )
    if compile and SCHEDULES[plan.pipeline.schedule].splits_backward:
        raise UsageError(
            f"schedule {plan.pipeline.schedule} splits the backward pass, which a compiled graph does not: use compile=False, "
            "or plan with --pin schedule=1f1b"
        )
    compute = exact or plan.precision.compute
    others = other_dtypes(model, compute) if exact is None else FLOATING

    def matched() -> tuple[_Matched, Stages | None]:
        if exact is not None:
            found = _exact(model, args, kwargs, plan, exact, loss_fn)
        else:
            summary = prepare(model, args, kwargs, compute, loss_fn=loss_fn, choice=listed(plan))
            spread = spread_experts(plan, expert_stacks(summary.outline))
            found = summary, agreed(spread, summary), spread, summary.outline
        return found, stages_of(found[2], found[3])

    (summary, own, plan, planned), stages = everywhere(matched, "apply the plan", PlanMismatch)
    check_plan(plan, training=summary.outline.training)
    where = torch.device(device) if device is not None else default_device()
    lowerings.check(plan, where)
    mesh = Mesh.create(plan.mesh, where, plan.pipeline)
    if exact is not None:
        plan = msgspec.structs.replace(plan, precision=Precision(exact, exact, exact, exact, exact))
    args, kwargs = cast_inputs((args, kwargs), others, compute)
    offload = offloader(plan, planned, summary.outline, own, mesh, offload_folder, compile=compile)
    programs = Programs(
        in_dtype(skeleton(model), compute), plan, summary, own, mesh, resolver(plan), compile=compile, loss_fn=loss_fn,
        local_batch=data == "local", exact=exact is not None, others=others,
        example=signature(args, kwargs, train=model.training, grad=True), stages=stages, offload=offload,
    )  # fmt: skip
    return ParallelModule.of(model, programs, mesh, seed=shared_seed(plan.source.seed))


_Matched = tuple[Summary, Assignment, Plan, Outline]
"""A graph, the plan's choices on it, the plan with its experts on an axis of their own, and the outline that it is for."""

FLOATING = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})


def agreed(plan: Plan, summary: Summary) -> Assignment:
    """The plan's choices for the graph it was made for; raises PlanMismatch for another, PlanError for illegal choices."""
    own = assign(plan, summary.outline)
    if summary.outline.fingerprint != plan.graph:
        wanted, found = plan.source.batch, summary.outline.batch
        sizes = f"a batch of {wanted}, the inputs have {found}" if wanted != found else "other sizes or dtypes"
        raise PlanMismatch(
            f"the model has the plan's ops and parameters, but the plan is for {sizes}: plan again, or pass the model, batch "
            "and sequence it was made for"
        )
    check_choices(summary.outline, own, tuple(axis.size for axis in plan.mesh))
    return own


def _exact(
    model: nn.Module, args: Any, kwargs: Any, plan: Plan, exact: str, loss_fn: Callable[..., Any] | None
) -> _Matched:
    """The graph in the dtype of verification, and the plan's choices on it: casts of the plan's own dtype are not in it."""
    args_then, kwargs_then = cast_inputs((args, kwargs), FLOATING, exact)
    bare = in_dtype(skeleton(model), exact)
    summary = prepare_bare(bare, args_then, kwargs_then, loss_fn=loss_fn, lift=exact == "float64", choice=listed(plan))
    plan = spread_experts(plan, expert_stacks(summary.outline))
    if summary.outline.fingerprint == plan.graph:
        return summary, agreed(plan, summary), plan, summary.outline
    own = prepare(model, args, kwargs, plan.precision.compute, loss_fn=loss_fn, choice=listed(plan))
    choices = transfer(agreed(plan, own), own.outline, summary.outline)
    return summary, choices, plan, own.outline


def resolver(plan: Plan) -> Callable[[Outline, Mapping[str, Storage]], Mapping[str, tuple[str, ...]]]:
    """Choices for graphs of other shapes or modes: the same solve, with the parameters where the plan has them."""

    def resolve(outline: Outline, storage: Mapping[str, Storage]) -> Mapping[str, tuple[str, ...]]:
        prices = Prices(Cluster.from_dict(plan.cluster), plan.precision.compute)

        def solved(axes: tuple[MeshAxis, ...], stored: Mapping[str, Storage]) -> Mapping[str, tuple[str, ...]]:
            return solve_fixed(outline, prices, axes, stored, plan.precision)

        return choices_around(outline, plan.mesh, storage, solved)

    return resolve


def default_device() -> torch.device:
    """This process's GPU where torch sees one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def agree(decide: Callable[[], Plan]) -> Plan:
    """The plan that rank 0 decides on, on every rank; an error there is raised on all."""
    if world_size() == 1:
        return decide()
    box: list[Any] = [None]
    if rank() == 0:
        try:
            box = [dump_plan(decide())]
        except Exception as error:
            box = [(f"{type(error).__name__}: {error}",)]
            dist.broadcast_object_list(box, 0)
            raise
    with waiting("broadcast of the plan"):
        dist.broadcast_object_list(box, 0)
    if isinstance(box[0], tuple):
        raise LaunchError(f"rank 0 could not make the plan: {box[0][0]}")
    return parse_plan(box[0], "the plan rank 0 sent")


def shared_seed(seed: int) -> int:
    """A seed for random ops, equal on all ranks: rank 0's torch seed and the plan's."""
    return from_first(torch.initial_seed() % (1 << 31) + seed)

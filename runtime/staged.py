"""A program cut into the virtual stages of a pipeline: what this rank has of it, and the list of what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import PinError, PlanError, UsageError
from ..passes.lowered import Emit, Lowered
from ..passes.stages import Borders, borders, lower_stage
from ..passes.summarize import Summary
from ..planner.assign import Assignment
from ..planner.exchanges import Step, with_messages
from ..planner.outline import Outline
from ..planner.placement import shape_of
from ..planner.plan import Plan
from ..planner.schedules import actions, forwards, stage_rank
from ..planner.staging import Staging, cut, holders_of, stages_by_parameters, stages_by_runs
from .mesh import Mesh


@dataclass(frozen=True)
class Stages:
    """The plan's virtual stages: their pipeline ranks, the layout of what leaves them, who holds each parameter (by name)."""

    plan: Plan
    rank_of: tuple[int, ...]
    layouts: tuple[str, ...]
    holders: Mapping[str, tuple[int, ...]]

    def ranks_of(self, name: str) -> tuple[int, ...]:
        """Pipeline ranks that hold a parameter; one that the plan's graph does not use is on all."""
        if name not in self.holders:
            return tuple(range(self.plan.pipeline.ranks))
        return tuple(sorted({self.rank_of[s] for s in self.holders[name]}))

    def cut(self, outline: Outline, results: Sequence[str]) -> Staging:
        """The stages of a graph: the plan's own, or another of the same model."""
        if outline.fingerprint == self.plan.graph:
            where = stages_by_runs(self.plan, outline)
        else:
            where = stages_by_parameters(outline, self.holders)
        return cut(outline, where, len(self.rank_of), results)


def stages_of(plan: Plan, outline: Outline) -> Stages | None:
    """The stages of a plan with a pipeline, None without one; `outline` is the plan's graph.

    Raises PlanError where the stages are not those that the schedule runs.
    """
    pipeline = plan.pipeline
    if pipeline.ranks == 1:
        return None
    rank_of = tuple(stage.rank for stage in plan.stages)
    wanted = stage_rank(pipeline.schedule, pipeline.ranks, pipeline.chunks)
    if rank_of != wanted:
        raise PlanError(f"stages: on ranks {list(rank_of)}; schedule {pipeline.schedule} has them on {list(wanted)}")
    exits = {entry.name: entry.exit for entry in plan.regions}
    layouts = tuple(exits[stage.runs[-1].use] if stage.runs else "R" for stage in plan.stages)
    results = [name for name in (outline.loss, *outline.outputs) if name]
    staging = cut(outline, stages_by_runs(plan, outline), len(rank_of), results)
    return Stages(plan, rank_of, layouts, holders_of(outline, staging))


@dataclass(frozen=True)
class Result:
    """A result of a forward pass: the pipeline rank that has it, its whole shape and dtype."""

    rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Staged:
    """What one rank runs of a program with stages.

    `own` are the graphs of its stages and `gives` the names of what each body returns first; `steps` is its list of actions, sends
    and receives. `ties` are trained parameters that several pipeline ranks hold, with the group of those ranks.
    """

    own: Mapping[int, Lowered]
    gives: Mapping[int, tuple[str, ...]]
    borders: Borders
    steps: tuple[Step, ...]
    rank_of: tuple[int, ...]
    loss: Result | None
    loss_stage: int
    results: Mapping[str, Result]
    ties: tuple[tuple[str, str], ...]
    parameters: frozenset[str]

    @property
    def first(self) -> Lowered:
        """The graphs of this rank's first stage."""
        return self.own[min(self.own)]

    def sources(self, stage: int) -> tuple[int, ...]:
        """Stages that a stage reads from."""
        return tuple(s for s, t in self.borders.edges if t == stage)

    def targets(self, stage: int) -> tuple[int, ...]:
        """Stages that read from a stage."""
        return tuple(t for s, t in self.borders.edges if s == stage)


def build(
    stages: Stages, summary: Summary, assignment: Assignment, mesh: Mesh, emit: Emit, *, microbatches: int, training: bool,
    results: Sequence[str], local_batch: bool,
) -> Staged:  # fmt: skip
    """Cut and lower a program for this rank. Every rank calls it at the same time: tied parameters may need new groups."""
    outline, pipeline = summary.outline, stages.plan.pipeline
    wanted = tuple(dict.fromkeys((*([outline.loss] if training else []), *results)))
    staging = stages.cut(outline, wanted)
    crossing = borders(summary, assignment, staging, mesh.axes, stages.layouts, microbatches=microbatches)
    try:
        lists = (
            actions(pipeline.schedule, pipeline.ranks, pipeline.chunks, microbatches)
            if training
            else forwards(stages.rank_of, microbatches)
        )
    except PinError as error:
        raise UsageError(f"a batch of {outline.batch} makes {microbatches} microbatches: {error}") from None
    back = {edge: training and bool(crossing.returning(*edge)) for edge in crossing.edges}
    steps = with_messages(lists, stages.rank_of, back)[mesh.stage]
    mine = [s for s, r in enumerate(stages.rank_of) if r == mesh.stage]
    own = {
        s: lower_stage(
            summary, assignment, staging, s, crossing, mesh.sizes, emit,
            microbatches=microbatches, looped=training, local_batch=local_batch,
        )
        for s in mine
    }  # fmt: skip
    gives = {s: tuple(dict.fromkeys(c.tensor for c in staging.parts[s].gives)) for s in mine}
    found = {
        name: Result(
            stages.rank_of[staging.home(name)],
            shape_of(outline.tensors[name].dims),
            getattr(torch, outline.tensors[name].dtype),
        )
        for name in wanted
    }
    ties = _ties(stages, outline, staging, mesh) if training else ()
    used = {name for s in mine for name in staging.parts[s].parameters} | {name for name, group in ties if group}
    return Staged(
        own, gives, crossing, steps, stages.rank_of, found[outline.loss] if training else None,
        staging.home(outline.loss) if training else -1, {name: found[name] for name in results}, ties, frozenset(used),
    )  # fmt: skip


def _ties(stages: Stages, outline: Outline, staging: Staging, mesh: Mesh) -> tuple[tuple[str, str], ...]:
    """Trained parameters that several pipeline ranks hold, in one order on all ranks; the group is "" elsewhere.

    A rank may hold a parameter that only its other programs use: its gradient must be equal there, too.
    """
    found = []
    for parameter in outline.parameters:
        if not (parameter.trainable and outline.tensors[parameter.tensor].differentiable):
            continue
        ranks = stages.ranks_of(parameter.names[0])
        users = {stages.rank_of[s] for s in staging.holders.get(parameter.tensor, ())}
        if len(ranks) > 1 and users:
            found.append((parameter.tensor, mesh.pipeline_group(ranks)))
    return tuple(found)

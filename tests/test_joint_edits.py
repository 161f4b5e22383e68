"""Plans of the joint search that somebody edited: priced again, or refused by the place of what is illegal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from jointplans import (
    again,
    attending,
    made,
    model,
    replaced,
    ringed,
    two_stages,
)
from shardwright.errors import Infeasible, PlanError
from shardwright.planner.assign import assign
from shardwright.planner.plan import Plan, StagePlan
from shardwright.planner.planfile import dump_plan, parse_plan


def moved(plan: Plan) -> Plan:
    """The first border moved by one instance of the region that lies on both sides of it."""
    one, two = plan.stages[:2]
    last, first = one.runs[-1], two.runs[0]
    assert last.use == first.use
    if last.count > 1:
        runs = (*one.runs[:-1], replaced(last, count=last.count - 1))
        others = (replaced(first, first=first.first - 1, count=first.count + 1), *two.runs[1:])
    else:
        runs = (*one.runs[:-1], replaced(last, count=last.count + 1))
        others = (replaced(first, first=first.first + 1, count=first.count - 1), *two.runs[1:])
    return replaced(plan, stages=(replaced(one, runs=runs), replaced(two, runs=others), *plan.stages[2:]))


@pytest.mark.parametrize(
    "pins",
    [
        (), ("pp=2", "vpp=2", "schedule=interleaved"), ("tp=2", "sequence_parallel=on"), ("zero=3",),
        ("recompute=full",), ("recompute=selective", "tp=2"), ("offload=optimizer",), ("offload=activations",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_an_unchanged_plan_is_priced_as_it_was(pins: tuple[str, ...]) -> None:
    plan = parse_plan(dump_plan(made(*pins)))
    same = again(plan, model())
    assert same.edited
    assert same.predicted.step_seconds == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    assert same.predicted.peak_bytes_per_device == pytest.approx(plan.predicted.peak_bytes_per_device, rel=1e-9)
    assert same.stages == plan.stages
    assert (same.search.bound_seconds, same.search.gap) == (0.0, 1.0)
    check_file = parse_plan(dump_plan(same))
    assert check_file.edited


def test_context_plans_are_priced_again() -> None:
    plan = ringed()
    same = again(plan, attending())
    assert same.predicted.step_seconds == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    assert same.predicted.peak_bytes_per_device == pytest.approx(plan.predicted.peak_bytes_per_device, rel=1e-9)


def test_a_moved_border_is_priced() -> None:
    plan = again(moved(two_stages()), model())
    assert plan.edited
    assert plan.predicted.step_seconds > two_stages().predicted.step_seconds
    assert plan.stages[0].forward_seconds != two_stages().stages[0].forward_seconds
    assign(plan, model())


def test_recompute_taken_out_is_faster_and_larger() -> None:
    regions = tuple(replaced(r, recompute=()) for r in two_stages().regions)
    plan = again(replaced(two_stages(), regions=regions), model())
    assert plan.predicted.step_seconds < two_stages().predicted.step_seconds
    assert plan.predicted.peak_bytes_per_device > two_stages().predicted.peak_bytes_per_device


def test_an_edit_above_the_limit_is_refused() -> None:
    peak = two_stages().predicted.peak_bytes_per_device
    regions = tuple(replaced(r, recompute=()) for r in two_stages().regions)
    with pytest.raises(Infeasible, match="the edited plan needs"):
        again(replaced(two_stages(), regions=regions, memory_limit_bytes=peak), model())


def _stage(plan: Plan, s: int, **fields: object) -> tuple[StagePlan, ...]:
    return tuple(replaced(stage, **fields) if i == s else stage for i, stage in enumerate(plan.stages))


def _layers(plan: Plan, **fields: object) -> Plan:
    return replaced(plan, regions=tuple(replaced(r, **fields) if r.repeats > 1 else r for r in plan.regions))


def _first_op(plan: Plan, choice: tuple[str, ...]) -> Plan:
    ops = next(r.ops for r in plan.regions if r.repeats > 1)
    return _layers(plan, ops=(replaced(ops[0], choice=choice), *ops[1:]))


def _first_parameter(plan: Plan, **fields: object) -> Plan:
    parameters = next(r.parameters for r in plan.regions if r.repeats > 1)
    return _layers(plan, parameters=(replaced(parameters[0], **fields), *parameters[1:]))


ILLEGAL: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "an op is not there": (lambda p: _layers(p, recompute=("l0.nothing",)), "l0.nothing"),
    "a copy is not there": (lambda p: _layers(p, recompute=("l0.nothing -> R",)), "l0.nothing"),
    "no such choice": (lambda p: _first_op(p, ("zz",) * len(p.mesh)), "l0.norm_n1"),
    "data axis whole": (lambda p: _first_op(p, ("R",) * len(p.mesh)), "l0.norm_n1"),
    "home": (lambda p: _first_parameter(p, home=("S(0)",) * len(p.mesh)), "l0.n1"),
    "zero": (lambda p: _first_parameter(p, zero=0, zero_axes=()), "l0.n1"),
    "offload": (lambda p: _layers(p, offload=("nowhere",)), "region r1"),
    "entry": (lambda p: _layers(p, entry="X"), "region r1"),
    "region": (lambda p: replaced(p, regions=(replaced(p.regions[0], name="other"), *p.regions[1:])), "other|r0"),
    "schedule": (lambda p: replaced(p, pipeline=replaced(p.pipeline, schedule="zbv")), "pipeline.schedule"),
    "no schedule": (lambda p: replaced(p, pipeline=replaced(p.pipeline, schedule="none")), "pipeline.schedule"),
    "chunks": (lambda p: replaced(p, pipeline=replaced(p.pipeline, chunks=2)), "pipeline.stages"),
    "microbatches": (lambda p: replaced(p, pipeline=replaced(p.pipeline, microbatches=3)), "pipeline: 3 microbatches"),
    "rank": (lambda p: replaced(p, stages=_stage(p, 1, rank=0)), r"stages\[1\].rank"),
    "twice": (lambda p: replaced(p, stages=(p.stages[0], p.stages[0])), "stages"),
    "order": (lambda p: replaced(p, stages=_stage(p, 0, runs=p.stages[0].runs[::-1])), r"stages\[0\]"),
    "axis order": (lambda p: replaced(p, pipeline=replaced(p.pipeline, order=("xx",))), "order"),
}


@pytest.mark.parametrize("edit", ILLEGAL)
def test_an_illegal_edit_names_its_place(edit: str) -> None:
    change, named = ILLEGAL[edit]
    with pytest.raises(PlanError, match=named):
        again(change(two_stages()), model())

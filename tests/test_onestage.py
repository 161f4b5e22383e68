"""Plans that recompute and run here: found under pins and limits, counted op by op, read back, refused where they cannot be."""

from __future__ import annotations

import functools

import msgspec
import pytest
from shardwright.errors import Infeasible, PlanError
from shardwright.planner.assign import assign
from shardwright.planner.capability import check_plan
from shardwright.planner.onestage import COUNTED
from shardwright.planner.outline import Outline
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan
from shardwright.planner.remake import Again
from shardwright.planner.solve import Request, evaluated, reprice, solve
from solver_outlines import FP32, SOURCE, FakePrices, transformer
from test_region import cluster

PLENTY = 10**9


@functools.cache
def plan_of(devices: int, pins: tuple[str, ...] = (), limit: int = PLENTY) -> Plan:
    request = Request(SOURCE, "adamw", FP32, limit, parse_pins(pins), runnable=True)
    return solve(model(), cluster(devices), FakePrices(), request)


@functools.cache
def model() -> Outline:
    return transformer()


def recomputed(plan: Plan) -> int:
    return sum(len(region.recompute) for region in plan.regions)


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_a_policy_runs_here_and_is_counted_op_by_op(policy: str) -> None:
    plan = plan_of(2, (f"recompute={policy}", "dp=2"))
    check_plan(plan)
    assert recomputed(plan)
    assert (plan.pipeline.stages, plan.pipeline.ranks) == (1, 1)
    assert COUNTED in plan.search.given_up
    found = evaluated(plan, model(), cluster(2), FakePrices(), assign(plan, model()))
    assert plan.predicted.peak_bytes_per_device == found.peak_bytes == sum(plan.predicted.memory.values())
    assert plan.predicted.traffic == found.traffic


def test_the_more_runs_again_the_less_is_kept() -> None:
    peaks = [plan_of(1, pins).predicted.peak_bytes_per_device for pins in ((), ("recompute=full",))]
    assert peaks[1] < peaks[0]
    assert plan_of(1, ("recompute=full",)).predicted.seconds["recompute"] > 0


def test_without_recompute_the_one_stage_search_answers() -> None:
    for pins in ((), ("recompute=none",)):
        plan = plan_of(1, pins)
        assert not plan.stages
        assert not recomputed(plan)


def test_a_limit_below_the_one_stage_search_is_met_by_recompute() -> None:
    tight = ("micro_batch=8",)
    free = plan_of(1, tight)
    limit = int(0.85 * free.predicted.peak_bytes_per_device)
    plan = plan_of(1, tight, limit)
    assert recomputed(plan)
    assert plan.predicted.peak_bytes_per_device <= limit == plan.memory_limit_bytes
    assert plan.search.bound_seconds <= plan.predicted.step_seconds
    with pytest.raises(Infeasible):
        plan_of(1, (*tight, "recompute=none"), limit)


def test_what_no_recompute_helps_is_infeasible() -> None:
    with pytest.raises(Infeasible, match="nothing fits") as caught:
        plan_of(1, ("recompute=full",), 10_000)
    assert caught.value.nearest
    with pytest.raises(Infeasible, match="nothing fits"):
        plan_of(1, (), 10_000)


def test_reading_back_changes_nothing() -> None:
    plan = plan_of(2, ("recompute=full", "dp=2"))
    again = reprice(plan, model(), cluster(2), FakePrices())
    assert again.predicted.memory == plan.predicted.memory
    assert again.predicted.traffic == plan.predicted.traffic
    assert again.predicted.step_seconds == pytest.approx(plan.predicted.step_seconds)
    assert again.edited


def edited(plan: Plan, **changes: object) -> Plan:
    regions = tuple(msgspec.structs.replace(r, **changes) if r.recompute else r for r in plan.regions)
    return msgspec.structs.replace(plan, regions=regions)


def test_an_edited_plan_is_counted_anew() -> None:
    plan = plan_of(2, ("recompute=full", "dp=2"))
    kept = reprice(edited(plan, recompute=()), model(), cluster(2), FakePrices())
    assert kept.predicted.memory["saved"] > plan.predicted.memory["saved"]
    with pytest.raises(Infeasible, match="the edited plan needs"):
        reprice(msgspec.structs.replace(plan, memory_limit_bytes=10_000), model(), cluster(2), FakePrices())


@pytest.mark.parametrize("text", ["nonsense", "nonsense -> R"])
def test_what_a_region_does_not_have_is_named(text: str) -> None:
    with pytest.raises(PlanError, match=r"recompute: .*nonsense"):
        assign(edited(plan_of(2, ("recompute=full", "tp=2")), recompute=(text,)), model())


def test_only_what_is_needed_inside_a_unit_runs_again() -> None:
    """An entry that names everything leaves the last op of each layer, whose result the next one takes, to be kept."""
    plan = plan_of(1, ("recompute=full",))
    entry = next(r for r in plan.regions if r.recompute)
    everything = edited(plan, recompute=tuple(op.op for op in entry.ops))
    again = assign(everything, model()).again
    region = model().regions[plan.regions.index(entry)]
    assert isinstance(again, Again)
    for instance in region.instances:
        assert instance[-1] not in again.ops
        assert again.ops & set(instance)

"""Plans that run here: found under pins and limits, counted op by op, read back, refused where they cannot be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from shardwright.errors import Infeasible, PinError, PlanError
from shardwright.planner.assign import assign
from shardwright.planner.capability import check_plan
from shardwright.planner.cluster import Cluster, Host
from shardwright.planner.offload import spare_host_bytes
from shardwright.planner.onestage import COUNTED, beyond_one_stage, searches
from shardwright.planner.outline import Outline
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan
from shardwright.planner.prices import Prices
from shardwright.planner.remake import Again
from shardwright.planner.repricing import reprice
from shardwright.planner.solve import Request, evaluated, solve
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


def with_host(devices: int, host_bytes: int = PLENTY) -> Cluster:
    """CPU devices whose memory is part of the host's."""
    made = cluster(devices)
    host = Host(devices, devices * (made.device.memory_bytes + host_bytes), 1e10, 1e11, 1e-9)
    return replace(made, host=host)


@functools.cache
def here(devices: int, pins: tuple[str, ...], limit: int = PLENTY, host_bytes: int = PLENTY) -> Plan:
    """As `plan_of`, where host memory lies behind the devices."""
    where = replace(with_host(devices, host_bytes), limit_bytes=limit)
    request = Request(SOURCE, "adamw", FP32, limit, parse_pins(pins), runnable=True)
    return solve(model(), where, Prices(where, "float32"), request)


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


def frozen_products() -> Outline:
    """With weights that are most of the memory, and frozen but for the norms'."""
    made = transformer(layers=4, batch=2, seq=4, hidden=64)
    frozen = {p.tensor for p in made.parameters if len(made.tensors[p.tensor].dims) > 1}
    parameters = tuple(replace(p, trainable=p.tensor not in frozen) for p in made.parameters)
    tensors = {n: replace(t, differentiable=t.differentiable and n not in frozen) for n, t in made.tensors.items()}
    return replace(made, parameters=parameters, tensors=tensors)


def test_frozen_parameters_take_no_room_in_the_optimizers_step() -> None:
    outline = frozen_products()

    def peak(*pins: str, limit: int = PLENTY) -> int:
        request = Request(SOURCE, "adamw", FP32, limit, parse_pins(("micro_batch=2", *pins)), runnable=True)
        return solve(outline, cluster(1), FakePrices(), request).predicted.peak_bytes_per_device

    most, least = peak(), peak("recompute=full")
    assert least < most
    limit = (least + most) // 2
    assert peak(limit=limit) <= limit


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


@pytest.mark.parametrize(
    ("pins", "says"),
    [
        ("pp=2", lambda p: p.pipeline.ranks == 2),
        ("vpp=2 micro_batch=1", lambda p: (p.pipeline.ranks, p.pipeline.chunks) == (2, 2)),
        ("schedule=interleaved", lambda p: p.pipeline.schedule == "interleaved"),
        ("pp=2 schedule=gpipe recompute=full", lambda p: p.pipeline.schedule == "gpipe" and recomputed(p)),
        ("offload=optimizer", lambda p: all("optimizer" in r.offload for r in p.regions if r.parameters)),
        ("offload=params zero=3 dp=2", lambda p: all("params" in r.offload for r in p.regions if r.parameters)),
        ("offload=activations recompute=none", lambda p: any("activations" in r.offload for r in p.regions)),
        ("pp!=1", lambda p: p.pipeline.ranks > 1),
    ],
)  # fmt: skip
def test_every_dimension_can_be_pinned_and_runs(pins: str, says: Callable[[Plan], bool]) -> None:
    plan = here(2, tuple(pins.split()))
    check_plan(plan)
    assert says(plan)
    assert plan.pins == tuple(pins.split())


def test_a_search_never_offers_what_does_not_run() -> None:
    """Parameters behind the device run with ZeRO 3, or whole with one microbatch; the least memory would be had otherwise."""
    plan = here(2, ("offload=params", "dp=2", "micro_batch=1"))
    check_plan(plan)
    assert all(p.zero == 3 for region in plan.regions for p in region.parameters if p.zero_axes)
    with pytest.raises(PinError, match=r"offload=params.*with ZeRO 1 or 2 \(zero=3 is executed\)"):
        here(2, ("offload=params", "dp=2", "zero=1"))


def test_without_a_host_nothing_is_offloaded() -> None:
    with pytest.raises(PinError, match="no host memory"):
        plan_of(2, ("offload=optimizer",))


def test_searches_open_more_keys_only_where_nothing_fits() -> None:
    assert not beyond_one_stage(parse_pins(["tp=2", "pp=1", "schedule=1f1b", "offload=none"]))
    assert not beyond_one_stage(parse_pins(["recompute=full"]), training=False)
    assert all(beyond_one_stage(parse_pins([text])) for text in ("pp=2", "cp=2", "vpp=2", "offload=params", "pp!=1"))
    first, second, third = searches(parse_pins([]))
    assert (first.pp, first.cp, first.offload, first.recompute) == (1, 1, "none", None)
    assert (second.pp, second.offload, third.pp, third.offload) == (1, None, None, None)
    assert [p.pp for p in searches(parse_pins(["pp=2", "offload=none"]))] == [2]
    assert searches(parse_pins(["vpp=2"]))[0].pp is None


def test_what_no_recompute_makes_fit_goes_to_the_host() -> None:
    """One device whose recomputing plans need more than it has: states go where room is, if there is room."""
    tight = ("micro_batch=1",)
    least = here(1, (*tight, "recompute=full", "offload=none")).predicted
    limit = int(0.6 * least.peak_bytes_per_device)
    plan = here(1, tight, limit)
    check_plan(plan)
    assert any(region.offload for region in plan.regions)
    assert plan.predicted.peak_bytes_per_device <= limit
    with pytest.raises(Infeasible, match="nothing fits"):
        here(1, tight, limit, host_bytes=limit - PLENTY)
    with pytest.raises(Infeasible, match="nothing fits"):
        here(1, (*tight, "offload=none"), limit)


def test_cpu_ranks_have_what_their_limits_leave() -> None:
    where = with_host(2, host_bytes=1000)
    spare = spare_host_bytes(replace(where, limit_bytes=where.device.memory_bytes - 500))
    assert spare == 1500
    assert spare_host_bytes(replace(where, limit_bytes=2 * where.device.memory_bytes)) == 0
    assert spare_host_bytes(cluster(2)) == 0


def test_inference_takes_the_pins_of_a_pipeline() -> None:
    forward = replace(model(), loss="")
    request = Request(SOURCE, "adamw", FP32, PLENTY, parse_pins(["pp=2"]), runnable=True)
    plan = solve(forward, cluster(2), FakePrices(), request)
    assert plan.pipeline.ranks == 2
    check_plan(plan)

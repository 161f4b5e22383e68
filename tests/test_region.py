"""The solver on a small transformer: known schemes under their pins, certificates, determinism, bounds, edited plans."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from shardwright.errors import Infeasible, PinError, PlanError
from shardwright.planner.assign import assign
from shardwright.planner.cluster import Cluster, Device, Level
from shardwright.planner.evaluate import Evaluator
from shardwright.planner.outline import Outline
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan
from shardwright.planner.repricing import reprice
from shardwright.planner.search import Candidate
from shardwright.planner.solve import Request, make_problem, shape_of, solve, solve_fixed
from solver_outlines import FP32, SOURCE, FakePrices, transformer

PLENTY = 10**9


def cluster(devices: int) -> Cluster:
    device = Device("toy", PLENTY, {"float32": 1e12}, 1e11, 1e-6, kind="cpu")
    return Cluster("toy", device, devices, devices, (Level("link", devices, 1e10, 1e-6),))


def request(pins: tuple[str, ...] = (), limit: int = PLENTY) -> Request:
    return Request(SOURCE, "adamw", FP32, limit, parse_pins(pins), runnable=True)


def plan_of(devices: int, pins: tuple[str, ...] = (), limit: int = PLENTY, outline: Outline | None = None) -> Plan:
    return solve(outline or transformer(), cluster(devices), FakePrices(), request(pins, limit))


def counts(plan: Plan, axis: str) -> dict[str, int]:
    return {t.collective: t.count for t in plan.predicted.traffic if t.axis == axis}


def per_layer(pins: tuple[str, ...], axis: str, devices: int = 2) -> dict[str, int]:
    """What one more layer adds."""
    few, many = (counts(plan_of(devices, pins, outline=transformer(layers)), axis) for layers in (2, 3))
    return {name: many[name] - few.get(name, 0) for name in many if many[name] != few.get(name, 0)}


def test_tensor_parallel_is_megatrons() -> None:
    assert per_layer(("tp=2",), "tp") == {"all_reduce": 4}


def test_sequence_parallel_is_megatrons() -> None:
    found = per_layer(("tp=2", "sequence_parallel=on"), "tp")
    assert found == {
        "all_gather": 4,
        "reduce_scatter": 4,
        "all_reduce": 1,
    }  # one for the bucket of the norms' gradients


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_data_parallel_reduces_once_a_step(micro_batch: int) -> None:
    assert per_layer(("dp=2", "zero=0", f"micro_batch={micro_batch // 2}"), "dp") == {"all_reduce": 1}


def test_zero3_gathers_twice_and_scatters_once_per_microbatch() -> None:
    assert per_layer(("dp=2", "zero=3", "micro_batch=1"), "dp") == {"all_gather": 8, "reduce_scatter": 4}


def test_zero1_and_2() -> None:
    assert per_layer(("dp=2", "zero=1", "micro_batch=1"), "dp") == {"all_gather": 1, "reduce_scatter": 1}
    assert per_layer(("dp=2", "zero=2", "micro_batch=1"), "dp") == {"all_gather": 1, "reduce_scatter": 4}


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("limit", [PLENTY, 400_000])
def test_objective_is_the_cost_recomputed_from_the_outline(devices: int, limit: int) -> None:
    problem = make_problem(transformer(), cluster(devices), FakePrices(), request(limit=limit))
    for d, t in ((devices, 1), (1, devices)):
        for m in (1, 4):
            if 8 % (d * m):
                continue
            candidate = Candidate(problem, shape_of(cluster(devices), d, t), m)
            while not candidate.advance():
                pass
            if candidate.solution is not None and candidate.solution.choice is not None:
                assert candidate.evaluation is not None
                assert candidate.solution.seconds == pytest.approx(candidate.evaluation.step_seconds, rel=1e-6)


def test_gap_and_bound() -> None:
    for limit in (PLENTY, 300_000):
        plan = plan_of(4, limit=limit)
        assert plan.predicted.peak_bytes_per_device <= limit
        assert 0 <= plan.search.gap <= 1e-3
        assert plan.search.bound_seconds <= plan.predicted.step_seconds
        assert sum(plan.predicted.seconds.values()) == pytest.approx(plan.predicted.step_seconds)
        assert sum(plan.predicted.memory.values()) == pytest.approx(plan.predicted.peak_bytes_per_device, abs=16)


def test_byte_identical_on_repetition() -> None:
    plans = [msgspec.json.encode(plan_of(4, limit=300_000)) for _ in range(2)]
    assert plans[0] == plans[1]


def test_byte_identical_in_another_process() -> None:
    """Another hash seed orders sets differently; nothing may depend on that."""
    script = (
        "import hashlib, msgspec; from test_region import plan_of; "
        "print(hashlib.sha256(msgspec.json.encode(plan_of(4, limit=300_000))).hexdigest())"
    )
    here = Path(__file__).parent
    found = {
        subprocess.run(
            [sys.executable, "-c", script], cwd=here, env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True, timeout=120,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {hashlib.sha256(msgspec.json.encode(plan_of(4, limit=300_000))).hexdigest() + "\n"}


def test_a_looser_limit_is_never_slower() -> None:
    last = float("inf")
    for limit in (180_000, 240_000, 320_000, PLENTY):
        seconds = plan_of(4, limit=limit).predicted.step_seconds
        assert seconds <= last * (1 + 1e-4)
        last = seconds


def test_more_pins_are_never_faster() -> None:
    free = plan_of(4).predicted.step_seconds
    for pins in (("tp=2",), ("dp=4",), ("zero=3",), ("tp=4", "sequence_parallel=on"), ("dp=2", "zero=1")):
        assert plan_of(4, pins).predicted.step_seconds >= free * (1 - 1e-4)


def test_scaling_all_times_scales_the_optimum() -> None:
    plain = plan_of(2).predicted.step_seconds
    twice = FakePrices(byte=2e-9, latency=2e-6)
    base = twice.op
    twice.op = lambda op, sizes, tensors: tuple(  # type: ignore[method-assign]
        type(p)(2 * p.seconds) for p in base(op, sizes, tensors)
    )
    copied = twice.copy
    twice.copy = lambda count: type(copied(0))(copied(count).seconds + 1e-8)  # type: ignore[method-assign]
    slow = solve(transformer(), cluster(2), twice, request()).predicted.step_seconds
    assert slow == pytest.approx(2 * plain, rel=2e-4)


def test_infeasible_names_cause_and_settings_that_fit() -> None:
    with pytest.raises(Infeasible) as caught:
        plan_of(2, limit=150_000)
    error = caught.value
    assert error.exit_status == 1
    assert error.cause in (
        "parameters",
        "gradients",
        "optimizer",
        "saved",
        "temporaries",
        "gathered",
        "buffers",
        "reserve",
    )
    assert error.nearest
    devices = next(n for n in error.nearest if n.endswith(" devices"))
    plan = plan_of(int(devices.split()[0]), limit=150_000)
    assert plan.predicted.peak_bytes_per_device <= 150_000


def test_infeasible_only_by_a_pin_says_so() -> None:
    with pytest.raises(Infeasible) as caught:
        plan_of(4, ("dp=4", "zero=0"), limit=300_000)
    assert any("zero=3" in n for n in caught.value.nearest)


@pytest.mark.parametrize(("pins", "devices"), [(("zero=1",), 1), (("tp=2", "zero=3"), 2)])
def test_zero_without_anything_to_share_out_is_refused(pins: tuple[str, ...], devices: int) -> None:
    with pytest.raises(PinError, match="zero="):
        plan_of(devices, pins)


def test_zero_over_the_model_axis_where_parameters_are_whole() -> None:
    plan = plan_of(2, ("tp=2", "sequence_parallel=on", "zero=3"))
    levels = {(q.zero, q.zero_axes, q.home[0]) for r in plan.regions for q in r.parameters}
    assert (3, ("tp",), "R") in levels
    assert all(zero == 0 for zero, _, home in levels if home != "R")


def test_a_sequence_that_does_not_divide_is_named() -> None:
    with pytest.raises(PinError, match="15"):
        plan_of(2, ("tp=2", "sequence_parallel=on"), outline=transformer(seq=15))


def test_fixed_parameters_keep_their_place() -> None:
    outline = transformer()
    plan = plan_of(4, ("tp=2", "dp=2", "zero=3"))
    storage = dict(assign(plan, outline).storage)
    inference = replace(outline, loss="", outputs=("logits",))
    found = solve_fixed(inference, FakePrices(), plan.mesh, storage, FP32)
    assert set(found) == {op.name for op in outline.ops}
    assert all(len(choice) == 2 for choice in found.values())


def test_edited_plans_are_priced_again_or_refused() -> None:
    outline = transformer()
    plan = plan_of(2, ("tp=2",))
    again = reprice(plan, outline, cluster(2), FakePrices())
    assert again.edited
    assert again.predicted.step_seconds == pytest.approx(plan.predicted.step_seconds)
    assert again.search.gap == 1.0
    op = plan.regions[1].ops[0]
    broken = msgspec.structs.replace(op, choice=("e",))
    region = msgspec.structs.replace(plan.regions[1], ops=(broken, *plan.regions[1].ops[1:]))
    edited = msgspec.structs.replace(plan, regions=(plan.regions[0], region, plan.regions[2]))
    with pytest.raises(PlanError, match=op.op):
        reprice(edited, outline, cluster(2), FakePrices())
    first = msgspec.structs.replace(plan.regions[1].parameters[1], home=("S(0)",), zero=1, zero_axes=("tp",))
    parameters = plan.regions[1].parameters
    region = msgspec.structs.replace(plan.regions[1], parameters=(parameters[0], first, *parameters[2:]))
    edited = msgspec.structs.replace(plan, regions=(plan.regions[0], region, plan.regions[2]))
    with pytest.raises(PlanError, match="splits it already"):
        reprice(edited, outline, cluster(2), FakePrices())
    with pytest.raises(Infeasible):
        reprice(msgspec.structs.replace(plan, memory_limit_bytes=1000), outline, cluster(2), FakePrices())


def test_an_edit_puts_other_dims_on_a_data_axis() -> None:
    outline = transformer()
    plan = plan_of(2, ("dp=2",))
    attention = next(i for i, op in enumerate(plan.regions[1].ops) if op.op == "l0.attn")
    ops = list(plan.regions[1].ops)
    ops[attention] = msgspec.structs.replace(ops[attention], choice=("g",))
    region = msgspec.structs.replace(plan.regions[1], ops=tuple(ops))
    edited = msgspec.structs.replace(plan, regions=(plan.regions[0], region, plan.regions[2]))
    with pytest.raises(PlanError, match="splits the batch only"):
        reprice(edited, outline, cluster(2), FakePrices())


def test_an_inference_plan() -> None:
    outline = replace(transformer(), loss="", outputs=("logits",))
    plan = plan_of(4, outline=outline)
    assert plan.pipeline.microbatches == 1
    assert plan.predicted.memory["gradients"] == plan.predicted.memory["optimizer"] == 0
    small = plan.predicted.peak_bytes_per_device // 2
    assert plan_of(4, outline=outline, limit=small).predicted.peak_bytes_per_device <= small


def test_relabelling_equal_layers_changes_nothing() -> None:
    """Evaluating layer by layer in any order of prices gives the same total: the evaluator sees concrete layers only."""
    outline = transformer(3)
    problem = make_problem(outline, cluster(2), FakePrices(), request())
    candidate = Candidate(problem, shape_of(cluster(2), 1, 2), 1)
    candidate.advance()
    assignment = candidate.assignment(candidate.chosen)
    first = Evaluator(candidate.template, problem.facts, candidate.space.costs, problem.setting).evaluate(assignment)
    names = list(assignment.choices)
    random.Random(0).shuffle(names)
    shuffled = replace(assignment, choices={n: assignment.choices[n] for n in names})
    second = Evaluator(candidate.template, problem.facts, candidate.space.costs, problem.setting).evaluate(shuffled)
    assert first.step_seconds == pytest.approx(second.step_seconds)
    assert first.points == second.points

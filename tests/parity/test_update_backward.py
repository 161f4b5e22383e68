"""Parameters updated in the backward pass: equal to those of the ordinary step, peaks as planned, refusals."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from pool import Pool
from running import differences, parallel, plan_of
from shardwright.errors import PinError, PlanError, UsageError
from shardwright.planner.plan import Plan
from shardwright.planner.planfile import dump_plan, parse_plan
from shardwright.runtime import parameters
from shardwright.runtime.losses import loss_of
from shardwright.runtime.monitor import measure_step
from shardwright.runtime.optimizers import make_optimizer

EARLY = "update=backward"
STEPS = 3
OPTIMIZERS: dict[str, dict[str, Any]] = {"adamw": {}, "sgd": {"momentum": 0.9}, "adagrad": {"foreach": False}}


def planned(name: str, pins: str, world: int = 1, batch: int = 8) -> Plan:
    return plan_of(name, f"{pins} dtype=fp32", world, batch, device="cpu")


def trained(name: str, plan: Plan, optimizer: str, early: bool, batch: int = 8) -> dict[str, Any]:
    """Rank function: three steps of the user's own loop; parameters, whether gradients were left, the peak of one more step."""
    torch.manual_seed(0)
    case, pm = parallel(name, plan, batch)
    step_of = make_optimizer(optimizer, pm.parameters(), **OPTIMIZERS[optimizer], fused=False)
    if early:
        pm.update_in_backward(step_of)
    left = []

    def step() -> None:
        step_of.zero_grad()
        loss_of(pm(*case.args, **case.kwargs)).backward()
        left.append(any(p.grad is not None for p in pm.parameters()))
        step_of.step()

    for _ in range(STEPS):
        step()
    values = {n: parameters.full(p.detach()).clone() for n, p in pm.named_parameters()}
    peak = measure_step(step, pm, step_of, case.args, case.kwargs).bytes
    return {"values": values, "left": left, "peak": peak}


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert all(torch.equal(found["values"][n], v) for n, v in wanted["values"].items())
    assert not any(found["left"])
    assert all(wanted["left"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_are_those_of_the_ordinary_step(optimizer: str) -> None:
    plan, usual = planned("gpt2", EARLY), planned("gpt2", "update=step zero=0")
    assert (plan.update, usual.update) == ("backward", "step")
    check(trained("gpt2", plan, optimizer, True), trained("gpt2", usual, optimizer, False))


@pytest.mark.parametrize("name", ["gpt2", "llama", "tied"])
def test_peak_is_as_predicted_and_lower(name: str) -> None:
    """With few activations: where they peak before any gradient comes, nothing is won."""
    plan, usual = planned(name, EARLY, batch=1), planned(name, "update=step zero=0", batch=1)
    early, late = trained(name, plan, "adamw", True, 1)["peak"], trained(name, usual, "adamw", False, 1)["peak"]
    predicted = plan.predicted.peak_bytes_per_device
    assert early == pytest.approx(predicted, rel=0.08)
    assert early < late
    assert predicted < usual.predicted.peak_bytes_per_device


def test_two_ranks(ranks2: Pool) -> None:
    """Replicated parameters are updated after the reduction of their bucket."""
    plan, usual = planned("gpt2", f"dp=2 {EARLY}", 2, 2), planned("gpt2", "dp=2 zero=0", 2, 2)
    assert (plan.overlap.prefetch, plan.overlap.reductions) == (0, 0)
    early = ranks2.run(trained, "gpt2", plan, "adamw", True, 2)
    for found, wanted in zip(early, ranks2.run(trained, "gpt2", usual, "adamw", False, 2), strict=True):
        check(found, wanted)
        assert found["peak"] < 0.95 * wanted["peak"]
        assert found["peak"] == pytest.approx(plan.predicted.peak_bytes_per_device, rel=0.08)


def test_split_parameters(ranks2: Pool) -> None:
    plan, usual = planned("gpt2", f"tp=2 {EARLY}", 2), planned("gpt2", "tp=2 zero=0", 2)
    for found, wanted in zip(
        ranks2.run(trained, "gpt2", plan, "sgd", True), ranks2.run(trained, "gpt2", usual, "sgd", False), strict=True
    ):
        check(found, wanted)
        assert found["peak"] <= wanted["peak"]


def test_verified_against_the_eager_module() -> None:
    found = differences("gpt2", planned("gpt2", EARLY))
    assert any(d["kind"].startswith("parameter after") for d in found)
    assert all(d["ok"] for d in found)


@pytest.mark.parametrize(
    ("more", "message"),
    [("zero=3", "zero=0 only"), ("offload=optimizer", "offload=none only"), ("recompute=full", "recompute=none only"),
     ("pp=2", "pp=1 only"), ("micro_batch=2", "micro_batch=2")],
)  # fmt: skip
def test_pins_that_do_not_go_with_it(more: str, message: str) -> None:
    with pytest.raises(PinError, match=message):
        planned("gpt2", f"{EARLY} {more}", 2)


def test_float16_is_refused() -> None:
    with pytest.raises(PinError, match="float16, whose loss"):
        plan_of("gpt2", f"{EARLY} dtype=fp16", 1, device="h100-sxm")


def test_plan_files() -> None:
    plan = planned("gpt2", EARLY)
    assert dump_plan(parse_plan(dump_plan(plan), "again")) == dump_plan(plan)
    several = msgspec.structs.replace(plan.pipeline, microbatches=2, micro_batch=plan.pipeline.micro_batch // 2)
    for changed, message in (
        ({"update": "never"}, "expected 'step' or"),
        ({"pipeline": several}, "several microbatches"),
    ):
        with pytest.raises(PlanError, match=message):
            parse_plan(dump_plan(msgspec.structs.replace(plan, **changed)), "edited")


def test_what_cannot_be_is_said() -> None:
    case, pm = parallel("gpt2", planned("gpt2", EARLY))
    half = make_optimizer("adamw", list(pm.parameters())[1:])
    with pytest.raises(UsageError, match="does not have"):
        pm.update_in_backward(half)
    with pytest.raises(UsageError, match="one by one"):
        pm.update_in_backward(torch.optim.LBFGS(pm.parameters()))
    optimizer = make_optimizer("adamw", pm.parameters())
    pm.update_in_backward(optimizer)
    with pytest.raises(UsageError, match="no gradient is left to clip"):
        pm.clip_grad_norm_(1.0)
    with pytest.raises(UsageError, match="scaled or divided"):
        (loss_of(pm(*case.args, **case.kwargs)) * 0.5).backward()
    loss_of(pm(*case.args, **case.kwargs)).backward()
    with pytest.raises(UsageError, match="second backward pass"):
        loss_of(pm(*case.args, **case.kwargs)).backward()
    optimizer.step()
    pm.update_in_backward(None)
    loss_of(pm(*case.args, **case.kwargs)).backward()
    assert all(p.grad is not None for p in pm.parameters() if p.requires_grad)
    two = planned("gpt2", "zero=0 micro_batch=4")
    with pytest.raises(UsageError, match="several microbatches"):
        parallel("gpt2", two)[1].update_in_backward(optimizer)


def test_checkpointed_rates_and_schedulers_count() -> None:
    """The group's options are read at every update."""
    case, pm = parallel("gpt2", planned("gpt2", EARLY))
    optimizer = make_optimizer("sgd", pm.parameters(), lr=0.0)
    pm.update_in_backward(optimizer)
    before = [p.detach().clone() for p in pm.parameters()]
    loss_of(pm(*case.args, **case.kwargs)).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, pm.parameters(), strict=True))
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "param_groups": [{**group, "lr": 0.5} for group in state["param_groups"]]})
    loss_of(pm(*case.args, **case.kwargs)).backward()
    assert not all(torch.equal(a, b) for a, b in zip(before, pm.parameters(), strict=True))

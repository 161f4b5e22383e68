"""Positions split over a context axis, and experts over an expert axis, at parity with the eager modules."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from models import SEQ, build
from msgspec.structs import replace
from pool import Pool
from running import differences, eager, parallel, records, traffic
from shardwright.api import make_plan
from shardwright.errors import UsageError
from shardwright.passes.choose import listed
from shardwright.passes.experts.interface import own_loops
from shardwright.passes.lift import Lift
from shardwright.passes.prepare import prepare
from shardwright.planner.context import context_choices
from shardwright.planner.plan import OpPlan, Plan
from shardwright.planner.ring import RING
from shardwright.runtime.apply import apply

NEUTRAL = "pp=1 recompute=none offload=none dtype=fp64"


@functools.cache
def joint_plan(name: str, pins: str, world: int, batch: int = 8, **options: Any) -> Plan:
    """A plan of the joint search on one stage, in float64."""
    case = build(name, batch)
    texts = f"{pins} {NEUTRAL}".split()
    inputs = dict(case.kwargs) or case.args
    return make_plan(
        case.model, inputs, f"h100-sxm:{world}", pins=texts, loss_fn=case.loss_fn, runnable=False, **options
    )


CASES = [
    ("gpt2", "cp=2 tp=1", 2), ("llama", "cp=2 tp=1 zero=3 micro_batch=2", 4), ("mixtral", "ep=2 tp=1 cp=1", 2),
]  # fmt: skip
MORE = [
    ("mixtral", "ep=2 tp=2 cp=1", 4),
    ("bert", "cp=2 tp=1", 2), ("t5", "cp=2 tp=1", 2), ("mistral", "cp=2 tp=1", 2), ("llama", "cp=4 tp=1", 4),
    ("llama", "cp=2 tp=2 sequence_parallel=on", 4), ("mixtral", "ep=2 tp=1 cp=1 zero=3", 4),
    ("mixtral", "ep=2 tp=1 cp=2 zero=1 micro_batch=2", 4), ("mixtral", "ep=4 tp=1 cp=1 zero=2 micro_batch=1", 4),
    ("deepseek", "ep=2 tp=1 cp=1", 2),
]  # fmt: skip
"""(case, pins, ranks) run every time, and nightly: masks, biases by distance, windows, every axis at once, ZeRO."""


def check(name: str, pins: str, world: int, pools: dict[int, Pool]) -> None:
    plan = joint_plan(name, pins, world)
    found = pools[world].run(differences, name, plan)
    assert all(answer == found[0] for answer in found)
    assert [d for d in found[0] if not d["ok"]] == []
    assert {d["kind"] for d in found[0]} == {"loss", "gradient", "parameter after 3 steps"}


@pytest.mark.parametrize(("name", "pins", "world"), CASES)
def test_parity(name: str, pins: str, world: int, pools: dict[int, Pool]) -> None:
    check(name, pins, world, pools)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "pins", "world"), MORE)
def test_more(name: str, pins: str, world: int, pools: dict[int, Pool]) -> None:
    check(name, pins, world, pools)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_collectives_of_a_context_axis_are_the_predicted_ones(name: str, ranks2: Pool) -> None:
    plan = joint_plan(name, "cp=2 tp=1", 2)
    predicted = {(t.collective, t.axis): (t.count, t.bytes) for t in plan.predicted.traffic}
    assert [op.choice for r in plan.regions for op in r.ops if "attention" in op.target] == [("ring",)]
    for ran in ranks2.run(records, name, plan):
        assert traffic(ran) == predicted


def test_exchanges_of_experts(ranks2: Pool) -> None:
    """Every slot of every token goes to the rank of its expert and back, in both directions, whatever the routing."""
    plan = joint_plan("mixtral", "ep=2 tp=1 cp=1", 2)
    assert any("depend on routing" in note for note in plan.notes)
    ran = ranks2.run(records, "mixtral", plan)
    layers, tokens, k, hidden, experts, wide = 2, 8 * SEQ, 2, 32, 4, 8
    sums = [traffic(r)["all_to_all", "ep"] for r in ran]
    assert {count for count, _ in sums} == {layers * 7}  # counts; rows and weights, then outputs, and their gradients
    per_layer = 4 * tokens * k * hidden * wide + 2 * tokens * k * 4 + 2 * experts * 8  # routers work in float32
    assert sum(size for _, size in sums) == 2 * layers * per_layer
    gradients = sum(size for r in ran for kind, axis, size, phase in r if kind == "all_reduce" and phase == "backward")
    case = build("mixtral")
    plain = sum(p.numel() for n, p in case.model.named_parameters() if "experts" not in n)
    assert gradients == 2 * plain * wide  # those of experts are not reduced: one rank holds each


def ulysses(name: str) -> Plan:
    """A plan that splits positions on the model axis everywhere but in attention, which splits its heads there."""
    case = build(name)
    plan = joint_plan(name, "tp=2 dp=1 cp=1", 2)
    outline = prepare(case.model, case.args, case.kwargs, "float64", choice=listed(plan)).outline
    cut, ops = context_choices(outline, 2), outline.by_name

    def choice(op: OpPlan) -> tuple[str, ...]:
        if cut.choice[op.op] != RING:
            return (cut.choice[op.op],)
        own = ops[op.op]
        return (own.factors[own.operands[0].factors[1][0]].name,)

    regions = tuple(
        replace(
            region,
            ops=tuple(replace(op, choice=choice(op)) for op in region.ops),
            parameters=tuple(replace(p, home=("R",), zero=0, zero_axes=()) for p in region.parameters),
        )
        for region in plan.regions
    )
    return replace(plan, regions=regions)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_ulysses(name: str, ranks2: Pool) -> None:
    """Heads of attention and positions of all else on one axis: queries, keys, values and results go through all-to-alls."""
    plan = ulysses(name)
    found = ranks2.run(differences, name, plan)
    assert [d for d in found[0] if not d["ok"]] == []
    ran = traffic(ranks2.run(records, name, plan)[0])
    assert ran["all_to_all", "tp"][0] == 2 * 4 * 2  # layers, tensors, directions


def modes(name: str, plan: Plan, batch: int) -> float:
    """Rank function: the largest difference of logits without labels, of another batch too, and of the loss in eval mode."""
    model, args, kwargs = eager(name)
    pm = apply(model, args, kwargs, plan, exact="float64")
    ids, labels = (kwargs[k].repeat(4, 1)[:batch] for k in ("input_ids", "labels"))
    worst = 0.0
    with torch.no_grad():
        for given in ({"input_ids": ids}, {"input_ids": ids, "labels": labels}):
            with Lift(casts=True, dropout=False), own_loops(model):
                wanted = model.eval()(**given)
            found = pm.eval()(**given)
            worst = max(worst, float((found.logits - wanted.logits).abs().max()))
            if "labels" in given:
                worst = max(worst, float((found.loss - wanted.loss).abs()))
    return worst


@pytest.mark.parametrize(
    ("name", "pins", "world", "batch"), [("llama", "cp=2 tp=1", 2, 6), ("mixtral", "ep=2 tp=1 cp=1", 2, 3)]
)
def test_other_inputs_and_modes(name: str, pins: str, world: int, batch: int, pools: dict[int, Pool]) -> None:
    """Without labels, in eval mode and with a batch that the data axis may not divide: the same weights where they are."""
    for worst in pools[world].run(modes, name, joint_plan(name, pins, world), batch):
        assert worst < 1e-12


def losses(name: str, plan: Plan) -> list[float]:
    """Rank function: two training steps with dropout, and one of another module from the same seed."""
    found = []
    for steps in (2, 1):
        torch.manual_seed(3)
        case, pm = parallel(name, plan)
        for _ in range(steps):
            loss = pm(*case.args, **case.kwargs).loss
            loss.backward()
            found.append(float(loss.detach()))
    return found


def test_dropout_on_a_context_axis(ranks2: Pool) -> None:
    """The same numbers on all ranks from the same seed, others in the next step."""
    first, second = ranks2.run(losses, "gpt2-dropout", joint_plan("gpt2-dropout", "cp=2 tp=1", 2))
    assert first == second
    assert first[0] == first[2]
    assert first[0] != first[1]


def compiled(plan: Plan) -> str:
    """Rank function: what is said of a compiled plan with experts."""
    with pytest.raises(UsageError) as told:
        parallel("mixtral", plan, compile=True)
    return str(told.value)


def test_experts_are_not_compiled(ranks2: Pool) -> None:
    assert "use compile=False" in ranks2.run(compiled, joint_plan("mixtral", "ep=2 tp=1 cp=1", 2))[0]

"""Recompute executed: the same loss and gradients, what runs again and what does not, its collectives, the memory it saves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest
import torch
from models import build
from pool import Pool
from running import differences, parallel, plan_of, records, same, traffic, whole_gradients
from shardwright.errors import UsageError
from shardwright.passes.shard import AGAIN
from shardwright.planner.plan import Plan
from shardwright.runtime.losses import loss_of
from shardwright.runtime.monitor import measure_step
from shardwright.runtime.regather import active_regather
from test_parity import check, pinned
from torch.utils._python_dispatch import TorchDispatchMode

MANY = 64
"""Samples with which activations are most of the memory."""

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


def recomputed(plan: Plan) -> int:
    return sum(len(region.recompute) for region in plan.regions)


# -- the same function


@pytest.mark.parametrize(
    ("name", "pins", "microbatches"),
    [
        ("gpt2", "dp=2 zero=3 recompute=full", 1), ("llama", "tp=2 sequence_parallel=on recompute=full dtype=fp32", 1),
        ("llama", "tp=2 sequence_parallel=off recompute=selective", 4), ("bert", "dp=2 zero=2 recompute=selective", 4),
    ],
)  # fmt: skip
def test_two_ranks(name: str, pins: str, microbatches: int, pools: dict[int, Pool]) -> None:
    assert recomputed(plan_of(name, pinned(pins, 8, microbatches), 2))
    check(name, pins, microbatches, pools)


@pytest.mark.parametrize(
    ("name", "pins", "limit"),
    [
        ("gpt2", "recompute=full", None),
        ("llama", "micro_batch=2 recompute=selective", None),
        ("vit", "micro_batch=8", 1_500_000),
    ],
)
def test_one_process(name: str, pins: str, limit: int | None) -> None:
    """The last one is a search for what to run again under a memory limit."""
    plan = plan_of(name, pins, 1, memory_limit=limit, device="cpu")
    assert recomputed(plan)
    wrong = [d for d in differences(name, plan) if not d["ok"]]
    assert not wrong


def gradients(name: str, plan: Plan, batch: int = 8) -> tuple[dict[str, Any], Any]:
    """Whole gradients and loss of one step under a fixed seed, dropout on."""
    torch.manual_seed(5)
    case, pm = parallel(name, plan, batch)
    loss = loss_of(pm(*case.args, **case.kwargs))
    loss.backward()
    return whole_gradients(pm), loss.detach()


@pytest.mark.parametrize("pins", ["", "micro_batch=2"])
def test_dropout_draws_the_same_masks_again(pins: str) -> None:
    plan = plan_of("gpt2-dropout", f"recompute=full {pins}", 1)
    kept = without(plan)
    drops = [op for region in plan.regions for op in region.recompute if "dropout" in op]
    assert len(drops) > 1
    found, loss = gradients("gpt2-dropout", plan)
    wanted, other = gradients("gpt2-dropout", kept)
    assert torch.equal(loss, other)
    same(found, wanted)


def without(plan: Plan) -> Plan:
    """The same plan, everything kept."""
    regions = tuple(msgspec.structs.replace(region, recompute=()) for region in plan.regions)
    return msgspec.structs.replace(plan, regions=regions)


# -- what runs again


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] += name in PRODUCTS or "attention" in name
        return func(*args, **(kwargs or {}))


def counts(name: str, plan: Plan) -> tuple[int, int, int]:
    """Products forward and backward, and kernels of attention in the backward pass that are forward ones."""
    case, pm = parallel(name, plan)
    with Products() as ahead:
        loss = loss_of(pm(*case.args, **case.kwargs))
    with Products() as back:
        loss.backward()
    again = sum(n for op, n in back.calls.items() if "attention" in op and "backward" not in op)
    return *(sum(n for op, n in c.calls.items() if op in PRODUCTS) for c in (ahead, back)), again


def test_full_runs_the_products_of_layers_again_and_selective_attention_alone() -> None:
    layers, plan = 2, plan_of("llama", "recompute=full", 1)
    layer = next(region for region in plan.regions if region.repeats == layers)
    products = {op.op for op in layer.ops if op.target in ("aten.linear", "aten.mm", "aten.matmul")}
    ahead, back, kernels = counts("llama", without(plan))
    assert kernels == 0
    more = layers * len(products & set(layer.recompute))
    assert more >= 5 * layers
    assert counts("llama", plan) == (ahead, back + more, layers)
    assert counts("llama", plan_of("llama", "recompute=selective", 1)) == (ahead, back, layers)


def test_what_is_marked_is_what_the_plan_says() -> None:
    plan = plan_of("llama", "recompute=selective", 1)
    case, pm = parallel("llama", plan)
    body = pm.program(*case.args, **case.kwargs).lowered.body
    assert sum(bool(node.meta.get(AGAIN)) for node in body.graph.nodes) == 2


@pytest.mark.parametrize(("pins", "hooked"), [("recompute=none", False), ("recompute=selective", True)])
def test_saved_tensors_are_looked_at_where_something_is_made_again(pins: str, hooked: bool) -> None:
    case, pm = parallel("llama", plan_of("llama", pins, 1))
    with pm.program(*case.args, **case.kwargs).regather():
        assert (active_regather() is not None) == hooked


def test_two_backward_passes_and_half_of_one() -> None:
    plan = plan_of("llama", "recompute=full", 1)
    case, pm = parallel("llama", plan)
    wanted, _ = gradients("llama", without(plan))
    loss = loss_of(pm(*case.args, **case.kwargs))
    last = next(p for n, p in pm.named_parameters() if n.endswith("lm_head.weight"))
    torch.autograd.grad(loss, last, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    same({n: g if g is None else g / 2 for n, g in whole_gradients(pm).items()}, wanted)


def test_second_derivatives_and_changed_parameters_are_refused() -> None:
    plan = plan_of("llama", "recompute=full", 1)
    case, pm = parallel("llama", plan)
    with pytest.raises(UsageError, match="create_graph"):
        loss_of(pm(*case.args, **case.kwargs)).backward(create_graph=True)
    loss = loss_of(pm(*case.args, **case.kwargs))
    with torch.no_grad():
        for p in pm.parameters():
            p.add_(1.0)
    with pytest.raises(UsageError, match="modified between"):
        loss.backward()


# -- what it communicates


@pytest.mark.parametrize(
    ("name", "pins"),
    [
        ("llama", "tp=2 sequence_parallel=on recompute=full"), ("llama", "tp=2 sequence_parallel=on recompute=selective"),
        ("gpt2", "tp=2 recompute=full micro_batch=2"), ("gpt2", "dp=2 zero=3 recompute=full micro_batch=2"),
        ("llama", "dp=2 zero=3 recompute=selective"), ("bert", "dp=2 zero=0 recompute=full"),
    ],
)  # fmt: skip
def test_prediction_is_what_ran(name: str, pins: str, ranks2: Pool) -> None:
    plan = plan_of(name, pins, 2)
    assert recomputed(plan)
    for found in ranks2.run(records, name, plan):
        assert traffic(found) == {(t.collective, t.axis): (t.count, t.bytes) for t in plan.predicted.traffic}


def test_copies_are_gathered_again() -> None:
    """Some plan of sequence parallelism gathers a copy again that the same plan without recompute keeps."""
    plan = plan_of("llama", "tp=2 sequence_parallel=on recompute=full", 2)
    assert any(" -> " in text for region in plan.regions for text in region.recompute)


# -- what it keeps


def peak(name: str, plan: Plan, batch: int) -> int:
    """Rank function: bytes at the peak of a step in steady state."""
    case, pm = parallel(name, plan, batch)
    optimizer = torch.optim.AdamW(pm.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss_of(pm(*case.args, **case.kwargs)).backward()
        optimizer.step()

    step()
    return measure_step(step, pm, optimizer, case.args, dict(case.kwargs)).bytes


@pytest.mark.parametrize(
    ("name", "pins"),
    [
        ("llama", ""),
        ("gpt2", ""),
        pytest.param("llama", "dp=2 zero=3", marks=pytest.mark.nightly),
        ("gpt2", "tp=2"),
        pytest.param("llama", "tp=2 sequence_parallel=on", marks=pytest.mark.nightly),
    ],
)
def test_peaks_are_lower_and_as_predicted(name: str, pins: str, ranks2: Pool) -> None:
    world = 2 if pins else 1
    data = 2 if "dp=2" in pins else 1
    measured = []
    for policy in ("none", "selective", "full"):
        texts = f"{pins} recompute={policy} dtype=fp32 micro_batch={MANY // data}"
        plan = plan_of(name, texts, world, MANY, device="cpu")
        found = max(ranks2.run(peak, name, plan, MANY)) if pins else peak(name, plan, MANY)
        measured.append(found)
        predicted = plan.predicted.peak_bytes_per_device
        assert 0.92 <= predicted / found <= 1.08, (policy, predicted, found, plan.predicted.memory)
    assert measured[2] < measured[1] < measured[0]


def test_a_limit_that_needs_recompute_is_kept() -> None:
    """Where nothing fits that keeps everything, what to run again is searched for."""
    free = plan_of("llama", f"micro_batch={MANY} dtype=fp32", 1, MANY, device="cpu")
    limit = int(0.8 * free.predicted.peak_bytes_per_device)
    plan = plan_of("llama", f"micro_batch={MANY} dtype=fp32", 1, MANY, device="cpu", memory_limit=limit)
    assert recomputed(plan)
    assert not recomputed(free)
    assert plan.predicted.peak_bytes_per_device <= plan.memory_limit_bytes == limit
    assert peak("llama", plan, MANY) <= 1.01 * limit


def test_the_case_has_no_dropout_of_its_own() -> None:
    """The masks of `test_dropout_draws_the_same_masks_again` matter: the loss changes with the seed."""
    plan = plan_of("gpt2-dropout", "recompute=full", 1)
    case, pm = parallel("gpt2-dropout", plan)
    first, second = (float(loss_of(pm(*case.args, **case.kwargs))) for _ in range(2))
    assert first != second
    assert build("gpt2-dropout").model.config.resid_pdrop > 0

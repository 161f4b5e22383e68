"""Collectives run beside computing: in which order they are launched and waited for, and what a trace and a slow link show."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import torch
from links import SlowLink
from pool import Pool
from running import differences, parallel, plan_of, traffic
from shardwright.planner.plan import OverlapPlan, Plan
from shardwright.runtime.collectives import CommLedger, Pending, observed, phase
from shardwright.runtime.losses import loss_of
from shardwright.runtime.tracing import COMPUTE, LANES, WAITING, trace_step
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "addmm", "bmm"}
Said = tuple[str, int, str]
"""("launch" or "wait", number of the collective, what it is) and ("product", 0, "")."""


@dataclass
class Order:
    """An observer that writes down launches and waits."""

    axes: dict[str, str]
    said: list[Said] = field(default_factory=list)
    numbers: dict[Pending, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def launching(self, pending: Pending) -> Iterator[None]:
        number = self.numbers[pending] = len(self.numbers)
        self.said.append(("launch", number, f"{pending.collective} {self.axes[pending.group]} {phase()}"))
        yield

    @contextlib.contextmanager
    def waiting(self, pending: Pending) -> Iterator[None]:
        self.said.append(("wait", self.numbers[pending], ""))
        yield


class Products(TorchDispatchMode):
    """Writes down matrix products between them."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.order.said.append(("product", 0, ""))
        return func(*args, **(kwargs or {}))


def spoken(name: str, plan: Plan, batch: int) -> list[Said]:
    """Rank function: what one step does, in order; a "done" where `backward()` has returned."""
    case, pm = parallel(name, plan, batch)
    order = Order(pm.axis_names)
    with observed(order), Products(order):
        loss_of(pm(*case.args, **case.kwargs)).backward()
    return [*order.said, ("done", 0, "")]


def between(said: list[Said], what: str) -> list[int]:
    """Products between launch and wait of every collective that is `what`, in order of launch."""
    found = []
    for i, (kind, number, name) in enumerate(said):
        if kind == "launch" and name.startswith(what):
            end = next(k for k in range(i, len(said)) if said[k][:2] == ("wait", number))
            found.append(sum(kind == "product" for kind, _, _ in said[i:end]))
    return found


def launches(said: list[Said]) -> list[str]:
    return [name for kind, _, name in said if kind == "launch"]


def without(plan: Plan) -> Plan:
    """The same plan with nothing beside computing."""
    return msgspec.structs.replace(plan, overlap=OverlapPlan(0, 0))


def test_reductions_run_while_the_backward_pass_goes_on(ranks2: Pool) -> None:
    plan = plan_of("llama", "dp=2 zero=0 dtype=fp32", 2)
    one, other = ranks2.run(spoken, "llama", plan, 8)
    assert launches(one) == launches(other)
    found = between(one, "all_reduce dp backward")
    assert len(found) == sum(region.repeats for region in plan.regions if region.parameters)
    assert all(found[:-2]), "beside the first layer there is the embedding only, which has no products"
    assert found == sorted(found, reverse=True), "all are waited for at the end"
    assert between(ranks2.run(spoken, "llama", without(plan), 8)[0], "all_reduce dp backward") == [0] * len(found)


def test_groups_are_gathered_ahead(ranks2: Pool) -> None:
    plan = plan_of("llama", "dp=2 zero=3 dtype=fp32", 2)
    one, other = ranks2.run(spoken, "llama", plan, 8)
    assert launches(one) == launches(other)
    forward, backward = between(one, "all_gather dp forward"), between(one, "all_gather dp backward")
    assert len(forward) > len(backward) > 1
    assert all(forward[2:]), "the first has no unit before it, and the second's is an embedding"
    assert len(backward) > 2
    assert all(backward[2:]), (
        "the first has no unit before it, and the second's is a norm: the head's gradients are there"
    )
    scattered = between(one, "reduce_scatter dp backward")
    assert all(scattered[:-2]), "as with reductions"
    alone = ranks2.run(spoken, "llama", without(plan), 8)[0]
    assert between(alone, "") == [0] * len(launches(alone))
    assert sorted(launches(alone)) == sorted(launches(one)), "the same collectives, launched at other times"


def test_weights_wait_beside_the_gradient_of_their_input(ranks2: Pool) -> None:
    plan = plan_of("llama", "dp=1 tp=2 dtype=fp32", 2)
    one, other = ranks2.run(spoken, "llama", plan, 8)
    assert launches(one) == launches(other)
    found = between(one, "all_reduce tp backward")
    layers = [n for n in found if n]
    assert len(layers) >= 4, "two layers, each with three products that take one sum and two that take another"
    assert set(layers) >= {2, 3}
    alone = ranks2.run(spoken, "llama", without(plan), 8)[0]
    assert sorted(launches(alone)) == sorted(launches(one))
    assert between(alone, "") == [0] * len(launches(alone))


@pytest.mark.parametrize("pins", ["zero=2 micro_batch=1", "zero=1", "zero=3 micro_batch=2"])
def test_nothing_is_left_under_way(pins: str, ranks2: Pool) -> None:
    plan = plan_of("llama", f"dp=2 {pins} dtype=fp32", 2)
    for said in ranks2.run(spoken, "llama", plan, 8):
        flying: set[int] = set()
        for kind, number, _ in said:
            flying ^= {number} if kind in ("launch", "wait") else set()
        assert not flying


def stepping(plan: Plan) -> tuple[list[float], list[float], list[str]]:
    """Rank function: gradient norms seen by hooks, after two backward passes that add up, and after clipping; their order."""
    case, pm = parallel("llama", plan, 8)
    seen: dict[str, float] = {}
    for name, p in pm.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.__setitem__(name, _norm(p.grad)))
    loss_of(pm(*case.args, **case.kwargs)).backward()
    first = [seen[n] for n, _ in pm.named_parameters()]
    assert first == [_norm(p.grad) for p in pm.parameters()], "a hook sees a complete gradient"
    loss_of(pm(*case.args, **case.kwargs)).backward()
    twice = [_norm(p.grad) for p in pm.parameters()]
    total = torch.nn.utils.clip_grad_norm_(pm.parameters(), 1e-3)
    return [*first, float(total.full_tensor() if hasattr(total, "full_tensor") else total)], twice, list(seen)


def _norm(grad: Any) -> float:
    local = grad.to_local() if hasattr(grad, "to_local") else grad
    return float(local.double().norm())


@pytest.mark.parametrize("pins", ["zero=0", "zero=3"])
def test_users_see_complete_gradients(pins: str, ranks2: Pool) -> None:
    plan = plan_of("llama", f"dp=2 {pins}", 2)
    found, wanted = ranks2.run(stepping, plan), ranks2.run(stepping, without(plan))
    for (first, twice, seen), (same, double, _) in zip(found, wanted, strict=True):
        assert first == pytest.approx(same, rel=1e-12)
        assert twice == pytest.approx(double, rel=1e-12)
        assert len(seen) == len(twice)


def counted(name: str, plan: Plan, batch: int) -> list[tuple[str, str, int, str]]:
    """Rank function: what the ledger has of a step whose backward pass runs under it, too."""
    case, pm = parallel(name, plan, batch)
    with CommLedger(pm.axis_names) as ledger:
        loss_of(pm(*case.args, **case.kwargs)).backward()
    return [(r.collective, r.axis, r.bytes, r.phase) for r in ledger.records]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "pins", ["dp=2 tp=2 zero=3", "dp=4 zero=2 micro_batch=1", "dp=2 tp=2 zero=1 sequence_parallel=on"]
)
def test_the_same_collectives_and_gradients(pins: str, ranks4: Pool) -> None:
    plan = plan_of("llama-deep", pins, 4)
    one = ranks4.run(counted, "llama-deep", plan, 8)[0]
    other = ranks4.run(counted, "llama-deep", without(plan), 8)[0]
    assert sorted(one) == sorted(other)
    assert traffic(one) == traffic(other)
    assert all(d["ok"] for d in ranks4.run(differences, "llama-deep", plan)[0])


def traced(name: str, plan: Plan, batch: int) -> tuple[str, int]:
    """Rank function: the trace of a step as text, and how many collectives it makes."""
    case, pm = parallel(name, plan, batch)

    def step() -> None:
        loss_of(pm(*case.args, **case.kwargs)).backward()

    step()
    with CommLedger(pm.axis_names) as ledger:
        found = trace_step(step, pm.axis_names)
    return json.dumps(found), len(ledger.records)


def test_a_trace_shows_collectives_beside_compute(ranks2: Pool) -> None:
    plan = plan_of("llama", "dp=2 zero=0 dtype=fp32", 2)
    text, count = ranks2.run(traced, "llama", plan, 8)[0]
    events = [e for e in json.loads(text)["traceEvents"] if e.get("pid") == LANES]
    lane_of = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans: dict[str, list[dict[str, Any]]] = {name: [] for name in lane_of.values()}
    for e in events:
        if e["ph"] == "X":
            spans[lane_of[e["tid"]]].append(e)
    assert {COMPUTE, "dp", WAITING} <= spans.keys()
    assert len(spans["dp"]) + sum(len(spans[a]) for a in spans if "+" in a) == count
    reductions = [e for e in spans["dp"] if e["args"]["phase"] == "backward"]
    beside = [any(_meet(e, c) for c in spans[COMPUTE]) for e in reductions]
    assert any(beside), "some reduction is under way while ops run"
    assert all(e["args"]["bytes"] > 0 for e in reductions)


def _meet(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["ts"] < b["ts"] + b["dur"] and b["ts"] < a["ts"] + a["dur"]


def blocked(name: str, plans: tuple[Plan, ...], batch: int, rounds: int) -> list[tuple[float, float]]:
    """Rank function: (seconds of a step, seconds of it that the rank waited for a slow link), per plan the least of some rounds."""
    made = [parallel(name, plan, batch) for plan in plans]
    found = [(float("inf"), float("inf"))] * len(plans)
    for _ in range(rounds):
        for i, (case, pm) in enumerate(made):
            link = SlowLink(alpha=0.02, bandwidth=1e9)
            with observed(link):
                begin = time.monotonic()
                loss_of(pm(*case.args, **case.kwargs)).backward()
                seconds = time.monotonic() - begin
            found[i] = min(found[i], (seconds, link.blocked))
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("pins", ["zero=0", "zero=3"])
def test_a_slow_link_is_hidden(pins: str, ranks2: Pool) -> None:
    plan = plan_of("llama-wide", f"dp=2 {pins} dtype=fp32", 2)
    (with_, waited), (alone, exposed) = ranks2.run(blocked, "llama-wide", (plan, without(plan)), 8, 6)[0]
    assert waited < 0.6 * exposed, (waited, exposed)
    assert with_ < alone - 0.5 * (exposed - waited)

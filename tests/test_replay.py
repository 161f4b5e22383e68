"""Replayed plans: the seconds and peaks of every rank are those that the plan predicts, and the trace holds them."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from shardwright.errors import PlanError
from shardwright.planner.cluster import Cluster
from shardwright.planner.counted import counts_bytes
from shardwright.planner.outline import Outline
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan
from shardwright.planner.replay import Replay, replay
from shardwright.planner.solve import Request, solve
from shardwright.planner.trace import trace_events
from solver_outlines import FP32, SOURCE, FakePrices, transformer
from test_region import cluster

PINS = (
    ("pp=2", "schedule=1f1b"), ("pp=4", "schedule=gpipe"), ("pp=2", "schedule=zb-h1"), ("pp=2", "vpp=2", "schedule=interleaved"),
    ("pp=1", "tp=2"), ("pp=2", "recompute=full", "micro_batch=1", "schedule=1f1b"),
)  # fmt: skip


def devices(count: int) -> Cluster:
    """Those of the tests, taken for GPUs."""
    made = cluster(count)
    return replace(made, device=replace(made.device, kind="gpu"))


@functools.cache
def model() -> Outline:
    return transformer(layers=4)


@functools.cache
def made(pins: tuple[str, ...]) -> tuple[Plan, Replay]:
    request = Request(SOURCE, "adamw", FP32, 10**9, parse_pins(pins))
    plan = solve(model(), devices(4), FakePrices(), request)
    return plan, replay(plan, model(), devices(4), FakePrices())


@pytest.mark.parametrize("pins", PINS, ids=" ".join)
def test_a_replay_takes_what_the_plan_predicts(pins: tuple[str, ...]) -> None:
    plan, found = made(pins)
    assert found.timeline.step_seconds == pytest.approx(plan.predicted.step_seconds, rel=1e-12)
    assert len(found.memory) == plan.pipeline.ranks
    assert found.alike * plan.pipeline.ranks == plan.ranks
    assert not counts_bytes(plan, devices(4))  # else a plan's own bytes are those of its ops
    for stage in plan.stages:
        assert found.memory[stage.rank].peak_bytes == pytest.approx(stage.peak_bytes, rel=1e-9)


@pytest.mark.parametrize("pins", PINS, ids=" ".join)
def test_bytes_by_cause_add_up_to_those_of_the_simulator(pins: tuple[str, ...]) -> None:
    _, found = made(pins)
    for own, curve in zip(found.memory, found.timeline.memory, strict=True):
        assert own.seconds == curve.seconds
        assert all(min(amounts) >= -1e-6 for amounts in own.causes.values())
        standing = own.peak_bytes - curve.peak_bytes
        assert standing == pytest.approx(sum(own.causes[c][0] for c in own.causes if c not in ("saved", "temporaries")))


def test_lanes_of_the_trace_add_up_to_what_ranks_are_busy() -> None:
    _, found = made(PINS[0])
    events = trace_events(found.timeline)["traceEvents"]
    for rank, busy in enumerate(found.timeline.busy_seconds):
        lane = [e["dur"] for e in events if e["ph"] == "X" and e["pid"] == rank and e["cat"] == "compute"]
        assert sum(lane) == pytest.approx(busy * 1e6)


def test_a_plan_without_stages_has_no_timeline() -> None:
    request = Request(SOURCE, "adamw", FP32, 10**9, parse_pins(()), runnable=True)
    plan = solve(model(), devices(1), FakePrices(), request)
    with pytest.raises(PlanError, match="no stages"):
        replay(plan, model(), devices(1), FakePrices())

"""Replayed plans: the seconds and peaks of every rank are those that the plan predicts, and the trace holds them."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from shardwright.errors import PlanError
from shardwright.planner.alive import REST
from shardwright.planner.cluster import Cluster
from shardwright.planner.counted import counts_bytes
from shardwright.planner.outline import Outline
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan
from shardwright.planner.replay import Replay, as_data, replay
from shardwright.planner.solve import Request, solve
from shardwright.planner.spans import COMPUTE, SEND
from shardwright.planner.trace import MICROSECONDS, trace_events
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


@pytest.mark.parametrize("pins", PINS, ids=" ".join)
def test_what_is_alive_at_the_peak_is_all_of_it(pins: tuple[str, ...]) -> None:
    plan, found = made(pins)
    for rank, (alive, memory) in enumerate(zip(found.alive, found.memory, strict=True)):
        assert sum(sum(own.values()) for own in alive.values()) == pytest.approx(memory.peak_bytes, abs=10)
        held = {run.use for stage in plan.stages if stage.rank == rank for run in stage.runs}
        assert set(alive) == held | {REST}
        assert not {"parameters", "optimizer", "saved", "gathered"} & set(alive[REST])
        total = sum(own.get("parameters", 0.0) for own in alive.values())
        assert total == pytest.approx(memory.causes["parameters"][0])


@pytest.mark.parametrize("pins", PINS, ids=" ".join)
def test_lanes_add_up_to_the_seconds_by_cause(pins: tuple[str, ...]) -> None:
    plan, found = made(pins)
    total: dict[str, float] = defaultdict(float)
    for span in (span for own in found.spans for span in own):
        total[span.cause] += span.seconds / len(found.spans)
    total.pop(SEND, 0.0)
    assert dict(total) == pytest.approx({c: s for c, s in plan.predicted.seconds.items() if s}, rel=1e-9, abs=1e-12)
    for own, tasks in zip(found.spans, found.timeline.tasks, strict=True):
        working = [s for s in own if s.lane != "pp"]
        assert sum(s.seconds for s in working) == pytest.approx(plan.predicted.step_seconds)
        assert all(a.end <= b.start + 1e-12 for a, b in pairwise(working)), "a rank does one thing at a time"
        assert sum(t.lane != COMPUTE for t in tasks) == sum(s.lane == "pp" for s in own)


@pytest.mark.parametrize("pins", PINS, ids=" ".join)
def test_the_trace_holds_every_span_and_the_bytes(pins: tuple[str, ...]) -> None:
    _, found = made(pins)
    events = json.loads(json.dumps(trace_events(found)))["traceEvents"]
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    for rank, (own, curve) in enumerate(zip(found.spans, found.memory, strict=True)):
        drawn = [e for e in events if e["ph"] == "X" and e["pid"] == rank]
        assert [(lanes[rank, e["tid"]], e["cat"], e["ts"], e["dur"]) for e in drawn] == [
            (s.lane, s.cause, s.start * MICROSECONDS, s.seconds * MICROSECONDS) for s in own
        ]
        counters = [e["args"] for e in events if e["ph"] == "C" and e["pid"] == rank]
        assert max(sum(amounts.values()) for amounts in counters) == pytest.approx(curve.peak_bytes)


def test_lanes_of_communication_are_named_by_their_axes() -> None:
    _, found = made(("pp=1", "tp=2"))
    lanes = {s.cause: s.lane for s in found.spans[0]}
    assert (lanes["activation_communication"], lanes["parameter_communication"]) == ("tp", "dp")


def test_plain_data_has_what_the_replay_has() -> None:
    plan, found = made(PINS[0])
    data = json.loads(json.dumps(as_data(found)))
    assert data["step_seconds"] == found.timeline.step_seconds
    assert [len(rank["spans"]) for rank in data["ranks"]] == [len(own) for own in found.spans]
    peaks = [max(map(sum, zip(*rank["memory"]["bytes"].values(), strict=True))) for rank in data["ranks"]]
    assert max(peaks) == pytest.approx(plan.memory["peak_bytes"], rel=1e-9)
    assert sum(plan.memory["bytes"].values()) == plan.memory["peak_bytes"]


def test_a_plan_without_stages_has_no_timeline() -> None:
    request = Request(SOURCE, "adamw", FP32, 10**9, parse_pins(()), runnable=True)
    plan = solve(model(), devices(1), FakePrices(), request)
    with pytest.raises(PlanError, match="no stages"):
        replay(plan, model(), devices(1), FakePrices())

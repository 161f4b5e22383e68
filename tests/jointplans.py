"""Plans of the joint search for its tests: small outlines, what is asked of them, and what holds for every plan."""

from __future__ import annotations

from functools import cache

import msgspec
import pytest
from attention_outlines import Form, decoder
from shardwright.planner.assign import assign
from shardwright.planner.cluster import Cluster, default_limit_bytes
from shardwright.planner.outline import Outline
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan, Precision, Source
from shardwright.planner.plancheck import problems
from shardwright.planner.prices import Prices
from shardwright.planner.repricing import reprice
from shardwright.planner.solve import Request, solve
from shardwright.profiles.devices import parse_cluster
from solver_outlines import transformer

BF16 = Precision("bf16-mixed", "bfloat16", "float32", "float32", "float32")
SPEC = "h100-sxm:8"


@cache
def cluster(spec: str = SPEC) -> Cluster:
    return parse_cluster(spec)


@cache
def model() -> Outline:
    return transformer(layers=6, batch=16, seq=512, hidden=512, heads=8, vocab=1024)


@cache
def attending(seq: int = 512) -> Outline:
    return decoder(Form(layers=4, batch=16, seq=seq, heads=8, width=64, vocab=1024))


def ask(outline: Outline, *pins: str, spec: str = SPEC, limit: int | None = None) -> Request:
    source = Source("module", "test", outline.batch)
    found = limit if limit is not None else default_limit_bytes(cluster(spec))
    return Request(source, "adamw", BF16, found, parse_pins(pins))


def plan_with(outline: Outline, *pins: str, spec: str = SPEC, limit: int | None = None) -> Plan:
    request = ask(outline, *pins, spec=spec, limit=limit)
    return solve(outline, cluster(spec), Prices(cluster(spec), "bfloat16"), request)


@cache
def free(which: str = "model", spec: str = SPEC) -> Plan:
    return plan_with({"model": model, "attending": attending}[which](), spec=spec)


@cache
def made(*pins: str) -> Plan:
    """The plan of `model()` under pins, made once for all tests that look at it."""
    return plan_with(model(), *pins) if pins else free()


@cache
def ringed() -> Plan:
    return plan_with(attending(), "cp=2")


def again(plan: Plan, outline: Outline, spec: str = SPEC) -> Plan:
    return reprice(plan, outline, cluster(spec), Prices(cluster(spec), "bfloat16"))


def units(outline: Outline) -> list[tuple[str, int]]:
    return [(region.name, k) for region in outline.regions for k in range(region.repeats)]


def check(plan: Plan, outline: Outline) -> None:
    """What holds for every plan of the joint search."""
    assert list(problems(plan)) == []
    assign(plan, outline)
    owner = {entry.name: entry.region or entry.name for entry in plan.regions}
    held = [(owner[run.use], k) for s in plan.stages for run in s.runs for k in range(run.first, run.first + run.count)]
    assert held == units(outline)
    assert plan.predicted.step_seconds > 0
    assert plan.search.bound_seconds <= plan.predicted.step_seconds
    seconds, bound = plan.predicted.step_seconds, plan.search.bound_seconds
    assert plan.search.gap == pytest.approx((seconds - bound) / seconds, abs=1e-12)
    assert all(0 < stage.peak_bytes <= plan.memory_limit_bytes for stage in plan.stages)
    assert max(s.peak_bytes for s in plan.stages) == pytest.approx(plan.predicted.peak_bytes_per_device, abs=16)
    best = min(r.step_seconds for r in plan.search.shapes if r.status == "solved" and r.step_seconds is not None)
    assert best == pytest.approx(seconds, rel=1e-9)


def sizes(plan: Plan) -> dict[str, int]:
    return {"pp": plan.pipeline.ranks, **{axis.name: axis.size for axis in plan.mesh}}


def zero_levels(plan: Plan) -> set[int]:
    return {p.zero for region in plan.regions for p in region.parameters}


def replaced(struct, **fields):
    return msgspec.structs.replace(struct, **fields)


@cache
def two_stages() -> Plan:
    return plan_with(model(), "pp=2", "dp=4", "recompute=full", "zero=1", "schedule=1f1b", "micro_batch=1")


@cache
def small() -> Outline:
    return transformer(layers=3, batch=4, seq=512, hidden=512, heads=8, vocab=1024)

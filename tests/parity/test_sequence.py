"""Positions split over a context axis, and experts over an expert axis, at parity with the eager modules."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from models import build
from pool import Pool
from running import differences
from shardwright.api import make_plan
from shardwright.planner.plan import Plan

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


CASES = [("gpt2", "cp=2 tp=1", 2), ("llama", "cp=2 tp=1 zero=3 micro_batch=2", 4), ("mixtral", "ep=2 tp=1 cp=1", 2)]


@pytest.mark.parametrize(("name", "pins", "world"), CASES)
def test_parity(name: str, pins: str, world: int, pools: dict[int, Pool]) -> None:
    plan = joint_plan(name, pins, world)
    found = pools[world].run(differences, name, plan)
    assert all(answer == found[0] for answer in found)
    assert [d for d in found[0] if not d["ok"]] == []
    assert {d["kind"] for d in found[0]} == {"loss", "gradient", "parameter after 3 steps"}

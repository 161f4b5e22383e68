"""Positions split over a context axis, and experts over an expert axis, at parity with the eager modules."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from models import build
from pool import Pool
from running import differences, eager
from shardwright.api import make_plan
from shardwright.passes.experts.interface import own_loops
from shardwright.passes.lift import Lift
from shardwright.planner.plan import Plan
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


CASES = [("gpt2", "cp=2 tp=1", 2), ("llama", "cp=2 tp=1 zero=3 micro_batch=2", 4), ("mixtral", "ep=2 tp=1 cp=1", 2)]


@pytest.mark.parametrize(("name", "pins", "world"), CASES)
def test_parity(name: str, pins: str, world: int, pools: dict[int, Pool]) -> None:
    plan = joint_plan(name, pins, world)
    found = pools[world].run(differences, name, plan)
    assert all(answer == found[0] for answer in found)
    assert [d for d in found[0] if not d["ok"]] == []
    assert {d["kind"] for d in found[0]} == {"loss", "gradient", "parameter after 3 steps"}


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

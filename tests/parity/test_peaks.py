"""Predicted against measured peak memory of a training step, by the allocator's events."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES
from pool import Pool
from running import parallel, plan_of
from shardwright.planner.plan import Plan
from shardwright.runtime.losses import loss_of
from shardwright.runtime.monitor import measure_step
from test_parity import PINS, pinned, ranks_of

SAMPLE = [
    ("gpt2", "dp=2 zero=2", 4), ("llama", "dp=2 zero=3", 1), ("vit", "", 1),
]  # fmt: skip
"""(case, pins, microbatches) run every time."""


def peak(name: str, plan: Plan, batch: int) -> int:
    """Rank function: bytes at the peak of a step in steady state."""
    case, pm = parallel(name, plan, batch)
    optimizer = torch.optim.AdamW([p for p in pm.parameters() if p.requires_grad])

    def step() -> None:
        optimizer.zero_grad()
        loss_of(pm(*case.args, **case.kwargs)).backward()
        optimizer.step()

    step()
    return measure_step(step, pm, optimizer, case.args, case.kwargs).bytes


def check(name: str, pins: str, microbatches: int, pools: dict[int, Pool]) -> None:
    world = ranks_of(pins)
    batch = 16 if world == 4 else 8
    plan = plan_of(name, pinned(f"{pins} dtype=fp32", batch, microbatches), world, batch, device="cpu")
    measured = max(pools[world].run(peak, name, plan, batch))
    predicted = plan.predicted.peak_bytes_per_device
    assert 0.85 <= predicted / measured <= 1.15, (predicted, measured, plan.mesh, plan.predicted.memory)


@pytest.mark.parametrize(("name", "pins", "microbatches"), SAMPLE)
def test_sample(name: str, pins: str, microbatches: int, pools: dict[int, Pool]) -> None:
    check(name, pins, microbatches, pools)


@pytest.mark.nightly
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("pins", [p for p in PINS if "sequence" not in p])
@pytest.mark.parametrize("name", FAMILIES)
def test_matrix(name: str, pins: str, microbatches: int, pools: dict[int, Pool]) -> None:
    check(name, pins, microbatches, pools)

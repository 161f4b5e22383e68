"""Offload executed: the same numbers as with everything on the device, fewer bytes there, and every copy as predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from offloading import offloaded
from pool import Pool
from running import parallel
from shardwright.planner.plan import Plan
from shardwright.runtime import parameters
from shardwright.runtime.losses import loss_of
from shardwright.runtime.monitor import measure_step
from shardwright.runtime.offload.memory import is_host

STATES = "offload=optimizer offload!=params offload!=activations"
PASSING = "offload=optimizer offload!=activations"
STEPS = 3


def trained(name: str, plan: Plan, batch: int = 8) -> dict[str, Any]:
    """Rank function: three steps of the user's own loop; losses, parameters, the peak of a further step and its copies."""
    case, pm = parallel(name, plan, batch)
    optimizer = torch.optim.AdamW(pm.parameters())
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        loss = loss_of(pm(*case.args, **case.kwargs))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    for _ in range(STEPS):
        step()
    values = {n: parameters.full(p.detach()).clone() for n, p in pm.named_parameters()}
    seen = dict(pm.offload.moved) if pm.offload is not None else {}
    step()
    now = dict(pm.offload.moved) if pm.offload is not None else {}
    moved = {k: (t.in_bytes - seen[k].in_bytes, t.out_bytes - seen[k].out_bytes) for k, t in now.items()}
    hosts = [n for n, p in pm.named_parameters() if is_host(p)]
    grads = all(is_host(p.grad) == is_host(p) for p in pm.parameters() if p.grad is not None)
    peak = measure_step(step, pm, optimizer, case.args, case.kwargs).bytes
    return {"losses": losses[:STEPS], "values": values, "moved": moved, "hosts": hosts, "grads": grads, "peak": peak}


def same_numbers(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Bit for bit."""
    assert found["losses"] == wanted["losses"]
    assert found["values"].keys() == wanted["values"].keys()
    assert all(torch.equal(found["values"][n], wanted["values"][n]) for n in wanted["values"])


@pytest.mark.parametrize(
    "more", ["zero=0", "zero=1", "zero=3", "zero=0 micro_batch=1", "zero=2 micro_batch=1", "zero=3 micro_batch=1"]
)
def test_two_ranks_train_as_without_offload(more: str, ranks2: Pool) -> None:
    """States in host memory under every ZeRO level, parameters too where each rank stores a chunk."""
    resident = ranks2.run(trained, "llama", offloaded("llama", f"dp=2 {more} offload=none", 2))
    for pins in (STATES, PASSING) if "zero=3" in more else (STATES,):
        plan = offloaded("llama", f"dp=2 {more} {pins}", 2)
        for found, wanted in zip(ranks2.run(trained, "llama", plan), resident, strict=True):
            same_numbers(found, wanted)
            assert found["hosts"] and found["grads"]
            assert found["peak"] < wanted["peak"]

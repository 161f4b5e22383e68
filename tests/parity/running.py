"""What the parity tests run on every rank, and plans for it: made once, in the test process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from models import Case, build
from shardwright.api import make_plan
from shardwright.planner.cluster import Cluster
from shardwright.planner.offload import Traffic
from shardwright.planner.plan import Plan
from shardwright.runtime import parameters
from shardwright.runtime.apply import apply
from shardwright.runtime.collectives import CommLedger
from shardwright.runtime.losses import loss_of
from shardwright.runtime.module import ParallelModule
from shardwright.runtime.monitor import measure_step
from shardwright.runtime.verify import verify
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Moved = dict[str, tuple[float, ...]]
"""Bytes in, out, read and written, by class."""
TIGHT = {"atol": 1e-11, "rtol": 1e-11}


@functools.cache
def plan_of(
    name: str, pins: str, world: int, batch: int = 8, device: str | Callable[[int], Cluster] = "h100-sxm", **options: Any
) -> Plan:  # fmt: skip
    """The plan of a case under pins written with spaces between them; computes in float64 unless a dtype is pinned.

    `device` is the name of a device, or makes the cluster of so many.
    """
    case = build(name, batch)
    texts = pins.split()
    if not any(p.startswith("dtype=") for p in texts):
        texts.append("dtype=fp64")
    inputs = dict(case.kwargs) or case.args
    where = f"{device}:{world}" if isinstance(device, str) else device(world)
    return make_plan(case.model, inputs, where, pins=texts, loss_fn=case.loss_fn, **options)


def differences(name: str, plan: Plan, batch: int = 8) -> list[dict[str, Any]]:
    """Rank function: what `verify` finds, as plain fields."""
    case = build(name, batch)
    found = verify(case.model, case.args, case.kwargs, plan, exact_applier(case), case.loss_fn)
    return [d.to_dict() for d in found]


def exact_applier(case: Case) -> Any:
    """`apply` as verification wants it: dropout off, casts lifted."""

    def make(model: Any, args: Any, kwargs: Any, plan: Plan, exact: str) -> ParallelModule:
        return apply(model, args, kwargs, plan, loss_fn=case.loss_fn, exact=exact)

    return make


def parallel(name: str, plan: Plan, batch: int = 8, **options: Any) -> tuple[Case, ParallelModule]:
    """The case and its ParallelModule."""
    case = build(name, batch)
    return case, apply(case.model, case.args, case.kwargs, plan, loss_fn=case.loss_fn, **options)


def records(name: str, plan: Plan, batch: int = 8) -> list[tuple[str, str, int, str]]:
    """Rank function: every collective of one step as (collective, axis, full bytes, phase)."""
    case, pm = parallel(name, plan, batch)
    with CommLedger(pm.axis_names) as ledger:
        loss_of(pm(*case.args, **case.kwargs)).backward()
    return [(r.collective, r.axis, r.bytes, r.phase) for r in ledger.records]


def traffic(found: Sequence[tuple[str, str, int, str]]) -> dict[tuple[str, str], tuple[int, int]]:
    """(count, bytes) by (collective, axis)."""
    total: dict[tuple[str, str], tuple[int, int]] = {}
    for collective, axis, size, _ in found:
        count, bytes_ = total.get((collective, axis), (0, 0))
        total[collective, axis] = count + 1, bytes_ + size
    return total


def moved_bytes(moved: Traffic, before: Traffic | None = None) -> tuple[float, ...]:
    """Bytes in, out, read and written since `before`."""
    then = before or Traffic()
    return tuple(
        getattr(moved, field) - getattr(then, field) for field in ("in_bytes", "out_bytes", "read_bytes", "write_bytes")
    )


@dataclass(frozen=True)
class Observed:
    """What one rank saw: differences to the eager module, collectives by (collective, axis), copies, peak, its pipeline rank."""

    wrong: list[dict[str, Any]]
    traffic: Mapping[tuple[str, str], tuple[int, int]]
    moved: Moved
    peak: int
    stage: int


def observe(name: str, plan: Plan, batch: int = 8) -> Observed:
    """Rank function: run a plan as it is and measure it, then verify it."""
    ran, moved, peak, stage = _measured(name, plan, batch)
    return Observed([d for d in differences(name, plan, batch) if not d["ok"]], ran, moved, peak, stage)


def _measured(name: str, plan: Plan, batch: int) -> tuple[Mapping[tuple[str, str], tuple[int, int]], Moved, int, int]:
    """Collectives, copies and peak of a step in steady state, on inputs in the dtype that is computed in; the pipeline rank."""
    case, pm = parallel(name, plan, batch)
    compute = getattr(torch, plan.precision.compute)

    def own(value: Any) -> Any:
        return value.to(compute) if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tree_map(own, (case.args, dict(case.kwargs)))
    optimizer = torch.optim.AdamW([p for p in pm.parameters() if p.requires_grad])

    def step() -> None:
        optimizer.zero_grad()
        loss_of(pm(*args, **kwargs)).backward()
        optimizer.step()

    step()
    seen = dict(pm.offload.moved) if pm.offload is not None else {}
    with CommLedger(pm.axis_names) as ledger:
        step()
    now = dict(pm.offload.moved) if pm.offload is not None else {}
    ran = traffic([(r.collective, r.axis, r.bytes, r.phase) for r in ledger.records])
    moved = {what: moved_bytes(t, seen.get(what)) for what, t in now.items()}
    return ran, moved, measure_step(step, pm, optimizer, args, kwargs).bytes, pm._core.mesh.stage


def eager(name: str, batch: int = 8) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The original in float64, with its inputs."""
    case = build(name, batch)

    def exact(v: Any) -> Any:
        return v.double() if isinstance(v, Tensor) and v.is_floating_point() else v

    args, kwargs = tree_map(exact, (case.args, case.kwargs))
    return case.model.double(), args, dict(kwargs)


def whole_gradients(pm: ParallelModule) -> dict[str, Tensor | None]:
    """Every gradient as one tensor, by parameter name."""
    return {n: None if p.grad is None else parameters.full(p.grad) for n, p in pm.named_parameters()}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Equal keys, None in the same places, and close values."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(found[name], value, **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


def local_data(plan: Plan, gradients: Callable[[ParallelModule], dict[str, Tensor | None]] = whole_gradients) -> None:
    """Rank function: with data="local" each data rank passes its part, and loss and `gradients` are those of the whole batch."""
    model, _, batch = eager("tied")
    _, pm = parallel("tied", plan, data="local")
    own = 8 // pm.data_size
    mine = {k: v[pm.data_rank * own : (pm.data_rank + 1) * own] for k, v in batch.items()}
    loss = pm(**mine)["loss"]
    torch.testing.assert_close(loss, model(**batch)["loss"], **TIGHT)
    loss.backward()
    model(**batch)["loss"].backward()
    same(gradients(pm), {n: p.grad for n, p in model.named_parameters()})
    with torch.no_grad():
        torch.testing.assert_close(pm(**mine)["loss"], model(**batch)["loss"], **TIGHT)

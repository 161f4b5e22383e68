"""What the parity tests run on every rank, and plans for it: made once, in the test process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from models import Case, build
from shardwright.api import make_plan
from shardwright.planner.plan import Plan
from shardwright.runtime.apply import apply
from shardwright.runtime.collectives import CommLedger
from shardwright.runtime.losses import loss_of
from shardwright.runtime.module import ParallelModule
from shardwright.runtime.verify import verify


@functools.cache
def plan_of(name: str, pins: str, world: int, batch: int = 8, **options: Any) -> Plan:
    """The plan of a case under pins written with spaces between them; computes in float64 unless a dtype is pinned."""
    case = build(name, batch)
    texts = pins.split()
    if not any(p.startswith("dtype=") for p in texts):
        texts.append("dtype=fp64")
    inputs = dict(case.kwargs) or case.args
    return make_plan(case.model, inputs, f"h100-sxm:{world}", pins=texts, loss_fn=case.loss_fn, **options)


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

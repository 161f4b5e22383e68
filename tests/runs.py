"""Hand-made results of runs, and ledger rows made of them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import plans
from shardwright.planner.plan import Plan
from shardwright.profiles.devices import load_device, parse_cluster
from shardwright.profiles.ledger import Entry, entry_of

MACHINE, VERSIONS, STACK = "cpu of a test", "torch 2.11.0+cpu", "eager, attention=flash, kernels=eager, float32"
START = datetime(2026, 1, 31, 12, tzinfo=UTC)


def plan(
    seconds: float = 0.125, calibration: float = 1.0, *, machine: str = MACHINE, limit: int = 14_720_000_000
) -> Plan:  # fmt: skip
    """The hand-made plan for a device of `machine`, predicted to take so long under a calibration."""
    made = plans.plan()
    device = replace(load_device("h100-sxm"), calibration=calibration, sources={"machine": machine})
    cluster = replace(parse_cluster("h100-sxm:4"), device=device).to_dict()
    predicted = msgspec.structs.replace(made.predicted, step_seconds=seconds)
    return msgspec.structs.replace(made, cluster=cluster, predicted=predicted, memory_limit_bytes=limit)


def result(seconds: float = 0.15, *, waited: float = 0.0, **changes: Any) -> dict[str, Any]:
    """What `run` measured on two ranks."""
    rank = {"seconds": [seconds] * 3, "waited_seconds": [waited] * 3, "peak_bytes": 6_000_000_000}
    found = {
        "world_size": 2, "device": MACHINE, "versions": VERSIONS, "compiled": False, "losses": [3.5, 3.25, 3.0, 2.9, 2.8],
        "step_seconds": seconds, "peak_bytes": [6_000_000_000, 6_500_000_000], "ranks": [rank, rank], "verify": [],
        "phase_seconds": {"forward": seconds / 3, "backward": seconds / 2, "optimizer": seconds / 6},
    }  # fmt: skip
    return {**found, **changes}


def entry(seconds: float = 0.15, *, of: Plan | None = None, day: int = 0, **changes: Any) -> Entry:
    """A ledger row."""
    made = entry_of(of or plan(), result(seconds, **changes), START + timedelta(days=day))
    assert made is not None
    return made

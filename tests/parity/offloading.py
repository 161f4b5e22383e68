"""Plans that keep part of the training state behind the device, for tests of their execution."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import msgspec
from models import build
from shardwright.api import make_plan
from shardwright.planner.cluster import Cluster, Host
from shardwright.planner.plan import Plan
from shardwright.profiles.devices import parse_cluster


def cluster(world: int) -> Cluster:
    """CPU devices with host memory and a disk behind them; the CPU keeps up with its link, so no update goes to the device."""
    host = Host(
        1,
        int(1e12),
        1e11,
        1e12,
        1e-12,
        disk_bytes=int(1e13),
        disk_read_bytes_per_second=1e11,
        disk_write_bytes_per_second=1e11,
    )
    return replace(parse_cluster(f"cpu:{world}"), host=host)


@functools.cache
def offloaded(name: str, pins: str, world: int, batch: int = 8, **options: Any) -> Plan:
    """The joint search's plan of a case on `cluster(world)` under pins written with spaces between them."""
    case = build(name, batch)
    texts = pins.split()
    if not any(p.startswith("pp=") for p in texts):
        texts.append("pp=1")
    if not any(p.startswith("dtype=") for p in texts):
        texts.append("dtype=fp64")
    if not any(p.startswith("recompute=") for p in texts):
        texts.append("recompute=none")
    inputs = dict(case.kwargs) or case.args
    return make_plan(case.model, inputs, cluster(world), pins=texts, loss_fn=case.loss_fn, runnable=False, **options)


def saying(plan: Plan, words: tuple[str, ...]) -> Plan:
    """The plan with these words as the offload of all its regions."""
    return msgspec.structs.replace(plan, regions=tuple(msgspec.structs.replace(r, offload=words) for r in plan.regions))

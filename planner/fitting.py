"""Plans held to their memory limit by the bytes that are counted.

The search compares plans by bytes of units, which leave what lies between units to an estimate; what a plan predicts is counted
over its whole graph (planner/counted.py). Where that comes out above the limit, the search is asked again for plans of less.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from ..errors import Infeasible
from .plan import Plan

ROUNDS = 6
"""Searches at most."""

NEAR = 1.02
"""Ratio of two allowances between which no third is tried."""

LESS = "options are compared by bytes of units, under less than the limit since what was found needs more, counted op by op"


def fitting(within: Callable[[int], Plan | None], limit: int) -> Plan | None:
    """The plan of `within`, a search under a limit in bytes, that stays under `limit` as counted; None where none is found."""
    allowed, bound = limit, math.inf
    for _ in range(ROUNDS):
        plan = within(allowed)
        if plan is None:
            return None
        bound, peak = min(bound, plan.search.bound_seconds), plan.predicted.peak_bytes_per_device
        if allowed == limit and peak <= plan.memory_limit_bytes:
            return plan
        if peak <= limit:
            return held_to(plan, limit, bound, LESS)
        allowed = math.floor(allowed * limit / peak / NEAR)
    return None


def held_to(plan: Plan, limit: int, bound: float, *given_up: str) -> Plan:
    """A plan of several searches, with the limit that was asked for, the bound that all of them proved, and what they give up."""
    seconds = plan.predicted.step_seconds
    bound = min(bound, seconds)
    search = msgspec.structs.replace(
        plan.search, bound_seconds=bound, gap=(seconds - bound) / seconds if seconds else 0.0,
        given_up=(*plan.search.given_up, *given_up),
    )  # fmt: skip
    return msgspec.structs.replace(plan, memory_limit_bytes=limit, search=search)


def within_limit(plan: Plan) -> Plan:
    """An edited plan; raises Infeasible where it breaks its memory limit."""
    memory, peak = plan.predicted.memory, plan.predicted.peak_bytes_per_device
    if peak > plan.memory_limit_bytes:
        cause = max(memory, key=lambda c: memory[c])
        raise Infeasible(
            f"the edited plan needs {peak} bytes per device, its limit is {plan.memory_limit_bytes} (most of it: {cause})",
            cause=cause, nearest=(f"--memory-limit {peak}",),
        )  # fmt: skip
    return plan

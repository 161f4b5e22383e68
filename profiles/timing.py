"""Clocks: the usual time of repeated calls, and figures that all ranks of a measurement agree on.

What else runs on a machine only ever makes a call slower, so the lower quartile is taken for its usual time, not the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

MOST_REPEATS = 25
LEAST_REPEATS = 2


@dataclass(frozen=True, slots=True)
class Timing:
    """Usual seconds of a call and their relative spread (half the interquartile range)."""

    seconds: float
    spread: float


def time_call(call: Callable[[], object], budget_seconds: float) -> Timing:
    """Time a call that has run before: 2 to 25 repeats as the budget allows, the same number on every rank."""
    times = [_once(call)]
    # Ranks repeat equally often, so that they load the machine together all along.
    repeats = int(min(MOST_REPEATS, max(LEAST_REPEATS, budget_seconds / max(agree(times[0]), 1e-7))))
    times += [_once(call) for _ in range(repeats - 1)]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(low, (high - low) / 2 / low if low > 0 else 0.0)


def _once(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def agree(value: float) -> float:
    """The largest of the ranks' values, on every rank; also a barrier. The value itself outside a process group."""
    return _reduced(value, dist.ReduceOp.MAX)


def spread_mean(value: float) -> float:
    """The mean of the ranks' values, on every rank; the value itself outside a process group."""
    return _reduced(value, dist.ReduceOp.SUM) / (dist.get_world_size() if dist.is_initialized() else 1)


def _reduced(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    if not dist.is_initialized():
        return value
    held = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(held, op=operation)
    return float(held)

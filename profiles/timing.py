"""Clocks: the usual time of repeated calls, and figures that all ranks of a measurement agree on.

Time that a call stood ready without a processor is not counted (profiles/clock.py), so a busy machine tells what it does when it
is idle. GPU work is waited for: a call has ended when its device has.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .clock import Span, Watch

MOST_REPEATS = 15
LEAST_REPEATS = 3
SAMPLE_SECONDS = 1e-4
"""Shorter calls are timed several at once: looking at the clocks takes about as long."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Usual seconds of a call and their relative spread (half the interquartile range)."""

    seconds: float
    spread: float


def time_call(call: Callable[[], object], budget_seconds: float, *, together: bool = False) -> Timing:
    """Time a call that has run before: 3 to 15 samples as the budget allows, the same number on every rank.

    The median of the calmest half is taken. `together`: the ranks wait for each other inside the call: what delays one delays all.
    """
    once = agree(_sample(call, 1).own)
    calls = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))
    # Ranks repeat equally often, so that they load the machine together all along.
    repeats = int(min(MOST_REPEATS, max(LEAST_REPEATS, budget_seconds / (calls * max(once, 1e-7)))))
    spans = [_sample(call, calls) for _ in range(repeats)]
    times = [span.own / calls for span in calmest(_common(spans) if together else spans)]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(middle, (high - low) / 2 / middle if middle > 0 else 0.0)


def time_difference(
    less: Callable[[], object], more: Callable[[], object], budget_seconds: float, most: int = MOST_REPEATS
) -> Timing:
    """What `more` takes longer than `less`, both run before: the mean of the middle half of up to `most` pairs.

    The two alternate, so that a machine whose speed changes from one second to the next changes it for both. Ranks that work
    for each other go on when the slowest has ended: the largest of theirs counts. The calmest half of the pairs is looked at.
    """
    once = agree(_sample(more, 1).own)
    repeats = int(min(most, max(LEAST_REPEATS, budget_seconds / max(once, 1e-7))))
    pairs = [[_sample(call, 1) for call in (less, more)] for _ in range(repeats)]
    short, long = (_common([pair[i] for pair in pairs]) for i in (0, 1))
    kept = _calm([Span(a.seconds + b.seconds, a.waited + b.waited) for a, b in zip(short, long, strict=True)])
    times = sorted(long[i].own - short[i].own for i in kept)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    middle = statistics.fmean(times[len(times) // 4 : len(times) - len(times) // 4])
    return Timing(middle, (high - low) / 2 / middle if middle > 0 else 0.0)


def _sample(call: Callable[[], object], calls: int) -> Span:
    finish()
    watch = Watch(team=torch.get_num_threads() > 1 and not dist.is_initialized())
    for _ in range(calls):
        call()
    finish()
    return watch.stop()


def finish() -> None:
    """Wait for what this process has started on its GPU, if it uses one."""
    if on_gpu():
        torch.cuda.synchronize()


def calmest(spans: Sequence[Span]) -> list[Span]:
    """The half of the samples that waited least (3 at least): how far waits add up over threads and ranks is not known exactly."""
    return [spans[i] for i in _calm(spans)]


def _calm(spans: Sequence[Span]) -> list[int]:
    """Indices of the calmest half."""
    ordered = sorted(range(len(spans)), key=lambda i: spans[i].waited / max(spans[i].seconds, 1e-12))
    return ordered[: max(LEAST_REPEATS, (len(spans) + 1) // 2)]


def _common(spans: Sequence[Span]) -> list[Span]:
    """Each sample as the slowest rank saw it, with the longest wait of any rank."""
    if not dist.is_initialized():
        return list(spans)
    held = torch.tensor([[s.seconds for s in spans], [s.waited for s in spans]], dtype=torch.float64, device=device())
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return [Span(seconds, waited) for seconds, waited in zip(*held.tolist(), strict=True)]


def device() -> torch.device:
    """Where this measurement runs: the process's GPU where its group is NCCL's, or torch sees one and there is no group."""
    nccl = "nccl" in dist.get_backend() if dist.is_initialized() else on_gpu()
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def on_gpu() -> bool:
    """Whether this process uses a GPU."""
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def agree(value: float) -> float:
    """The largest of the ranks' values, on every rank; also a barrier. The value itself outside a process group."""
    return _reduced(value, dist.ReduceOp.MAX)


def spread_mean(value: float) -> float:
    """The mean of the ranks' values, on every rank; the value itself outside a process group."""
    return _reduced(value, dist.ReduceOp.SUM) / (dist.get_world_size() if dist.is_initialized() else 1)


def _reduced(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    if not dist.is_initialized():
        return value
    held = torch.tensor([value], dtype=torch.float64, device=device())
    dist.all_reduce(held, op=operation)
    return float(held)

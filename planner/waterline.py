"""Where the seconds of a step go, op by op: the waterline of a sequence of ops, and how far each is from its ideal.

Every forward and backward pass of an op takes at least flops / peak ("ideal") and at least bytes / bandwidth; the larger is its
roofline. What it is priced at is divided into parts that add up to it:

    compute   flops / peak
    memory    what bytes / bandwidth takes beyond that
    launch    what starting its kernels takes
    shortfall the rest: kernels reach neither the peak nor the bandwidth of the device whole

Efficiency is ideal seconds over seconds; a sequence's is the mean of its ops', weighted by their seconds. Waterline and efficiency
gap are those of "On the Efficiency of Convolutional Neural Networks" (arXiv 2404.03617), with seconds where it draws operations, so
that ops without any (copies, fills) have their width too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .outline import Op, Outline
from .prices import Price, Prices

PARTS = ("compute", "memory", "launch", "shortfall")
"""What an op's seconds are made of, in the order in which they are drawn and taken off."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One pass ("forward" or "backward") of one op: FLOPs, bytes moved, seconds priced and their `parts` (as PARTS), which sum to
    them. `source` is the line of the model, `origin` where the price comes from. `ideal_seconds` are above `seconds` only where a
    measured op beats the device's peak figure."""

    op: str
    target: str
    source: str
    phase: str
    flops: float
    bytes: float
    seconds: float
    ideal_seconds: float
    parts: tuple[float, float, float, float]
    origin: str

    @property
    def gap_seconds(self) -> float:
        return self.seconds - self.ideal_seconds

    @property
    def efficiency(self) -> float:
        """Ideal seconds over seconds."""
        return self.ideal_seconds / self.seconds

    @property
    def bound(self) -> str:
        """The largest part."""
        return PARTS[self.parts.index(max(self.parts))]


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over moments: `calls` are ops among them (one whose two passes are there counts once), `parts` seconds as PARTS."""

    calls: int
    flops: float
    bytes: float
    seconds: float
    ideal_seconds: float
    parts: tuple[float, float, float, float]

    @property
    def gap_seconds(self) -> float:
        return self.seconds - self.ideal_seconds

    @property
    def efficiency(self) -> float:
        """Ideal seconds over seconds; 0 of nothing."""
        return self.ideal_seconds / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Waterline:
    """The moments of a step in the order in which they run, on one device: its peak FLOP/s and bytes per second."""

    moments: tuple[Moment, ...]
    peak_flops: float
    bytes_per_second: float

    @property
    def totals(self) -> Totals:
        return totals(self.moments)


def totals(moments: Iterable[Moment]) -> Totals:
    """What moments add up to."""
    flops = moved = seconds = ideal = 0.0
    parts = [0.0] * len(PARTS)
    ops: set[str] = set()
    for one in moments:
        ops.add(one.op)
        flops, moved = flops + one.flops, moved + one.bytes
        seconds, ideal = seconds + one.seconds, ideal + one.ideal_seconds
        parts = [a + b for a, b in zip(parts, one.parts, strict=True)]
    return Totals(len(ops), flops, moved, seconds, ideal, (parts[0], parts[1], parts[2], parts[3]))


def by_target(moments: Iterable[Moment]) -> dict[str, Totals]:
    """What moments of each target add up to, the largest seconds first."""
    members: dict[str, list[Moment]] = {}
    for one in moments:
        members.setdefault(one.target, []).append(one)
    found = {target: totals(own) for target, own in members.items()}
    return dict(sorted(found.items(), key=lambda item: (-item[1].seconds, item[0])))


def waterline(outline: Outline, prices: Prices) -> Waterline:
    """The ops of a whole (unsplit) model in order, then the backward passes in reverse. Ops that cost nothing (views) have no row.

    Raises ClusterError where the device has no figure for the dtype.
    """
    ahead: list[Moment] = []
    back: list[Moment] = []
    for op in outline.ops:
        for moment in _moments(op, outline, prices):
            (ahead if moment.phase == "forward" else back).append(moment)
    device = prices.cluster.device
    return Waterline((*ahead, *reversed(back)), device.peak(prices.compute), device.memory_bytes_per_second)


def _moments(op: Op, outline: Outline, prices: Prices) -> Iterator[Moment]:
    sizes = tuple(float(f.size) for f in op.factors)
    work = prices.work(op, outline.tensors)
    device = prices.cluster.device
    moved = (work.forward_bytes(sizes), work.backward_bytes(sizes))
    paid = prices.op(op, sizes, outline.tensors)
    for i, (phase, flops) in enumerate(zip(("forward", "backward"), work.flops(sizes), strict=True)):
        if paid[i].seconds <= 0.0:
            continue
        size = moved[i] + sum(term.at(sizes) for term in work.beside[i])
        ideal, streamed = flops / prices.peak_flops(work), size / device.memory_bytes_per_second
        parts = _parts(paid[i], ideal, streamed, device.kernel_overhead_seconds * work.launched[i])
        price = paid[i]
        yield Moment(op.name, op.target, op.source, phase, flops, size, price.seconds, ideal, parts, price.source)


def _parts(paid: Price, ideal: float, streamed: float, launch: float) -> tuple[float, float, float, float]:
    """The seconds of one price by PARTS, taken off in that order for as long as any are left (a measured op may beat a figure)."""
    rest = paid.seconds
    compute = min(ideal, rest)
    rest -= compute
    memory = min(max(streamed - ideal, 0.0), rest)
    rest -= memory
    started = min(launch, rest)
    return compute, memory, started, rest - started

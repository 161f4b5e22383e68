"""The plans that other planners would make, each a restriction of our space, with our prices.

Common to all: meshes are those of our shapes (every stage has the same one, no context axis, pipelines outermost), the pieces of a
layer are sharded as our styles shard them, and what is chosen by a peer's own estimate is priced by our simulator and memory model.
Where a peer leaves something to its user (microbatches, recompute, number of stages), every value is tried and the cheapest
taken, so the peer is shown at its best. Candidates that our memory model refuses are dropped, as their out-of-memory trials are.

megatron    Narayanan et al. 2021 (arXiv 2104.04473), takeaways 1-3; Korthikanti et al. 2022 (arXiv 2205.05198), section 5.
            Modelled: tensor parallelism grows to the node, then the pipeline, until it fits; the rest is data parallel; sequence
            parallelism on; as many layers in every stage, 1F1B or interleaved where chunks divide the layers; distributed
            optimizer; no or selective recompute, full only where nothing else fits; microbatch and chunks by (m + (p - 1) / v) t.
            Not modelled: its fixed vocabulary padding, its own kernels, hand-set stage sizes, context parallelism.
fsdp        PyTorch FSDP (Zhao et al. 2023, arXiv 2304.11277): all devices data parallel, parameters resharded after the
            forward pass (ZeRO 3), full recompute of every layer, the largest microbatch that fits. Not modelled: hybrid sharding.
alpa        Zheng et al. 2022 (arXiv 2201.12023), sections 4-5, and its released code. Modelled: the fastest sharding (style and
            ZeRO level) of every interval of layers, memory not looked at; full recompute for all or for none; intervals whose
            sharding does not fit are infeasible; stages by the dynamic program over the slowest stage, 1F1B; powers of two.
            Not modelled: submeshes of unlike shape, sharding op by op beyond our styles, its clustering of ops into layers.
galvatron   Miao et al. 2022 (arXiv 2211.13878), Wang et al. 2024 (arXiv 2307.02031), and its released code. Modelled: even
            stages; per layer a program over sharding style, ZeRO (0 or 2 for all, 3 by layer) and recompute (off or full) with
            memory in 1/8192 of the device; each stage alone; 1F1B (GPipe takes as long and holds more); powers of two.
            Not modelled: layers of one plan on meshes of unlike shape, its share of memory held back (20 %).
mist        Zhu et al. 2025 (arXiv 2503.19050), sections 4-5. Modelled: one ZeRO level and one offload per stage, so many of its
            first layers recomputed; stages within two layers of the mean, by (m - 1) max t + sum t; 1F1B; Megatron sharding
            with sequence parallelism; powers of two. Not modelled: offload ratios (a class is away or here), its loss of
            unsupported Pareto points, its microbatches of at most 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from knapsack import Item, quickest
from peer_desk import Candidate, Counts, Desk, Floats, Mixed, Planned, Strip, away, divide
from shardwright.planner.options import Option
from shardwright.planner.shapes import Arrangement

Rung = list[Candidate]
ZERO = (0, 1, 2, 3)
SPREAD = 2
"""Mist's stages have the mean number of layers, give or take so many."""

BUCKETS = 8192
"""Parts of a device's memory that Galvatron's program counts in."""

WORKS = 3
"""Limits of working memory that it is run with."""


@dataclass(frozen=True)
class Peer:
    """A planner: `rungs` yields its candidates, those it prefers first; the best of the first rung that fits is its plan.

    `tiers`: it offloads, so it sees the host.
    """

    name: str
    rungs: Callable[[Desk], Iterator[Rung]]
    tiers: bool = False

    def plan(self, desk: Desk) -> Planned | None:
        """The plan it makes, at our prices; None where nothing it considers fits."""
        for rung in self.rungs(desk):
            found = desk.best(rung)
            if found is not None:
                return found
        return None


def _sharded(shape: Arrangement) -> str:
    """Megatron's style with sequence parallelism."""
    return "single" if shape.tp == 1 else "tensor+sequence"


def _power(number: int) -> bool:
    return number & (number - 1) == 0


def _binary(desk: Desk) -> list[Arrangement]:
    """1F1B shapes of powers of two without expert axes, in the order of their bounds."""
    found = [
        s for s in desk.shapes
        if s.schedule in ("none", "1f1b") and s.ep == 1 and all(map(_power, (s.pp, s.tp, s.micro_batch)))
    ]  # fmt: skip
    return sorted(found, key=lambda s: (desk.bench.bound(s), s))


def _whole(desk: Desk, shape: Arrangement, strip: Strip, cuts: Sequence[int]) -> float:
    """Narayanan et al. 2021, section 3.2, equation 1: (m + (p - 1) / v) x the seconds of the slowest rank."""
    ready, seconds = desk.bench.ready(shape), strip.seconds
    slow = max(sum(seconds[cuts[s + 1]] - seconds[cuts[s]] for s in stages) for stages in ready.local)
    return float((shape.microbatches + (shape.pp - 1) / shape.chunks) * slow)


# -- megatron


def _megatron(desk: Desk) -> Iterator[Rung]:
    shapes = [s for s in desk.shapes if s.schedule in ("none", "1f1b", "interleaved") and _power(s.tp)]
    shapes = [s for s in shapes if s.pp == 1 or desk.layers % (s.pp * s.chunks) == 0]
    able = {tp for tp in {s.tp for s in shapes} if desk.strip(*_one(shapes, tp), "none", 0) is not None}
    widest = max(able, default=1)
    for policies in (("none", "selective"), ("full",)):
        for tp, pp in sorted({(s.tp, s.pp) for s in shapes if s.tp in able and (s.pp == 1 or s.tp == widest)}):
            yield [
                plan for s in shapes if (s.tp, s.pp) == (tp, pp) for policy in policies
                if (plan := _megatron_plan(desk, s, policy)) is not None
            ]  # fmt: skip


def _one(shapes: Sequence[Arrangement], tp: int) -> tuple[Arrangement, str]:
    shape = next(s for s in shapes if s.tp == tp)
    return shape, _sharded(shape)


def _megatron_plan(desk: Desk, shape: Arrangement, policy: str) -> Candidate | None:
    # Copies gathered for products are made again from their shards (Korthikanti et al. 2022, section 4.2.2).
    strip = desk.strip(shape, _sharded(shape), policy, 1, best=lambda o: o.saved)
    cuts = desk.even_cuts(shape.pp * shape.chunks)
    if strip is None or cuts is None:
        return None
    return Candidate(_whole(desk, shape, strip, cuts), shape, cuts, strip.options)


# -- fsdp


def _fsdp(desk: Desk) -> Iterator[Rung]:
    devices = desk.bench.task.cluster.devices
    shapes = [s for s in desk.shapes if s.dp == devices and s.ep == 1]
    for shape in sorted(shapes, key=lambda s: -s.micro_batch):
        strip = desk.strip(shape, "single", "full", 3)
        if strip is not None:
            yield [Candidate(float(strip.seconds[-1]), shape, (0, len(desk.units)), strip.options)]


# -- alpa


def _alpa(desk: Desk) -> Iterator[Rung]:
    found: Rung = []
    best = math.inf
    for shape in _binary(desk):
        if desk.bench.bound(shape) >= best:
            continue
        for policy in ("none", "full"):
            plan = _alpa_plan(desk, shape, policy, best)
            if plan is not None:
                found.append(plan)
                best = min(best, plan.estimate)
    yield found


def _alpa_plan(desk: Desk, shape: Arrangement, policy: str, most: float) -> Candidate | None:
    styles = ("single",) if shape.tp == 1 else ("tensor", "tensor+sequence", "free")
    strips = [s for style in styles for z in ZERO if (s := desk.strip(shape, style, policy, z)) is not None]
    if not strips:
        return None
    start, end = np.triu_indices(len(desk.units) + 1, 1)
    times = np.array([s.seconds[end] - s.seconds[start] for s in strips])
    fastest = times.argmin(0)
    tables, cache = [], {}
    for stage in range(shape.pp):
        alive = desk.live(shape, stage)
        if alive not in cache:
            fits = np.array([Mixed(s, s).fits(desk, shape, alive, start, start, end) for s in strips])
            cache[alive] = _table(
                len(desk.units), start, end, np.where(fits, times, math.inf)[fastest, np.arange(len(start))]
            )
        tables.append(cache[alive])
    answer = divide(tables, shape.microbatches, most)
    if answer is None:
        return None
    estimate, cuts = answer
    chosen = [min(strips, key=lambda s, i=i, j=j: s.seconds[j] - s.seconds[i]).options[i:j] for i, j in pairwise(cuts)]
    return Candidate(estimate, shape, cuts, tuple(o for mine in chosen for o in mine))


def _table(units: int, start: Counts, end: Counts, seconds: Floats) -> Floats:
    found = np.full((units + 1, units + 1), math.inf)
    found[start, end] = seconds
    return found


# -- galvatron


def _galvatron(desk: Desk) -> Iterator[Rung]:
    found: Rung = []
    best = math.inf
    for shape in _binary(desk):
        cuts = desk.even_cuts(shape.pp)
        if cuts is None or desk.bench.bound(shape) >= best:
            continue
        for base in (0, 2):
            plan = _galvatron_plan(desk, shape, cuts, base)
            if plan is not None:
                found.append(plan)
                best = min(best, plan.estimate)
    yield found


def _galvatron_plan(desk: Desk, shape: Arrangement, cuts: tuple[int, ...], base: int) -> Candidate | None:
    offers = {
        region: [o for o in desk.offers(shape, region, ("none", "full"), (base, 3)) if not o.offload]
        for region in dict.fromkeys(desk.units)
    }  # fmt: skip
    change = {pair: sum(both) for pair, both in desk.bench.change(shape).items()}
    chosen: list[Option] = []
    slowest = total = 0.0
    known: dict[tuple[tuple[int, ...], int], tuple[float, list[Option]] | None] = {}
    for stage, (i, j) in enumerate(pairwise(cuts)):
        key = desk.units[i:j], desk.live(shape, stage)
        if key not in known:
            known[key] = _layers(desk, shape, [offers[r] for r in key[0]], key[1], change)
        answer = known[key]
        if answer is None:
            return None
        seconds, options = answer
        slowest, total = max(slowest, seconds), total + seconds
        chosen += options
    return Candidate(total + (shape.microbatches - 1) * slowest, shape, cuts, tuple(chosen))


def _layers(
    desk: Desk, shape: Arrangement, offers: Sequence[Sequence[Option]], alive: int, change: dict[tuple[str, str], float]
) -> tuple[float, list[Option]] | None:
    """The quickest options of the layers of one stage that fit; None where none do."""
    cap, m = desk.bench.memory(shape).cap_bytes, shape.microbatches
    once = m == 1 and shape.pp == 1
    least = max(min(o.work for o in mine) for mine in offers)
    works = sorted({o.work for mine in offers for o in mine if o.work >= least}, reverse=True)
    best: tuple[float, list[Option]] | None = None
    for work in works[:: max(1, -(-len(works) // WORKS))]:
        room = cap - work
        allowed = [[o for o in mine if o.work <= work] for mine in offers]
        if room <= 0:
            continue
        items = [[_item(o, m, alive, once, room) for o in mine] for mine in allowed]
        answer = quickest(items, BUCKETS, change)
        if answer is not None and (best is None or answer[0] < best[0]):
            best = answer[0], [mine[k] for mine, k in zip(allowed, answer[1], strict=True)]
    return best


def _item(option: Option, m: int, alive: int, once: bool, room: float) -> Item:
    running = option.static + (0.0 if once else option.gradient) + alive * option.saved
    held = max(running, option.static + option.gradient + option.step)
    size = math.ceil(held / room * BUCKETS)
    return Item(option.seconds + option.finish / m, size, option.entry, option.exit)


# -- mist


def _mist(desk: Desk) -> Iterator[Rung]:
    found: Rung = []
    best = math.inf
    for shape in _binary(desk):
        if desk.bench.bound(shape) >= best or desk.layers < shape.pp:
            continue
        plan = _mist_plan(desk, shape, best)
        if plan is not None:
            found.append(plan)
            best = min(best, plan.estimate)
    yield found


def _mist_plan(desk: Desk, shape: Arrangement, most: float) -> Candidate | None:
    mixes = _mixes(desk, shape)
    if not mixes:
        return None
    intervals = _Intervals.of(desk, shape.pp)
    tables = {}
    for alive in {desk.live(shape, s) for s in range(shape.pp)}:
        times = [
            np.where(
                intervals.real & x.fits(desk, shape, alive, *intervals.units), x.seconds(*intervals.units), math.inf
            )
            for x in mixes
        ]
        tables[alive] = intervals.least(times)
    mine = [tables[desk.live(shape, s)] for s in range(shape.pp)]
    answer = divide([times for times, _ in mine], shape.microbatches, most)
    if answer is None:
        return None
    estimate, cuts = answer
    chosen: list[Option] = []
    for (i, j), (_, picks) in zip(pairwise(cuts), mine, strict=True):
        mix, again = divmod(int(picks[i, j]), len(intervals.middle))
        chosen += mixes[mix].options(i, intervals.ends(i, j, again), j)
    return Candidate(estimate, shape, cuts, tuple(chosen))


def _mixes(desk: Desk, shape: Arrangement) -> list[Mixed]:
    """Recomputed and kept layers of every ZeRO level and offload."""
    made = []
    for level in ZERO if desk.bench.data(shape).ranks > 1 else (0,):
        offers = [o for r in dict.fromkeys(desk.units) for o in desk.offers(shape, r, ("none",), (level,))]
        for offload in sorted({away(o) for o in offers}, key=sorted):
            pair = [desk.strip(shape, _sharded(shape), p, level, offload) for p in ("full", "none")]
            if pair[0] is not None and pair[1] is not None:
                made.append(Mixed(pair[0], pair[1]))
    return made


@dataclass(frozen=True)
class _Intervals:
    """Intervals [start, end) near the mean size; row c of `middle` is where their first c layers end, `real` whether they have
    so many. `places`: the end of every layer; `before`: layers before each unit."""

    size: int
    start: Counts
    end: Counts
    middle: Counts
    real: Any
    places: Counts
    before: Counts

    @classmethod
    def of(cls, desk: Desk, stages: int) -> _Intervals:
        before = np.concatenate([[0], np.cumsum(desk.layer)])
        start, end = np.triu_indices(len(desk.units) + 1, 1)
        layers, mean = before[end] - before[start], desk.layers / stages
        near = (layers >= max(math.floor(mean) - SPREAD, 1)) & (layers <= math.ceil(mean) + SPREAD)
        start, end, layers = start[near], end[near], layers[near]
        count = np.arange(int(layers.max(initial=0)) + 1)[:, None]
        places = np.array([u + 1 for u, layer in enumerate(desk.layer) if layer])
        last = np.clip(before[start] + count - 1, 0, len(places) - 1)
        middle = np.where(count > 0, np.clip(places[last], start, end), start)
        return cls(len(desk.units), start, end, middle, count <= layers, places, before)

    @property
    def units(self) -> tuple[Counts, Counts, Counts]:
        """Start, middle and end of every interval and row."""
        wide = np.broadcast_to
        return wide(self.start, self.middle.shape), self.middle, wide(self.end, self.middle.shape)

    def ends(self, start: int, end: int, count: int) -> int:
        """Where the first `count` layers of an interval end."""
        return min(int(self.places[self.before[start] + count - 1]), end) if count else start

    def least(self, times: Sequence[Floats]) -> tuple[Floats, Floats]:
        """(start, end) -> the least seconds of all mixes and rows, and which it is (mix x rows + row)."""
        flat = np.array(times).reshape(-1, len(self.start))
        size = self.size
        return _table(size, self.start, self.end, flat.min(0)), _table(size, self.start, self.end, flat.argmin(0))


PEERS = (
    Peer("megatron", _megatron),
    Peer("fsdp", _fsdp),
    Peer("alpa", _alpa),
    Peer("galvatron", _galvatron),
    Peer("mist", _mist, tiers=True),
)

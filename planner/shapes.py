"""The shapes of the search: how many ranks each axis has, the pipeline's chunks and schedule, and the microbatches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations, product

from ..errors import PinError
from .cluster import Cluster
from .pins import Pins
from .placing import axis_orders
from .refusals import why_batch, why_devices, why_micro_batch, why_model_axis, why_together
from .schedules import SCHEDULES, fault
from .updates import BACKWARD

FREE_SCHEDULES = ("1f1b", "interleaved", "zb-h1", "zbv", "dualpipev")
"""Schedules searched without a pin, beside that of branches where there are some. GPipe takes as long as 1F1B and holds more."""

CHUNKS = (2, 3, 4, 6, 8)
"""Chunks per rank searched without a pin."""

MOST_POOLS = 3
"""Pools whose orders along the pipeline are all tried; of more, the one given and its reverse."""

MOST_RANKS = 64
"""Pipeline ranks searched without a pin."""


@dataclass(frozen=True, slots=True, order=True)
class Arrangement:
    """One shape. `order` names the axes outermost first; `pieces` is into how many microbatches the whole batch is cut.

    On unlike devices `pools` is the pool of every pipeline rank: those of one pool come one after the other.
    """

    pp: int
    dp: int
    ep: int
    cp: int
    tp: int
    chunks: int
    schedule: str
    microbatches: int
    micro_batch: int
    order: tuple[str, ...] = ("pp", "dp", "ep", "cp", "tp")
    pools: tuple[int, ...] = ()

    @property
    def devices(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def pieces(self) -> int:
        """Parts of the batch: data ranks times microbatches."""
        return self.dp * self.microbatches

    @property
    def pool_order(self) -> tuple[int, ...]:
        """The pools as the pipeline meets them."""
        return tuple(dict.fromkeys(self.pools))

    def sizes(self) -> dict[str, int]:
        """Ranks by axis; expert ranks are part of the data axis and take their place inside it."""
        return {"pp": self.pp, "dp": self.dp // self.ep, "ep": self.ep, "cp": self.cp, "tp": self.tp}

    def mesh(self) -> dict[str, int]:
        """What a record shows: axes with more than one rank, the data axis alone where there is none."""
        found = {"pp": self.pp, "dp": self.dp, "ep": self.ep, "cp": self.cp, "tp": self.tp}
        found = {name: size for name, size in found.items() if size > 1}
        return found or {"dp": 1}

    def told(self) -> str:
        """One line for people."""
        mesh = " x ".join(f"{name}={size}" for name, size in self.mesh().items())
        pipeline = (
            f", {self.schedule}" + (f" of {self.chunks} chunks" if self.chunks > 1 else "") if self.pp > 1 else ""
        )
        pools = f", pools {' '.join(str(p + 1) for p in self.pool_order)}" if self.pools else ""
        cut = "1 microbatch" if self.microbatches == 1 else f"{self.microbatches} microbatches"
        return f"{mesh}{pipeline}{pools}, {cut} of {self.micro_batch}"


def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    small = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    return tuple(sorted({*small, *(number // k for k in small)}))


@dataclass(frozen=True, slots=True)
class Room:
    """What bounds the shapes: units of the chain, samples, whether the batch may be cut, a backward pass, experts, branches."""

    units: int
    batch: int
    training: bool
    blockers: tuple[str, ...]
    experts: tuple[int, ...] = ()
    context: bool = True
    forks: bool = False


def arrangements(cluster: Cluster, room: Room, pins: Pins) -> tuple[Arrangement, ...]:
    """Every shape that the pins leave; raises PinError naming what leaves none."""
    found = tuple(dict.fromkeys(_all(cluster, room, pins)))
    if not found:
        raise PinError(_why(cluster, room, pins))
    return found


def _all(cluster: Cluster, room: Room, pins: Pins) -> Iterator[Arrangement]:
    inner = min((p.levels[0].ranks for p in cluster.pool_list()), default=1)
    for pp in _axis(pins, "pp", cluster.devices, min(MOST_RANKS, room.units)):
        if any(pool.devices % (cluster.devices // pp) for pool in cluster.pools):
            continue  # a rank of the pipeline would lie in two pools
        for tp in _axis(pins, "tp", cluster.devices // pp, max(inner, 1)):
            for cp in _axis(pins, "cp", cluster.devices // pp // tp, inner if room.context else 1):
                dp = cluster.devices // pp // tp // cp
                if not _allowed(pins, "dp", dp) or room.batch % dp or (pins.sequence_parallel and tp == 1):
                    continue
                for ep in _experts(pins, room, dp):
                    yield from _timed(cluster, room, pins, (pp, dp, ep, cp, tp))


def _timed(cluster: Cluster, room: Room, pins: Pins, axes: tuple[int, int, int, int, int]) -> Iterator[Arrangement]:
    pp, dp, ep, cp, tp = axes
    local = room.batch // dp
    rows = _pools(cluster, pp)
    orders = (
        axis_orders(cluster, {"pp": pp, "dp": dp // ep, "ep": ep, "cp": cp, "tp": tp})
        if len(rows) == 1 and not rows[0]
        else (("pp", "dp", "ep", "cp", "tp"),)
    )
    if pp * ep * cp * tp > cluster.pool_list()[0].per_node:
        orders = orders[:1]  # a pipeline inside data parallelism pays where it stays inside a node
    for micro_batch in divisors(local):
        m = local // micro_batch
        if not _allowed(pins, "micro_batch", micro_batch) or (m > 1 and (room.blockers or not room.training)):
            continue
        for schedule, chunks in _pipelines(room, pins, pp, m):
            if schedule == "branches" and rows[0]:
                continue  # what a branch takes on other devices is not looked at
            for order, pools in product(orders, rows):
                yield Arrangement(*axes, chunks, schedule, m, micro_batch, order, pools)


def _pools(cluster: Cluster, pp: int) -> tuple[tuple[int, ...], ...]:
    """The pool of every pipeline rank, for every order of the pools that differs; () where all devices are equal."""
    pools = cluster.pools
    if len(pools) < 2:
        return ((),)
    per = cluster.devices // pp
    places = range(len(pools))
    orders = permutations(places) if len(pools) <= MOST_POOLS else (tuple(places), tuple(reversed(places)))
    found: dict[tuple[object, ...], tuple[int, ...]] = {}
    for order in orders:
        alike = tuple(
            next(k for k in places if replace(pools[k], name="") == replace(pools[p], name="")) for p in order
        )
        found.setdefault(alike, tuple(p for p in order for _ in range(pools[p].devices // per)))
    return tuple(found.values())


def _pipelines(room: Room, pins: Pins, pp: int, m: int) -> Iterator[tuple[str, int]]:
    """(schedule, chunks) for so many ranks and microbatches."""
    if pp == 1:
        if pins.vpp in (None, 1) and pins.schedule in (None, "none", "gpipe", "1f1b"):
            yield "none", 1
        return
    free = (*FREE_SCHEDULES, "branches") if room.forks else FREE_SCHEDULES
    names: tuple[str | None, ...] = (pins.schedule,) if pins.schedule is not None else free
    if pins.schedule is None and pins.vpp == 1:
        names = ("1f1b", "zb-h1")
    for name in names:
        if name is None or name == "none" or pins.forbids("schedule", name):
            continue
        least, most = SCHEDULES[name].chunks
        choices = (
            (pins.vpp,)
            if pins.vpp is not None
            else tuple(
                v for v in (1, *CHUNKS) if v >= least and (most is None or v <= most) and (v == 1 or name != "zb-h1")
            )
        )
        for chunks in choices:
            if chunks is None or pp * chunks > room.units or pins.forbids("vpp", chunks):
                continue
            if not fault(name, pp, chunks, m):
                yield name, chunks


def _axis(pins: Pins, key: str, ranks: int, most: int) -> tuple[int, ...]:
    """Sizes of an axis: the pinned one, else divisors of the ranks that are left up to `most`."""
    wanted = getattr(pins, key)
    if wanted is not None:
        return (wanted,) if ranks % wanted == 0 and not pins.forbids(key, wanted) else ()
    return tuple(k for k in divisors(ranks) if (k <= most or k == 1) and not pins.forbids(key, k))


def _experts(pins: Pins, room: Room, dp: int) -> tuple[int, ...]:
    if pins.ep is not None:
        return (pins.ep,) if dp % pins.ep == 0 and (pins.ep == 1 or pins.ep in room.experts) else ()
    degrees = (1, *(e for e in room.experts if e > 1))
    return tuple(e for e in dict.fromkeys(degrees) if dp % e == 0 and not pins.forbids("ep", e))


def _allowed(pins: Pins, key: str, value: int) -> bool:
    wanted = getattr(pins, key)
    return (wanted is None or wanted == value) and not pins.forbids(key, value)


def _why(cluster: Cluster, room: Room, pins: Pins) -> str:
    """What leaves no shape, as far as one thing alone does."""
    if len(cluster.pools) > 1:
        sizes, most = [p.devices for p in cluster.pools], min(MOST_RANKS, room.units)
        per = math.gcd(*sizes)
        if pins.pp is None and sum(sizes) // per > most:
            told = " and ".join(map(str, sizes))
            return (
                f"pools of {told} devices share pipeline ranks of at most {per}: at least {sum(sizes) // per} ranks, "
                f"and a pipeline here has {most} at the most; make the sizes of the pools alike"
            )
        if pins.pp is not None and (sum(sizes) % pins.pp or any(s % (sum(sizes) // pins.pp) for s in sizes)):
            told = " and ".join(map(str, sizes))
            return f"pp={pins.pp} does not cut pools of {told} devices into equal ranks; {_cuts(sizes)}"
    stages = ""
    if pins.pp is not None and pins.pp * (pins.vpp or 1) > room.units:
        stages = f"pp={pins.pp} x {pins.vpp or 1} chunks is more stages than the model has units to cut ({room.units})"
    return (
        why_devices(pins, cluster.devices)
        or (why_batch(room.batch, (pins.dp,)) if pins.dp is not None else "")
        or stages
        or why_micro_batch(pins, room.batch, pins.dp, room.blockers)
        or why_model_axis(pins, cluster.devices)
        or _why_schedule(room, pins)
        or why_together(pins, cluster.devices, room.batch)
    )


def _cuts(sizes: list[int]) -> str:
    per = math.gcd(*sizes)
    return "use pp=" + "|".join(str(sum(sizes) // k) for k in reversed(divisors(per)))


def _why_schedule(room: Room, pins: Pins) -> str:
    """What the pinned schedule makes impossible with the chunks, ranks and microbatches that are pinned; "" for nothing."""
    if pins.schedule in (None, "none"):
        return ""
    name = str(pins.schedule)
    least = SCHEDULES[name].chunks[0]
    problem = fault(name, pins.pp or 2, pins.vpp or least, max(room.batch, 1))
    if pins.vpp is not None and problem:
        return f"schedule={name} and vpp={pins.vpp} contradict each other: {problem}"
    if pins.pp is not None:
        most = max(room.batch // (pins.dp or 1) // (pins.micro_batch or 1), 1)
        return fault(name, pins.pp, pins.vpp or least, most)
    return ""


# -- plans that run: one stage, data and model axes


def mesh_shapes(pins: Pins, devices: int, batch: int) -> tuple[tuple[int, int], ...]:
    """All (data, model) sizes with data * model = devices that the pins allow and whose data axis divides the batch.

    Larger data axes first. Raises PinError where nothing is left, naming what does not divide.
    """
    found = [
        (d, devices // d) for d in reversed(divisors(devices))
        if _allowed(pins, "dp", d) and _allowed(pins, "tp", devices // d) and (d < devices or not pins.sequence_parallel)
    ]  # fmt: skip
    if not found:
        raise PinError(
            why_devices(pins, devices, ("dp", "tp"))
            or why_model_axis(pins, devices)
            or why_together(pins, devices, batch)
        )
    if problem := why_batch(batch, [d for d, _ in found]):
        raise PinError(problem)
    return tuple((d, t) for d, t in found if batch % d == 0)


def microbatch_counts(pins: Pins, batch: int, data: int, blockers: tuple[str, ...]) -> tuple[int, ...]:
    """Numbers of microbatches to consider with `data` data-parallel ranks, fewest first; raises PinError if none is left."""
    local = batch // data
    if problem := why_micro_batch(pins, batch, data, blockers):
        raise PinError(problem)
    counts = [local // b for b in reversed(divisors(local)) if _allowed(pins, "micro_batch", b)]
    if blockers or pins.update == BACKWARD:
        counts = [m for m in counts if m == 1]
    if not counts:
        raise PinError(f"the pins {', '.join(pins.texts)} leave no number of microbatches for {local} samples per rank")
    return tuple(counts)

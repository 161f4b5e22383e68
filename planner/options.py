"""Options of a unit: a design with the storage of its parameters over the data axes (planner/stored.py).

What runs every microbatch hides under the compute of its own unit as far as the device lets it; what runs once a step
hides under the last backward pass (reductions) or the first forward pass (gathers).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from ..errors import PinError
from .away import HERE, Away, Case, Copies, Moves, offers
from .capability import Kept, why_kept_here
from .causes import Causes, Change
from .cluster import Device, Host
from .costs import Call, PriceBook
from .front import Design
from .fronts import Named
from .numbers import Numbers, Weights
from .overlap import Overlap
from .pins import Pins
from .plan import Precision
from .schedules import SCHEDULES
from .stored import Data, Keeping, Shared, Stored, Talk, stored_of
from .unitexperts import spread

NOTHING = Causes()


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run and store a unit. Seconds are of one microbatch, `finish` of the end of a step; bytes are a rank's.

    `static` lives all the time, `gradient` from the first backward pass to the step, `saved` per microbatch in flight, `work`
    only while the unit runs, `step` while the optimizer does. `host` bytes live in host memory, `host_saved` per microbatch;
    `offload` says what lies there (planner/away.py). `ahead`, `back` and `ends` are `forward`, `backward` and `finish` by cause.
    """

    region: int
    design: Design
    style: str
    policy: str
    zero: int
    entry: str
    exit: str
    forward: float
    backward: float
    weight: float
    finish: float
    static: float
    gradient: float
    saved: float
    work: float
    step: float
    host: float = 0.0
    host_saved: float = 0.0
    disk: float = 0.0
    offload: str = ""
    ahead: Causes = NOTHING
    back: Causes = NOTHING
    ends: Causes = NOTHING
    memory: Mapping[str, float] = field(default_factory=dict)
    calls: tuple[tuple[Call, int], ...] = ()
    shared: tuple[Shared, ...] = ()

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


MANY = 1e9
"""Elements of which starting the optimizer is no part that counts."""

KINDS = 2
"""Kinds of parameters in a unit: those of experts, and the others."""

PASSING = 2.0
"""Saved sets of one unit on the device while they come and go: the one in use, and the one before or after it on its way."""


@dataclass(frozen=True, slots=True)
class _Lying:
    """What a unit's parameters take at one ZeRO level and place, whatever its design."""

    level: int
    away: Away
    talk: Talk
    memory: Mapping[str, float]
    moves: Moves | None


def end_to_end(options: Sequence[Option], change: Change) -> tuple[float, float, float, float]:
    """Seconds of units one after the other: forward, backward, weight and finish, changes of layout between them included."""
    turns = [change[one.exit, two.entry] for one, two in pairwise(options) if one.exit != two.entry]
    forward = math.fsum([*(o.forward for o in options), *(f for f, _ in turns)])
    backward = math.fsum([*(o.backward for o in options), *(b for _, b in turns)])
    return forward, backward, math.fsum(o.weight for o in options), math.fsum(o.finish for o in options)


@dataclass(frozen=True)
class Storing:
    """Prices options: what they depend on beside the unit.

    With `host`, the tiers behind each node, options with state there are offered as far as `pins` leave them; `prices` are then
    planner/prices.py's. With `runnable` no more of them than the runtime executes.
    """

    prices: PriceBook
    device: Device
    precision: Precision
    optimizer: str
    training: bool
    foreach: bool
    host: Host | None = None
    pins: Pins = field(default_factory=Pins)
    runnable: bool = False

    @cached_property
    def keeping(self) -> Keeping:
        """Prices of parameters over the data axes."""
        return Keeping(self.prices, self.precision, self.optimizer, self.foreach)

    @cached_property
    def copies(self) -> Copies:
        """What goes to the host and comes back."""
        assert self.host is not None
        return Copies(self.host, self.prices, self.precision, self.optimizer, self.device.kind != "cpu")

    def undercut(self) -> float:
        """Seconds by which the optimizer's step of a unit may be shorter with its states behind the device than with them on it.

        No more than starting it takes, for each kind of parameters; inf where even an element takes less there.
        """
        assert self.host is not None
        start, many = (self.prices.optimizer_seconds(n, self.optimizer, self.precision) for n in (1.0, MANY))
        tiers = ("host", "disk") if self.host.disk_bytes else ("host",)
        rates = [self.copies.update(Away(tier, parameters=p))[1] for tier in tiers for p in ("", "host")]
        return KINDS * start if min(rates) >= (many - start) / MANY else math.inf

    @cached_property
    def overlap(self) -> Overlap:
        """What the device hides of communication."""
        return Overlap.of(self.device)

    def options(
        self, region: int, measured: Iterable[tuple[Named, Numbers]], data: Data, levels: Sequence[int]
    ) -> list[Option]:
        """The options of each ZeRO level for some designs; none for one whose experts cannot be split so.

        Raises PinError where an offload is pinned and there is no host, or none of it runs.
        """
        if self.host is None and self.pins.offload not in (None, "none"):
            raise PinError(
                f"offload={self.pins.offload}: the cluster has no host memory; describe it in a [host] table"
            )

        def exchange(full_bytes: float) -> float:
            return self.prices.collective("all_to_all", full_bytes, data.expert_stride, data.experts).seconds

        made, shelf, why = list[Option](), Shelf(self, data), ""
        for named, numbers in measured:
            found = spread(numbers, data.experts, data.ranks, exchange, self.training)
            if found is None:
                continue
            for lying in shelf.places(named, found, levels):
                problem = self._unexecuted(found.weights, lying, data) if self.runnable else ""
                if not problem:
                    made.append(self._option(region, named, found, lying, data))
                why = why or problem
        if why and not made:
            raise PinError(f"offload={self.pins.offload} does not run here: {why}")
        return made

    def _unexecuted(self, weights: Sequence[Weights], lying: _Lying, data: Data) -> str:
        """Why the runtime does not execute what is kept away; "" where it does, under any schedule that the pins leave."""
        shared, schedule = data.ranks > 1, SCHEDULES.get(self.pins.schedule or "")
        splits = data.stages > 1 and (schedule is None or schedule.splits_backward)
        kept = Kept(
            lying.away, frozenset([lying.level] if shared else []), shared and not lying.level, data.microbatches, splits,
            self.training and any(w.trainable for w in weights),
        )  # fmt: skip
        return why_kept_here(kept)

    def _option(self, region: int, named: Named, n: Numbers, lying: _Lying, data: Data) -> Option:
        away, talk, memory, moves = lying.away, lying.talk, lying.memory, lying.moves
        compute_back = n.compute_backward + n.again
        hidden = self.overlap.exposed
        transient = max(n.peak - n.saved, 0.0) if self.training else 0.0
        talked, talked_back = hidden(n.compute_forward, talk.forward), hidden(compute_back, talk.backward)
        ends = hidden(n.compute_forward, talk.first) + hidden(compute_back, talk.last)
        forward = backward = finish = left = slots = 0.0
        update = talk.update
        if moves is not None:
            # Of inference what is saved are the keys and values.
            left, slots = n.saved if away.activations else 0.0, moves.slots
            forward, backward, finish = self.copies.exposed(moves, left, n.compute_forward, compute_back)
            update = talk.update if moves.update is None else moves.update
        talk_forward, talk_backward = n.forward - n.compute_forward, n.backward - n.compute_backward
        work = max(transient + memory["work"], n.work + memory["gathered"])
        return Option(
            region, named.design, named.style, named.policy, lying.level, named.design.entry, named.design.exit,
            n.forward + talked + forward, n.backward + n.again + talked_back + backward, n.weight,
            ends + update + finish, memory["static"], memory["gradient"], n.saved - left,
            max(work + PASSING * left, slots), memory["step"], memory["host"], left, memory["disk"],
            away.told(moves.stride if moves is not None else math.inf),
            ahead=Causes(n.compute_forward, talk_forward, talked, 0.0, forward),
            back=Causes(n.compute_backward, talk_backward, talked_back, n.again, backward),
            ends=Causes(0.0, 0.0, ends, 0.0, finish, update),
            memory={**memory, "temporaries": max(transient, n.work)}, calls=n.calls, shared=talk.shared,
        )  # fmt: skip


class Shelf:
    """Where and how parameters of the designs of a unit may be kept over one set of data axes; what designs share is kept."""

    def __init__(self, storing: Storing, data: Data) -> None:
        self.storing, self.data = storing, data
        self._stored: dict[tuple[Weights, ...], list[Stored]] = {}
        self._talk: dict[tuple[tuple[Weights, ...], int], Talk] = {}
        self._offered: dict[tuple[tuple[Weights, ...], bool, str], list[_Lying]] = {}
        self._one: dict[tuple[tuple[Weights, ...], int, Away], _Lying] = {}

    def places(self, named: Named, n: Numbers, levels: Sequence[int]) -> list[_Lying]:
        """All that a design is offered."""
        saves = self.storing.training and n.saved > 0
        key = (n.weights, saves, named.policy)
        if key not in self._offered:
            self._offered[key] = list(self._places(n.weights, saves, named.policy, levels))
        return self._offered[key]

    def _places(
        self, weights: tuple[Weights, ...], saves: bool, policy: str, levels: Sequence[int]
    ) -> Iterator[_Lying]:
        store, data = self.storing, self.data
        if weights not in self._stored:
            self._stored[weights] = stored_of(weights, data, store.training)
        stored = self._stored[weights]
        trains, some = any(s.trained for s in stored), any(s.elements for s in stored)
        for level in levels:
            case = Case(level, data.ranks, data.microbatches, trains, some, saves, policy)
            for away in offers(store.host, store.pins, case):
                yield self._at(weights, level, away)

    def _at(self, weights: tuple[Weights, ...], level: int, away: Away) -> _Lying:
        key = (weights, level, away)
        if key not in self._one:
            store, stored = self.storing, self._stored[weights]
            moves = None
            if store.host is not None and away != HERE:
                moves = store.copies.moves(away, [s.moved(level) for s in stored], self.data.microbatches)
            if (weights, level) not in self._talk:
                self._talk[weights, level] = sum((store.keeping.talk(s, level) for s in stored), Talk())
            memory = store.keeping.all_memory(stored, level, away)
            self._one[key] = _Lying(level, away, self._talk[weights, level], memory, moves)
        return self._one[key]

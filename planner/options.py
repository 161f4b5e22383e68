"""Options of a unit: a design with the storage of its parameters, in closed form over the data axes.

With n data ranks, E local parameter elements, and W = E at the compute dtype (planners.md 11; ZeRO, Rajbhandari et al. 2020):

    level   stored per element                     per microbatch                        once a step
    0       p + g + master + moments (+ copy)                                            all-reduce W
    1       (p + master + moments)/n + g + copy                                          reduce-scatter W, all-gather W
    2       (p + g + master + moments)/n + copy    reduce-scatter W                      all-gather W
    3       (p + g + master + moments)/n           all-gather W twice, reduce-scatter W

Experts split over ep of the n ranks (planner/unitexperts.py) are 1/ep of their parameters, with n/ep data ranks of their own.
State that lies behind the device (planner/away.py) is the host's or the disk's, and a table above says what is left of it here.

A compute copy that is the stored parameter itself (a recipe with master weights) is counted once. What runs every microbatch
hides under the compute of its own unit as far as the device lets it; what runs once a step hides under the last backward pass
(reductions) or the first forward pass (gathers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from ..errors import PinError
from .away import HERE, Away, Case, Copies, Moved, offers
from .bench import Numbers, Weights
from .cluster import Device, Host
from .costs import Call, PriceBook
from .front import Design
from .fronts import Named
from .offload import offloaded_state_bytes
from .outline import DTYPE_BYTES
from .overlap import Overlap
from .pins import Pins
from .plan import Precision
from .precision import OPTIMIZERS, state_bytes
from .unitexperts import spread


@dataclass(frozen=True, slots=True)
class Data:
    """The data axes around the inner mesh: ranks that share parameters, their distance, model ranks, microbatches, stages.

    Groups of `experts` of these ranks, `expert_stride` apart, hold each expert once.
    """

    ranks: int
    stride: int
    ways: int
    microbatches: int
    stages: int
    experts: int = 1
    expert_stride: int = 0

    @property
    def once(self) -> bool:
        """Whether the backward pass runs once a step and alone: gradients appear while activations go."""
        return self.microbatches == 1 and self.stages == 1

    def of_experts(self) -> Data:
        """The data axes as parameters of experts see them: one rank of each group."""
        return replace(self, ranks=self.ranks // self.experts, stride=self.stride * self.experts, experts=1)


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run and store a unit. Seconds are of one microbatch, `finish` of the end of a step; bytes are a rank's.

    `static` lives all the time, `gradient` from the first backward pass to the step, `saved` per microbatch in flight, `work`
    only while the unit runs, `step` while the optimizer does. `host` bytes live in host memory, `host_saved` per microbatch;
    `offload` says what lies there (planner/away.py). `parts` are seconds of one step by cause, for a table.
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
    parts: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    calls: tuple[tuple[Call, int], ...] = ()
    shared: tuple[Shared, ...] = ()

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


Shared = tuple[str, int, float, float]
"""A collective over the data axes: its name, how often a step runs it, bytes of the full tensors and seconds of one run."""


@dataclass(frozen=True, slots=True)
class _Talk:
    """Seconds of collectives (per microbatch forward and backward, at a step's start and end), and of the optimizer."""

    forward: float = 0.0
    backward: float = 0.0
    first: float = 0.0
    last: float = 0.0
    update: float = 0.0
    shared: tuple[Shared, ...] = ()

    def __add__(self, other: _Talk) -> _Talk:
        return _Talk(
            self.forward + other.forward, self.backward + other.backward, self.first + other.first,
            self.last + other.last, self.update + other.update, self.shared + other.shared,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Stored:
    """Parameters of a unit that share a data axis, and that axis."""

    weights: tuple[Weights, ...]
    data: Data

    @property
    def elements(self) -> float:
        return sum(w.elements for w in self.weights)

    @property
    def trained(self) -> float:
        return sum(w.elements for w in self.weights if w.trainable)


PASSING = 2.0
"""Saved sets of one unit on the device while they come and go: the one in use, and the one before or after it on its way."""


@dataclass(frozen=True, slots=True)
class _Copied:
    """What the copies of an option add: exposed seconds (forward, backward, at a step's end), seconds of the optimizer wherever
    it runs, saved bytes that left, device bytes of states passing through, and the stride of the update."""

    forward: float = 0.0
    backward: float = 0.0
    ends: float = 0.0
    update: float = 0.0
    left: float = 0.0
    slots: float = 0.0
    stride: float = math.inf


def end_to_end(
    options: Sequence[Option], change: Mapping[tuple[str, str], tuple[float, float]]
) -> tuple[float, float, float, float]:
    """Seconds of units one after the other: forward, backward, weight and finish, changes of layout between them included."""
    turns = [change[one.exit, two.entry] for one, two in pairwise(options) if one.exit != two.entry]
    forward = math.fsum([*(o.forward for o in options), *(f for f, _ in turns)])
    backward = math.fsum([*(o.backward for o in options), *(b for _, b in turns)])
    return forward, backward, math.fsum(o.weight for o in options), math.fsum(o.finish for o in options)


@dataclass(frozen=True)
class Storing:
    """Prices options: what they depend on beside the unit.

    With `host`, the tiers behind each node, options with state there are offered as far as `pins` leave them; `prices` are then
    planner/prices.py's.
    """

    prices: PriceBook
    device: Device
    precision: Precision
    optimizer: str
    training: bool
    foreach: bool
    host: Host | None = None
    pins: Pins = field(default_factory=Pins)

    @cached_property
    def copies(self) -> Copies:
        """What goes to the host and comes back."""
        assert self.host is not None
        return Copies(self.host, self.prices, self.precision, self.optimizer)

    def hidden(self, compute: float, talk: float) -> float:
        """Seconds that `talk` adds to `compute` it may hide under (planner/overlap.py)."""
        return Overlap.of(self.device).exposed(compute, talk)

    def options(self, region: int, named: Named, numbers: Numbers, data: Data, levels: Sequence[int]) -> list[Option]:
        """The options of each ZeRO level for one design; none where experts cannot be split so.

        Raises PinError where an offload is pinned and there is no host.
        """
        if self.host is None and self.pins.offload not in (None, "none", "any"):
            raise PinError(
                f"offload={self.pins.offload}: the cluster has no host memory; describe it in a [host] table"
            )

        def exchange(full_bytes: float) -> float:
            return self.prices.collective("all_to_all", full_bytes, data.expert_stride, data.experts).seconds

        found = spread(numbers, data.experts, data.ranks, exchange, self.training)
        if found is None:
            return []
        stored = self._stored(found, data)
        made = []
        for level in levels:
            talk = sum((self._talk(s, level) for s in stored), _Talk())
            made += [
                self._option(region, named, found, data, level, away, stored, talk)
                for away in offers(self.host, self.pins, self._case(named, found, data, stored, level))
            ]
        return made

    def _stored(self, n: Numbers, data: Data) -> list[_Stored]:
        """Parameters by the data axis they are shared over; those of experts have their own."""
        owned = [w for w in n.weights if not w.borrowed or data.stages > 1]
        plain = tuple(w for w in owned if not w.expert or data.experts == 1)
        split = tuple(
            replace(w, elements=w.elements / data.experts, rows=w.rows / data.experts)
            for w in owned if w.expert and data.experts > 1
        )  # fmt: skip
        return [_Stored(plain, data), *([_Stored(split, data.of_experts())] if split else [])]

    def _case(self, named: Named, n: Numbers, data: Data, stored: Sequence[_Stored], level: int) -> Case:
        return Case(
            level, data.ranks, data.microbatches, self.training and any(s.trained for s in stored),
            any(s.elements for s in stored), self.training and n.saved > 0, named.policy,
        )  # fmt: skip

    def _option(
        self, region: int, named: Named, n: Numbers, data: Data, level: int, away: Away, stored: Sequence[_Stored], talk: _Talk
    ) -> Option:  # fmt: skip
        compute_back = n.compute_backward + n.again
        memory = _summed([self._memory(s.weights, s.data, level, away) for s in stored])
        saved = n.saved  # of inference, the keys and values
        transient = max(n.peak - n.saved, 0.0) if self.training else 0.0
        copied = self._copied(away, n, stored, level, talk.update, saved)
        talked, talked_back = self.hidden(n.compute_forward, talk.forward), self.hidden(compute_back, talk.backward)
        ends = self.hidden(n.compute_forward, talk.first) + self.hidden(compute_back, talk.last)
        runs = data.microbatches
        parts = {
            "compute": runs * n.parts["compute"],
            "activation_communication": runs * n.parts["activation_communication"], "recompute": runs * n.again,
            "parameter_communication": runs * (talked + talked_back) + ends, "optimizer": copied.update,
        }  # fmt: skip
        if away != HERE:
            parts["offload"] = runs * (copied.forward + copied.backward) + copied.ends
        work = max(transient + memory["work"], n.work + memory["gathered"])
        return Option(
            region, named.design, named.style, named.policy, level, named.design.entry, named.design.exit,
            n.forward + talked + copied.forward, n.backward + n.again + talked_back + copied.backward, n.weight,
            ends + copied.update + copied.ends, memory["static"], memory["gradient"], saved - copied.left,
            max(work + PASSING * copied.left, copied.slots), memory["step"], memory["host"], copied.left, memory["disk"],
            away.told(copied.stride), parts=parts, memory={**memory, "temporaries": max(transient, n.work)},
            calls=n.calls, shared=talk.shared,
        )  # fmt: skip

    def _copied(
        self, away: Away, n: Numbers, stored: Sequence[_Stored], level: int, update: float, saved: float
    ) -> _Copied:
        """What the copies of an option add."""
        if self.host is None or away == HERE:
            return _Copied(update=update)
        copies = self.copies
        moved = [Moved(s.elements, s.trained if self.training else 0.0, level, s.data.ranks) for s in stored]
        there, back = copies.passes(away, moved, saved)
        compute_back = n.compute_backward + n.again
        adding = copies.adding(away, moved, stored[0].data.microbatches)
        stride, slots = math.inf, 0.0
        if away.optimizer:
            elements = sum(m.trained / m.share for m in moved)
            stride, rate = copies.update(away)
            update, slots = rate * elements, copies.slots(away, elements)
        return _Copied(
            copies.exposed(there, n.compute_forward), max(copies.exposed(back, compute_back), adding - compute_back),
            copies.ends(away, moved, compute_back), update, saved if away.activations else 0.0, slots, stride,
        )  # fmt: skip

    def _talk(self, stored: _Stored, level: int) -> _Talk:
        """Seconds of collectives of the parameters, and of an optimizer on the device."""
        weights, data = stored.weights, stored.data
        width = DTYPE_BYTES[self.precision.compute]
        total = sum(w.elements for w in weights) * width
        trained = sum(w.elements for w in weights if w.trainable) * width if self.training else 0.0
        again = sum(w.elements for w in weights if w.needed) * width if self.training else 0.0
        whole = sum(w.elements for w in weights if w.whole and w.trainable) * width if self.training else 0.0
        many = data.microbatches > 1
        gather = self._collective("all_gather", total, data)
        back = self._collective("all_gather", again, data)
        scatter = self._collective("reduce_scatter", trained, data)
        inner = self.prices.collective("all_reduce", whole, 1, data.ways).seconds if whole and data.ways > 1 else 0.0
        forward = gather if level == 3 else 0.0
        backward = (back if level == 3 else 0.0) + (scatter + inner if level >= 2 and (many or level == 3) else 0.0)
        first = gather if level in (1, 2) else 0.0
        last = 0.0
        if level == 0:
            last = self._collective("all_reduce", trained, data) + inner
        elif level == 1 or (level == 2 and not many):
            last = scatter + inner
        share = data.ranks if level else 1
        update = (
            self.prices.optimizer_seconds(trained / width / share, self.optimizer, self.precision) if trained else 0.0
        )
        return _Talk(forward, backward, first, last, update, self._shared(data, level, total, again, trained))

    def _shared(
        self, data: Data, level: int, total: float, again: float, trained: float
    ) -> tuple[Shared, ...]:  # fmt: skip
        """The collectives of a step over the data axes: `total` bytes gathered, `again` in backward, `trained` reduced."""
        m = data.microbatches
        gathers = (m, m) if level == 3 else (1, 0) if level else (0, 0)
        reduced = m if level >= 2 else 1
        found = (
            ("all_gather", gathers[0], total), ("all_gather", gathers[1], again),
            ("reduce_scatter" if level else "all_reduce", reduced, trained),
        )  # fmt: skip
        return tuple(
            (name, times, size, self._collective(name, size, data))
            for name, times, size in found if times and size and data.ranks > 1
        )  # fmt: skip

    def _collective(self, name: str, full_bytes: float, data: Data) -> float:
        if data.ranks == 1 or not full_bytes:
            return 0.0
        return self.prices.collective(name, full_bytes, data.stride, data.ranks).seconds

    def _memory(self, weights: Sequence[Weights], data: Data, level: int, away: Away = HERE) -> dict[str, float]:
        """Bytes of one unit's parameters by what they are for."""
        kept = state_bytes(self.precision, self.optimizer)
        width = DTYPE_BYTES[self.precision.compute]
        share = data.ranks if level else 1
        elements = sum(w.elements for w in weights)
        trained = sum(w.elements for w in weights if w.trainable) if self.training else 0.0
        largest = max((w.rows for w in weights), default=0.0)
        copy = width * elements if level in (1, 2) or (level == 0 and kept.copy) else 0.0
        stored = kept.parameter * elements / share
        if kept.master and level in (1, 2):
            stored = 0.0  # the compute copy is the stored parameter; the shard the optimizer updates is the master's
        states = (kept.master + kept.moments) * trained / share
        many = data.microbatches > 1 or data.stages > 1
        gradient = kept.gradient * trained / (data.ranks if level >= 2 or (level == 1 and not many) else 1)
        whole = width * trained if level >= 2 or data.once or away.gradients else 0.0
        gathered = 2.0 * width * elements if (level == 3 and data.ranks > 1) or away.parameters else 0.0
        at_once = trained if self.foreach else OPTIMIZERS[self.optimizer].temporaries * largest
        temporaries = kept.parameter * at_once / share
        host = disk = 0.0
        if away.optimizer:
            moved = offloaded_state_bytes(kept) * trained / share
            host, disk = (moved, 0.0) if away.optimizer == "host" else (0.0, moved)
            host += kept.gradient * trained / share
            if not kept.master:
                # What the optimizer updates went with the moments; the device computes with the copy.
                stored -= kept.parameter * trained / share
                stored += 0.0 if copy else (kept.copy or kept.parameter) * trained / share
            states = temporaries = 0.0
        if away.gradients:
            whole += kept.gradient * trained / share
            gradient = 0.0
        if away.parameters:
            # Between the steps of ZeRO 1 and 2 the shard that the optimizer updates stays.
            left = copy if level in (1, 2) else stored + copy
            uncast = kept.copy * elements / share if level == 3 and not away.optimizer else 0.0
            host, stored, copy = host + left + uncast, stored + copy - left, 0.0
        return {
            "static": stored + states + copy, "gradient": gradient, "work": whole + gathered, "gathered": gathered,
            "step": temporaries, "parameters": stored, "optimizer": states, "copies": copy, "host": host, "disk": disk,
        }  # fmt: skip


def _summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}

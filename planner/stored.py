"""Parameters of a unit over the data axes, in closed form: their bytes, their collectives, their optimizer's step.

With n data ranks, E local parameter elements, and W = E at the compute dtype (planners.md 11; ZeRO, Rajbhandari et al. 2020):

    level   stored per element                     per microbatch                        once a step
    0       p + g + master + moments (+ copy)                                            all-reduce W
    1       (p + master + moments)/n + g + copy                                          reduce-scatter W, all-gather W
    2       (p + g + master + moments)/n + copy    reduce-scatter W                      all-gather W
    3       (p + g + master + moments)/n           all-gather W twice, reduce-scatter W

Reductions move W in the dtype in which gradients are summed (planner/precision.py).

Experts split over ep of the n ranks (planner/unitexperts.py) are 1/ep of their parameters, with n/ep data ranks of their own.
State that lies behind the device (planner/away.py) is the host's or the disk's, and a table above says what is left of it here.

A compute copy that is the stored parameter itself (a recipe with master weights) is counted once. Nothing here depends on how a
unit runs, so designs with the same weights share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .away import HERE, WINDOW, Away, Moved
from .costs import PriceBook
from .numbers import Weights
from .offload import offloaded_state_bytes
from .outline import DTYPE_BYTES
from .plan import Precision
from .precision import StateBytes, find_optimizer, state_bytes, sum_ratio


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


Shared = tuple[str, int, float, float]
"""A collective over the data axes: its name, how often a step runs it, bytes of the full tensors and seconds of one run."""


@dataclass(frozen=True, slots=True)
class Talk:
    """Seconds of collectives (per microbatch forward and backward, at a step's start and end), and of the optimizer."""

    forward: float = 0.0
    backward: float = 0.0
    first: float = 0.0
    last: float = 0.0
    update: float = 0.0
    shared: tuple[Shared, ...] = ()

    def __add__(self, other: Talk) -> Talk:
        return Talk(
            self.forward + other.forward, self.backward + other.backward, self.first + other.first,
            self.last + other.last, self.update + other.update, self.shared + other.shared,
        )  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Parameters of a unit that share a data axis, and that axis; nothing is trained outside training."""

    weights: tuple[Weights, ...]
    data: Data
    training: bool

    @cached_property
    def elements(self) -> float:
        """All elements of the rank's slice."""
        return sum(w.elements for w in self.weights)

    @cached_property
    def trained(self) -> float:
        """Those that an optimizer updates."""
        return sum(w.elements for w in self.weights if w.trainable) if self.training else 0.0

    @cached_property
    def needed(self) -> float:
        """Those that the backward pass needs again."""
        return sum(w.elements for w in self.weights if w.needed) if self.training else 0.0

    @cached_property
    def whole(self) -> float:
        """Trained ones that stand whole on the model axis."""
        return sum(w.elements for w in self.weights if w.whole and w.trainable) if self.training else 0.0

    @cached_property
    def largest(self) -> float:
        """Elements of the largest parameter that an optimizer updates."""
        return max((w.rows for w in self.weights if w.trainable), default=0.0) if self.training else 0.0

    def share(self, level: int) -> int:
        """Ranks that the optimizer's elements are shared by."""
        return self.data.ranks if level else 1

    def moved(self, level: int) -> Moved:
        """What copies to the host and back take of them."""
        return Moved(self.elements, self.trained, level, self.data.ranks)


def stored_of(weights: Sequence[Weights], data: Data, training: bool) -> list[Stored]:
    """Parameters by the data axis they are shared over; those of experts have their own."""
    owned = [w for w in weights if not w.borrowed or data.stages > 1]
    plain = tuple(w for w in owned if not w.expert or data.experts == 1)
    split = tuple(
        replace(w, elements=w.elements / data.experts, rows=w.rows / data.experts)
        for w in owned if w.expert and data.experts > 1
    )  # fmt: skip
    return [Stored(plain, data, training), *([Stored(split, data.of_experts(), training)] if split else [])]


@dataclass(frozen=True)
class Keeping:
    """Prices and measures stored parameters: what that depends on beside them."""

    prices: PriceBook
    precision: Precision
    optimizer: str
    foreach: bool

    @cached_property
    def state(self) -> StateBytes:
        """Bytes per element by cause."""
        return state_bytes(self.precision, self.optimizer)

    @cached_property
    def width(self) -> int:
        """Bytes of an element at the compute dtype."""
        return DTYPE_BYTES[self.precision.compute]

    @cached_property
    def temporaries(self) -> int:
        """Tensors of the size of a parameter that the optimizer makes while it updates it."""
        return find_optimizer(self.optimizer).temporaries

    def talk(self, s: Stored, level: int) -> Talk:
        """Seconds of collectives of the parameters, and of an optimizer on the device."""
        data, width, summed = s.data, self.width, self.width * sum_ratio(self.precision)
        total, trained, again, whole = s.elements * width, s.trained * summed, s.needed * width, s.whole * summed
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
        local = s.trained / s.share(level)
        update = self.prices.optimizer_seconds(local, self.optimizer, self.precision) if trained else 0.0
        return Talk(forward, backward, first, last, update, self._shared(data, level, total, again, trained))

    def _shared(self, data: Data, level: int, total: float, again: float, trained: float) -> tuple[Shared, ...]:
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

    def memory(self, s: Stored, level: int, away: Away = HERE) -> dict[str, float]:
        """Bytes of the parameters by what they are for."""
        kept, width, data, share = self.state, self.width, s.data, s.share(level)
        elements, trained = s.elements, s.trained
        copy = width * elements if level in (1, 2) or (level == 0 and kept.copy) else 0.0
        stored = kept.parameter * elements / share
        if kept.master and level in (1, 2):
            stored = 0.0  # the compute copy is the stored parameter; the shard the optimizer updates is the master's
        states = (kept.master + kept.moments) * trained / share
        many = data.microbatches > 1 or data.stages > 1
        gradient = kept.gradient * trained / (data.ranks if level >= 2 or (level == 1 and not many) else 1)
        whole = width * trained if level >= 2 or data.once or away.gradients else 0.0
        gathered = WINDOW * width * elements if (level == 3 and data.ranks > 1) or away.parameters else 0.0
        at_once = trained if self.foreach else self.temporaries * s.largest
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
            host += uncast + (left if away.parameters == "host" else 0.0)
            disk += left if away.parameters == "disk" else 0.0
            stored, copy = stored + copy - left, 0.0
        return {
            "static": stored + states + copy, "gradient": gradient, "work": whole + gathered, "gathered": gathered,
            "step": temporaries, "parameters": stored, "optimizer": states, "copies": copy, "host": host, "disk": disk,
        }  # fmt: skip

    def all_memory(self, stored: Sequence[Stored], level: int, away: Away = HERE) -> Mapping[str, float]:
        """The same of all the parameters of a unit."""
        parts = [self.memory(s, level, away) for s in stored]
        return parts[0] if len(parts) == 1 else {name: sum(p[name] for p in parts) for name in parts[0]}

"""What of a unit may lie behind the device, in host memory or on disk: what is offered, and the copies that it asks for.

    optimizer     moments and what they update; their step runs on the CPU, or every k-th part of it on the GPU
    gradients     follow the optimizer states: as the backward pass makes them, or once a step
    params        fetched for the forward and for the backward pass of every microbatch, in as many parts as ZeRO shares them;
                  those that are updated lie with the optimizer's states, the others where the word says
    activations   all that a unit saves leaves after its forward pass and is back before its backward pass

One unit takes a class as a whole; a share of it follows from units that do and units that do not. (ZeRO-Offload, Ren et al.
2021; ZeRO-Infinity, Rajbhandari et al. 2021.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..errors import PlanError
from .cluster import Host
from .costs import PriceBook
from .hostupdate import ALL_CPU, MOST_SUBGROUPS, SLOTS, best_stride, update_rates
from .offload import (
    ON_DISK,
    ON_HOST,
    Traffic,
    activation_traffic,
    gradient_traffic,
    lane_seconds,
    offloaded_state_bytes,
    parameter_traffic,
)
from .pins import Pins
from .plan import Precision
from .precision import StateBytes, state_bytes
from .prices import Prices

SUBGROUP = 1e7
"""Elements updated at a time: large enough to fill a link, small enough that `SLOTS` of them do not fill a device."""

ADDED = 3
"""Times the host moves a gradient to add it to those of the microbatches before: both read, the sum written."""


@dataclass(frozen=True, slots=True)
class Away:
    """Which classes lie behind the device; `gradients` leave as they are made.

    `optimizer` and `parameters` are "", "host" or "disk"; what the optimizer updates lies where `optimizer` says.
    """

    optimizer: str = ""
    gradients: bool = False
    parameters: str = ""
    activations: bool = False

    @property
    def classes(self) -> frozenset[str]:
        """Names as the `offload` pin spells them."""
        named = {"optimizer": bool(self.optimizer), "params": bool(self.parameters), "activations": self.activations}
        return frozenset(name for name, there in named.items() if there)

    def told(self, stride: float = math.inf) -> str:
        """The label of an option: classes joined by "+", "" where all is on the device.

        `optimizer/k` updates every k-th part on the GPU (1: all of it), `optimizer` all on the CPU, `@disk` has it on disk.
        """
        words = []
        if self.optimizer:
            part = "" if math.isinf(stride) else f"/{stride:g}"
            words.append(f"optimizer{part}" + ("@disk" if self.optimizer == "disk" else ""))
        words += ["gradients"] if self.gradients else []
        words += [f"params{'@disk' * (self.parameters == 'disk')}"] if self.parameters else []
        return "+".join([*words, "activations"] if self.activations else words)

    def tier(self, *, trained: bool) -> str:
        """Where parameters lie: "" (on the device), "host" or "disk". `trained`: those that the optimizer updates."""
        return self.optimizer if trained and self.optimizer else self.parameters


HERE = Away()
"""All on the device."""

WINDOW = 2
"""Units whose parameters are on the device at once where they pass through it: the one that runs, and the next one coming in."""

PENDING = 2
"""Copies off the device whose source it still holds: one on its way, and the one before it."""


def subgroups(sizes: Sequence[float]) -> list[int]:
    """The subgroup of every parameter of an optimizer, in its order: of `SUBGROUP` elements, one larger parameter by itself."""
    found, number, filled = list[int](), 0, 0.0
    for size in sizes:
        if filled and filled + size > SUBGROUP:
            number, filled = number + 1, 0.0
        filled += size
        found.append(number)
    return found


def updated_on_device(sizes: Sequence[float], strides: Sequence[float]) -> list[bool]:
    """Which parameters of an optimizer, in its order, the device updates: those of every k-th subgroup."""
    return [
        math.isfinite(stride) and number % stride == stride - 1
        for number, stride in zip(subgroups(sizes), strides, strict=True)
    ]


def offload_classes(label: str) -> frozenset[str]:
    """The classes (optimizer, params, activations) in the label of an option."""
    words = {word.partition("@")[0].partition("/")[0] for word in label.split("+")}
    return frozenset(words & {"optimizer", "params", "activations"})


def read_offload(words: Sequence[str], where: str) -> tuple[Away, float]:
    """What the words of a plan's `offload` say: (classes, stride of updates on the device, inf for none).

    The inverse of `Away.told`; `where` is what PlanError names for a word that is none.
    """
    tier, stride, parameters, plain = "", math.inf, "", set[str]()
    for word in words:
        name, _, place = word.partition("@")
        name, _, part = name.partition("/")
        if name == "optimizer" and place in ("", "disk") and (not part or (part.isdecimal() and int(part))):
            tier, stride = place or "host", float(part) if part else math.inf
        elif word in ("params", "params@disk"):
            parameters = place or "host"
        elif word in ("gradients", "activations"):
            plain.add(word)
        else:
            raise PlanError(
                f"{where}: offload {word!r}; expected optimizer, optimizer/K, params, each with @disk or without, gradients or "
                "activations"
            )
    return Away(tier, "gradients" in plain, parameters, "activations" in plain), stride


@dataclass(frozen=True, slots=True)
class Case:
    """What decides which offloads a unit is offered. `shares`: ranks that share its parameters; `saves`: it keeps something."""

    level: int
    shares: int
    microbatches: int
    trains: bool
    parameters: bool
    saves: bool
    policy: str


def offers(host: Host | None, pins: Pins, case: Case) -> Iterator[Away]:
    """The offloads of a unit that the pins leave; a class that is pinned is away wherever the unit has it.

    Few, because units are mixed: parameters, which travel every microbatch, go after the states, which travel once a step, and
    where ZeRO shares them or nobody else has them; activations leave designs that keep everything or their border alone; the
    disk is for named designs, of parameters where nothing is trained. A pin of a class offers it with every design and level.
    """
    if host is None:
        yield HERE
        return
    pinned = pins.offload
    apart = case.level == 3 or case.shares == 1
    tiers = ["", "host"] if case.trains else [""]
    if case.trains and host.disk_bytes and apart and case.policy:
        tiers.append("disk")
    places = ("host", "disk") if host.disk_bytes and not case.trains and case.policy else ("host",)
    alone = not case.trains or pinned == "params" or pins.forbids("offload", "optimizer")
    fetched = case.parameters and (apart or pinned == "params")
    leave = case.saves and (case.policy in ("none", "full") or pinned == "activations")
    had = {"optimizer": case.trains, "params": case.parameters, "activations": case.saves}
    for tier in tiers:
        ways = _gradients(tier, case)
        for gradients in ways if case.policy else ways[-1:]:
            follow = fetched and (gradients == ways[-1] if tier else alone)
            for parameters in ("", *places) if follow else ("",):
                for activations in (False, True) if leave and tier != "disk" else (False,):
                    found = Away(tier, gradients, parameters, activations)
                    if _allowed(found, pins, had):
                        yield found


def _gradients(tier: str, case: Case) -> tuple[bool, ...]:
    """Whether gradients may leave as they are made: reduced ones only, and where nothing is added to them it is no worse."""
    if not tier:
        return (False,)
    if case.microbatches == 1 or (tier == "disk" and (case.level >= 2 or case.shares == 1)):
        return (True,)
    return (False, True) if case.level >= 2 or case.shares == 1 else (False,)


def _allowed(away: Away, pins: Pins, had: dict[str, bool]) -> bool:
    classes = away.classes
    if any(pins.forbids("offload", name) for name in classes or {"none"}):
        return False
    if pins.offload == "none":
        return not classes
    return pins.offload is None or pins.offload in classes or not had[pins.offload]


@dataclass(frozen=True, slots=True)
class Moved:
    """What one unit copies: elements on this rank (`trained` of them the optimizer's), ranks they are shared by at its level."""

    elements: float
    trained: float
    level: int
    ranks: int

    @property
    def share(self) -> int:
        """Ranks that the optimizer's elements are shared by."""
        return self.ranks if self.level else 1


@dataclass(frozen=True, slots=True)
class Moves:
    """What the copies of a unit's parameters take, whatever its design.

    `forward` and `backward` go with every microbatch, and a window is the compute that hides them; `adding` are seconds of the
    host's memory beside a backward pass, to add up gradients that leave as they are made. At the end of a step `leaving` seconds
    of copies may hide under the last backward pass, `returned` do not. `update` are seconds of the optimizer over states that
    are away, with its `stride`, and `slots` the device bytes of those passing through; None where they are here.
    """

    forward: Traffic
    backward: Traffic
    forward_window: float
    backward_window: float
    adding: float
    leaving: float
    returned: float
    stride: float
    update: float | None
    slots: float


@dataclass(frozen=True)
class Copies:
    """Seconds and bytes of offloads with one recipe and optimizer; rates of the update are worked out when first asked for.

    `beside`: copies run beside compute, and the host's processor beside the device. CPU ranks have one for all of it.
    """

    host: Host
    prices: PriceBook
    precision: Precision
    optimizer: str
    beside: bool = True
    _rates: dict[tuple[str, bool], tuple[float, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def state(self) -> StateBytes:
        """Bytes per element by cause."""
        return state_bytes(self.precision, self.optimizer)

    def update(self, away: Away) -> tuple[float, float]:
        """(stride, seconds per element) of the best step over states on the tier of `away`.

        Units of a rank follow each other in one stream, so a long one sets the rate. Parameters that lie on the host need not
        be brought back. Raises TypeError for prices that know no cluster.
        """
        key = (away.optimizer, bool(away.parameters))
        if key not in self._rates:
            if not isinstance(self.prices, Prices):
                raise TypeError(f"the optimizer step of the host is priced by Prices, not {type(self.prices).__name__}")
            prices = replace(self.prices, cluster=replace(self.prices.cluster, host=self.host))
            rates = update_rates(prices, self.precision, self.optimizer, away.optimizer)
            if away.parameters:
                rates = replace(rates, parameters_in=0.0)
            if self.beside:
                elements = MOST_SUBGROUPS * SUBGROUP
                stride, seconds = best_stride(elements, rates, SUBGROUP)
                self._rates[key] = stride, seconds / elements
            else:
                self._rates[key] = ALL_CPU, rates.cpu + rates.parameters_in + rates.read + rates.write
        return self._rates[key]

    def slots(self, away: Away, elements: float) -> float:
        """Device bytes of the states that pass through while the step runs."""
        if not away.optimizer or math.isinf(self.update(away)[0]):
            return 0.0
        return SLOTS * min(SUBGROUP, elements) * offloaded_state_bytes(self.state)

    def fetched(self, away: Away, moved: Moved) -> Traffic:
        """Parameters brought in for one pass of one microbatch."""
        parts = ((moved.trained, True), (moved.elements - moved.trained, False))
        shards, found = moved.ranks if moved.level == 3 else 1, Traffic()
        for elements, trained in parts:
            where = ON_DISK if away.tier(trained=trained) == "disk" else ON_HOST
            found += parameter_traffic(elements, self.state, where, shards)[0]
        return replace(found, copies=1 if moved.elements else 0)

    def moves(self, away: Away, moved: list[Moved], microbatches: int) -> Moves:
        """What the copies of a unit's parameters take, whatever its design."""
        forward, backward = Traffic(), Traffic()
        if away.parameters:
            forward += sum((self.fetched(away, m) for m in moved), Traffic())
            backward += forward
        gradients = sum((self._gradient(m) for m in moved), Traffic()) if away.optimizer else Traffic()
        if away.gradients:
            backward += gradients
        stride, update, slots = math.inf, None, 0.0
        if away.optimizer:
            elements = sum(m.trained / m.share for m in moved)
            stride, rate = self.update(away)
            update, slots = rate * elements, self.slots(away, elements)
        leaving = Traffic() if away.gradients else gradients
        return Moves(
            forward, backward, self._window(forward), self._window(backward), self._adding(away, moved, microbatches),
            self._window(leaving), self._returned(moved) if away.parameters and not away.optimizer else 0.0, stride, update, slots,
        )  # fmt: skip

    def _gradient(self, moved: Moved) -> Traffic:
        return gradient_traffic(moved.trained / moved.share, self.state, ON_HOST)

    def _window(self, traffic: Traffic) -> float:
        return lane_seconds(self.host, traffic).window

    def _adding(self, away: Away, moved: list[Moved], microbatches: int) -> float:
        if not away.gradients or microbatches == 1:
            return 0.0
        size = sum(m.trained / m.share for m in moved) * self.state.gradient
        return ADDED * size / self.host.rank_host_memory_bytes_per_second

    def _returned(self, moved: list[Moved]) -> float:
        """Seconds of bringing parameters of the host to the device that updates them, where a recipe has no master copy of
        them, and of writing them back."""
        state, back = self.state, Traffic()
        for m in moved:
            whole = m.level in (1, 2)
            size = m.elements * (state.copy or state.parameter) if whole else m.trained / m.share * state.parameter
            need = 0.0 if whole or state.master else size
            back += Traffic(in_bytes=need, out_bytes=size, copies=1 if size else 0)
        return self._window(back)

    def exposed(self, moves: Moves, left: float, compute: float, compute_back: float) -> tuple[float, float, float]:
        """Seconds that the compute of a unit does not hide: forward, backward and at a step's end.

        `left` are saved bytes that leave after the forward pass and come back; both directions have lanes of their own.
        """
        forward, backward = moves.forward_window, moves.backward_window
        if not self.beside:
            compute = compute_back = 0.0
        if left:
            out, back = activation_traffic(left, ON_HOST)
            forward, backward = self._window(moves.forward + out), self._window(moves.backward + back)
        return (
            max(0.0, forward - compute),
            max(0.0, backward - compute_back, moves.adding - compute_back),
            max(0.0, moves.leaving - compute_back) + moves.returned,
        )  # fmt: skip

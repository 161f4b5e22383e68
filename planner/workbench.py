"""Prices of units, options and borders, shared by all shapes of one task, and the bounds of a shape made of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..errors import PinError
from .arcs import Line
from .cluster import Cluster, Device
from .costs import PriceBook
from .forked import Cuts, Forked
from .front import Design, crossing_state, ways_of
from .fronts import Fronts, Named
from .memory import Setting
from .offload import spare_host_bytes
from .options import Option, Storing
from .outline import Outline
from .overlap import Overlap
from .part import Chain, chain
from .pins import Pins
from .placing import axis_strides, send_price
from .prices import Price
from .progress import Event, Progress
from .prune import undominated
from .ready import Ready, make_ready
from .residual import residual_factors
from .schedules import SCHEDULES
from .screen import Screen
from .shapes import Arrangement
from .stageproblem import Memory, Pipeline, StageProblem
from .stored import Data


@dataclass(frozen=True)
class Task:
    """What is planned, ready for the search. `runnable`: only what the runtime executes."""

    outline: Outline
    cluster: Cluster
    prices: PriceBook
    pins: Pins
    setting: Setting
    limit_bytes: int
    runnable: bool = False

    @property
    def device(self) -> Device:
        return self.cluster.device


class Workbench:
    """Prices of units, options and borders, shared by all shapes of one task."""

    def __init__(self, task: Task, tell: Progress, *, tiers: bool = False) -> None:
        self.task, self.tell, self.tiers = task, tell, tiers
        self.chain: Chain = chain(task.outline)
        self.forked = Forked(self.chain)
        self.residual = residual_factors(task.outline)
        self.overlap = Overlap.of(task.device)
        self.fronts = Fronts(
            self.chain, task.prices, task.pins, task.setting, self.residual,
            lambda text: tell(Event("front", text)), overlap=self.overlap,
        )  # fmt: skip
        self.storing = self._storing()
        self.regions = tuple(r for r, _ in self.chain.units)
        self._least: dict[tuple[int, int, int], tuple[float, float]] = {}
        self._options: dict[tuple[object, ...], list[Option]] = {}
        self._slowest: dict[tuple[tuple[float, ...], int], float] = {}
        self._ready: dict[tuple[str, int, int, int], Ready] = {}
        self._cuts: dict[Arrangement, Cuts | None] = {}
        self.screen = Screen()
        self.memoryless = Screen(self.screen.held, self._undercut())

    def _storing(self) -> Storing:
        task, precision, optimizer = self.task, self.task.setting.precision, self.task.setting.optimizer
        return Storing(
            task.prices, task.device, precision, optimizer, task.outline.training, task.setting.foreach,
            task.cluster.host if self.tiers else None, task.pins, task.runnable,
        )  # fmt: skip

    def offering(self, tiers: bool) -> Workbench:
        """This bench with or without host memory and disk; what they do not change is shared."""
        if tiers == self.tiers:
            return self
        made = copy.copy(self)
        made.tiers = tiers
        made.storing, made.screen = made._storing(), Screen(self.screen.held)
        return made

    def on(self, shape: Arrangement, rank: int) -> Workbench:
        """The bench of a pipeline rank's devices: this one where all are equal."""
        return self

    # -- bounds

    def least(self, region: int, shape: Arrangement) -> tuple[float, float]:
        """The least forward and backward compute of a unit: every op by its fastest strategy, nothing communicated."""
        key = (region, shape.tp, shape.pieces)
        if key not in self._least:
            part = self.chain.at(region, shape.pieces)
            costs, tensors = self.fronts.costs(shape.tp), part.outline.tensors
            forward = backward = 0.0
            for op in part.outline.ops:
                ways = ways_of(op, tensors, costs, Pins(), frozenset())
                forward += min(w.forward for w in ways)
                backward += min(w.backward for w in ways)
            self._least[key] = forward, backward
        forward, backward = self._least[key]
        return forward / shape.cp, backward / shape.cp

    def bound(self, shape: Arrangement) -> float:
        """No plan of this shape takes less: the compute of its slowest rank, each op by its fastest strategy."""
        return self._bound(shape, Line.of(self.regions, [[self.least(r, shape)] for r in range(len(self.chain.parts))]))

    def _bound(self, shape: Arrangement, line: Line) -> float:
        m, total = shape.microbatches, line.before[-1]
        if shape.schedule == "branches":
            return m * total / shape.pp
        # One microbatch passes every unit and comes back; where weight halves are put off, they may run side by side.
        alone = line.forward(0, len(line)) if SCHEDULES[schedule_of(shape)].splits_backward else total
        if shape.chunks > 1 or shape.pp == 1:
            return max(m * total / shape.pp, alone)
        key = (line.least, shape.pp)
        if key not in self._slowest:
            self._slowest[key] = line.bottleneck(shape.pp)
        return max(m * self._slowest[key], alone)

    def talk_bound(self, shape: Arrangement) -> float:
        """A higher bound: designs with their communication."""
        times = [self.fronts.least(r, shape.tp, shape.pieces, shape.cp) for r in range(len(self.chain.parts))]
        if any(t is None for t in times):
            return 0.0  # the solve says why
        line = Line.of(self.regions, [[t] for t in times if t is not None])
        return self._bound(shape, line)

    def screened(self, shape: Arrangement, low: float, most: float) -> float:
        """A bound with memory and what passes before a rank can begin, between `low` and `most`; raises PinError."""
        key = (shape.tp, shape.cp, shape.pieces, self.data(shape))
        return self.screen.seconds(self.problem(shape), key, low, most)

    def roomy(self, shape: Arrangement, low: float, most: float) -> float:
        """As `screened`, without looking at memory: a bound for plans with host memory and disk too."""
        if self.memoryless.spare == math.inf:
            return low
        problem = replace(self.problem(shape), memory=Memory(math.inf, math.inf, math.inf))
        key = (shape.tp, shape.cp, shape.pieces, self.data(shape))
        return max(low, self.memoryless.seconds(problem, key, low, most))

    def _undercut(self) -> float:
        """Seconds by which a unit's update may be shorter with its states behind the device than with them on it.

        Copies only add to everything else. Inf where an element takes less there.
        """
        host = self.task.cluster.host
        if host is None or not self.task.outline.training:
            return 0.0
        return replace(self.storing, host=host).undercut()

    def ready(self, shape: Arrangement) -> Ready:
        """The schedule of a shape, made once."""
        name = schedule_of(shape) if self.task.outline.training else "forward"
        key = (name, shape.pp, shape.chunks, shape.microbatches)
        if key not in self._ready:
            self._ready[key] = make_ready(*key)
        return self._ready[key]

    # -- options

    def options(self, region: int, shape: Arrangement) -> list[Option]:
        """Every option of a unit; raises PinError where the pins leave none."""
        data = self.data(shape)
        key = (self.tiers, region, shape.tp, shape.cp, shape.pieces, data)
        if key not in self._options:
            measured = self.fronts.numbers(region, shape.tp, shape.pieces, shape.cp)
            levels = self.levels(data)
            self._options[key] = undominated(self.storing.options(region, measured, data, levels))
        return self._options[key]

    def option(self, region: int, shape: Arrangement, design: Design, zero: int, offload: str) -> Option | None:
        """The option of one design, ZeRO level and offload; None where it is not possible."""
        numbers = self.fronts.bench(region, shape.tp, shape.pieces, shape.cp).measure(design)
        if numbers is None:
            return None
        found = self.storing.options(region, [(Named(design, "", "none"), numbers)], self.data(shape), (zero,))
        return next((o for o in found if o.offload == offload), None)

    def data(self, shape: Arrangement) -> Data:
        """The data axes around the inner mesh of a shape."""
        strides = axis_strides(shape.order, shape.sizes())
        stride = strides["cp"] if shape.cp > 1 else strides["ep"] if shape.ep > 1 else strides["dp"]
        return Data(
            shape.dp * shape.cp, stride, shape.tp, shape.microbatches, shape.pp, shape.ep, strides["ep"]
        )  # fmt: skip

    def levels(self, data: Data) -> tuple[int, ...]:
        """The ZeRO levels that the pins leave; raises PinError where there is none."""
        pins = self.task.pins
        if data.ranks == 1:
            if pins.zero:
                raise PinError(
                    f"zero={pins.zero} shares out parameters that several ranks hold whole; there are none without a data "
                    "axis: use zero=0, or dp=N with N > 1"
                )
            return (0,)
        levels: tuple[int, ...] = (0, 1, 2, 3) if self.task.outline.training else (0, 3)
        if pins.zero is not None:
            levels = (pins.zero,) if pins.zero in levels else (0,)
        kept = tuple(z for z in levels if not pins.forbids("zero", z))
        if not kept:
            raise PinError(f"the pins {', '.join(pins.texts)} leave no ZeRO level")
        return kept

    def problem(self, shape: Arrangement) -> StageProblem:
        """The stage solve of a shape."""
        options = [self.options(r, shape) for r in range(len(self.chain.parts))]
        for r, found in enumerate(options):
            if not found:
                blockers = self.fronts.context(shape.cp).blockers if shape.cp > 1 else ()
                raise PinError(
                    f"cp={shape.cp}: {blockers[0]}"
                    if blockers
                    else f"ep={shape.ep} does not divide the experts"
                    if shape.ep > 1
                    else f"region {self.task.outline.regions[r].name} cannot run on {shape.told()}"
                )
        line = Line.of(self.regions, [[(o.forward, o.backward) for o in found] for found in options])
        cuts = self.cuts(shape) if shape.schedule == "branches" else ()
        if cuts is None:
            raise PinError("schedule=branches: the model has no two branches that stages could hold")
        return StageProblem(
            line, options, self.change(shape), Pipeline(shape.pp, shape.chunks, schedule_of(shape), shape.microbatches),
            self.memory(shape), lambda at, layout: self.send(shape, at, layout), self.task.outline.training,
            hand=(lambda stage, at, layout: self.hand(shape, stage, cuts, layout)) if cuts else None, cuts=cuts,
        )  # fmt: skip

    def cuts(self, shape: Arrangement) -> Cuts | None:
        """Where a shape of two branches is cut, by the least seconds of its units; None where the model has none."""
        if shape not in self._cuts:
            least = [sum(self.least(r, shape)) for r in self.regions]
            ways = 2 if self.task.outline.training else 1
            self._cuts[shape] = self.forked.cuts(least, lambda names: ways * self._sent(shape, names, "R"))
        return self._cuts[shape]

    def _sent(self, shape: Arrangement, names: Sequence[str], layout: str) -> float:
        """Seconds of handing tensors on to another pipeline rank."""
        return self.sending(shape, self._border_bytes(shape, names, layout)).seconds if names else 0.0

    @cached_property
    def given_bytes(self) -> float:
        """Bytes of buffers and constants, which every rank has."""
        tensors = self.task.outline.tensors.values()
        return float(sum(t.bytes for t in tensors if t.role in ("buffer", "constant") and t.storage == t.name))

    def reserve(self, shape: Arrangement) -> float:
        """Bytes that the device's context and the buffers of communicators take.

        There is a communicator for every axis of several ranks, and one of all of them where there are several such axes (norms
        of gradients, the end of a step).
        """
        axes = sum(size > 1 for size in (shape.pp, shape.dp, shape.cp, shape.tp)) + (1 < shape.ep < shape.dp)
        return self.task.setting.reserve + (axes + (axes > 1)) * self.task.device.communicator_bytes

    def memory(self, shape: Arrangement) -> Memory:
        """What a rank may use: the limit less the context and communicators, and its share of the host."""
        host = self.task.cluster.host
        cap = max(self.task.limit_bytes - self.reserve(shape) - self.given_bytes, 0.0)
        if host is None or not self.tiers:
            return Memory(cap, 0.0, 0.0)
        return Memory(cap, float(spare_host_bytes(self.task.cluster)), float(host.rank_disk_bytes))

    def crossing_bytes(self, shape: Arrangement, at: int, layout: str) -> float:
        """Bytes of one rank's part of what crosses before unit `at`, for one microbatch."""
        return self._border_bytes(shape, self.chain.borders[at - 1], layout)

    def _border_bytes(self, shape: Arrangement, border: Sequence[str], layout: str) -> float:
        total = 0.0
        for name in border:
            tensor = self.task.outline.tensors[name]
            state = crossing_state(tensor, layout, self.chain.places.get(name, ()), shape.tp)
            total += tensor.bytes / shape.pieces / shape.cp / (shape.tp if state.is_split else 1)
        return total

    def send(self, shape: Arrangement, at: int, layout: str) -> tuple[float, float]:
        """Seconds of handing on what crosses before unit `at`, forward and back."""
        if shape.pp == 1:
            return 0.0, 0.0
        seconds = self.sending(shape, self.crossing_bytes(shape, at, layout)).seconds
        return seconds, seconds if self.task.outline.training else 0.0

    def sending(self, shape: Arrangement, size: float) -> Price:
        """The price of handing so many bytes to the next pipeline rank."""
        stride = axis_strides(shape.order, shape.sizes())["pp"]
        return send_price(self.task.prices, self.task.cluster, size, stride, shape.pp)

    def hand(self, shape: Arrangement, stage: int, cuts: Sequence[int], layout: str) -> tuple[float, float]:
        """As `send`, for what the stage before a stage hands on, and what that stage hands back, under these cuts.

        Of branches the fork (stage 0) hands on to stage 2, and the first branch (stage 1) to the join (stage 3).
        """
        if shape.schedule != "branches":
            return self.send(shape, cuts[stage], layout)
        ahead = self._sent(shape, self.forked.sent(cuts, stage - 1), layout) if stage < 3 else 0.0
        back = self._sent(shape, self.forked.sent(cuts, stage - 2), layout) if stage > 1 else 0.0
        return ahead, back if self.task.outline.training else 0.0

    def change(self, shape: Arrangement) -> Mapping[tuple[str, str], tuple[float, float]]:
        """Seconds of changing the layout of what crosses between units: a gather one way, a slice the other."""
        if shape.tp == 1 or not self.chain.borders:
            return {}
        most = max(self._border_bytes(shape, border, "R") for border in set(self.chain.borders))
        gather = self.task.prices.collective("all_gather", most, 1, shape.tp).seconds
        back = gather if self.task.outline.training else 0.0
        return {("R", "S"): (0.0, back), ("S", "R"): (gather, 0.0)}


def schedule_of(shape: Arrangement) -> str:
    """The schedule that is simulated."""
    return "1f1b" if shape.schedule == "none" else shape.schedule

"""The cost of a plan recomputed from the outline alone, op by op over every concrete layer, without the integer program.

It is what plans report, what checks the solver (its objective must equal this) and what prices edited plans.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .assign import Assignment, Storage
from .away import HERE
from .behind import Behind, Lying
from .costs import Call, Costs
from .halved import Halved
from .memory import Facts, Held, Point, Setting, held
from .outline import DTYPE_BYTES, Op
from .placement import Placement, R, V, local_elements, reduced_over, replaced
from .plan import Traffic
from .precision import state_bytes
from .ring import RING
from .ring import scratch_bytes as ring_scratch
from .space import Option, Times, stored_elements, times
from .template import Template
from .timeline import Timeline
from .uses import Borders, Uses

Line = TypeVar("Line", bound=Timeline)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Seconds by cause, traffic, bytes at every time point, and by cause at the peak."""

    seconds: Mapping[str, float]
    traffic: tuple[Traffic, ...]
    points: Mapping[Point, float]
    memory: Mapping[str, int]
    peak_point: Point

    @property
    def step_seconds(self) -> float:
        return math.fsum(self.seconds.values())

    @property
    def peak_bytes(self) -> int:
        return math.ceil(self.points[self.peak_point] - 1e-6)


class Evaluator:
    """Evaluates assignments of one outline, cut into microbatches, on one mesh."""

    def __init__(
        self, template: Template, found: Facts, costs: Costs, setting: Setting, borders: Borders | None = None
    ) -> None:  # fmt: skip
        """`borders` are those of an outline that is a part of another."""
        cut = template.cut
        self.borders = borders
        self.class_of = template.class_of
        self.cut, self.facts, self.costs, self.setting = cut, found, costs, setting
        self.outline, self.m, self.sizes = cut.outline, cut.microbatches, costs.shape.sizes
        self.tensors = dict(self.outline.tensors)
        self.training = self.outline.training
        self.parameters = {p.tensor: p for p in self.outline.parameters}
        self.region_of = {t: r for r, region in enumerate(self.outline.regions) for ts in region.parameters for t in ts}
        self.bucket_of = {t: template.parameters[w].bucket for t, w in template.parameter_of.items()}
        # Parameters whose group ZeRO-3 gathers again in backward.
        self.again = frozenset(t for t, bucket in self.bucket_of.items() if bucket in template.regathered)
        self.references = [0.0] * len(self.outline.regions)
        for r, region in enumerate(self.outline.regions):
            self.references[r] = (
                float(sum(self.tensors[t].bytes for t in region.parameters[0])) if region.parameters else 0.0
            )

    def evaluate(self, assignment: Assignment, lies: Lying | None = None) -> Evaluation:
        """Evaluate; raises ValueError where a choice or storage is not possible on this mesh.

        Bytes are without what `lies` behind the device, seconds as if nothing did but for collectives that it asks for.
        """
        ledger = self.ledger(assignment, lies)
        points, causes = self.timeline(assignment, ledger, lies).points()
        peak = max(points, key=lambda p: (points[p], p))
        return Evaluation(dict(ledger.seconds), ledger.traffic(), points, causes(peak), peak)

    def ledger(self, assignment: Assignment, lies: Lying | None = None) -> Ledger:
        """Seconds and collectives alone; raises ValueError where a choice or storage is not possible on this mesh."""
        ledger = Ledger(self, assignment, lies)
        ledger.ops()
        ledger.transitions()
        ledger.parameters()
        return ledger

    def timeline(
        self, assignment: Assignment, ledger: Ledger, lies: Lying | None = None, *, first: bool = False
    ) -> Timeline:
        """Bytes alone, without what `lies` behind the device; with `first` those of the first microbatch, before any gradient."""
        given = self._given(assignment, ledger, first)
        return self._with_rings(Timeline(*given) if lies is None else Behind(lies, *given))

    def halved(self, assignment: Assignment, ledger: Ledger) -> Halved:
        """Bytes of a backward pass in two halves."""
        return self._with_rings(Halved(*self._given(assignment, ledger, False)))

    def _given(self, assignment: Assignment, ledger: Ledger, first: bool) -> tuple[Any, ...]:
        """What a time line is made of."""
        held = {name: self._held(name, assignment, ledger) for name in self.parameters}
        cut = replace(self.cut, microbatches=1) if first else self.cut
        uses = ledger.uses()
        return cut, self.facts, self.setting, self.sizes, assignment, held, uses, ledger.again, self.borders

    def _with_rings(self, line: Line) -> Line:
        """With the buffers of rings."""
        for i, op in enumerate(self.outline.ops):
            choice = line.assignment.choices[op.name]
            if RING in choice:
                share = self.costs.repeated.get(op.name, 1.0)
                line.moment[i] += ring_scratch(op, self.tensors, choice, self.sizes, self.training, share)
        return line

    def _held(self, name: str, assignment: Assignment, ledger: Ledger) -> Held:
        bytes_ = state_bytes(self.setting.precision, self.setting.optimizer)
        tensor, storage = self.tensors[name], assignment.storage.get(name)
        if storage is None:
            return held(tensor, False, tensor.elements, tensor.elements, 0, 0, bytes_, self.setting)
        used = local_elements(tensor.dims, storage.home, self.sizes)
        trains = self.parameters[name].trainable and self.training
        return held(
            tensor, trains, ledger.stored(name), used, storage.zero, len(ledger.reduced[name]), bytes_, self.setting
        )


Run = tuple[tuple[float, float, tuple[Call, ...]], tuple[Placement, ...], tuple[Placement, ...]]
"""Price of an op, placements it wants of operands and makes of results."""


class Ledger:
    """Seconds and collectives of one assignment."""

    def __init__(self, owner: Evaluator, assignment: Assignment, lies: Lying | None = None) -> None:
        self.owner, self.assignment, self.lies = owner, assignment, lies
        causes = ("compute", "activation_communication", "parameter_communication", "copies", "optimizer")
        self.seconds: dict[str, float] = dict.fromkeys(causes, 0.0)
        self._calls: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self.wanted: dict[str, tuple[Placement, ...]] = {}
        self.produced: dict[str, Placement] = dict(owner.borders.takes) if owner.borders else {}
        self.wants: dict[str, dict[Placement, None]] = defaultdict(dict)
        self.reduced: dict[str, set[Placement]] = defaultdict(set)
        self.fresh: dict[str, list[Placement]] = defaultdict(list)
        self.turned: dict[str, int] = defaultdict(int)
        read = {owner.bucket_of.get(name) for name in assignment.again.parameters}
        self.again = owner.again | frozenset(t for t, bucket in owner.bucket_of.items() if bucket in read)

    def ops(self) -> None:
        """Price every op and note what it makes and wants; ops of one class and choice are looked up once."""
        owner = self.owner
        known: dict[tuple[int, tuple[str, ...]], Run] = {}
        for op in owner.outline.ops:
            price, wanted, produced = self._op(op, self.assignment.choices[op.name], known)
            self.wanted[op.name] = wanted
            runs = 1 if self._once(op) else owner.m
            self.seconds["compute"] += runs * price[0]
            self.seconds["activation_communication"] += runs * price[1]
            self._count(price[2], runs * (2 if op.name in self.assignment.again.ops else 1), runs)
            for use, placement in zip(op.results, produced, strict=True):
                self.produced[use.tensor] = placement
            for use, placement in zip(op.operands, wanted, strict=True):
                self.wants[use.tensor].setdefault(placement)

    def _op(self, op: Op, choice: tuple[str, ...], known: dict[tuple[int, tuple[str, ...]], Run]) -> Run:
        owner, key = self.owner, (self.owner.class_of[op.name], choice)
        if key not in known:
            price = owner.costs.op(op, owner.tensors, choice)
            if price is None:
                raise ValueError(f"{op.name}: a split by {', '.join(choice)} does not divide")
            known[key] = (price, *owner.costs.placed(op, owner.tensors, choice))
        return known[key]

    def _once(self, op: Op) -> bool:
        return any(u.tensor in self.owner.cut.once for u in op.results)

    def transitions(self) -> None:
        """One chain per (activation, wanted placement); the loss and the outputs of inference are wanted whole."""
        owner = self.owner
        whole: Placement = (R,) * len(owner.sizes)
        for name, wants in self.wants.items():
            if owner.tensors[name].role != "parameter":
                outside = name not in self.produced
                runs = 1 if outside or name in owner.cut.once else owner.m
                for want in wants:
                    self._chain(name, self.produced.get(name, whole), want, runs)
        for name, want in owner.borders.gives.items() if owner.borders else ():
            if want not in self.wants[name]:
                self._chain(name, self.produced[name], want, owner.m)
        for name in (*([owner.outline.loss] if owner.training else owner.outline.outputs), *owner.outline.writes):
            if name in self.produced:
                self._chain(name, self.produced[name], whole, 1)

    def _chain(self, name: str, source: Placement, target: Placement, runs: int) -> None:
        chain = self.owner.costs.chain(self.owner.tensors[name], source, target)
        if chain is None:
            raise ValueError(f"{name} cannot go from {source} to {target}")
        self.seconds["activation_communication"] += runs * (chain.forward + chain.backward)
        self.seconds["copies"] += runs * (chain.copies_forward + chain.copies_backward)
        self._count(chain.calls, runs * (2 if (name, target) in self.assignment.again.copies else 1), runs)

    def parameters(self) -> None:
        """Gathers, reductions and transitions of every parameter group, and the optimizer."""
        for group in self.assignment.groups:
            used = {t: self._used(t) for t in group}
            self._gather(group, used)
            wants = [(t, want) for t in group for want in self.wants[t]]
            summed = {(t, want): self._summed(t, want) for t, want in wants}
            for axes in sorted({axes for found in summed.values() for axes in found}):
                self._reduce([(t, want) for t, want in wants if axes in summed[t, want]], used, axes)
            for name in group:
                self._optimizer(name)
                self._entries(name)

    def _used(self, name: str) -> float:
        tensor = self.owner.tensors[name]
        return (
            local_elements(tensor.dims, self.assignment.storage[name].home, self.owner.sizes)
            * DTYPE_BYTES[tensor.dtype]
        )

    def _times(self, name: str) -> Times:
        owner, again = self.owner, name in self.again
        trains = owner.parameters[name].trainable and owner.training
        level = self.assignment.storage[name].zero
        away = self.lies.away[name][0] if self.lies is not None else HERE
        if away.parameters:  # every microbatch fetches them, as with ZeRO-3
            level = 3
        elif away.gradients and trains:  # they leave as every microbatch makes them, summed, as with ZeRO-2
            level = max(level, 2)
        return times(level, owner.m, owner.training, trains, again)

    def _gather(self, group: tuple[str, ...], used: Mapping[str, float]) -> None:
        owner, storage = self.owner, self.assignment.storage[group[0]]
        if not storage.zero:
            return
        often, reference = self._times(group[0]), owner.references[owner.region_of[group[0]]]
        chunks = math.prod(owner.sizes[a] for a in storage.zero_axes)
        padded = chunks * sum(self.stored(t) * DTYPE_BYTES[owner.tensors[t].dtype] for t in group)
        for name, runs in (("all_gather", often.gather), ("reduce_scatter", often.scatter)):
            bucket = owner.costs.bucket(name, storage.zero_axes, reference)
            sent = padded if name == "all_gather" else self._sent(group[0], padded)
            self._bucket(name, storage.zero_axes, runs, bucket.fixed + bucket.slope * sum(used.values()), sent)

    def _reduce(
        self, members: Sequence[tuple[str, Placement]], used: Mapping[str, float], axes: tuple[int, ...]
    ) -> None:
        owner, first = self.owner, members[0][0]
        for name, want in members:
            self.reduced[name].add(want)
        bucket = owner.costs.bucket("all_reduce", axes, owner.references[owner.region_of[first]])
        total = sum(used[t] for t, _ in members)
        self._bucket(
            "all_reduce",
            axes,
            self._times(first).backward,
            bucket.fixed + bucket.slope * total,
            self._sent(first, total),
        )

    def _summed(self, name: str, want: Placement) -> tuple[tuple[int, ...], ...]:
        """The sets of axes over which the gradient of a use is summed."""
        if not self.owner.tensors[name].differentiable:
            return ()
        now = self._now(self.assignment.storage[name], name)
        return reduced_over(now, want, self.assignment.shared_axes)

    def _sent(self, name: str, total: float) -> float:
        """Bytes of gradients, `total` in the compute dtype; where that is not the stored one, they are summed in their own."""
        precision = self.owner.setting.precision
        if precision.compute == precision.parameter:
            return total
        return total * DTYPE_BYTES[precision.gradient] / DTYPE_BYTES[self.owner.tensors[name].dtype]

    def _now(self, storage: Storage, name: str) -> Placement:
        owner = self.owner
        now = storage.home
        for axis in storage.zero_axes if storage.zero else ():
            now = replaced(now, axis, V if owner.parameters[name].trainable and owner.training else R)
        return now

    def _bucket(self, name: str, axes: tuple[int, ...], runs: int, seconds: float, total: float) -> None:
        if not runs or math.prod(self.owner.sizes[a] for a in axes) == 1:
            return
        self.seconds["parameter_communication"] += runs * seconds
        self._add(name, "+".join(self.owner.costs.shape.names[a] for a in sorted(axes)), runs, total, runs * seconds)

    def stored(self, name: str) -> int:
        """Elements of a parameter on the rank that stores most of it."""
        owner = self.owner
        return stored_elements(owner.tensors[name], option(self.assignment.storage[name], owner.sizes), owner.sizes)

    def _optimizer(self, name: str) -> None:
        owner = self.owner
        if owner.training and owner.parameters[name].trainable:
            setting = owner.setting
            seconds = owner.costs.prices.optimizer_seconds(self.stored(name), setting.optimizer, setting.precision)
            self.seconds["optimizer"] += seconds

    def _entries(self, name: str) -> None:
        owner, tensor, often = self.owner, self.owner.tensors[name], self._times(name)
        now = self._now(self.assignment.storage[name], name)
        for want in self.wants[name]:
            at = now
            for axis in (a for axes in self._summed(name, want) for a in axes):
                at = replaced(at, axis, V)
            chain = owner.costs.chain(tensor, at, want)
            if chain is None:
                raise ValueError(f"parameter {name} cannot go from {now} to {want}")
            self.seconds["parameter_communication"] += often.forward * chain.forward + often.backward * chain.backward
            self.seconds["copies"] += often.forward * chain.copies_forward + often.backward * chain.copies_backward
            self._count(chain.calls, often.forward, often.backward)
            if chain.fresh:
                self.fresh[name].append(want)
            if chain.copies_backward or any(call.backward for call in chain.calls):
                self.turned[name] += 1

    def _count(self, calls: tuple[Call, ...], forward: int, backward: int) -> None:
        for call in calls:
            runs = backward if call.backward else forward
            axis = self.owner.costs.shape.names[call.axis]
            self._add(call.collective, axis, runs, call.bytes, runs * self.owner.costs.collective(call))

    def _add(self, name: str, axis: str, runs: int, total: float, seconds: float) -> None:
        entry = self._calls[name, axis]
        entry[0] += runs
        entry[1] += runs * total
        entry[2] += seconds

    def uses(self) -> Uses:
        """The placements memory depends on."""
        return Uses(self.wanted, self.produced, self.fresh, self.wants, self.reduced, self.turned)

    def traffic(self) -> tuple[Traffic, ...]:
        """Collectives of one step by kind and axis."""
        return tuple(
            Traffic(name, axis, int(count), round(total), seconds)
            for (name, axis), (count, total, seconds) in sorted(self._calls.items())
            if count
        )


def option(storage: Storage, sizes: tuple[int, ...]) -> Option:
    """A storage as an option of the space (without its uses)."""
    chunks = math.prod(sizes[a] for a in storage.zero_axes) if storage.zero else 1
    return Option(storage.home, storage.zero, storage.zero_axes, storage.home, chunks)

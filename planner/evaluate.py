"""The cost of a plan recomputed from the outline alone, op by op over every concrete layer, without the integer program.

It is what plans report, what checks the solver (its objective must equal this) and what prices edited plans.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .assign import Assignment, Storage
from .costs import Call, Costs, replaced
from .memory import (
    CAUSES, Facts, Held, buffer, held, local_bytes, new_bytes, operand_gradients,
)  # fmt: skip
from .outline import DTYPE_BYTES, Op, Outline, Parameter
from .placement import Placement, R, V, local_elements
from .plan import Precision, Traffic
from .precision import StateBytes, state_bytes
from .space import Option, Times, stored_elements, times
from .template import Cut

Point = tuple[str, int]
"""A time point: ("op", index of the op whose backward runs), ("reduce", group), ("finish", group), ("held", 0), ("step", index)."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a plan is evaluated under."""

    precision: Precision
    optimizer: str
    reserve: int = 0
    foreach: bool = False


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

    def __init__(self, cut: Cut, found: Facts, costs: Costs, setting: Setting) -> None:
        self.cut, self.facts, self.costs, self.setting = cut, found, costs, setting
        self.outline, self.m, self.sizes = cut.outline, cut.microbatches, costs.shape.sizes
        self.tensors = dict(self.outline.tensors)
        self.training = bool(self.outline.loss)
        self.parameters = {p.tensor: p for p in self.outline.parameters}
        self.region_of = {t: r for r, region in enumerate(self.outline.regions) for ts in region.parameters for t in ts}
        self.references = [0.0] * len(self.outline.regions)
        for r, region in enumerate(self.outline.regions):
            self.references[r] = float(sum(self.tensors[t].bytes for t in region.parameters[0])) if region.parameters else 0.0

    def evaluate(self, assignment: Assignment) -> Evaluation:
        """Evaluate; raises ValueError where a choice or storage is not possible on this mesh."""
        ledger = _Ledger(self, assignment)
        ledger.ops()
        ledger.transitions()
        ledger.parameters()
        points, causes = _Memory(self, assignment, ledger).points()
        peak = max(points, key=lambda p: (points[p], p))
        return Evaluation(dict(ledger.seconds), ledger.traffic(), points, causes(peak), peak)


class _Ledger:
    """Seconds and collectives of one assignment."""

    def __init__(self, owner: Evaluator, assignment: Assignment) -> None:
        self.owner, self.assignment = owner, assignment
        causes = ("compute", "activation_communication", "parameter_communication", "copies", "optimizer")
        self.seconds: dict[str, float] = dict.fromkeys(causes, 0.0)
        self._calls: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        self.wanted: dict[str, tuple[Placement, ...]] = {}
        self.produced: dict[str, Placement] = {}
        self.wants: dict[str, dict[Placement, None]] = defaultdict(dict)
        self.reduced: dict[str, int] = defaultdict(int)
        self.fresh: dict[str, list[Placement]] = defaultdict(list)

    def ops(self) -> None:
        """Price every op and note what it makes and wants."""
        owner = self.owner
        for op in owner.outline.ops:
            choice = self.assignment.choices[op.name]
            price = owner.costs.op(op, owner.tensors, choice)
            if price is None:
                raise ValueError(f"{op.name}: a split by {', '.join(choice)} does not divide")
            wanted, produced = owner.costs.placed(op, owner.tensors, choice)
            self.wanted[op.name] = wanted
            runs = 1 if self._once(op) else owner.m
            self.seconds["compute"] += runs * price[0]
            self.seconds["activation_communication"] += runs * price[1]
            self._count(price[2], runs, runs)
            for use, placement in zip(op.results, produced, strict=True):
                self.produced[use.tensor] = placement
            for use, placement in zip(op.operands, wanted, strict=True):
                self.wants[use.tensor].setdefault(placement)

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
        for name in (owner.outline.loss,) if owner.training else owner.outline.outputs:
            if name in self.produced:
                self._chain(name, self.produced[name], whole, 1)

    def _chain(self, name: str, source: Placement, target: Placement, runs: int) -> None:
        chain = self.owner.costs.chain(self.owner.tensors[name], source, target)
        if chain is None:
            raise ValueError(f"{name} cannot go from {source} to {target}")
        self.seconds["activation_communication"] += runs * (chain.forward + chain.backward)
        self.seconds["copies"] += runs * (chain.copies_forward + chain.copies_backward)
        self._count(chain.calls, runs, runs)

    def parameters(self) -> None:
        """Gathers, reductions and transitions of every parameter group, and the optimizer."""
        owner = self.owner
        for group in self.assignment.groups:
            used = {t: self._used(t) for t in group}
            self._gather(group, used)
            for axis in range(len(owner.sizes)):
                self._reduce(group, used, axis)
            for name in group:
                self._optimizer(name)
                self._entries(name)

    def _used(self, name: str) -> float:
        tensor = self.owner.tensors[name]
        return local_elements(tensor.dims, self.assignment.storage[name].home, self.owner.sizes) * DTYPE_BYTES[tensor.dtype]

    def _times(self, name: str) -> Times:
        owner = self.owner
        return times(self.assignment.storage[name].zero, owner.m, owner.training, owner.parameters[name].trainable)

    def _gather(self, group: tuple[str, ...], used: Mapping[str, float]) -> None:
        owner, storage = self.owner, self.assignment.storage[group[0]]
        if not storage.zero:
            return
        often, reference = self._times(group[0]), owner.references[owner.region_of[group[0]]]
        padded = sum(self.stored(t) * option(self.assignment.storage[t], owner.sizes).chunks * DTYPE_BYTES[owner.tensors[t].dtype] for t in group)
        for name, runs in (("all_gather", often.gather), ("reduce_scatter", often.scatter)):
            bucket = owner.costs.bucket(name, storage.zero_axes, reference)
            self._bucket(name, storage.zero_axes, runs, bucket.fixed + bucket.slope * sum(used.values()), padded)

    def _reduce(self, group: tuple[str, ...], used: Mapping[str, float], axis: int) -> None:
        owner = self.owner
        members = [t for t in group for want in self.wants[t] if self._needs(t, want, axis)]
        if not members:
            return
        for name in members:
            self.reduced[name] += 1
        bucket = owner.costs.bucket("all_reduce", (axis,), owner.references[owner.region_of[group[0]]])
        total = sum(used[t] for t in members)
        self._bucket("all_reduce", (axis,), self._times(group[0]).backward, bucket.fixed + bucket.slope * total, total)

    def _needs(self, name: str, want: Placement, axis: int) -> bool:
        storage, tensor = self.assignment.storage[name], self.owner.tensors[name]
        return tensor.differentiable and self._now(storage, name)[axis] == R and want[axis] == V

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
        self._add(name, "+".join(self.owner.costs.shape.names[a] for a in axes), runs, total, runs * seconds)

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
            for axis in range(len(owner.sizes)):
                if self._needs(name, want, axis):
                    at = replaced(at, axis, V)
            chain = owner.costs.chain(tensor, at, want)
            if chain is None:
                raise ValueError(f"parameter {name} cannot go from {now} to {want}")
            self.seconds["parameter_communication"] += often.forward * chain.forward + often.backward * chain.backward
            self.seconds["copies"] += often.forward * chain.copies_forward + often.backward * chain.copies_backward
            self._count(chain.calls, often.forward, often.backward)
            if chain.fresh:
                self.fresh[name].append(want)

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


class _Memory:
    """Bytes alive at every time point of one assignment, counted concretely."""

    def __init__(self, owner: Evaluator, assignment: Assignment, ledger: _Ledger) -> None:
        self.owner, self.assignment, self.ledger = owner, assignment, ledger
        self.ops = owner.outline.ops
        bytes_ = state_bytes(owner.setting.precision, owner.setting.optimizer)
        self.held: dict[str, Held] = {}
        for name, parameter in owner.parameters.items():
            self.held[name] = self._held(name, parameter, bytes_)
        self.groups = [g for g in assignment.groups]
        self.count = len(self.ops)
        self.lanes = {cause: [0.0] * (self.count + 1) for cause in ("gradients", "saved", "gathered", "temporaries")}
        self.moment = [0.0] * self.count

    def _held(self, name: str, parameter: Parameter, bytes_: StateBytes) -> Held:
        owner, storage = self.owner, self.assignment.storage.get(name)
        tensor = owner.tensors[name]
        if storage is None:
            return held(tensor, False, tensor.elements, tensor.elements, 0, 0, bytes_, owner.setting.optimizer)
        used = local_elements(tensor.dims, storage.home, owner.sizes)
        trains = parameter.trainable and owner.training
        reduced = self.ledger.reduced[name]
        return held(tensor, trains, self.ledger.stored(name), used, storage.zero, reduced, bytes_, owner.setting.optimizer)

    def _over(self, cause: str, low: int, high: int, amount: float) -> None:
        """Add to a lane for time points low..high (inclusive), as differences."""
        if amount and low <= high:
            self.lanes[cause][low] += amount
            self.lanes[cause][high + 1] -= amount

    def points(self) -> tuple[dict[Point, float], Callable[[Point], dict[str, int]]]:
        """(bytes by point, function giving the causes at a point)."""
        owner = self.owner
        (self._training if owner.training else self._inference)()
        lanes = {cause: _accumulated(lane)[: self.count] for cause, lane in self.lanes.items()}
        base = {
            "parameters": sum(h.stored for h in self.held.values()),
            "optimizer": sum(h.moments for h in self.held.values()),
            "buffers": sum(t.bytes for t in owner.tensors.values() if t.role in ("input", "buffer", "constant") and t.storage == t.name),
            "reserve": owner.setting.reserve,
        }
        points: dict[Point, dict[str, float]] = {}
        for v in range(self.count):
            points["op", v] = {c: lanes[c][v] for c in lanes}
            points["op", v]["temporaries"] += self.moment[v]
        if owner.training:
            self._reductions(points, lanes)
            self._steps(points)
        fixed = sum(base.values())
        totals = {p: fixed + sum(c.values()) for p, c in points.items()}

        def causes(point: Point) -> dict[str, int]:
            found = {c: float(base.get(c, 0)) for c in CAUSES}
            for cause, amount in points[point].items():
                found[cause] += amount
            return {c: round(x) for c, x in found.items()}

        return totals, causes

    # -- lanes

    def _training(self) -> None:
        self._saved()
        self._gradients()
        self._gathered()
        self._temporaries()

    def _saved(self) -> None:
        owner, found = self.owner, self.owner.facts
        first: dict[tuple[str, Placement], int] = {}
        whole: Placement = (R,) * len(owner.sizes)
        for i, op in enumerate(self.ops):
            for item in op.saved:
                if item.source == "new":
                    self._over("saved", i, self.count - 1, new_bytes(op, item, self.assignment.choices[op.name], owner.sizes))
                    continue
                use = (op.operands if item.source == "operand" else op.results)[item.index]
                placement = self.ledger.wanted[op.name][item.index] if item.source == "operand" else self.ledger.produced[use.tensor]
                first.setdefault(buffer(found, use.tensor, placement), i)
        for (name, placement), i in first.items():
            root = owner.tensors[name]
            if root.role == "parameter" or (root.role != "activation" and placement == whole):
                continue
            self._over("saved", i, self.count - 1, local_bytes(root, placement, owner.sizes))
        for name, i in found.saved_parameters.items():
            for want in self.ledger.fresh[name] if owner.m == 1 or self.assignment.storage[name].zero == 3 else ():
                self._over("saved", i, self.count - 1, local_bytes(owner.tensors[name], want, owner.sizes))

    def _gradients(self) -> None:
        found, m, last = self.owner.facts, self.owner.m, self.count - 1
        for name, h in self.held.items():
            if not h.whole or not found.uses[name]:
                continue
            if m > 1 and self.assignment.storage[name].zero < 2:
                self._over("gradients", 0, last, h.whole)
                continue
            self._over("gradients", found.low[name], found.uses[name][-1], h.whole)
            self._over("gradients", 0, last if m > 1 else found.low[name] - 1, h.final)

    def _gathered(self) -> None:
        owner, found, last = self.owner, self.owner.facts, self.count - 1
        span = {}
        for r, region in enumerate(owner.outline.regions):
            for k, ops in enumerate(region.instances):
                span[r, k] = (found.order[ops[0]], found.order[ops[-1]])
        for name, storage in self.assignment.storage.items():
            h = self.held[name]
            self._over("gathered", 0 if owner.m > 1 else found.low[name], last, h.copy)
            for key in sorted(found.touched[name]):
                self._over("gathered", *span[key], h.gathered)
            for want in self.ledger.fresh[name] if owner.m > 1 and storage.zero < 3 else ():
                self._over("gathered", 0, last, local_bytes(owner.tensors[name], want, owner.sizes))

    def _temporaries(self) -> None:
        owner = self.owner
        for span in owner.facts.spans:
            amount = local_bytes(owner.tensors[span.root], self.ledger.produced[span.root], owner.sizes)
            self._over("temporaries", span.start, span.end - 1, amount)
        for i, op in enumerate(self.ops):
            for j in operand_gradients(op, owner.tensors):
                amount = local_bytes(owner.tensors[op.operands[j].tensor], self.ledger.wanted[op.name][j], owner.sizes)
                self.moment[i] += amount

    def _inference(self) -> None:
        owner = self.owner
        self._gathered()
        for span in owner.facts.spans:
            amount = local_bytes(owner.tensors[span.root], self.ledger.produced[span.root], owner.sizes)
            self._over("temporaries", span.start, min(span.end, self.count - 1), amount)
        for i, op in enumerate(self.ops):
            for use, placement in zip(op.operands, self.ledger.wanted[op.name], strict=True):
                tensor = owner.tensors[use.tensor]
                source = self.ledger.produced.get(use.tensor)
                if source is not None and buffer(owner.facts, use.tensor, source) != buffer(owner.facts, use.tensor, placement):
                    self.moment[i] += local_bytes(tensor, placement, owner.sizes)

    # -- other time points

    def _reductions(self, points: dict[Point, dict[str, float]], lanes: Mapping[str, list[float]]) -> None:
        found, m = self.owner.facts, self.owner.m
        final = sum(h.final for h in self.held.values())
        waiting = sum(self.held[t].whole for t, s in self.assignment.storage.items() if s.zero < 2)
        copies = sum(h.copy for h in self.held.values())
        for g, group in enumerate(self.groups):
            bucket = sum(self.held[t].bucket for t in group)
            if m > 1 and self.assignment.storage[group[0]].zero < 2:
                points["finish", g] = {"gradients": waiting + final, "gathered": copies, "reserve": bucket}
                continue
            v = found.low[group[0]]
            before = {c: lanes[c][v - 1] if v else 0.0 for c in ("saved", "temporaries")}
            points["reduce", g] = {"gradients": lanes["gradients"][v], "gathered": lanes["gathered"][v], "reserve": bucket, **before}

    def _steps(self, points: dict[Point, dict[str, float]]) -> None:
        final = sum(h.final for h in self.held.values())
        if self.owner.m > 1:
            points["held", 0] = {"gradients": 2 * final}
        if self.owner.setting.foreach:
            points["step", 0] = {"gradients": final, "temporaries": sum(h.step for h in self.held.values())}
            return
        for i, p in enumerate(self.owner.outline.parameters):
            if self.held[p.tensor].step:
                points["step", i] = {"gradients": final, "temporaries": self.held[p.tensor].step}


def _accumulated(differences: list[float]) -> list[float]:
    total, found = 0.0, []
    for d in differences:
        total += d
        found.append(total)
    return found

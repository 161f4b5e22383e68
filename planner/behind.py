"""Bytes alive at every time point of one assignment that keeps something behind the device (runtime/offload), op by op.

What planner/timeline.py counts of a step, but

    parameters    a copy at the compute dtype of those whose optimizer states are away, for as long as they stay; those that pass
                  through are there from the beginning of a unit's backward pass to their own op in it, and in the unit after it,
                  while they come in
    gradients     until those of their unit have come, and in a step of one microbatch the last that leave while those of the next
                  unit are made; those added up over microbatches until the end
    saved         of units whose activations leave, from the beginning of the backward pass of the next such unit to their own op
    step          nothing of what the host updates; of what visits the device, `SLOTS` subgroups
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from .assign import entries_of
from .away import HERE, PENDING, Away, read_offload, subgroups, updated_on_device
from .hostupdate import SLOTS
from .memory import Buffer, Held, Point, buffer, local_bytes, new_bytes
from .needing import Unit
from .offload import offloaded_state_bytes
from .outline import DTYPE_BYTES, Outline, Tensor
from .placement import R
from .plan import Plan
from .precision import StateBytes, state_bytes
from .timeline import Timeline


@dataclass(frozen=True)
class Lying:
    """Where a plan has parameters (classes and stride, by tensor), and the ops of units whose activations leave."""

    away: Mapping[str, tuple[Away, float]]
    leaving: frozenset[str]


def lying(plan: Plan, outline: Outline) -> Lying:
    """What a plan keeps behind the device; raises PlanMismatch where the plan is of another model."""
    away: dict[str, tuple[Away, float]] = {}
    leaving: set[str] = set()
    for entries, region in zip(entries_of(plan, outline), outline.regions, strict=True):
        for k, entry in enumerate(entries):
            found = read_offload(entry.offload, f"region {entry.name}")
            if found[0].activations:
                leaving |= set(region.instances[k])
            if region.parameters:
                away |= dict.fromkeys(region.parameters[k], found)
    return Lying(away, frozenset(leaving))


def kept(h: Held, away: Away, tensor: Tensor, trains: bool, zero: int, state: StateBytes) -> Held:
    """What a parameter takes on the device where some of it is away."""
    if not away.parameters and not (trains and away.optimizer):
        return h
    count = h.stored // (state.parameter + (state.master if trains else 0))
    here = count * DTYPE_BYTES[tensor.dtype]
    stays = not away.parameters and zero in (0, 3)
    return replace(
        h, stored=here if stays else 0, moments=0, step=0, copy=h.copy if zero in (1, 2) else 0,
        gathered=here if away.parameters and not h.gathered else h.gathered,
    )  # fmt: skip


class Behind(Timeline):
    """One assignment's memory over its time points, with what lies behind the device left out."""

    def __init__(self, lies: Lying, *args: Any) -> None:
        super().__init__(*args)
        self.lies = lies
        state = state_bytes(self.setting.precision, self.setting.optimizer)
        self.trains = {p.tensor: p.trainable and self.training for p in self.outline.parameters}
        self.zero = {name: storage.zero for name, storage in self.assignment.storage.items()}
        self.elements = {n: h.stored // state.parameter for n, h in self.held.items()}
        self.held = {
            name: kept(h, self.away(name), self.tensors[name], self.trains[name], self.zero.get(name, 0), state)
            for name, h in self.held.items()
        }
        self.state = state
        self.spans = self.needing.spans
        self.coming: dict[int, float] = defaultdict(float)
        """Bytes of activations that come back where the backward pass of an op begins."""
        self.leaving = {self.facts.instance[i] for i, op in enumerate(self.ops) if op.name in lies.leaving}

    def away(self, name: str) -> Away:
        """Which classes of a parameter lie behind the device."""
        return self.lies.away.get(name, (HERE, math.inf))[0]

    def leaves(self, name: str) -> bool:
        """Whether the gradient of a parameter leaves."""
        return bool(self.trains[name] and self.away(name).optimizer)

    def every(self, name: str) -> bool:
        """Whether its gradient leaves as every microbatch makes it."""
        return self.leaves(name) and (self.m == 1 or self.away(name).gradients)

    # -- gradients

    def each(self, name: str) -> bool:
        """Whether its gradient is reduced in every microbatch: those that pass through are fetched in each."""
        return super().each(name) or bool(self.away(name).parameters)

    def _adding(self, name: str) -> bool:
        """What leaves as every microbatch makes it is added to nothing here, but what several ops make of one parameter."""
        return self.facts.shared(name) if self.every(name) else super()._adding(name)

    def _gradients(self) -> None:
        found, m, last = self.facts, self.m, self.count - 1
        for name, h in self.held.items():
            if not h.whole or not found.uses[name]:
                continue
            every = self.every(name)
            if m > 1 and not self.each(name) and not every:
                self._adds_up(name)
                continue
            self._over("gradients", found.low[name], found.uses[name][-1], h.whole)
            if not every:
                self._over("gradients", 0, last if m > 1 else found.low[name] - 1, h.final)
        if self.setting.reductions:
            self._flying()
        if m > 1:
            return  # The runtime (offload/places.py) defers a copy only in a step of one microbatch: those of several end at once.
        groups = [g for g in self.groups if self.every(g[0])]
        groups.sort(key=lambda g: found.low[g[0]])
        for before, group in pairwise(groups):
            # Chunks of ZeRO, and sums of a group, are parts of one buffer, and come last.
            flat = [t for t in group if self.zero[t] or self.uses.reduced.get(t)]
            alone = [t for t in group if t not in flat]
            waiting = flat + alone[len(alone) - max(0, PENDING - len(flat)) :]
            amount = sum(self.held[t].final if self.zero[t] else self.held[t].whole for t in waiting)
            self._over("gradients", found.low[before[0]], found.low[group[0]] - 1, amount)

    def _reductions(self, points: dict[Point, dict[str, float]], lanes: Mapping[str, list[float]]) -> None:
        held = self.held
        self.held = {n: replace(h, whole=0, final=0) if self.every(n) else h for n, h in self._fetched().items()}
        super()._reductions(points, lanes)
        self.held = held
        for g, group in enumerate(self.groups):
            # Gradients go as the backward pass leaves a unit, before the next one begins and activations come back.
            if ("reduce", g) in points:
                points["reduce", g]["saved"] -= self.coming[self.facts.low[group[0]] - 1]

    # -- parameters

    def _early(self, name: str) -> bool:
        """What is fetched from behind the device is gathered where it is fetched, and what leaves is reduced where it leaves."""
        return self.away(name) == HERE

    def _gathered(self) -> None:
        held = self.held
        self.held = self._fetched()
        super()._gathered()
        self.held = held
        for group in self.through:
            if not self.zero[group[0]]:
                for name in group:
                    self._passing(name, group)
        for one, other in pairwise(self.through):
            self._coming(one, other)

    @cached_property
    def through(self) -> Sequence[Sequence[str]]:
        """The groups that pass through the device, as they are first used."""
        uses = self.facts.uses
        groups = (g for g in self.groups if self.away(g[0]).parameters and any(uses[t] for t in g))
        return sorted(groups, key=lambda g: min(uses[t][0] for t in g if uses[t]))

    def changing(self) -> dict[Point, dict[str, float]]:
        """With the forward pass where it brings in parameters: a group is there while the next one comes."""
        points = super().changing()
        if not self.training:
            return points
        saved = [0.0, *accumulate(self.lanes["saved"])] if not self.leaving else None
        waiting = sum(self.accumulating(t) for t in self.held if self.m > 1 and not self.each(t) and not self.every(t))
        for k, group in enumerate(self.through):
            coming = sum(self._chunk(t) for g in self.through[k + 1 : k + 2] for t in g)
            points["fetch", k] = {
                "gathered": sum(self.held[t].gathered for t in group) + coming,
                "saved": saved[self.spans[self._unit(group)][0]] if saved else 0.0,
                "gradients": waiting,
            }
        return points

    def _fetched(self) -> dict[str, Held]:
        """What parameters take, without those that are fetched whole: they come and go otherwise than what is gathered."""
        return {
            n: replace(h, gathered=0) if self.away(n).parameters and not self.zero.get(n) else h
            for n, h in self.held.items()
        }

    def _passing(self, name: str, group: Sequence[str]) -> None:
        """A parameter while the units that use it run: in the backward pass from the first op that needs one of its group down to
        its own, in inference from the unit's first op."""
        for unit in self.facts.touched[name]:
            low, high = self.spans[unit]
            uses = self.needing.ops_of.get(name, ()) if self.training else self.facts.uses[name]
            mine = sorted(i for i in uses if low <= i <= high)
            if mine:
                start, end = (mine[0], self.needing.asked(group, unit)) if self.training else (low, mine[-1])
                self._over("gathered", start, end, self.held[name].gathered)

    def _coming(self, one: Sequence[str], other: Sequence[str]) -> None:
        """Of two groups that follow each other, the one that comes in while the one before it is used."""
        if not self.training:
            self._over("gathered", *self.spans[self._unit(one)], sum(self._chunk(t) for t in other))
            return
        asked = [self.needing.asked(group, self._unit(group)) for group in (one, other)]
        if min(asked) >= 0:
            coming = [t for t in one if t in self.needing.ops_of or self.zero[t]]
            self._over("gathered", asked[0] + 1, asked[1], sum(self._chunk(t) for t in coming))

    def _chunk(self, name: str) -> float:
        """Bytes of what comes in ahead."""
        return self.elements[name] * DTYPE_BYTES[self.tensors[name].dtype]

    def _unit(self, group: Sequence[str]) -> Unit:
        return self.facts.instance[min(self.facts.uses[t][0] for t in group if self.facts.uses[t])]

    # -- saved

    def _saved(self) -> None:
        if not self.leaving:
            super()._saved()
            return
        found, again, last = self.facts, self.assignment.again, self.count - 1
        remade = self._made_again() if again else None
        savers: dict[Buffer, dict[Unit, int]] = defaultdict(dict)
        for i, op in enumerate(self.ops):
            for item in self.saves(op):
                if item.source == "new":
                    if op.name not in again.ops:
                        amount = new_bytes(op, item, self.assignment.choices[op.name], self.sizes)
                        self._back(found.instance[i], i, amount)
                    continue
                own = item.source == "operand"
                use = (op.operands if own else op.results)[item.index]
                placement = self.uses.wanted[op.name][item.index] if own else self.uses.produced[use.tensor]
                savers[buffer(found, use.tensor, placement)].setdefault(found.instance[i], i)
        for at, i in (remade or {}).items():  # what ops that run again take, too
            savers[at].setdefault(found.instance[i], i)
        whole, staying = (R,) * len(self.sizes), dict[Buffer, int]()
        for (name, placement), units in savers.items():
            root = self.tensors[name]
            if root.role == "parameter" or (root.role != "activation" and placement == whole):
                continue
            if remade is not None and (name, placement) not in remade:
                continue
            amount = found.parts(root) * local_bytes(root, placement, self.sizes)
            here = [i for unit, i in units.items() if not self._goes(unit, root)]
            if here:
                staying[name, placement] = min(here)
                self._over("saved", min(here), last, amount)
            else:
                for unit, i in units.items():
                    self._back(unit, i, amount)
        self._crossing(staying)
        self._anew()

    def _back(self, unit: Unit, at: int, amount: float) -> None:
        """Bytes that op `at` of a unit saved: on the device until its backward pass, from when they come back if they left."""
        last, high = self.count - 1, self._back_by(unit, self.count - 1)
        self._over("saved", at, high, amount)
        if high != self.spans[unit][1]:
            self.coming[high] += amount
        if high == last and unit in self.leaving:
            self.returned += amount

    def _goes(self, unit: Unit, root: Tensor) -> bool:
        """Whether a storage that a unit saves leaves: not what came from outside, nor tables of an earlier unit."""
        if unit not in self.leaving or root.role != "activation":
            return False
        maker = next((i for i, op in enumerate(self.ops) if any(u.tensor == root.name for u in op.results)), -1)
        return root.differentiable or (maker >= 0 and self.facts.instance[maker] == unit)

    def _back_by(self, unit: Unit, last: int) -> int:
        """The op whose backward has what a unit saved back on the device: the last of the next unit that leaves, or its own."""
        if unit not in self.leaving:
            return last
        later = [u for u in self.spans if u in self.leaving and self.spans[u] > self.spans[unit]]
        return self.spans[later[0] if later else unit][1]

    # -- the optimizer's step

    def _steps(self, points: dict[Point, dict[str, float]]) -> None:
        held = self.held
        self.held = {n: replace(h, final=0) if self.leaves(n) else h for n, h in held.items()}
        super()._steps(points)
        self.held = held
        visiting = self._visiting()
        if visiting:
            final = sum(h.final for n, h in held.items() if not self.leaves(n))
            points["step", len(self.outline.parameters)] = {"gradients": final, "temporaries": visiting}

    def _visiting(self) -> float:
        """Bytes of the subgroups that are on the device at once: parameter, gradient, states, and what the update makes."""
        mine = [p.tensor for p in self.outline.parameters if self.leaves(p.tensor)]
        sizes = [float(self.elements[n]) for n in mine]
        here = updated_on_device(sizes, [self.lies.away[n][1] for n in mine])
        each = offloaded_state_bytes(self.state) + self.state.gradient
        filled: dict[int, float] = defaultdict(float)
        for number, size, visits in zip(subgroups(sizes), sizes, here, strict=True):
            if visits:
                filled[number] += size * each
        ordered = [filled[n] for n in sorted(filled)]
        return max((sum(ordered[i : i + SLOTS]) for i in range(len(ordered))), default=0.0)

"""Bytes by cause at every op of one assignment, counted concretely: op by op, buffer by buffer (planner/memory.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from . import rule_heads
from .assign import Assignment
from .dispatch import DISPATCH, dispatched
from .memory import (
    Facts,
    Held,
    Setting,
    buffer,
    gradient_copies,
    local_bytes,
    new_bytes,
    operand_gradients,
    parameter_gradients,
)
from .needing import Needing
from .outline import Op, Saved
from .passing import Interval, Passing
from .placement import Placement, R
from .remake import Values, rerun
from .rule_experts import received_bytes
from .saves import saves
from .scratch import inside_bytes
from .template import Cut
from .turning import turning
from .uses import Borders, Uses

LANES = ("gradients", "saved", "gathered", "temporaries")
BESIDE = {"ahead": "gathered", "arriving": "gathered", "flying": "gradients"}
"""What collectives hold that run beside ops, and the cause it counts under: groups gathered ahead and what gathering takes beyond
them (it is over when the gradients of the unit are reduced), gradients being reduced."""


class Lanes:
    """One assignment's bytes by cause over the backward pass of its ops, or the ops of inference."""

    def __init__(
        self, cut: Cut, found: Facts, setting: Setting, sizes: tuple[int, ...], assignment: Assignment,
        held: Mapping[str, Held], uses: Uses, regathered: frozenset[str], borders: Borders | None = None,
    ) -> None:  # fmt: skip
        """`borders` are those of a stage of a pipeline, whose parameters are gathered and reduced as around a microbatch loop."""
        self.outline, self.m = cut.outline, cut.microbatches
        self.facts, self.setting, self.sizes = found, setting, sizes
        self.assignment, self.held, self.uses, self.regathered = assignment, held, uses, regathered
        self.borders, self.looped = borders or Borders(), self.m > 1 or borders is not None
        self.ops, self.tensors, self.groups = self.outline.ops, self.outline.tensors, assignment.groups
        self.training = self.outline.training
        self.fine = self.training and setting.fine
        self.count = len(self.ops)
        self.lanes = {cause: [0.0] * (self.count + 1) for cause in (*LANES, *BESIDE)}
        self.standing = {"gradients": 0.0, "gathered": 0.0}
        self.returned = 0.0
        """Bytes saved at the beginning of the backward pass that were away since the forward pass."""
        self.moment = [0.0] * self.count
        self.making = [0.0] * self.count

    def _over(self, cause: str, low: int, high: int, amount: float) -> None:
        """Add to a lane for time points low..high (inclusive), as differences."""
        if amount and low <= high:
            self.lanes[cause][low] += amount
            self.lanes[cause][high + 1] -= amount

    def _training(self) -> None:
        self._saved()
        self._gradients()
        self._gathered()
        self._temporaries()

    def _saved(self) -> None:
        found, again = self.facts, self.assignment.again
        first: dict[tuple[str, Placement], int] = {}
        whole: Placement = (R,) * len(self.sizes)
        for i, op in enumerate(self.ops):
            for item in self.saves(op):
                if item.source == "new":
                    if op.name not in again.ops:
                        size = new_bytes(op, item, self.assignment.choices[op.name], self.sizes)
                        self._over("saved", i, self.count - 1, size)
                    continue
                if item.source == "operand":
                    use, placement = op.operands[item.index], self.uses.wanted[op.name][item.index]
                else:
                    use = op.results[item.index]
                    placement = self.uses.produced[use.tensor]
                first.setdefault(buffer(found, use.tensor, placement), i)
        if again:
            first = self._made_again()
        for (name, placement), i in first.items():
            root = self.tensors[name]
            if root.role == "parameter" or (root.role != "activation" and placement == whole):
                continue
            self._over("saved", i, self.count - 1, found.parts(root) * local_bytes(root, placement, self.sizes))
        self._crossing(first)
        self._anew()

    def _anew(self) -> None:
        """Parameters that ops save in a placement other than the stored one."""
        for name, i in self.facts.saved_parameters.items():
            for want in self.uses.fresh[name] if not self.looped or self.assignment.storage[name].zero == 3 else ():
                self._over("saved", i, self.count - 1, local_bytes(self.tensors[name], want, self.sizes))

    def saves(self, op: Op) -> tuple[Saved, ...]:
        """What an op keeps for its backward pass."""
        return saves(op, self.assignment.choices[op.name], self.tensors)

    def _crossing(self, kept: Mapping[tuple[str, Placement], int]) -> None:
        """What a stage took and gives lives until its backward is over, and so do the gradients of both."""
        last = self.count - 1
        for name, placement in (*self.borders.takes.items(), *self.borders.gives.items()):
            size = local_bytes(self.tensors[name], placement, self.sizes)
            at = buffer(self.facts, name, placement)
            self._over("saved", 0, kept[at] - 1 if at in kept else last, size)
            if self.tensors[name].differentiable:
                self._over("temporaries", 0, last, size)

    def _made_again(self) -> dict[tuple[str, Placement], int]:
        """Count what is made again, with the gradients that the op makes after it; returns what is kept."""
        values = Values(self.outline, self.facts, self.uses.wanted, self.uses.produced, self.assignment.choices)
        found = rerun(values, self.assignment.again, self.sizes)
        for i, (most, there) in enumerate(zip(found.most, found.there, strict=True)):
            self.making[i] = most
            self.moment[i] += there
        return found.kept

    def _gradients(self) -> None:
        found, last = self.facts, self.count - 1
        for name, h in self.held.items():
            if not h.whole or not found.uses[name]:
                continue
            if self.setting.early:
                self._over("gradients", found.complete(name, self.sizes), found.uses[name][-1], h.whole)
                continue
            if self.looped and not self.each(name):
                self._adds_up(name)
                self.standing["gradients"] += self.accumulating(name)
                continue
            self._over("gradients", found.low[name], found.uses[name][-1], h.whole)
            self._over("gradients", 0, last if self.m > 1 else found.low[name] - 1, h.final)
            self.standing["gradients"] += h.final
        if self.setting.reductions:
            self._flying()

    def _adds_up(self, name: str) -> None:
        """A gradient that adds up over microbatches; in each of them that of the last use waits for those of the others."""
        uses = self.facts.uses[name]
        self._over("gradients", 0, self.count - 1 if self.m > 1 else uses[-1], self.accumulating(name))
        if not self.fine or self.m == 1 or len(uses) == 1:
            return
        for want in self.uses.wants.get(name, ()):
            if mine := [i for i in uses if want in self._wanted(self.ops[i], name)]:
                self._over("gradients", mine[0], mine[-1] - 1, local_bytes(self.tensors[name], want, self.sizes))

    def _wanted(self, op: Op, name: str) -> list[Placement]:
        """The placements in which an op uses a parameter."""
        wanted = zip(op.operands, self.uses.wanted[op.name], strict=True)
        return [want for use, want in wanted if self.facts.aliases[use.tensor].root == name]

    def each(self, name: str) -> bool:
        """Whether a parameter's gradient is reduced in every microbatch, not once a step."""
        return self.assignment.storage[name].zero >= 2

    def _flying(self) -> None:
        """Packed gradients, from the reduction of their group to that of the next; those of the last into the next microbatch."""
        least = 2 if self.looped else 1
        groups = [g for g in self.groups if self.assignment.storage[g[0]].zero >= least and self._early(g[0])]
        when = sorted({self.facts.low[g[0]] for g in groups if any(self.held[t].whole for t in g)})
        for group in groups:
            amount, low = sum(self.held[t].whole for t in group), self.facts.low[group[0]]
            self._over("flying", max((v for v in when if v < low), default=0), low - 1, amount)
            if self.m > 1 and amount and low == when[0]:
                self._over("flying", when[-1], self.count - 1, amount)

    def _early(self, name: str) -> bool:
        """Whether collectives of a parameter's group run beside ops."""
        return True

    def _ahead(self) -> None:
        """Groups of ZeRO-3 that are gathered while those before them are used: in the backward pass the ones after them."""
        found, ahead = self.facts, self.setting.prefetch
        storage = self.assignment.storage
        names = [n for n, s in storage.items() if s.zero == 3 and self.held[n].gathered and self._early(n)]
        if self.training:
            names = [n for n in names if n in self.regathered]
        spans = self.needing.spans
        home = {n: found.instance[found.high[n] if self.training else found.low[n]] for n in names}
        order = sorted(set(home.values()), key=lambda key: spans[key])
        for name, key in home.items():
            at, when = order.index(key), None
            if self.training and at + 1 < len(order):
                when = spans[key][1] + 1, spans[order[min(at + ahead, len(order) - 1)]][1]
            elif not self.training and at:
                when = spans[order[max(at - ahead, 0)]][0], spans[key][0] - 1
            if when is not None:
                self._over("ahead", *when, self.held[name].gathered)
                self._over("arriving", *when, self.held[name].arrival)

    def _gathered(self) -> None:
        if self.setting.prefetch:
            self._ahead()
        found, last = self.facts, self.count - 1
        for name, storage in self.assignment.storage.items():
            h = self.held[name]
            if found.lasting(name, self.training, 2 if self.looped else 1) or name in self.assignment.again.parameters:
                self._over("gathered", 0 if self.looped else self._first(name), last, h.copy)
                self.standing["gathered"] += h.copy
            if h.gathered:
                self._whole(name, h.gathered)
            for want in self.uses.fresh[name] if self.looped and storage.zero < 3 else ():
                size = local_bytes(self.tensors[name], want, self.sizes)
                self._over("gathered", 0, last, size)
                self.standing["gathered"] += size

    def _first(self, name: str) -> int:
        """The last op of a backward pass that has the copy of a parameter which the forward pass made."""
        uses = self.needing.ops_of.get(name, ()) if self.fine else ()
        return min(uses, default=self.facts.low[name])

    def _whole(self, name: str, amount: float) -> None:
        """A parameter that units gather: in the backward pass from where one of its group is needed down to its last op."""
        if not self.fine:
            for key in sorted(self.facts.touched[name]):
                self._over("gathered", *self.needing.spans[key], amount)
        elif uses := self.needing.ops_of.get(name):
            self._over("gathered", min(uses), self.needing.asked(self.group_of[name]), amount)

    @cached_property
    def group_of(self) -> Mapping[str, Sequence[str]]:
        """The group of every parameter."""
        return {name: group for group in self.groups for name in group}

    @cached_property
    def needing(self) -> Needing:
        """Which ops need which parameters."""
        return Needing(self.ops, self.facts, self.saves, self.assignment.again.ops)

    def _temporaries(self) -> None:
        for interval in self._gradients_of_activations():
            self._over("temporaries", *interval)
        for i, op in enumerate(self.ops):
            self.moment[i] += self._ahead_of(op) if op.kind == rule_heads.KIND else self._backward_of(op)

    def _backward_of(self, op: Op) -> float:
        """Bytes that the backward pass of an op makes or has inside."""
        choice = self.assignment.choices[op.name]
        total, copies = self._inside(op, choice), gradient_copies(op, choice)
        for j in operand_gradients(op, self.tensors):
            total += copies * self._wanted_bytes(op, j)
        for j in parameter_gradients(op, self.tensors) if self.m > 1 else ():
            if self._adding(op.operands[j].tensor):
                total += self._wanted_bytes(op, j)
        return total

    def _ahead_of(self, op: Op) -> float:
        """The same of an op that makes gradients in its forward pass, with what has left the device away: its backward pass hands
        out what it kept, so that the gradient of a parameter is no second tensor."""
        inside = self._inside(op, self.assignment.choices[op.name])
        once = 0.0 if self.looped else sum(self._wanted_bytes(op, j) for j in parameter_gradients(op, self.tensors))
        return max(0.0, inside - self.returned) - once

    def _wanted_bytes(self, op: Op, j: int) -> float:
        return local_bytes(self.tensors[op.operands[j].tensor], self.uses.wanted[op.name][j], self.sizes)

    def _gradients_of_activations(self) -> Iterator[Interval]:
        """When the gradients of activations are there, and their bytes."""
        if self.fine:
            yield from Passing(self.outline, self.facts, self.uses, self.sizes).intervals()
            return
        for span in self.facts.spans:
            amount = local_bytes(self.tensors[span.root], self.uses.produced[span.root], self.sizes)
            yield span.start, span.end - 1, amount

    def _turning(self, v: int, saved: Sequence[float]) -> float:
        """Bytes while gradients of an op's operands change placements, with what the op saved gone."""
        if not self.fine:
            return 0.0
        most = turning(self.ops[v], self.tensors, self.facts, self.uses, self.sizes)
        return most - max(0.0, saved[v] - (saved[v - 1] if v else 0.0))

    def _inside(self, op: Op, choice: tuple[str, ...]) -> float:
        """Bytes that live inside one op alone."""
        names, sizes = self._spread(op, choice)
        came = received_bytes(op, self.tensors, names, sizes) if DISPATCH in choice and self.training else 0.0
        inside = inside_bytes(op, self.tensors, names, sizes, training=self.training, unfolds=self.setting.unfolds)
        return inside + came + (self._read_once(op) if op.kind == rule_heads.KIND else 0.0)

    def _read_once(self, op: Op) -> float:
        """Bytes of gathered parameters that an op needs which makes their gradients at once, where its backward pass needs none."""
        here = self.ops.index(op)
        names = {self.facts.aliases[use.tensor].root for use in op.operands} & set(self.held)
        return sum(self.held[t].gathered for t in names if here not in self.needing.ops_of.get(t, ()))

    def _adding(self, name: str) -> bool:
        """Whether the gradient of an op's parameter is made beside one that it is then added to."""
        return name not in self.assignment.storage or not self.each(name) or self.facts.shared(name)

    def _spread(self, op: Op, choice: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """(choices, sizes) with the two splits of experts whose tokens are sent to them as two axes."""
        pairs = [(name, n) for name, n in zip(choice, self.sizes, strict=True) if name != DISPATCH]
        ways = [n for name, n in zip(choice, self.sizes, strict=True) if name == DISPATCH]
        pairs += [(op.factors[f].name, n) for n in ways for f in dispatched(op) or ()]
        return tuple(name for name, _ in pairs), tuple(n for _, n in pairs)

    def _inference(self) -> None:
        self._gathered()
        for span in self.facts.spans:
            amount = local_bytes(self.tensors[span.root], self.uses.produced[span.root], self.sizes)
            self._over("temporaries", span.start, min(span.end, self.count - 1), amount)
        for i, op in enumerate(self.ops):
            choice = self.assignment.choices[op.name]
            self.moment[i] += self._inside(op, choice)
            for use, placement in zip(op.operands, self.uses.wanted[op.name], strict=True):
                tensor = self.tensors[use.tensor]
                source = self.uses.produced.get(use.tensor)
                if source is not None and buffer(self.facts, use.tensor, source) != buffer(
                    self.facts, use.tensor, placement
                ):
                    self.moment[i] += local_bytes(tensor, placement, self.sizes)

    def accumulating(self, name: str) -> float:
        """Bytes in which a parameter's gradients gather over microbatches: one for every placement that is wanted of it."""
        if not self.held[name].whole:
            return 0.0
        return sum(local_bytes(self.tensors[name], want, self.sizes) for want in self.uses.wants.get(name, ()))

"""Bytes alive at every time point of one assignment, counted concretely: op by op, buffer by buffer (planner/memory.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate

from .assign import Assignment
from .dispatch import DISPATCH, dispatched
from .memory import (
    CAUSES,
    Facts,
    Held,
    Point,
    Setting,
    buffer,
    gradient_copies,
    local_bytes,
    new_bytes,
    operand_gradients,
    parameter_gradients,
)
from .outline import Op, Saved
from .placement import Placement, R
from .remake import Values, rerun
from .ring import saves
from .scratch import inside_bytes
from .template import Cut
from .turning import turning
from .uses import Borders, Uses

LANES = ("gradients", "saved", "gathered", "temporaries")
BESIDE = {"ahead": "gathered", "arriving": "gathered", "flying": "gradients"}
"""What collectives hold that run beside ops, and the cause it counts under: groups gathered ahead and what gathering takes beyond
them (it is over when the gradients of the unit are reduced), gradients being reduced."""


class Timeline:
    """One assignment's memory over its time points."""

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

    def points(self) -> tuple[dict[Point, float], Callable[[Point], dict[str, int]]]:
        """(bytes by point, function giving the causes at a point)."""
        base, points = self.base(), self.changing()
        fixed = sum(base.values())
        totals = {p: fixed + sum(c.values()) for p, c in points.items()}

        def causes(point: Point) -> dict[str, int]:
            found = {c: float(base.get(c, 0)) for c in CAUSES}
            for cause, amount in points[point].items():
                found[cause] += amount
            return {c: round(x) for c, x in found.items()}

        return totals, causes

    def base(self) -> dict[str, float]:
        """What is there all the time, by cause."""
        return {
            "parameters": sum(h.stored for h in self.held.values()),
            "optimizer": sum(h.moments for h in self.held.values()),
            "buffers": sum(self.facts.given.values()),
            "reserve": self.setting.reserve,
        }

    def changing(self) -> dict[Point, dict[str, float]]:
        """Bytes by cause at every time point, beside what is there all the time."""
        (self._training if self.training else self._inference)()
        known = {cause: list(accumulate(lane))[: self.count] for cause, lane in self.lanes.items()}
        lanes = {cause: known[cause] for cause in LANES}
        points: dict[Point, dict[str, float]] = {}
        for v in range(self.count):
            points["op", v] = {c: lanes[c][v] for c in lanes}
            points["op", v]["temporaries"] += max(self.moment[v], self.making[v], self._turning(v, known["saved"]))
            for lane, cause in BESIDE.items():
                points["op", v][cause] += known[lane][v]
        if self.training:
            self._reductions(points, known)
            self._steps(points)
        return points

    def backward(self) -> float:
        """The most saved and temporary bytes at once, over the backward pass of all ops."""
        self._saved()
        self._temporaries()
        saved, held = (list(accumulate(self.lanes[cause])) for cause in ("saved", "temporaries"))
        return max((saved[v] + held[v] + self.moment[v] for v in range(self.count)), default=0.0)

    def passing(self) -> float:
        """The most bytes of activations at once in the forward pass, each alive from its op to its last use."""
        lane = [0.0] * (self.count + 2)
        for span in self.facts.spans:
            amount = local_bytes(self.tensors[span.root], self.uses.produced[span.root], self.sizes)
            lane[span.start] += amount
            lane[min(span.end, self.count) + 1] -= amount
        return max(accumulate(lane), default=0.0)

    # -- lanes

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
        uses, amount = self.facts.uses[name], self.accumulating(name)
        self._over("gradients", 0, self.count - 1 if self.m > 1 else uses[-1], amount)
        if self.m > 1:
            self._over("gradients", uses[0], uses[-1] - 1, amount)

    def each(self, name: str) -> bool:
        """Whether a parameter's gradient is reduced in every microbatch, not once a step."""
        return self.assignment.storage[name].zero >= 2

    def _flying(self) -> None:
        """Packed gradients, from the reduction of their group to that of the next; those of the last into the next microbatch."""
        groups = [g for g in self.groups if self.assignment.storage[g[0]].zero >= (2 if self.looped else 1)]
        when = sorted({self.facts.low[g[0]] for g in groups if any(self.held[t].whole for t in g)})
        for group in groups:
            amount, low = sum(self.held[t].whole for t in group), self.facts.low[group[0]]
            self._over("flying", max((v for v in when if v < low), default=0), low - 1, amount)
            if self.m > 1 and amount and low == when[0]:
                self._over("flying", when[-1], self.count - 1, amount)

    def _early(self, name: str) -> bool:
        """Whether a parameter may be gathered ahead."""
        return True

    def _ahead(self) -> None:
        """Groups of ZeRO-3 that are gathered while those before them are used: in the backward pass the ones after them."""
        found, ahead = self.facts, self.setting.prefetch
        storage = self.assignment.storage
        names = [n for n, s in storage.items() if s.zero == 3 and self.held[n].gathered and self._early(n)]
        if self.training:
            names = [n for n in names if n in self.regathered]
        spans: dict[tuple[int, int], list[int]] = {}
        for v, key in enumerate(found.instance):
            spans.setdefault(key, [v, v])[1] = v
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
        span = {}
        for r, region in enumerate(self.outline.regions):
            for k, ops in enumerate(region.instances):
                if not ops:  # parameters of a unit that another stage runs
                    continue
                span[r, k] = (found.order[ops[0]], found.order[ops[-1]])
        for name, storage in self.assignment.storage.items():
            h = self.held[name]
            if found.lasting(name, self.training, 2 if self.looped else 1) or name in self.assignment.again.parameters:
                self._over("gathered", 0 if self.looped else found.low[name], last, h.copy)
                self.standing["gathered"] += h.copy
            for key in sorted(found.touched[name]):
                self._over("gathered", *span[key], h.gathered)
            for want in self.uses.fresh[name] if self.looped and storage.zero < 3 else ():
                size = local_bytes(self.tensors[name], want, self.sizes)
                self._over("gathered", 0, last, size)
                self.standing["gathered"] += size

    def _temporaries(self) -> None:
        for span in self.facts.spans:
            amount = local_bytes(self.tensors[span.root], self.uses.produced[span.root], self.sizes)
            self._over("temporaries", span.start, span.end - 1, amount)
        for i, op in enumerate(self.ops):
            choice = self.assignment.choices[op.name]
            self.moment[i] += self._inside(op, choice)
            copies = gradient_copies(op, choice)
            for j in operand_gradients(op, self.tensors):
                amount = copies * local_bytes(
                    self.tensors[op.operands[j].tensor], self.uses.wanted[op.name][j], self.sizes
                )
                self.moment[i] += amount
            for j in parameter_gradients(op, self.tensors) if self.m > 1 else ():
                use = op.operands[j]
                if self._adding(use.tensor):
                    self.moment[i] += local_bytes(self.tensors[use.tensor], self.uses.wanted[op.name][j], self.sizes)

    def _turning(self, v: int, saved: Sequence[float]) -> float:
        """Bytes while gradients of an op's operands change placements, with what the op saved gone."""
        if not (self.training and self.setting.staged):
            return 0.0
        most = turning(self.ops[v], self.tensors, self.facts, self.uses, self.sizes)
        return most - max(0.0, saved[v] - (saved[v - 1] if v else 0.0))

    def _inside(self, op: Op, choice: tuple[str, ...]) -> float:
        """Bytes that live inside one op alone."""
        names, sizes = self._spread(op, choice)
        return inside_bytes(op, self.tensors, names, sizes, training=self.training, unfolds=self.setting.unfolds)

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

    # -- other time points

    def _reductions(self, points: dict[Point, dict[str, float]], lanes: Mapping[str, list[float]]) -> None:
        found = self.facts
        for g, group in enumerate(self.groups):
            if self.assignment.storage[group[0]].zero == 3 and group[0] in self.regathered:
                there = {c: lanes[c][found.high[group[0]]] for c in LANES}
                points["gather", g] = {"reserve": sum(self.held[t].arrival for t in group), **there}
            bucket = sum(self.held[t].bucket for t in group)
            if self.looped and not self.each(group[0]):
                points["finish", g] = {"gradients": self._around(group), "reserve": sum(map(self._reducing, group))}
                continue
            v = found.low[group[0]]
            before = {c: lanes[c][v - 1] if v else 0.0 for c in ("saved", "temporaries")}
            now = {c: lanes[c][v] for c in ("gradients", "gathered")}
            now["gathered"] -= sum(self.held[t].gathered for t in group)  # all that backward needs of them is done
            now["gathered"] += lanes["ahead"][v]
            if self.m > 1 and self.setting.reductions:
                now["gradients"] += self._summed_last(v)
            points["reduce", g] = {"reserve": bucket, **now, **before}

    def _summed_last(self, at: int) -> float:
        """Bytes of the sums of the group that was reduced before the one at `at`: they are added to what accumulates after it."""
        low, later = self.facts.low, [g for g in self.groups if self.facts.low[g[0]] > at]
        return sum(self.held[t].final for t in min(later, key=lambda g: low[g[0]], default=()))

    def accumulating(self, name: str) -> float:
        """Bytes in which a parameter's gradients gather over microbatches: one for every placement that is wanted of it."""
        if not self.held[name].whole:
            return 0.0
        return sum(local_bytes(self.tensors[name], want, self.sizes) for want in self.uses.wants.get(name, ()))

    @cached_property
    def once(self) -> list[str]:
        """The parameters whose gradients are reduced once a step."""
        return [t for t in self.assignment.storage if not self.each(t)]

    @property
    def waiting(self) -> float:
        """Bytes of the gradients that are reduced once a step, before they are."""
        return sum(self.accumulating(t) for t in self.once)

    def _around(self, group: Sequence[str]) -> float:
        """Bytes of gradients while those of `group` are reduced: those used after it are, those before it wait.

        Of its region instance both count, as that may have several groups.
        """
        low, now, own = self.facts.low, self.facts.low[group[0]], frozenset(group)
        total = sum(h.final for t, h in self.held.items() if t not in own) - sum(
            self.held[t].final for t in self.once if low[t] < now
        )
        return total + sum(self.accumulating(t) for t in self.once if low[t] <= now)

    def _reducing(self, name: str) -> float:
        """Bytes of a parameter's gradients while they are reduced once a step, beyond those that have gathered.

        Not reduced ones are copied; of several reduced ones, each is there with its part of the sum.
        """
        h, more = self.held[name], max(len(self.uses.reduced.get(name, ())) - 1, 0)
        turned = self.uses.turned.get(name, 0) * h.whole
        return turned + (h.bucket if self.assignment.storage[name].zero else h.final * (1 + 2 * more))

    def _steps(self, points: dict[Point, dict[str, float]]) -> None:
        final = sum(h.final for h in self.held.values())
        if self.setting.foreach:
            points["step", 0] = {"gradients": final, "temporaries": sum(h.step for h in self.held.values())}
            return
        for i, p in enumerate(self.outline.parameters):
            if self.held[p.tensor].step:
                points["step", i] = {"gradients": final, "temporaries": self.held[p.tensor].step}

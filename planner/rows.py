"""Memory rows of the integer program: what is alive at one time point as a linear form over its variables.

The same accounting as planner/memory.py describes, gathered by class: how many instances of a class are alive at the point
times the bytes each strategy or storage option gives it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .memory import (
    Facts,
    Held,
    Point,
    Setting,
    buffer,
    gradient_copies,
    held,
    local_bytes,
    new_bytes,
    operand_gradients,
    parameter_gradients,
)
from .placement import Placement, R, local_elements
from .precision import state_bytes
from .region import Form, Key
from .ring import RING, ring_of
from .saves import saves
from .scratch import inside_bytes
from .space import Space
from .template import Template

Saver = tuple[int, str, int]
"""(op class, "operand" or "result", index)."""


Savers = Mapping[str, Sequence[tuple[int, Saver]]]
"""Per storage, the ops (indices) that save it."""


def savers(template: Template, found: Facts) -> Savers:
    """Who saves what under some choice, parameters left out."""
    known: dict[str, list[tuple[int, Saver]]] = defaultdict(list)
    for i, op in enumerate(template.outline.ops):
        ring = saves(op, (RING,), template.tensors) if ring_of(op) is not None else ()
        for item in dict.fromkeys((*op.saved, *ring)):
            if item.source != "new":
                use = (op.operands if item.source == "operand" else op.results)[item.index]
                known[found.aliases[use.tensor].root].append((i, (template.class_of[op.name], item.source, item.index)))
    return {root: s for root, s in known.items() if template.tensors[root].role != "parameter"}


@dataclass(frozen=True, slots=True)
class Group:
    """A parameter group as a row names it: region, instance and what its members have in common."""

    region: int
    instance: int
    key: tuple[object, ...]


class Rows:
    """Forms of one space; time points are those of the concrete graph."""

    def __init__(self, space: Space, found: Facts, setting: Setting, known: Savers) -> None:
        self.space, self.facts, self.setting = space, found, setting
        self.template, self.sizes = space.template, space.shape.sizes
        self.outline = self.template.outline
        self.tensors, self.m = self.template.tensors, self.template.microbatches
        self.ops = self.outline.ops
        self.members: list[list[str]] = [[] for _ in self.template.parameters]
        for name, w in self.template.parameter_of.items():
            self.members[w].append(name)
        self.consumers = {c.parameter: len(c.consumers) for c in self.template.classes if c.parameter is not None}
        self.savers = known
        self._canon: dict[Saver, tuple[tuple[int, Key, float, bool], ...]] = {}
        self._held: dict[tuple[int, int, int], Held] = {}
        self.producer = {
            u.tensor: (self.template.class_of[op.name], i) for op in self.ops for i, u in enumerate(op.results)
        }

    def form(self, point: Point, group: Group | None = None) -> Form:
        """Bytes at `point` (that of `group` for "gather", "reduce" and "finish", which are named by the op where it is used)."""
        total: dict[Key, float] = defaultdict(float)
        kind, at = point
        constant = self._base(total)
        if kind == "op":
            if self.space.training:
                self._saved(total, at)
                self._spans(total, at)
                self._operands(total, at)
                self._gradients(total, at)
            else:
                self._forward(total, at)
            self._gathered(total, at)
        elif kind == "reduce" and group is not None:
            self._saved(total, at - 1)
            self._spans(total, at - 1)
            self._gradients(total, at)
            self._gathered(total, at)
            for w, o, h in self._of(group):
                total["z", w, o] -= h.gathered
            self._buckets(total, group)
        elif kind == "gather" and group is not None:
            self._saved(total, at)
            self._spans(total, at)
            self._gradients(total, at)
            self._gathered(total, at)
            for w, o, h in self._of(group):
                total["z", w, o] += h.arrival
        elif kind == "finish" and group is not None:
            self._finish(total, at, group)
        elif kind == "step" and self.setting.early:
            self._update(total, at)
        else:
            self._step(total, kind, at)
        return Form(constant, dict(total))

    # -- parameters

    def floor(self) -> float:
        """Bytes that every plan of the space has at the optimizer step, whatever the number of microbatches."""
        least = [0.0] * len(self.members)
        for w in range(len(self.members)):
            kept = (self.held(w, o) for o in range(len(self.space.options[w])))
            least[w] = len(self.members[w]) * min(
                h.stored + h.moments + (0 if self.setting.early else h.final) for h in kept
            )
        return self._constant() + sum(least)

    def held(self, w: int, o: int, reduced: int = 0) -> Held:
        """What parameter class `w` takes per instance under option `o`."""
        key = (w, o, reduced)
        if key not in self._held:
            item, option = self.template.parameters[w], self.space.options[w][o]
            trains = item.parameter.trainable and self.space.training
            used = local_elements(item.tensor.dims, option.home, self.sizes)
            bytes_ = state_bytes(self.setting.precision, self.setting.optimizer)
            stored = self.space.stored_elements(w, option)
            self._held[key] = held(item.tensor, trains, stored, used, option.zero, reduced, bytes_, self.setting)
        return self._held[key]

    def _options(self) -> list[tuple[int, int, Held]]:
        return [(w, o, self.held(w, o)) for w, options in enumerate(self.space.options) for o in range(len(options))]

    def _of(self, group: Group) -> list[tuple[int, int, Held]]:
        """Options that put a parameter into the group."""
        items, space = self.template.parameters, self.space
        return [
            (w, o, h) for w, o, h in self._options()
            if items[w].region == group.region and space.group(w, space.options[w][o]) == group.key
        ]  # fmt: skip

    def _base(self, total: dict[Key, float]) -> float:
        for w, o, h in self._options():
            total["z", w, o] += len(self.members[w]) * (h.stored + h.moments)
        return self._constant()

    def _constant(self) -> float:
        """Inputs, buffers, parameters no op uses, and the reserve."""
        bytes_ = state_bytes(self.setting.precision, self.setting.optimizer)
        unused = [p.tensor for p in self.outline.parameters if p.tensor not in self.template.parameter_of]
        loose = sum(self.tensors[t].elements * bytes_.parameter for t in unused)
        return float(sum(self.facts.given.values()) + loose + self.setting.reserve)

    def _gradients(self, total: dict[Key, float], at: int) -> None:
        found = self.facts
        for w, o, h in self._options():
            if not h.whole:
                continue
            members = [n for n in self.members[w] if found.uses[n]]
            if self.setting.early:
                alive = sum(found.complete(n, self.sizes) <= at <= found.uses[n][-1] for n in members)
                total["z", w, o] += alive * h.whole
                continue
            if self.m > 1 and self.space.options[w][o].zero < 2:
                self._accumulating(total, w, o, len(members))
                continue
            whole = sum(found.low[n] <= at <= found.uses[n][-1] for n in members)
            final = len(members) if self.m > 1 else sum(at < found.low[n] for n in members)
            total["z", w, o] += whole * h.whole + final * h.final

    def _gathered(self, total: dict[Key, float], at: int) -> None:
        found, here = self.facts, self.facts.instance[at]
        for w, o, h in self._options():
            members = self.members[w]
            if h.copy:
                alive = (n for n in members if self.m > 1 or found.low[n] <= at)
                total["z", w, o] += h.copy * sum(found.lasting(n, self.space.training, self.m) for n in alive)
            if h.gathered:
                total["z", w, o] += h.gathered * sum(here in found.touched[n] for n in members)
            if self.m > 1 and self.space.options[w][o].zero < 3:
                self._fresh(total, w, o, len(members))

    def _fresh(self, total: dict[Key, float], w: int, o: int, count: int) -> None:
        """Copies that a chain from the stored to a wanted placement makes."""
        for want in self.space.wants[w]:
            entry = self.space.entry(w, o, want)
            if count and entry is not None and entry.chain.fresh:
                total["e", w, o, want] += count * local_bytes(self.template.parameters[w].tensor, want, self.sizes)

    def _buckets(self, total: dict[Key, float], group: Group, *, zero: bool = False) -> None:
        """Copies while a group's gradients are reduced; with `zero`, of what is stored in chunks alone."""
        for w, o, h in self._of(group):
            if zero and not self.space.options[w][o].zero:
                continue
            total["z", w, o] += h.bucket
            more = self.held(w, o, 1).bucket - h.bucket
            for want in self.space.wants[w]:
                entry = self.space.entry(w, o, want)
                if entry is not None and entry.reduced:
                    total["e", w, o, want] += more

    def _accumulating(self, total: dict[Key, float], w: int, o: int, count: int) -> None:
        """Gradients of `count` instances that gather over microbatches, in every placement that is wanted."""
        if self.held(w, o).whole:
            for want in self.space.wants[w]:
                if self.space.entry(w, o, want) is not None:
                    total["e", w, o, want] += count * local_bytes(self.template.parameters[w].tensor, want, self.sizes)

    def _finish(self, total: dict[Key, float], at: int, group: Group) -> None:
        """Gradients around the reduction of a group, once a step; `at` is where its instance is used first."""
        low, mine = self.facts.low, {(w, o) for w, o, _ in self._of(group)}
        for w, o, h in self._options():
            starts, own = [low[n] for n in self.members[w]], (w, o) in mine
            once = self.space.options[w][o].zero < 2
            made = sum(start >= at for start in starts) if once else len(starts)
            total["z", w, o] += h.final * (made - own)
            if once:
                self._accumulating(total, w, o, sum(start <= at for start in starts))
        self._reducing(total, group)

    def _reducing(self, total: dict[Key, float], group: Group) -> None:
        """What a group's gradients are while they are reduced once a step, beyond those that have gathered."""
        for w, o, h in self._of(group):
            entries = {
                want: entry for want in self.space.wants[w] if (entry := self.space.entry(w, o, want)) is not None
            }
            for want, entry in entries.items():
                turned = entry.chain.copies_backward or any(call.backward for call in entry.chain.calls)
                total["e", w, o, want] += h.whole if turned else 0
            if not self.space.options[w][o].zero:
                total["z", w, o] += h.final
                reduced = tuple(want for want, entry in entries.items() if entry.reduced)
                if len(reduced) > 1 and self.consumers[w] > 1:
                    total["more", w, o, reduced] += 2 * h.final
        self._buckets(total, group, zero=True)

    def _update(self, total: dict[Key, float], at: int) -> None:
        """The update of one parameter in the backward pass."""
        name = self.outline.parameters[at].tensor
        v, mine = self.facts.complete(name, self.sizes), self.template.parameter_of[name]
        self._saved(total, v - 1)
        self._spans(total, v - 1)
        self._gradients(total, v)
        self._gathered(total, v)
        for w, o, h in self._options():
            total["z", w, o] += h.step if w == mine else 0

    def _step(self, total: dict[Key, float], kind: str, at: int) -> None:
        for w, o, h in self._options():
            total["z", w, o] += len(self.members[w]) * h.final
            if kind == "step":
                mine = self.setting.foreach or self.outline.parameters[at].tensor in self.members[w]
                total["z", w, o] += h.step * (len(self.members[w]) if self.setting.foreach else mine)

    # -- activations

    def _buffers(self, saver: Saver) -> tuple[tuple[int, Key, float, bool], ...]:
        """Per strategy of the saver's class that saves it: (index, buffer within its storage, bytes, whether it is whole)."""
        if saver not in self._canon:
            v, source, index = saver
            op = self.template.ops[v].op
            use = (op.operands if source == "operand" else op.results)[index]
            whole = (R,) * len(self.sizes)
            found = []
            for s, strategy in enumerate(self.space.strategies[v]):
                if not any((i.source, i.index) == (source, index) for i in saves(op, strategy.choice, self.tensors)):
                    continue
                placement = (strategy.operands if source == "operand" else strategy.results)[index]
                name, states = buffer(self.facts, use.tensor, placement)
                mine = () if name == self.facts.aliases[use.tensor].root else (saver,)
                found.append((s, (*mine, states), local_bytes(self.tensors[name], states, self.sizes), states == whole))
            self._canon[saver] = tuple(found)
        return self._canon[saver]

    def _saved(self, total: dict[Key, float], at: int) -> None:
        groups: dict[tuple[tuple[Saver, ...], bool], int] = defaultdict(
            int
        )  # how many storages, or microbatches of them
        for root, entries in self.savers.items():
            alive = tuple(dict.fromkeys(s for i, s in entries if i <= at))
            if alive:
                groups[alive, self.tensors[root].role == "activation"] += self.facts.parts(self.tensors[root])
        for (savers, activation), number in groups.items():
            self._storage(total, savers, activation, number)
        fresh: dict[int, int] = defaultdict(int)
        for name, i in self.facts.saved_parameters.items():
            fresh[self.template.parameter_of[name]] += i <= at
        for w, count in fresh.items():
            for o, option in enumerate(self.space.options[w]):
                if self.m == 1 or option.zero == 3:
                    self._fresh(total, w, o, count)
        for op in self.ops[: at + 1]:
            self._new(total, self.template.class_of[op.name])

    def _storage(self, total: dict[Key, float], savers: Sequence[Saver], activation: bool, count: int) -> None:
        users: dict[Key, tuple[float, list[tuple[Key, ...]]]] = {}
        for saver in savers:
            mine: dict[Key, list[Key]] = defaultdict(list)
            for s, canon, amount, whole in self._buffers(saver):
                if activation or not whole:
                    mine[canon].append(("x", saver[0], s))
                    users.setdefault(canon, (amount, []))
            for canon, keys in mine.items():
                users[canon][1].append(tuple(keys))
        for amount, groups in users.values():
            if len(groups) == 1:
                for key in groups[0]:
                    total[key] += count * amount
            else:
                total["any", tuple(groups)] += count * amount

    def _new(self, total: dict[Key, float], v: int) -> None:
        op = self.template.ops[v].op
        for s, strategy in enumerate(self.space.strategies[v]):
            for item in saves(op, strategy.choice, self.tensors):
                if item.source == "new":
                    total["x", v, s] += new_bytes(op, item, strategy.choice, self.sizes)

    def _result(self, total: dict[Key, float], name: str, count: int) -> None:
        v, i = self.producer[name]
        tensor = self.tensors[name]
        for s, strategy in enumerate(self.space.strategies[v]):
            total["x", v, s] += count * local_bytes(tensor, strategy.results[i], self.sizes)

    def _spans(self, total: dict[Key, float], at: int, *, through: bool = False) -> None:
        groups: dict[tuple[int, int], list[str]] = defaultdict(list)
        for span in self.facts.spans:
            if span.start <= at and (at < span.end or (through and at == span.end)):
                groups[self.producer[span.root]].append(span.root)
        for names in groups.values():
            self._result(total, names[0], len(names))

    def _operands(self, total: dict[Key, float], at: int) -> None:
        op = self.ops[at]
        v = self.template.class_of[op.name]
        for s, strategy in enumerate(self.space.strategies[v]):
            if amount := inside_bytes(
                op, self.tensors, strategy.choice, self.sizes, training=True, unfolds=self.setting.unfolds
            ):
                total["x", v, s] += amount
        for j in parameter_gradients(op, self.tensors) if self.m > 1 else ():
            self._added(total, v, j, op.operands[j].tensor)
        for j in operand_gradients(op, self.tensors):
            for s, strategy in enumerate(self.space.strategies[v]):
                amount = local_bytes(self.tensors[op.operands[j].tensor], strategy.operands[j], self.sizes)
                total["x", v, s] += gradient_copies(op, strategy.choice) * amount

    def _added(self, total: dict[Key, float], v: int, j: int, name: str) -> None:
        """The gradient of an op's parameter, made beside one that it is added to: of what is reduced once a step, or is shared."""
        w, tensor = self.template.parameter_of.get(name), self.tensors[name]
        if w is None or self.facts.shared(name):
            for s, strategy in enumerate(self.space.strategies[v]):
                total["x", v, s] += local_bytes(tensor, strategy.operands[j], self.sizes)
            return
        for o, option in enumerate(self.space.options[w]):
            if option.zero < 2:
                self._accumulating(total, w, o, 1)

    def _forward(self, total: dict[Key, float], at: int) -> None:
        """Inference: results that are still used, and the copies this op's transitions make."""
        self._spans(total, at, through=True)
        op = self.ops[at]
        v = self.template.class_of[op.name]
        for i, use in enumerate(op.operands):
            made = self.producer.get(use.tensor)
            if made is None:
                continue
            sources: dict[Placement, None] = dict.fromkeys(s.results[made[1]] for s in self.space.strategies[made[0]])
            wants: dict[Placement, None] = dict.fromkeys(s.operands[i] for s in self.space.strategies[v])
            for p in sources:
                for q in wants:
                    if buffer(self.facts, use.tensor, p) != buffer(self.facts, use.tensor, q):
                        amount = local_bytes(self.tensors[use.tensor], q, self.sizes)
                        total["y", (made, v, i), p, q] += amount

"""What the backward pass of a plan makes again, spread over the ops of an outline, and when it does so.

A *value* is a buffer (planner/memory.py): a storage in one placement. It is made by an op, or by a chain of transitions, a
*copy*. The backward pass needs what ops saved; it makes a needed value again where its op or copy is among those that run again,
first making what that takes, and lets go of it after its last use. Everything else that it needs is kept.

Kept in any case: results that leave their unit, since the plan counts them with the unit that takes them, and results of ops
that use a parameter which other units use too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import PlanError
from .choices import placed
from .memory import Buffer, Facts, buffer, facts, local_bytes, new_bytes
from .outline import Op, Outline, Region, Saved
from .part import part_of
from .placement import Placement, R
from .plan import RegionPlan
from .saves import saves

Copy = tuple[str, Placement]
"""A tensor, and the placement that a chain of transitions brings it to."""


@dataclass(frozen=True, slots=True)
class Again:
    """What runs again in the backward pass: ops by name, and copies.

    `parameters` are those that it reads for that.
    """

    ops: frozenset[str] = frozenset()
    copies: frozenset[Copy] = frozenset()
    parameters: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.ops or self.copies)


NOTHING = Again()


def spread(
    outline: Outline, ways: Sequence[Sequence[RegionPlan]], choices: Mapping[str, tuple[str, ...]], model: int | None
) -> Again:
    """What runs again where instance k of region r is run as `ways[r][k]` says; `model` is the index of the model axis.

    Raises PlanError where an entry names what its region does not have.
    """
    if not any(entry.recompute for entries in ways for entry in entries):
        return NOTHING
    ops: set[str] = set()
    copies: set[Copy] = set()
    for r, (region, entries) in enumerate(zip(outline.regions, ways, strict=True)):
        for k, entry in enumerate(entries):
            if entry.recompute:
                names = dict(zip(region.instances[0], region.instances[k], strict=True))
                ops |= {_named(entry, names, text) for text in entry.recompute if " -> " not in text}
                wanted = {text for text in entry.recompute if " -> " in text}
                if wanted:
                    copies |= _copies(outline, r, k, entry, wanted, choices, model)
    return _pruned(outline, choices, ops, copies)


def _pruned(outline: Outline, choices: Mapping[str, tuple[str, ...]], ops: set[str], copies: set[Copy]) -> Again:
    """What of this may run again, and is needed."""
    values = Values(outline, facts(outline), *standing(outline, choices), choices)
    return values.needed(Again(frozenset(ops - _staying(outline)), frozenset(copies)))


def transferred(
    again: Again, target: Outline, choices: Mapping[str, tuple[str, ...]], names: Mapping[str, str]
) -> Again:  # fmt: skip
    """`again` for another outline of the same model; `names` gives each of its ops the name it had."""
    if not again:
        return NOTHING
    ops = {mine for mine, theirs in names.items() if theirs in again.ops}
    wanted, _ = standing(target, choices)
    copies = {
        (use.tensor, placement)
        for op in target.ops for use, placement in zip(op.operands, wanted[op.name], strict=True)
        if (_renamed(use.tensor, names), placement) in again.copies
    }  # fmt: skip
    return _pruned(target, choices, ops, copies)


def _named(entry: RegionPlan, names: Mapping[str, str], text: str) -> str:
    if text not in names:
        raise PlanError(f"region {entry.name}.recompute: {text!r} is not in the region")
    return names[text]


def _staying(outline: Outline) -> frozenset[str]:
    """Ops whose result leaves its unit, and those with a parameter that several units use."""
    where = {name: (r, k) for r, g in enumerate(outline.regions) for k, ops in enumerate(g.instances) for name in ops}
    maker = {use.tensor: op.name for op in outline.ops for use in op.results}
    users: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for op in outline.ops:
        for use in op.operands:
            users[outline.tensors[use.tensor].storage].add(where[op.name])
    found = {maker[root] for root, at in users.items() if root in maker and at != {where[maker[root]]}}
    found |= {maker[outline.tensors[name].storage] for name in (outline.loss, *outline.outputs) if name in maker}
    shared = {root for root, at in users.items() if outline.tensors[root].role == "parameter" and len(at) > 1}
    for op in outline.ops:
        if any(outline.tensors[use.tensor].storage in shared for use in op.operands):
            found.add(op.name)
    return frozenset(found)


def _copies(
    outline: Outline, r: int, k: int, entry: RegionPlan, wanted: set[str], choices: Mapping[str, tuple[str, ...]],
    model: int | None,
) -> set[Copy]:  # fmt: skip
    """The chains of instance `k` that make a copy again ("op -> state", op and state of what it is a copy of)."""
    region, part, tensors = outline.regions[r], part_of(outline, r, k), dict(outline.tensors)
    told = _told(outline, region, k)
    by_name = outline.by_name
    found: set[Copy] = set()
    met: set[str] = set()
    for name in region.instances[k]:
        op = by_name[name]
        operands, _ = placed(op, tensors, choices[name])
        for use, placement in zip(op.operands, operands, strict=True):
            if tensors[use.tensor].role == "parameter" or model is None:
                continue
            root, stands = buffer(part.facts, use.tensor, placement)
            text = f"{_renamed(root, told)} -> {stands[model]}"
            if text in wanted:
                met.add(text)
                found.add((use.tensor, placement))
    if wanted - met:
        raise PlanError(f"region {entry.name}.recompute: {min(wanted - met)!r} is no copy that the region makes")
    return found


def _told(outline: Outline, region: Region, k: int) -> dict[str, str]:
    """How a plan names the ops behind an instance's tensors: as in the first instance; outside ones as in the typical one."""
    by_name = outline.by_name
    typical = region.instances[1 if region.repeats > 1 else 0]
    found: dict[str, str] = {}
    for mine, theirs in zip(region.instances[k], typical, strict=True):
        for a, b in zip(by_name[mine].operands, by_name[theirs].operands, strict=True):
            found[a.tensor.partition(":")[0]] = b.tensor.partition(":")[0]
    return found | dict(zip(region.instances[k], region.instances[0], strict=True))


def _renamed(tensor: str, names: Mapping[str, str]) -> str:
    op, colon, index = tensor.partition(":")
    return names.get(op, op) + colon + index


def standing(
    outline: Outline, choices: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, tuple[Placement, ...]], dict[str, Placement]]:
    """Wanted placements of operands by op, and produced ones by tensor; raises PlanError naming an op without such a choice."""
    tensors = dict(outline.tensors)
    wanted: dict[str, tuple[Placement, ...]] = {}
    produced: dict[str, Placement] = {}
    for op in outline.ops:
        try:
            wanted[op.name], made = placed(op, tensors, choices[op.name])
        except ValueError as error:
            raise PlanError(f"op {op.name}: {error}") from None
        produced |= {use.tensor: placement for use, placement in zip(op.results, made, strict=True)}
    return wanted, produced


@dataclass(frozen=True, slots=True)
class Maker:
    """What makes a value: an op (`copy` is None), or a chain of transitions from the value `source`."""

    op: str
    copy: Copy | None = None
    source: Buffer | None = None


class Values:
    """The values of an outline under placements, and what makes them."""

    def __init__(
        self, outline: Outline, found: Facts, wanted: Mapping[str, tuple[Placement, ...]], produced: Mapping[str, Placement],
        choices: Mapping[str, tuple[str, ...]],
    ) -> None:  # fmt: skip
        self.outline, self.facts, self.wanted, self.produced, self.choices = outline, found, wanted, produced, choices
        self.ops = outline.by_name
        self.whole: Placement = (R,) * (len(next(iter(produced.values()))) if produced else 1)
        self.makers: dict[Buffer, Maker] = {}
        for op in outline.ops:
            for i, use in enumerate(op.operands):
                value = self.operand(op, i)
                if not self.parameter(use.tensor) and value not in self.makers:
                    source = buffer(found, use.tensor, produced.get(use.tensor, self.whole))
                    if value != source:
                        self.makers[value] = Maker(op.name, (use.tensor, wanted[op.name][i]), source)
            for i in range(len(op.results)):
                self.makers.setdefault(self.result(op, i), Maker(op.name))

    def operand(self, op: Op, i: int) -> Buffer:
        """The value that operand `i` of an op is in."""
        return buffer(self.facts, op.operands[i].tensor, self.wanted[op.name][i])

    def result(self, op: Op, i: int) -> Buffer:
        """The value that result `i` of an op is in."""
        return buffer(self.facts, op.results[i].tensor, self.produced[op.results[i].tensor])

    def parameter(self, tensor: str) -> bool:
        """Whether a tensor lies in a parameter."""
        return self.outline.tensors[self.facts.aliases[tensor].root].role == "parameter"

    def saved(self, op: Op) -> Iterator[Buffer]:
        """The values that an op saves as they are, one for every time that it saves it."""
        for item in saves(op, self.choices[op.name], self.outline.tensors):
            if item.source == "operand" and not self.parameter(op.operands[item.index].tensor):
                yield self.operand(op, item.index)
            elif item.source == "result":
                yield self.result(op, item.index)

    def new(self, op: Op) -> list[Saved]:
        """What an op saves that is no value."""
        return [item for item in saves(op, self.choices[op.name], self.outline.tensors) if item.source == "new"]

    def takes(self, maker: Maker) -> list[Buffer]:
        """The values that making one takes."""
        if maker.source is not None:
            return [maker.source]
        op = self.ops[maker.op]
        return [self.operand(op, i) for i, use in enumerate(op.operands) if not self.parameter(use.tensor)]

    def runs_again(self, again: Again, maker: Maker | None) -> bool:
        """Whether a value made by `maker` is made again."""
        if maker is None:
            return False
        return maker.op in again.ops if maker.copy is None else maker.copy in again.copies

    def needed(self, again: Again) -> Again:
        """Those of `again` that the backward pass comes to need, with the parameters they read."""
        open_: list[Maker] = []
        seen: set[Maker] = set()

        def ask(value: Buffer) -> None:
            maker = self.makers.get(value)
            if maker is not None and self.runs_again(again, maker) and maker not in seen:
                seen.add(maker)
                open_.append(maker)

        for op in self.outline.ops:
            for value in self.saved(op):
                ask(value)
            if op.name in again.ops and self.new(op) and Maker(op.name) not in seen:
                seen.add(Maker(op.name))
                open_.append(Maker(op.name))
        while open_:
            for value in self.takes(open_.pop()):
                ask(value)
        ops = frozenset(m.op for m in seen if m.copy is None)
        read = {
            self.facts.aliases[u.tensor].root for n in ops for u in self.ops[n].operands if self.parameter(u.tensor)
        }
        copies = frozenset(c for c in again.copies if self.makers.get(buffer(self.facts, *c)) in seen)
        return Again(ops, copies, frozenset(read))


@dataclass
class Rerun:
    """Bytes of what is made again, by op of the backward pass: the most while making, and what is there then.

    `kept` are values that are kept with the first op (index) that needs them.
    """

    most: list[float]
    there: list[float]
    kept: dict[Buffer, int] = field(default_factory=dict)


def rerun(values: Values, again: Again, sizes: tuple[int, ...]) -> Rerun:
    """Follow the backward pass, last op first."""
    return _Backward(values, again, sizes).follow()


class _Backward:
    """The values that are there in the backward pass beside what is kept."""

    def __init__(self, values: Values, again: Again, sizes: tuple[int, ...]) -> None:
        self.values, self.again, self.sizes = values, again, sizes
        self.ops, self.order = values.outline.ops, values.facts.order
        self.found = Rerun([0.0] * len(self.ops), [0.0] * len(self.ops))
        self.left: dict[Buffer, int] = defaultdict(int)
        self.alive: dict[Buffer, float] = {}
        self.inside: dict[str, float] = {}
        self.total = self.most = 0.0
        makers = [Maker(name) for name in again.ops]
        makers += [m for m in values.makers.values() if m.copy is not None and values.runs_again(again, m)]
        for op in self.ops:
            for value in values.saved(op):
                self._count(value, self.order[op.name])
        for maker in makers:
            for value in values.takes(maker):
                self._count(value, self.order[maker.op])

    def _count(self, value: Buffer, at: int) -> None:
        if self._remade(value):
            self.left[value] += 1
        else:
            self.found.kept[value] = min(at, self.found.kept.get(value, at))

    def _remade(self, value: Buffer) -> bool:
        return self.values.runs_again(self.again, self.values.makers.get(value))

    def follow(self) -> Rerun:
        for v in range(len(self.ops) - 1, -1, -1):
            op = self.ops[v]
            self.most = self.total
            needed = [value for value in self.values.saved(op) if self._remade(value)]
            for value in needed:
                self._make(value)
            if op.name in self.again.ops and op.name not in self.inside:
                self._run(Maker(op.name))
            self.found.most[v], self.found.there[v] = self.most, self.total
            for value in needed:
                self._used(value)
            self.total -= self.inside.pop(op.name, 0.0)
        return self.found

    def _make(self, value: Buffer) -> None:
        if value not in self.alive:
            self._run(self.values.makers[value])

    def _run(self, maker: Maker) -> None:
        taken = [value for value in self.values.takes(maker) if self._remade(value)]
        for value in taken:
            self._make(value)
        if maker.copy is None:
            op = self.values.ops[maker.op]
            made = [self.values.result(op, i) for i in range(len(op.results))]
            choice = self.values.choices[op.name]
            self.inside[op.name] = sum(new_bytes(op, item, choice, self.sizes) for item in self.values.new(op))
            self.total += self.inside[op.name]
        else:
            made = [value for value, m in self.values.makers.items() if m is maker]
        for value in made:
            if value not in self.alive and self.values.makers.get(value) == maker:
                tensor = self.values.outline.tensors[value[0]]
                self.alive[value] = local_bytes(tensor, value[1], self.sizes) if tensor.storage == tensor.name else 0.0
                self.total += self.alive[value]
        self.most = max(self.most, self.total)
        for value in taken:
            self._used(value)
        for value in made:
            if not self.left[value]:
                self.total -= self.alive.pop(value, 0.0)

    def _used(self, value: Buffer) -> None:
        self.left[value] -= 1
        if self.left[value] <= 0:
            self.total -= self.alive.pop(value, 0.0)

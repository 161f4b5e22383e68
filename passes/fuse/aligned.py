"""Which dims of which tensors are the positions of a padding mask, by the rules of the ops between them.

It begins at attention: the keys of a call whose mask blocks padded positions (padded_keys.py) are at the mask's positions. From
there it follows letters of op rules that may be split, forward and backward: an op whose loop over positions may be split does
the same at every position and moves nothing. So a flip, a convolution or a shift ends it, and the positions of a decoder beside
those of its encoder are others, be there as many.

What lies at padded positions may then be anything, provided that nothing valid is computed from it. `safe` says whether that is
so: positions may mix where the mask blocks padded keys, and else only in what has no positions any more (a pooled vector, a loss:
whether those read padded positions is up to the model).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from ...planner import rule_heads
from ...planner.rule_types import Letters, RuleInstance
from ...planner.rules import instantiate
from ..base import fake, is_tensor, tensor_name
from ..pattern import target_of
from ..summarize import operands_of, target_name
from .padded_keys import PaddedKeys

READ_KINDS = frozenset({"reduction", "loss", rule_heads.KIND})
READS = frozenset({"aten.select", "aten.slice", "aten.index", "aten.gather", "aten.index_select"})
"""Ops that may read positions one by one or sum over them, where what they make has no positions."""
KEEPS_ZERO = frozenset({
    "aten.dropout", "aten.to", "aten._to_copy", "aten.mul", "aten.div", "aten.clone", "aten.contiguous", "aten.view",
    "aten.reshape", "aten.expand", "aten.transpose", "aten.permute", "aten.detach", "aten.alias",
})  # fmt: skip
"""Ops behind which the weights of blocked keys are still zero."""
ATTENTION, SOFTMAX = "aten.scaled_dot_product_attention", ("aten.softmax", "aten._softmax")


@dataclass(frozen=True)
class Place:
    """The dims of a tensor that are samples and positions of the mask: one dim where it merges both, no samples in a batch of one.

    The dim of samples may merge them with what else there is of each (heads), samples major.
    """

    batch: int | None
    position: int


@dataclass(frozen=True)
class Call:
    """A call with its rule (None where it has none): names of its operands and results with the letters of their dims."""

    node: fx.Node
    rule: RuleInstance | None
    operands: tuple[str, ...]
    results: tuple[str, ...]

    def sides(self) -> Iterator[tuple[str, Letters]]:
        """Operands, then results."""
        if self.rule is not None:
            yield from zip(self.operands, self.rule.operands, strict=True)
            yield from zip(self.results, self.rule.results, strict=True)

    def free(self, letter: str) -> bool:
        """Whether the op does the same all along a letter."""
        return self.rule is not None and letter not in self.rule.never and letter not in self.rule.implementation


Pair = tuple[str | None, str]
"""The letters of samples and of positions."""


def letters_at(dims: Letters, place: Place, sizes: dict[str, int], mask: tuple[int, int]) -> Pair | None:
    """The letters that a place has in one call under a mask of this shape; None where its dims are cut otherwise."""
    members = dims[place.position]
    if place.batch is not None and place.batch != place.position:
        major = dims[place.batch]
        whole = len(major) == 1 or (len(major) > 1 and sizes[major[0]] == mask[0])
        return (major[0], members[0]) if whole and len(members) == 1 else None
    if len(members) == 1:
        return (None if place.batch is None else members[0]), members[0]
    return (members[0], members[1]) if len(members) == 2 and sizes[members[1]] == mask[1] else None


def places_of(dims: Letters, pair: Pair) -> Iterator[Place]:
    """Where a tensor of one call has these letters."""
    batch, position = pair
    for at, members in enumerate(dims):
        if members == (position,):
            if batch is None:
                yield Place(None, at)
            elif batch == position:
                yield Place(at, at)
            else:
                yield from (Place(d, at) for d, other in enumerate(dims) if d != at and other[:1] == (batch,))
        elif batch is not None and members == (batch, position):
            yield Place(at, at)


class Aligned:
    """The places of all tensors of a graph under one mask."""

    def __init__(self, graph: fx.Graph, keys: PaddedKeys) -> None:
        self.keys = keys
        self.batch, self.length = fake(keys.mask).shape
        self.calls = {n.name: _call(n) for n in graph.nodes if n.op == "call_function" and target_of(n) != "getitem"}
        self.varies = _varying(graph)
        self.reading: dict[str, list[Call]] = defaultdict(list)
        for call in self.calls.values():
            for name in dict.fromkeys((*call.operands, *call.results)):
                self.reading[name].append(call)
        self.masked = dict(self._masked())
        self.places: dict[str, set[Place]] = defaultdict(set)
        for name, place in {(s, p) for call, found in self.masked.items() for s, p in self._seeds(call, found)}:
            self._follow(name, place)

    def _masked(self) -> Iterator[tuple[str, frozenset[int]]]:
        """Calls that mix positions under the mask, with the operands whose padded positions they do not read."""
        for name, call in self.calls.items():
            op, args = target_of(call.node), call.node.args
            if op == ATTENTION:
                mask = args[3] if len(args) > 3 else call.node.kwargs.get("attn_mask")
                if self.keys.blocks(mask) or self.keys.masked(mask):
                    yield name, frozenset({1, 2})
            elif op in SOFTMAX and args[1] in (-1, fake(call.node).dim() - 1) and self.keys.masked(args[0]):
                yield name, frozenset({0})

    def _seeds(self, name: str, operands: Iterable[int]) -> Iterator[tuple[str, Place]]:
        call = self.calls[name]
        attention = target_of(call.node) == ATTENTION
        for i in operands:
            rank = fake(call.node.args[i]).dim()  # type: ignore[arg-type]
            yield call.operands[i], Place(None if self.batch == 1 else 0, rank - 2 if attention else rank - 1)

    def _follow(self, name: str, place: Place) -> None:
        """Enter a place, and every one that it is the same as."""
        queue = [(name, place)]
        while queue:
            name, place = queue.pop()
            if place in self.places[name] or name not in self.varies:
                continue
            self.places[name].add(place)
            for call in self.reading[name]:
                for pair in {p for n, dims in call.sides() if n == name and (p := self._free(call, dims, place))}:
                    queue += [(n, p) for n, dims in call.sides() for p in places_of(dims, pair)]

    def pair(self, call: Call, dims: Letters, place: Place) -> Pair | None:
        """The letters of a place."""
        assert call.rule is not None
        return letters_at(dims, place, call.rule.sizes, (self.batch, self.length))

    def _free(self, call: Call, dims: Letters, place: Place) -> Pair | None:
        """The letters of a place along which the op does the same everywhere."""
        pair = self.pair(call, dims, place)
        return pair if pair is not None and all(c is None or call.free(c) for c in pair) else None

    def lead(self, name: str, shape: tuple[int, ...]) -> int:
        """How many leading dims of a tensor are its positions: 2 for [b, s, ..], 1 for [b s, ..], 0 for anything else."""
        batch = None if self.batch == 1 else 0
        if Place(batch, 1) in self.places[name] and shape[0] == self.batch:
            return 2
        return int(Place(batch, 0) in self.places[name])

    def safe(self, begins: frozenset[str]) -> bool:
        """Whether nothing valid depends on what the calls named in `begins` make at padded positions."""
        tainted, loose, zero = set[str](), set[str](), set[tuple[str, Place]]()
        for call in self.calls.values():
            self._zeros(call, zero)
            if call.node.name in begins:
                tainted.update(call.results)
                continue
            if tainted.isdisjoint(call.operands):
                continue
            tainted.update(call.results)
            reads = [self._reads(call, i, zero) for i, name in enumerate(call.operands) if name in tainted]
            if None in reads:
                return False
            if any(reads) or not loose.isdisjoint(call.operands):
                loose.update(call.results)
        return not any(self.places[name] for name in loose)

    def _reads(self, call: Call, index: int, zero: set[tuple[str, Place]]) -> bool | None:
        """Whether a call reads padded positions of an operand, one by one or in sums; None where it mixes them with others."""
        name, found = call.operands[index], False
        if not self.places[name]:
            return False
        if call.rule is None:
            return None
        own = call.rule.operands[index]
        for place in self.places[name]:
            pair = self.pair(call, own, place)
            if pair is not None and all(c is None or call.free(c) for c in pair):
                if any(
                    p in self.places[n]
                    for n, dims in zip(call.results, call.rule.results, strict=True)
                    for p in places_of(dims, pair)
                ):
                    continue  # carried on
                sides = zip(call.operands, call.rule.operands, strict=True)
                if any((n, p) in zero for n, dims in sides for p in places_of(dims, pair)):
                    continue  # each padded position times zero
            if index in self.masked.get(call.node.name, ()) and self._is_key(call, index, place):
                continue
            if call.rule.kind not in READ_KINDS and target_of(call.node) not in READS:
                return None
            found = True
        return found

    def _is_key(self, call: Call, index: int, place: Place) -> bool:
        return any(p == place for _, p in self._seeds(call.node.name, [index]))

    def _zeros(self, call: Call, zero: set[tuple[str, Place]]) -> None:
        """Enter what of a call's results is zero at padded positions: weights of attention, and what is made of them."""
        if call.node.name in self.masked and target_of(call.node) in SOFTMAX:
            zero.update((call.results[0], place) for _, place in self._seeds(call.node.name, [0]))
        elif target_of(call.node) in KEEPS_ZERO and call.rule is not None:
            for name, dims in zip(call.operands, call.rule.operands, strict=True):
                for place in [p for n, p in zero if n == name]:
                    if pair := self._free(call, dims, place):
                        sides = zip(call.results, call.rule.results, strict=True)
                        zero.update((n, p) for n, own in sides for p in places_of(own, pair))


def _call(node: fx.Node) -> Call:
    operands, args, kwargs = operands_of(node)
    value = fake(node)
    results = {node.name: value} if is_tensor(value) else {f"{node.name}:{i}": v for i, v in enumerate(value)}
    made = {name: tuple(v.shape) for name, v in results.items() if is_tensor(v)}
    tensors: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: tensors.append(n))
    shapes = [tuple(fake(n).shape) for n in tensors]
    rule = instantiate(target_name(node.target), args, kwargs, shapes, list(made.values()))
    return Call(node, rule, operands, tuple(made))


def _varying(graph: fx.Graph) -> frozenset[str]:
    """Names of tensors that depend on an input of the model."""
    found: set[fx.Node] = set()
    names: set[str] = set()
    for node in graph.nodes:
        given = node.op == "placeholder" and node.meta.get("role") == "input"
        if given or (node.op == "call_function" and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
            value = node.meta["val"]
            many = isinstance(value, tuple | list)
            names.update([tensor_name(node), *(f"{node.name}:{i}" for i in range(len(value) if many else 0))])
    return frozenset(names)

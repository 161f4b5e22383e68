"""Factor analysis: the common refinement of every dim of every tensor into the factors the ops split by.

Each op names loops (letters) and says which letters make up each dim of its operands and results, major to minor. A dim is
described by its *cuts*: the sizes of what lies inside each boundary, so [2304] seen as (3, 12, 64) has the cuts {768, 64}.
Cuts travel through letters between all dims that share them until nothing changes. A letter whose cuts cannot be reconciled
(6x4 seen as 8x3) is *detached*: it may not be split, and its dims keep their own factors.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .outline import Factor, Use
from .placement import Dims

Letters = tuple[tuple[str, ...], ...]
"""Per dim, the letters of that dim, major to minor; a dim of size 1 has none."""


@dataclass(frozen=True, slots=True)
class LetteredOp:
    """An op with its letters: operand and result tensors (name, letters per dim), sizes, and which letters may be split."""

    name: str
    uses: tuple[tuple[str, Letters], ...]
    sizes: Mapping[str, int]
    never: frozenset[str]
    implementation: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Slot:
    """One letter's stretch of one tensor dim: the dim's sizes between `inner` (exclusive) and `inner * size`."""

    tensor: str
    dim: int
    inner: int


class _Analysis:
    """Mutable working state of one analysis; `cuts` of tensor dims and of op letters grow to a fixpoint."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], ops: Sequence[LetteredOp]) -> None:
        self.shapes, self.ops = shapes, ops
        self.detached: set[tuple[str, str]] = set()
        self.slots: dict[tuple[str, str], list[Slot]] = defaultdict(list)
        self.of_dim: dict[tuple[str, int], list[tuple[str, str, int]]] = defaultdict(list)
        for op in ops:
            for tensor, dims in op.uses:
                self._index(op, tensor, dims)
        self.sizes = {(op.name, letter): size for op in ops for letter, size in op.sizes.items()}
        self.dim_cuts: dict[tuple[str, int], set[int]] = {}
        self.letter_cuts: dict[tuple[str, str], set[int]] = {}

    def _index(self, op: LetteredOp, tensor: str, dims: Letters) -> None:
        for dim, letters in enumerate(dims):
            inner = self.shapes[tensor][dim]
            for letter in letters:
                inner //= max(op.sizes[letter], 1)  # an empty dim is never split
                self.slots[op.name, letter].append(Slot(tensor, dim, inner))
                self.of_dim[tensor, dim].append((op.name, letter, inner))

    def run(self) -> None:
        while not self._settle():
            pass

    def _settle(self) -> bool:
        """Propagate all cuts; False when a letter had to be detached and everything must start again."""
        self.dim_cuts, self.letter_cuts = defaultdict(set), defaultdict(set)
        before = len(self.detached)
        queue: deque[tuple[str, int]] = deque()
        for key, members in self.of_dim.items():
            queue.append(key)
            for op, letter, inner in members:
                if (op, letter) not in self.detached and inner > 1 and not self._add_dim(key, inner):
                    self.detached.add((op, letter))
        while queue:
            key = queue.popleft()
            for op, letter, inner in self.of_dim[key]:
                if (op, letter) not in self.detached:
                    self._to_letter(key, op, letter, inner, queue)
        return len(self.detached) == before

    def _to_letter(self, key: tuple[str, int], op: str, letter: str, inner: int, queue: deque[tuple[str, int]]) -> None:
        mine, size = self.letter_cuts[op, letter], self.sizes[op, letter]
        new = set()
        for cut in self.dim_cuts[key]:
            if inner < cut < inner * size:
                if cut % inner:
                    self.detached.add((op, letter))
                    return
                new.add(cut // inner)
        if inner * size < self.shapes[key[0]][key[1]] and inner * size not in self.dim_cuts[key]:
            self.detached.add((op, letter))
            return
        new -= mine
        if not all(_chain(cut, mine | new) for cut in new):
            self.detached.add((op, letter))
            return
        if not new:
            return
        mine |= new
        for slot in self.slots[op, letter]:
            there = (slot.tensor, slot.dim)
            grown = False
            for cut in mine:
                if cut * slot.inner not in self.dim_cuts[there]:
                    if not self._add_dim(there, cut * slot.inner):
                        self.detached.add((op, letter))
                        return
                    grown = True
            if grown:
                queue.append(there)

    def _add_dim(self, key: tuple[str, int], cut: int) -> bool:
        cuts = self.dim_cuts[key]
        if not _chain(cut, cuts) or self.shapes[key[0]][key[1]] % cut:
            return False
        cuts.add(cut)
        return True


def _chain(cut: int, cuts: Iterable[int]) -> bool:
    return all(cut % c == 0 or c % cut == 0 for c in cuts)


def _factor_sizes(size: int, cuts: Iterable[int]) -> tuple[int, ...]:
    """Sizes between the cuts of a dim, major to minor; () for a dim of size 1."""
    if size == 1:
        return ()
    bounds = [size, *sorted(cuts, reverse=True), 1]
    return tuple(a // b for a, b in itertools.pairwise(bounds))


@dataclass(frozen=True, slots=True)
class Refined:
    """The result: factor sizes of each tensor, and for each op its factors and how its tensors use them."""

    dims: Mapping[str, Dims]
    factors: Mapping[str, tuple[Factor, ...]]
    uses: Mapping[str, tuple[Use, ...]]


def refine(shapes: Mapping[str, tuple[int, ...]], ops: Sequence[LetteredOp]) -> Refined:
    """Refine all dims. `shapes` gives every tensor of the graph; uses come back in the order given."""
    work = _Analysis(shapes, ops)
    work.run()
    dims = {
        name: tuple(_factor_sizes(size, work.dim_cuts.get((name, d), ())) for d, size in enumerate(shape))
        for name, shape in shapes.items()
    }
    factors: dict[str, tuple[Factor, ...]] = {}
    uses: dict[str, tuple[Use, ...]] = {}
    for op in ops:
        factors[op.name], uses[op.name] = _refine_op(work, dims, op)
    return Refined(dims, factors, uses)


def _refine_op(work: _Analysis, dims: Mapping[str, Dims], op: LetteredOp) -> tuple[tuple[Factor, ...], tuple[Use, ...]]:
    found: list[Factor] = []
    parts: dict[str, list[int]] = {}
    for letter, size in op.sizes.items():
        if size == 1 or (op.name, letter) in work.detached:
            continue
        sizes = _factor_sizes(size, work.letter_cuts.get((op.name, letter), ()))
        split = "never" if letter in op.never else op.implementation.get(letter, "free")
        parts[letter] = list(range(len(found), len(found) + len(sizes)))
        names = [letter] if len(sizes) == 1 else [f"{letter}.{i}" for i in range(len(sizes))]
        # An implementation (vocabulary-parallel lookup) works on a contiguous range: only the major factor.
        found += [
            Factor(n, s, split if i == 0 or split in ("free", "never") else "never")
            for i, (n, s) in enumerate(zip(names, sizes, strict=True))
        ]
    uses = []
    for index, (tensor, letters) in enumerate(op.uses):
        members = []
        for dim, of_dim in enumerate(letters):
            members.append(_members(work, dims[tensor][dim], op, index, dim, of_dim, parts, found))
        uses.append(Use(tensor, tuple(members)))
    return tuple(found), tuple(uses)


def _members(
    work: _Analysis, sizes: tuple[int, ...], op: LetteredOp, use: int, dim: int, letters: tuple[str, ...],
    parts: Mapping[str, list[int]], found: list[Factor],
) -> tuple[int, ...]:  # fmt: skip
    """Op factors of one dim of one use; stretches of detached letters become factors of their own that are never split."""
    members: list[int] = []
    inner = math.prod(sizes)
    at = 0
    for letter in letters:
        low = inner // max(op.sizes[letter], 1)
        if letter in parts:
            for index in parts[letter]:
                assert sizes[at] == found[index].size, (op.name, letter, sizes, at)
                members.append(index)
                at += 1
        else:
            while at < len(sizes) and math.prod(sizes[at + 1 :]) >= low and math.prod(sizes[at:]) <= inner:
                if sizes[at] == 1:
                    break
                members.append(len(found))
                found.append(Factor(f"{letter}~{use}.{dim}.{at}", sizes[at], "never"))
                at += 1
        inner = low
    while at < len(sizes):  # detached stretches whose boundaries the dim does not have
        members.append(len(found))
        found.append(Factor(f"~{use}.{dim}.{at}", sizes[at], "never"))
        at += 1
    return tuple(members)


class Classes:
    """Union-find over (tensor, dim, factor): two places are in one class when some op runs both by one loop."""

    def __init__(self) -> None:
        self._parent: dict[tuple[str, int, int], tuple[str, int, int]] = {}

    def find(self, place: tuple[str, int, int]) -> tuple[str, int, int]:
        root = place
        while (up := self._parent.setdefault(root, root)) != root:
            root = up
        while place != root:
            self._parent[place], place = root, self._parent[place]
        return root

    def union(self, a: tuple[str, int, int], b: tuple[str, int, int]) -> None:
        self._parent[self.find(a)] = self.find(b)


def classes(refined: Refined) -> Classes:
    """Classes of all places of a refined graph."""
    found = Classes()
    for uses in refined.uses.values():
        first: dict[int, tuple[str, int, int]] = {}
        for use in uses:
            for dim, members in enumerate(use.factors):
                for i, factor in enumerate(members):
                    place = (use.tensor, dim, i)
                    found.union(place, first.setdefault(factor, place))
    return found

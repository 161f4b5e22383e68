"""A model as a chain of units: one unit is one repeat of a region, and a *part* is the graph of one unit on its own.

A part is an outline of the ops of one repeat. What crosses its border is of three kinds: *entry* tensors come from an earlier
unit with a gradient to send back, *exit* tensors go to a later one, and *side* tensors (masks, tables of positions) carry no
gradient and can be made again wherever they are needed. A parameter used in several units is owned by the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from .memory import Facts, facts
from .microbatch import BatchCut
from .outline import Op, Outline, Region, Tensor
from .template import batch_cut, cut_op, cut_tensor, hoisted

Place = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """One unit's graph. `outline` has one region with one instance; `borrowed` are parameters that an earlier unit owns."""

    region: int
    outline: Outline
    entry: tuple[str, ...]
    side: tuple[str, ...]
    exit: tuple[str, ...]
    borrowed: frozenset[str]

    @cached_property
    def facts(self) -> Facts:
        """Order, storages and spans of the part."""
        return facts(self.outline)


@dataclass(frozen=True)
class Chain:
    """The units of an outline in order, as indices of regions, with the tensors that cross each of the gaps between them.

    `ties` are pairs of units that share a parameter: (parameter tensor, owner unit, units that borrow it).
    """

    outline: Outline
    units: tuple[tuple[int, int], ...]
    borders: tuple[tuple[str, ...], ...]
    ties: tuple[tuple[str, int, tuple[int, ...]], ...]

    def __len__(self) -> int:
        return len(self.units)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """One part per region, that of a typical repeat (the second where there is one)."""
        return tuple(
            part_of(self.outline, r, 1 if region.repeats > 1 else 0) for r, region in enumerate(self.outline.regions)
        )

    @cached_property
    def cut(self) -> tuple[BatchCut, frozenset[str]]:
        """How the batch is cut, and what is computed once before the loop over microbatches."""
        found = batch_cut(self.outline)
        return found, hoisted(self.outline, found)

    @cached_property
    def places(self) -> Mapping[str, tuple[Place, ...]]:
        """Per tensor, where its positions stand: token factors that are not samples."""
        found: dict[str, tuple[Place, ...]] = {}
        for op in self.outline.ops:
            for use in (*op.operands, *op.results):
                if use.tensor not in found:
                    found[use.tensor] = tuple(
                        (d, i)
                        for d, members in enumerate(use.factors)
                        for i, f in enumerate(members)
                        if op.factors[f].token and not op.factors[f].batch
                    )
        return found

    def at(self, region: int, pieces: int) -> Part:
        """The part of a region with the batch cut into `pieces` (data ranks times microbatches)."""
        part = self.parts[region]
        if pieces == 1:
            return part
        cut, once = self.cut
        tensors = {n: cut_tensor(t, cut, once, pieces) for n, t in part.outline.tensors.items()}
        ops = tuple(cut_op(op, cut, once, pieces) for op in part.outline.ops)
        return replace(part, outline=replace(part.outline, tensors=tensors, ops=ops))


def chain(outline: Outline) -> Chain:
    """The chain of units of an outline."""
    units = tuple((r, k) for r, region in enumerate(outline.regions) for k in range(region.repeats))
    where = {name: u for u, (r, k) in enumerate(units) for name in outline.regions[r].instances[k]}
    made: dict[str, int] = {}
    last: dict[str, int] = {}
    users: dict[str, set[int]] = {}
    for op in outline.ops:
        here = where[op.name]
        for use in op.operands:
            tensor = outline.tensors[use.tensor]
            if tensor.role == "parameter":
                users.setdefault(use.tensor, set()).add(here)
            elif use.tensor in made and tensor.differentiable:
                last[use.tensor] = max(last.get(use.tensor, 0), here)
        for use in op.results:
            made[use.tensor] = here
    crossing: list[dict[str, None]] = [{} for _ in range(max(len(units) - 1, 0))]
    for name, end in last.items():
        for gap in range(made[name], end):
            crossing[gap].setdefault(name)
    ties = tuple((name, min(at), tuple(sorted(at - {min(at)}))) for name, at in sorted(users.items()) if len(at) > 1)
    return Chain(outline, units, tuple(tuple(c) for c in crossing), ties)


def part_of(outline: Outline, r: int, k: int) -> Part:
    """The part of repeat `k` of region `r`."""
    region = outline.regions[r]
    names = frozenset(region.instances[k])
    ops = tuple(op for op in outline.ops if op.name in names)
    made = {use.tensor for op in ops for use in op.results}
    used = dict.fromkeys(use.tensor for op in ops for use in op.operands)
    outside = {name: outline.tensors[name] for name in used if name not in made}
    later = _later(outline, names, made)
    tensors = _closed({**outside, **{n: outline.tensors[n] for n in made}})
    owned = region.parameters[k] if region.parameters else ()
    known = {p.tensor: p for p in outline.parameters}
    parameters = tuple(known[name] for name in outside if name in known)
    alone = Region(region.name, (tuple(op.name for op in ops),), (tuple(p.tensor for p in parameters),))
    return Part(
        r,
        Outline(
            tensors, ops, (alone,), parameters,
            tuple(n for n, t in outside.items() if t.role == "input"),
            outline.loss if outline.loss in made else "", tuple(sorted(later)), outline.batch, outline.tokens, "",
            trains=outline.training,
        ),
        tuple(n for n, t in outside.items() if t.role == "activation" and t.differentiable),
        tuple(n for n, t in outside.items() if t.role == "activation" and not t.differentiable),
        tuple(n for n in _order(ops) if n in later and outline.tensors[n].differentiable),
        frozenset(p.tensor for p in parameters) - frozenset(owned),
    )  # fmt: skip


def _order(ops: tuple[Op, ...]) -> list[str]:
    return [use.tensor for op in ops for use in op.results]


def _later(outline: Outline, names: frozenset[str], made: set[str]) -> frozenset[str]:
    """Tensors made here that ops elsewhere use, or that the model returns."""
    found = {u.tensor for op in outline.ops if op.name not in names for u in op.operands if u.tensor in made}
    if not outline.training:
        found |= {name for name in outline.outputs if name in made}
    return frozenset(found)


def _closed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Storages that lie outside the part become the tensors' own."""
    return {n: t if t.storage in tensors else replace(t, storage=n) for n, t in tensors.items()}

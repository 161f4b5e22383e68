"""Inference as an outline: the forward pass of a training capture, with the keys and values that attention keeps.

    prefill   the whole prompt: batch x seq positions, keys and values of all of them kept
    decode    one new token per sequence: every position is one, but for the keys and values that attention reads: seq of them

Decoding is derived from the capture of the whole prompt. The positions are the class of factors that attention's queries run
over (planner/factors.py names factors; equal ones are joined here through the ops that share them); every op runs over one of
them, and attention reads what it keeps. That is only right where positions meet in causal attention and nowhere else, so what
mixes them otherwise (a reduction over positions, a convolution, recurrences, attention to an encoder) is refused by name.

An encoder, where every position attends to all, keeps nothing. Keys and values are kept as attention's own distinct ones: where
views repeat them for groups of queries (grouped-query attention) the op is wired to what was repeated, which is what kernels of
inference read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ..errors import PinError
from .factors import Classes
from .goal import PHASES
from .outline import DTYPE_BYTES, Op, Outline, Region, Saved, Tensor, Use
from .ring import ring_of

Place = tuple[str, int, int]


def inference_outline(outline: Outline, phase: str) -> Outline:
    """The forward pass of `outline` in a phase; raises PinError naming what cannot be decoded token by token."""
    if phase not in PHASES:
        raise PinError(f"phase={phase}: expected one of {', '.join(PHASES)}")
    bare = _cached(forward_only(outline))
    if phase == "decode":
        bare = _one_token(bare)
    notes = (*bare.notes, *_said(bare, phase))
    return replace(bare, fingerprint=f"{outline.fingerprint}@{phase}", notes=notes)


def forward_only(outline: Outline) -> Outline:
    """The ops that the outputs need; no loss and nothing saved. What a gradient would flow through stays marked."""
    makers = {use.tensor: op for op in outline.ops for use in op.results}
    needed: set[str] = set()
    stack = [name for name in outline.outputs if name in makers]
    while stack:
        op = makers[stack.pop()]
        if op.name not in needed:
            needed.add(op.name)
            stack += [use.tensor for use in op.operands if use.tensor in makers]
    if not needed:
        raise PinError("the model returns nothing but its loss: there is no forward pass to plan on its own")
    ops = tuple(replace(op, saved=(), backward_flops=0.0) for op in outline.ops if op.name in needed)
    regions = tuple(r for r in (_without(region, needed) for region in outline.regions) if r is not None)
    return replace(outline, ops=ops, regions=regions, loss="", trains=None)


def _without(region: Region, needed: set[str]) -> Region | None:
    """A region with the ops that are needed (all repeats lose the same ones, being alike); None where none is left."""
    instances = tuple(tuple(name for name in names if name in needed) for names in region.instances)
    if not any(instances):
        return None
    if len({len(names) for names in instances}) > 1:
        raise PinError(f"region {region.name}: its repeats are not alike in the forward pass alone")
    return replace(region, instances=instances)


# -- keys and values


def _cached(outline: Outline) -> Outline:
    """Attention wired to its distinct keys and values, and keeping them."""
    makers = {use.tensor: op for op in outline.ops if op.kind == "view" for use in op.results}
    classes = _classes(outline)
    ops = tuple(
        _keeping(op, outline.tensors, makers) if _attends(op) and not _sees_all(op, classes) else op
        for op in outline.ops
    )
    return replace(outline, ops=ops)


def _sees_all(op: Op, classes: Classes) -> bool:
    """Whether every position attends to every other one (an encoder): no token comes after, and nothing is kept for one."""
    ring = ring_of(op)
    if ring is None or ring.causal or len(op.operands) > 3:
        return False
    return _class(op, ring.query, classes) == _class(op, ring.key, classes)


def _attends(op: Op) -> bool:
    return op.kind == "attention" and len(op.operands) > 2


def _keeping(op: Op, tensors: Mapping[str, Tensor], makers: Mapping[str, Op]) -> Op:
    operands = list(op.operands)
    kept = []
    for i in (1, 2):
        operands[i] = use = _distinct(op.operands[i], makers)
        factors = tuple(f for dim in use.factors for f in dim)
        size = math.prod(op.factors[f].size for f in factors) * DTYPE_BYTES[tensors[use.tensor].dtype]
        kept.append(Saved("new", 0, factors, size))
    return replace(op, operands=tuple(operands), saved=tuple(kept))


def _distinct(use: Use, makers: Mapping[str, Op]) -> Use:
    """The smallest tensor that views make `use` of, seen by the same op: factors that views repeat it over are gone."""
    best = use
    while use.tensor in makers and len(makers[use.tensor].operands) == 1:
        view = makers[use.tensor]
        result = next(r for r in view.results if r.tensor == use.tensor)
        mine = {theirs: ours for dim, seen in zip(result.factors, use.factors, strict=True)
                for theirs, ours in zip(dim, seen, strict=True)}  # fmt: skip
        source = view.operands[0]
        if any(f not in mine for dim in source.factors for f in dim):
            break  # a slice, or dims that the op does not see
        back = Use(source.tensor, tuple(tuple(mine[f] for f in dim) for dim in source.factors))
        if sum(map(len, back.factors)) < sum(map(len, best.factors)):
            best = back
        use = back
    return best


# -- one token


def _one_token(outline: Outline) -> Outline:
    """Every op over one position, attention over the keys and values that are kept."""
    classes = _classes(outline)
    positions = _positions(outline, classes)
    inside = {op.name: frozenset(_factors(op, classes, positions)) for op in outline.ops}
    flows = _flowing(outline)
    for op in outline.ops:
        if not _attends(op) and (why := _mixing(op, inside[op.name], flows)):
            raise PinError(f"phase=decode: {_named(op)} {why}; only causal attention may mix positions")
    tensors = {name: _shrunk(t, classes, positions) for name, t in outline.tensors.items()}
    ops = tuple(_shortened(op, inside[op.name]) for op in outline.ops)
    tokens = max(outline.batch, 1)
    return replace(outline, tensors=tensors, ops=ops, tokens=tokens)


def _classes(outline: Outline) -> Classes:
    """Places of tensors (tensor, dim, factor) joined where one factor of an op stands."""
    found = Classes()
    for op in outline.ops:
        first: dict[int, Place] = {}
        for use in (*op.operands, *op.results):
            for dim, members in enumerate(use.factors):
                for i, factor in enumerate(members):
                    place = (use.tensor, dim, i)
                    found.union(place, first.setdefault(factor, place))
    return found


def _class(op: Op, factor: int, classes: Classes) -> object:
    for use in (*op.operands, *op.results):
        where = use.place(factor)
        if where is not None:
            return classes.find((use.tensor, *where))
    return None


def _positions(outline: Outline, classes: Classes) -> object:
    """The class of the positions that attention runs over; raises PinError where there is none, or more than one."""
    found: dict[object, Op] = {}
    for op in outline.ops:
        if not _attends(op):
            continue
        ring = ring_of(op)
        if ring is None:
            raise PinError(f"phase=decode: {_named(op)} has no positions of its own")
        query, key = (_class(op, f, classes) for f in (ring.query, ring.key))
        if query != key:
            raise PinError(f"phase=decode: {_named(op)} attends to other positions than its own (an encoder's)")
        if not ring.causal:
            raise PinError(
                f"phase=decode: {_named(op)} is not known to be causal: a token may attend to later ones, or to a window"
            )
        found.setdefault(query, op)
    if not found:
        raise PinError("phase=decode: the model has no attention that keeps keys and values; use phase=prefill")
    if len(found) > 1:
        names = " and ".join(_named(op) for op in list(found.values())[:2])
        raise PinError(f"phase=decode: {names} run over different positions")
    return next(iter(found))


def _factors(op: Op, classes: Classes, positions: object) -> list[int]:
    return [i for i in range(len(op.factors)) if _class(op, i, classes) == positions]


def _flowing(outline: Outline) -> set[str]:
    """Tensors that a parameter goes into: not masks, nor tables of positions."""
    found = {p.tensor for p in outline.parameters}
    for op in outline.ops:
        if any(use.tensor in found for use in op.operands):
            found |= {use.tensor for use in op.results}
    return found


def _mixing(op: Op, positions: frozenset[int], flows: set[str]) -> str:
    """Why an op cannot run on one position at a time; "" where it can (picking a position is not mixing)."""
    if not positions or not any(use.tensor in flows for use in op.results):
        return ""
    made = {f for use in op.results for dim in use.factors for f in dim}
    left = positions - made
    if len(positions) > 1:
        return "pairs positions with each other without being attention"
    if any(op.factors[f].split == "never" for f in positions & made):
        return "mixes positions without being attention"
    if left and op.kind != "view":
        return "sums over positions"
    return ""


def _shrunk(tensor: Tensor, classes: Classes, positions: object) -> Tensor:
    """A tensor with one position; what the model is given (parameters, buffers, constants) stays."""
    if tensor.role in ("parameter", "buffer", "constant"):
        return tensor
    dims = tuple(
        tuple(1 if classes.find((tensor.name, d, i)) == positions else size for i, size in enumerate(members))
        for d, members in enumerate(tensor.dims)
    )
    return replace(tensor, dims=dims)


def _shortened(op: Op, positions: frozenset[int]) -> Op:
    """An op over one position. Attention keeps its keys: the new token attends to all of them, where half did on average."""
    if not positions:
        return op
    ring = ring_of(op) if _attends(op) else None
    mine = positions - {ring.key} if ring is not None else positions
    flops = op.flops * (2.0 if ring is not None and ring.causal else 1.0)
    flops /= math.prod(op.factors[f].size for f in mine)
    factors = tuple(replace(f, size=1) if i in mine else f for i, f in enumerate(op.factors))
    return replace(op, factors=factors, flops=flops)


def _said(outline: Outline, phase: str) -> tuple[str, ...]:
    """What a plan of this outline should know."""
    kept = sum(item.bytes for op in outline.ops for item in op.saved)
    said = [f"{phase}: {kept} bytes of keys and values are kept for the whole batch"] if kept else []
    if phase == "decode" and any(op.kind == "experts" for op in outline.ops):
        said.append(
            "decode: all experts of a layer are read, however few the tokens choose: an upper bound for small batches"
        )
    return tuple(said)


def _named(op: Op) -> str:
    return f"{op.name} ({op.target})" + (f", {op.source}" if op.source else "")

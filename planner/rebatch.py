"""The same outline at another batch: the batch is a factor, so sizes and work scale without a second capture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .outline import Op, Outline, Saved, Tensor, Use
from .placement import Dims


def rebatch(outline: Outline, batch: int) -> Outline:
    """`outline` with its batch factors scaled to `batch`.

    Good for prices and memory; a plan is made from a capture at the batch itself. Raises ValueError where a size does not
    scale to a whole number.
    """
    if batch == outline.batch:
        return outline
    places = _batch_places(outline)
    tensors = {
        name: _tensor(t, places.get(name, frozenset()), outline.batch, batch) for name, t in outline.tensors.items()
    }
    ops = tuple(_op(op, outline.batch, batch) for op in outline.ops)
    tokens = outline.tokens * batch // outline.batch
    return replace(
        outline, tensors=tensors, ops=ops, batch=batch, tokens=tokens, fingerprint=f"{outline.fingerprint}@{batch}"
    )


def _batch_places(outline: Outline) -> Mapping[str, frozenset[tuple[int, int]]]:
    found: dict[str, set[tuple[int, int]]] = {}
    for op in outline.ops:
        for use in (*op.operands, *op.results):
            found.setdefault(use.tensor, set()).update(_places(use, op))
    return {name: frozenset(p) for name, p in found.items()}


def _places(use: Use, op: Op) -> set[tuple[int, int]]:
    return {(d, i) for d, members in enumerate(use.factors) for i, f in enumerate(members) if op.factors[f].batch}


def _scaled(size: int, old: int, new: int) -> int:
    if size * new % old:
        raise ValueError(f"a batch factor of {size} does not scale from batch {old} to {new}")
    return size * new // old


def _tensor(tensor: Tensor, places: frozenset[tuple[int, int]], old: int, new: int) -> Tensor:
    if not places:
        return tensor
    dims: Dims = tuple(
        tuple(_scaled(s, old, new) if (d, i) in places else s for i, s in enumerate(members))
        for d, members in enumerate(tensor.dims)
    )
    return replace(tensor, dims=dims)


def _op(op: Op, old: int, new: int) -> Op:
    batched = [i for i, f in enumerate(op.factors) if f.batch]
    if not batched:
        return op
    factors = tuple(replace(f, size=_scaled(f.size, old, new)) if f.batch else f for f in op.factors)
    ratio = 1.0
    for _ in batched:
        ratio *= new / old
    saved = tuple(_saved(s, batched, old, new) for s in op.saved)
    return replace(op, factors=factors, flops=op.flops * ratio, backward_flops=op.backward_flops * ratio, saved=saved)


def _saved(saved: Saved, batched: list[int], old: int, new: int) -> Saved:
    if saved.source == "new" and any(f in batched for f in saved.factors):
        return replace(saved, bytes=saved.bytes * new // old)
    return saved

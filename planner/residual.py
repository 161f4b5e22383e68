"""Which factors belong to the residual stream: what one layer hands to the next, and what norms run over.

Megatron's tensor parallelism splits the factors inside a layer (heads, ffn) and leaves the stream between layers whole; a tp
pin means exactly that, so these factors are closed to the model axis under it.
"""

from __future__ import annotations

from collections.abc import Mapping

from .factors import Classes
from .outline import Outline


def residual_factors(outline: Outline) -> Mapping[str, frozenset[str]]:
    """Per op (by name), the factors that the residual stream has; ops without any are left out."""
    classes = Classes()
    for op in outline.ops:
        first: dict[int, tuple[str, int, int]] = {}
        for use in (*op.operands, *op.results):
            for dim, members in enumerate(use.factors):
                for i, factor in enumerate(members):
                    place = (use.tensor, dim, i)
                    classes.union(place, first.setdefault(factor, place))
    stream = {classes.find(place) for place in _carried(outline) | _normalised(outline)}
    found: dict[str, frozenset[str]] = {}
    for op in outline.ops:
        names = {
            op.factors[factor].name
            for use in (*op.operands, *op.results)
            for dim, members in enumerate(use.factors)
            for i, factor in enumerate(members)
            if not op.factors[factor].token and classes.find((use.tensor, dim, i)) in stream
        }
        if names:
            found[op.name] = frozenset(names)
    return found


def _carried(outline: Outline) -> set[tuple[str, int, int]]:
    """Places of differentiable tensors that an instance of a repeated region hands to the next one."""
    where = {
        name: (r, k)
        for r, region in enumerate(outline.regions)
        for k, ops in enumerate(region.instances)
        for name in ops
    }
    made = {use.tensor: where.get(op.name) for op in outline.ops for use in op.results}
    found = set()
    for op in outline.ops:
        here = where.get(op.name)
        for use in op.operands:
            source = made.get(use.tensor)
            if here is None or source is None or not outline.tensors[use.tensor].differentiable:
                continue
            if source[0] == here[0] and source[1] + 1 == here[1]:
                found |= {(use.tensor, d, i) for d, members in enumerate(use.factors) for i in range(len(members))}
    return found


def _normalised(outline: Outline) -> set[tuple[str, int, int]]:
    """Places that a norm runs over."""
    return {
        (use.tensor, d, i)
        for op in outline.ops if op.kind == "norm"
        for use in op.operands
        for d, members in enumerate(use.factors)
        for i, factor in enumerate(members) if op.factors[factor].split == "never"
    }  # fmt: skip

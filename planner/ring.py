"""Ring attention: queries, keys and values split along their positions, keys and values passed round the ring of ranks.

Each of n ranks holds one block of queries, keys and values. In n rounds it attends from its queries to one block of keys, while
it sends that block on to its neighbour; sums of exponentials are kept per row, so that no full row of scores is ever made (Liu
et al. 2023, "Ring Attention with Blockwise Transformers"). Per rank, in blocks of keys or values:

    forward     2 (n - 1)    K, V
    backward    4 (n - 1)    K, V again, and dK, dV, which go round with them and end at their owner

Ring self-attention of Li et al. 2021 sends 2 (n - 1) forward and 6 (n - 1) backward: it sums dK and dV by ring all-reduces.
These are the bytes of an all-gather, and of a reduce-scatter for the gradients, and they cost what those cost as rings.

Under a causal mask a rank holds two stretches of positions, the r-th and the (2n - 1 - r)-th of 2n ("zig-zag"), so that every
rank has the same work in every round; positions must divide by 2n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .dispatch import DISPATCH, dispatched
from .outline import DTYPE_BYTES, Op, Outline, Tensor, Use

RING = "ring"
"""The choice of an attention op that runs as a ring."""

TILE = 1 << 22
"""Scores that are made at once (runtime/kernels/ring.py)."""

SUMS = 4
"""Bytes of an element of sums, where operands are narrower."""

TILES_FORWARD, TILES_BACKWARD = 3, 4
"""Tensors of a tile's size that are alive at once."""


@dataclass(frozen=True, slots=True)
class Ring:
    """The op factors that run over positions of queries and of keys, and whether the mask is causal."""

    query: int
    key: int
    causal: bool

    def divisor(self, ways: int) -> int:
        """What the positions must divide by on a ring of `ways` ranks."""
        return 2 * ways if self.causal else ways


def ring_of(op: Op) -> Ring | None:
    """How `op` may run as a ring; None for everything but attention with keys and values of its own.

    Queries, keys and values are [..., positions, width]; where positions are a merge of factors, the major one is split. The
    rule of attention forbids the query letter exactly when the mask is causal (planner/rule_variants.py).
    """
    if op.kind != "attention" or len(op.operands) < 3 or not op.results:
        return None
    query, key, value, result = (_positions(use) for use in (*op.operands[:3], op.results[0]))
    if not query or not key or query != result or key != value or query[0] == key[0]:
        return None
    if not op.factors[query[0]].token or op.factors[query[0]].batch:
        return None
    return Ring(query[0], key[0], op.factors[query[0]].split == "never")


def _positions(use: Use) -> tuple[int, ...]:
    return use.factors[-2] if len(use.factors) >= 2 else ()


def stretches(rank: int, ways: int) -> tuple[int, int]:
    """The two of 2 `ways` equal stretches of positions that a rank of a causal ring holds: from the front and from the back."""
    return rank, 2 * ways - 1 - rank


def zigzag_axes(outline: Outline, choices: Mapping[str, Sequence[str]]) -> frozenset[int]:
    """Mesh axes on which some attention runs as a causal ring: what is split there is held in two stretches per rank."""
    return frozenset(
        axis
        for op in outline.ops
        for axis, choice in enumerate(choices[op.name])
        if choice == RING and (ring := ring_of(op)) is not None and ring.causal
    )


def split_by(op: Op, choice: str) -> tuple[int, ...]:
    """Indices of the op's factors that a choice divides: one, two of a ring or a dispatch, or none ("R", "V", "P0")."""
    if choice == RING:
        ring = ring_of(op)
        return (ring.query, ring.key) if ring is not None else ()
    if choice == DISPATCH:
        return dispatched(op) or ()
    return tuple(i for i, f in enumerate(op.factors) if f.name == choice)


def repeated(outline: Outline) -> dict[str, float]:
    """Per attention op, the share of its keys and values that is distinct, where views repeat them for groups of queries.

    The ring passes each key once; it is repeated where it arrives. Ops whose keys are all distinct are left out.
    """
    makers = {use.tensor: op for op in outline.ops if op.kind == "view" for use in op.results}
    found = {}
    for op in outline.ops:
        if ring_of(op) is not None:
            shares = [_distinct(outline, makers, op.operands[i].tensor) for i in (1, 2)]
            if max(shares) < 1.0:
                found[op.name] = max(shares)
    return found


def _distinct(outline: Outline, makers: Mapping[str, Op], name: str) -> float:
    """Elements of the smallest tensor that views make `name` of, over those of `name`; only views of one tensor count."""
    whole = least = outline.tensors[name].elements
    while name in makers and len(makers[name].operands) == 1:
        name = makers[name].operands[0].tensor
        if outline.tensors[name].elements > whole:  # a slice of something larger
            break
        least = min(least, outline.tensors[name].elements)
    return least / whole if whole else 1.0


def block_bytes(op: Op, tensors: Mapping[str, Tensor], sizes: Sequence[float], share: float = 1.0) -> float:
    """Bytes of one block of keys and values, where the factors of `op` have `sizes` in a block and `share` is distinct."""
    total = 0.0
    for use in op.operands[1:3]:
        elements = math.prod(sizes[f] for dim in use.factors for f in dim)
        total += elements * DTYPE_BYTES[tensors[use.tensor].dtype]
    return total * share


def scratch_bytes(
    op: Op, tensors: Mapping[str, Tensor], choice: Sequence[str], mesh: Sequence[int], training: bool, share: float = 1.0
) -> float:  # fmt: skip
    """Bytes of the ring's buffers while `op` runs under one choice per axis; 0 for an op that does not run as a ring.

    While a block is attended to the next one arrives. In the backward pass the gradients of other ranks' blocks, which are
    added up at the width of sums, go round, too; those that a rank returns count as its gradients.
    """
    if RING not in choice:
        return 0.0
    sizes, ways = [float(f.size) for f in op.factors], mesh[choice.index(RING)]
    for name, n in zip(choice, mesh, strict=True):
        for i in split_by(op, name):
            sizes[i] /= n
    block, width = block_bytes(op, tensors, sizes, share), DTYPE_BYTES[tensors[op.operands[0].tensor].dtype]
    tile, rows = _tile(op, sizes)
    tile, rows, sums = tile * max(width, SUMS), rows * width, max(width, SUMS) / width
    if not training:
        return min(ways, 2) * block + TILES_FORWARD * tile + rows
    attending = 2 * block + (sums * block if ways > 2 else 0.0) + TILES_BACKWARD * tile + rows
    passing = (ways > 2) * block + (sums if sums == 1 else sums + 1) * block + block
    last = (1 + sums) * block + TILES_BACKWARD * tile + rows
    return max(attending, passing, last)


def _tile(op: Op, sizes: Sequence[float]) -> tuple[float, float]:
    """Scores of the largest tile, and elements of its queries, where the factors of `op` have `sizes` on a rank."""
    ring = ring_of(op)
    queries = math.prod(sizes[f] for dim in op.operands[0].factors for f in dim)
    length, wide = (math.prod(sizes[f] for f in op.operands[0].factors[at]) for at in (-2, -1))
    keys = math.prod(sizes[f] for f in op.operands[1].factors[-2])
    beside = queries / (length * wide)
    stretches_ = 2 if ring is not None and ring.causal and length % 2 == 0 else 1
    columns = keys / stretches_
    rows = min(length / stretches_, max(1.0, TILE // (beside * columns)))
    return beside * rows * columns, beside * rows * wide

"""The choice among lowerings of composite ops: by measured rows alone, or as it is pinned.

A lowering is another way to run an op: the same values, other kernels. What is measured of it is filed as the op's rows are, under
"TARGET.NAME". It is chosen for all ops of a target where it was measured and took less; without rows ops run as `torch`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from .fit import samples
from .outline import Outline
from .prices import OpRow, Prices
from .work import OpKey

PLAIN = "torch"
"""The lowering that every op has: plain torch ops."""


def key_of(key: OpKey, lowering: str) -> OpKey:
    """What a lowering of an op with rows under `key` is filed under."""
    return replace(key, target=f"{key.target}.{lowering}")


def cheapest(outline: Outline, prices: Prices, offered: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Lowerings by target of the ops that are quicker so; `offered` are those that an op may have, by its name.

    Seconds are forward and backward of every op at every local shape that a plan may ask for and that was timed both ways.
    """
    saved: dict[tuple[str, str], float] = {}
    wanted = {op.target for op in outline.ops if offered.get(op.name)}
    for sample in samples(outline, prices) if wanted else ():
        for name in offered.get(sample.op.name, ()):
            key = prices.op_key(sample.op, sample.sizes, outline.tensors)
            plain, other = prices.ops.get(key), prices.ops.get(key_of(key, name))
            if plain is None or other is None:
                continue
            less = sample.weight * (1 - _seconds(other) / _seconds(plain))  # the weight: plain seconds of all such ops
            saved[key.target, name] = saved.get((key.target, name), 0.0) + less
    best = sorted((-less, target, name) for (target, name), less in saved.items() if less > 0)
    found: dict[str, str] = {}
    for _, target, name in best:
        found.setdefault(target, name)
    return dict(sorted(found.items()))


def under(prices: Prices, lowerings: Mapping[str, str]) -> Prices:
    """`prices` with the rows of the chosen lowerings in the place of those of plain ops."""
    rows = {
        replace(key, target=target): row
        for target, name in lowerings.items()
        for key, row in prices.ops.items()
        if key.target == f"{target}.{name}"
    }
    return replace(prices, ops={**prices.ops, **rows}) if rows else prices


def _seconds(row: OpRow) -> float:
    return max(row.forward + row.backward, 1e-12)

"""What ops cost in place: measured op prices corrected by what whole regions and whole optimizer steps of the model took.

An op timed alone runs again and again on the same tensors, between others it does not. The regions of a model that were timed whole
(profiles/regions.py) over the sum of their ops' prices, summed over all their repeats, are one factor on the prices of all ops.
It is left out where regions were not timed. The optimizer's rate is that of a step over the model's own parameters.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..planner.plan import Precision
from ..planner.precision import fused, state_bytes
from ..planner.prices import OpRow, Prices, Rate
from ..profiles.local import machine_key, versions
from ..profiles.store import Store
from .regions import local_sizes, timed_regions
from .summarize import Summary

STEADY = 0.2
"""Relative spread beyond which a timed region is noise: its difference says less than the sum of its ops does."""


def in_place(prices: Prices, summary: Summary, store: Store) -> Prices:
    """`prices` of this machine with the factor of the model's timed regions and its optimizer rates, where the store has them."""
    place = machine_key(prices.cluster.devices), versions()
    regions, optimizers = (store.read(*place, kind) for kind in ("region", "optimizer"))
    rates = optimizer_rates(summary, prices.compute, optimizers, prices.cluster.device.kind)
    factor = region_factor(prices, summary, regions)
    if factor == 1.0:
        return replace(prices, optimizer_rates={**prices.optimizer_rates, **rates})
    return replace(
        prices,
        ops={key: OpRow(row.forward * factor, row.backward * factor, row.error) for key, row in prices.ops.items()},
        rates={name: _scaled(rate, factor) for name, rate in prices.rates.items()},
        optimizer_rates={**prices.optimizer_rates, **rates},
    )


def region_factor(prices: Prices, summary: Summary, rows: Mapping[str, Any]) -> float:
    """Seconds of the model's timed regions over those of their ops; 1 where none was timed steadily."""
    if not rows:
        return 1.0
    ranks, tensors = prices.cluster.devices, summary.outline.tensors
    whole, parts = 0.0, 0.0
    for region in timed_regions(summary, ranks)[0]:
        if region.key in rows and float(rows[region.key][1]) <= STEADY:
            ops = (prices.op(op, local_sizes(op, ranks), tensors) for op in region.ops)
            parts += region.repeats * math.fsum(price.seconds for pair in ops for price in pair)
            whole += region.repeats * float(rows[region.key][0])
    return whole / parts if parts else 1.0


def _scaled(rate: Rate, factor: float) -> Rate:
    return Rate(rate.forward / factor, rate.backward / factor, rate.overhead * factor, rate.error)


def optimizer_rates(summary: Summary, dtype: str, rows: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Bytes per second of optimizer steps over this model's parameters, by optimizer, as planner/prices.py counts bytes."""
    sizes = parameter_sizes(summary)
    found: dict[str, float] = {}
    for key, seconds in rows.items():
        name = key.partition(" ")[0]
        if key == optimizer_key(name, dtype, sizes, kind) and seconds > 0:
            kept = state_bytes(Precision(dtype, dtype, dtype, dtype, dtype), name)
            moved = 2 * kept.parameter + kept.gradient + 2 * kept.master + 2 * kept.moments
            found[name] = sum(sizes) * moved / seconds
    return found


def parameter_sizes(summary: Summary) -> list[int]:
    """Elements of every trained parameter, in order."""
    tensors = summary.outline.tensors
    return [tensors[p.tensor].elements for p in summary.outline.parameters if p.trainable]


def optimizer_key(name: str, dtype: str, sizes: Sequence[int], kind: str) -> str:
    """What seconds of an optimizer step are filed under: its name, whether a kind of device runs it as one kernel, the dtype, how
    many elements, and a digest of their sizes."""
    digest = hashlib.sha256(json.dumps(list(sizes)).encode()).hexdigest()[:16]
    how = " fused" if fused(name, kind, dtype) else ""
    return f"{name}{how} {dtype} {sum(sizes)} {digest}"

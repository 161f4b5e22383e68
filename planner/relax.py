"""Why nothing of the whole space fits, and the cheapest changes after which something does, each of them solved for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import Infeasible, PinError
from .cluster import Cluster
from .costs import PriceBook
from .infeasible import limit_text, size_text
from .outline import Outline
from .pins import parse_pins
from .plan import Plan
from .progress import Event
from .rebatch import rebatch

if TYPE_CHECKING:
    from .solve import Request

LOOSER = ("recompute", "offload", "zero", "micro_batch", "schedule", "sequence_parallel", "tp", "pp")
"""Pins in the order in which dropping one is tried."""


def explain_joint(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Infeasible:
    """The error to raise: the stage and cause that bind where the least memory is needed, and what would fit."""
    from .objectives import least_memory

    tell = request.progress
    tell(Event("fit", "least memory of any plan"))
    least = least_memory(outline, cluster, prices, request)
    limit = request.memory_limit_bytes
    if least is None:
        return Infeasible("no shape of the cluster can hold this model under the pins")
    stage = max(range(len(least.stages)), key=lambda s: (least.stages[s].peak_bytes, -s))
    memory, peak = least.predicted.memory, least.predicted.peak_bytes_per_device
    cause = max(memory, key=lambda c: memory[c])
    where = f"stage {stage} of {len(least.stages)}, " if len(least.stages) > 1 else ""
    message = (
        f"nothing fits in {size_text(limit)} per device: the least any plan needs is {size_text(peak)} "
        f"({where}{_mesh(least)}, {least.pipeline.microbatches} microbatches), most of it {cause} ({size_text(memory[cause])})"
    )
    nearest = [*_pins(outline, cluster, prices, request), *_batches(outline, cluster, prices, request)]
    nearest.append(f"devices with {limit_text(peak)} for the plan (--memory-limit)")
    return Infeasible(message, cause=cause, nearest=nearest)


def _fits(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> bool:
    from .objectives import fits

    try:
        return fits(outline, cluster, prices, request)
    except PinError:
        return False


def _pins(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Iterator[str]:
    """Single pins without which something fits."""
    for key in LOOSER:
        mine = [t for t in request.pins.texts if t.partition("=")[0].rstrip("!").strip() == key]
        if mine:
            rest = [t for t in request.pins.texts if t not in mine]
            if _fits(outline, cluster, prices, replace(request, pins=parse_pins(rest))):
                yield f"without --pin {mine[0]}"


def _batches(outline: Outline, cluster: Cluster, prices: PriceBook, request: Request) -> Iterator[str]:
    """The largest of the halved batches that fits."""
    batch = outline.batch
    while batch % 2 == 0:
        batch //= 2
        try:
            smaller = rebatch(outline, batch)
        except ValueError:
            return
        if _fits(smaller, cluster, prices, request):
            yield f"--batch {batch}"
            return


def _mesh(plan: Plan) -> str:
    found = {"pp": plan.pipeline.ranks, **{a.name: a.size for a in plan.mesh}}
    return " x ".join(f"{n}={s}" for n, s in found.items() if s > 1) or "one device"

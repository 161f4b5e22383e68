"""Why pins leave nothing to search, in the words of both searches: each function returns a message, or "" for no objection."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .pins import Pins

AXES = ("pp", "tp", "cp", "dp")


def why_devices(pins: Pins, devices: int, axes: Sequence[str] = AXES) -> str:
    """Pinned sizes of axes multiply to a divisor of the devices, and to all of them where every axis is pinned."""
    known = _known(pins, axes)
    product = math.prod(known.values())
    if devices % product == 0 and (product == devices or len(known) < len(axes)):
        return ""
    told = " ".join(f"{key}={size}" for key, size in known.items())
    if len(known) == 1:
        return f"{told} does not divide the {devices} devices"
    return f"{told} needs {product} devices, the cluster has {devices}"


def why_model_axis(pins: Pins, devices: int) -> str:
    """Sequence parallelism shares the model axis."""
    others = math.prod(_known(pins, ("pp", "cp", "dp")).values())
    if not pins.sequence_parallel or (pins.tp != 1 and others < devices):
        return ""
    return "sequence_parallel=on needs a model axis: pin tp=N with N > 1, or use more devices"


def why_batch(batch: int, data: Sequence[int]) -> str:
    """The batch is shared by one of these numbers of data ranks."""
    if any(batch % ranks == 0 for ranks in data):
        return ""
    return f"a batch of {batch} does not divide over dp={' or '.join(map(str, data))}; change --batch"


def why_micro_batch(pins: Pins, batch: int, data: int | None, blockers: Sequence[str]) -> str:
    """The pinned microbatch divides the samples of a data rank, and is all of them where `blockers` keep the batch whole.

    `data` ranks share the batch; None where that is open.
    """
    micro = pins.micro_batch
    if micro is None:
        return ""
    local = batch // (data or 1)
    if data is not None and local % micro:
        return f"micro_batch={micro} does not divide the {local} samples of each of {data} data ranks"
    if not blockers or micro == local:
        return ""
    instead = f"; use micro_batch={local}" if data is not None else ""
    return f"micro_batch={micro} would cut the batch, but it cannot be cut: {blockers[0]}{instead}"


def why_together(pins: Pins, devices: int, batch: int) -> str:
    """Where no one pin can be named."""
    told = ", ".join(pins.texts) or "(none)"
    return f"the pins {told} leave no shape for {devices} devices and a batch of {batch}"


def _known(pins: Pins, axes: Sequence[str]) -> dict[str, int]:
    return {key: size for key in axes if (size := getattr(pins, key)) is not None}

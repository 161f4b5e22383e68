"""What is asked of a plan beside its objective, and what is said of the answer: plain facts, as a plan file holds them."""

from __future__ import annotations

import msgspec

OBJECTIVES = ("throughput", "latency", "memory", "devices", "cost")
"""What may be sought (planner/pursue.py)."""

PHASES = ("prefill", "decode")
"""What of inference is planned: the whole prompt at once, or one new token per sequence against cached keys and values."""


class Aim(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What comes with an objective.

    `phase`: "prefill" or "decode" plans inference, "" a training step. `target_seconds` is the most a step may take,
    `target_tokens_per_second` the least all devices together must reach. `price_per_device_hour` is in US dollars.
    """

    phase: str = ""
    target_seconds: float | None = None
    target_tokens_per_second: float | None = None
    price_per_device_hour: float | None = None
    frontier: bool = False


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number of devices: "met", "missed", "does not fit", "skipped" (its bound says enough) or "refused", and its figures.

    `step_seconds` and `peak_bytes` are those of the fastest plan; no plan on so many devices takes less than `bound_seconds`.
    `dollars` is what the step costs.
    """

    devices: int
    status: str
    bound_seconds: float | None = None
    step_seconds: float | None = None
    peak_bytes: int | None = None
    dollars: float | None = None
    reason: str = ""


class Goal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a plan meets an objective that is not seconds on a given cluster.

    `target_seconds` of a step; `dollars_per_step` at `price_per_device_hour`; `trials` are the numbers of devices looked at, in
    order. `least_bytes` is what no plan of the space needs less than per device, None where nothing is proven.
    """

    target_seconds: float | None = None
    price_per_device_hour: float | None = None
    dollars_per_step: float | None = None
    trials: tuple[Trial, ...] = ()
    least_bytes: int | None = None


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plan as a point of the frontier: seconds of a step, peak bytes per device and devices, and how it is arranged.

    `status` is "best" where no point found is at least as good in all three, "runner-up" for the best of another mesh.
    `gap` is to the proven bound of what was solved for; `limit_bytes` the memory limit it was found under.
    """

    seconds: float
    peak_bytes: int
    devices: int
    mesh: dict[str, int]
    status: str = "best"
    schedule: str = "none"
    chunks: int = 1
    microbatches: int = 1
    micro_batch: int = 1
    limit_bytes: int = 0
    gap: float | None = None

"""The ledger: what every timed run of a plan took, beside what the plan had predicted; rows stand in the profile store.

A row keeps the calibration that its prediction contained (`Device.calibration`), so that recalibrating from the same rows gives
the same factor however often it is done (profiles/calibrate.py).
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from ..errors import ClusterError
from ..planner.cluster import Cluster
from ..planner.pins import Pins, parse_pins
from ..planner.plan import Plan, Precision
from ..planner.planfile import digest
from ..planner.precision import RECIPES
from .store import Run, Store, text

MOST_WAITED = 0.2
"""A run that waited longer for processors, as a share of its step, says more of the machine's other users than of the device."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of one plan. Seconds are of a step: the median over the timed steps of the slowest rank; peaks are of each rank.

    `device` and `versions` say what ran it and `planned_device` what it was planned for (`device_key`); `stack` is the software
    (`stack_text`). `calibration` is the factor in `predicted_seconds`; None where unlike devices had several. `waited_seconds` of
    `measured_seconds` the ranks stood ready without a processor. `measured_phases` are seconds of "forward", "backward",
    "optimizer" (or "forward and backward" together); `predicted_causes` the plan's seconds by cause.
    """

    plan: str
    model: str
    date: str
    device: str
    planned_device: str
    versions: str
    stack: str
    ranks: int
    steps: int
    predicted_seconds: float
    measured_seconds: float
    calibration: float | None = 1.0
    waited_seconds: float = 0.0
    predicted_peak_bytes: int = 0
    measured_peak_bytes: tuple[int, ...] = ()
    predicted_causes: Mapping[str, float] = field(default_factory=dict)
    measured_phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Measured over predicted seconds."""
        return self.own_seconds / self.predicted_seconds

    @property
    def own_seconds(self) -> float:
        """Measured seconds without the waiting for processors that others had."""
        return max(self.measured_seconds - self.waited_seconds, 0.1 * self.measured_seconds)

    @property
    def usable(self) -> bool:
        """Whether it may calibrate: it ran where it was planned for, on one kind of device, and others left it its processors."""
        timed = self.predicted_seconds > 0 and 0 < self.measured_seconds * MOST_WAITED >= self.waited_seconds
        return timed and self.calibration is not None and self.device == self.planned_device


def entry_of(plan: Plan, result: Mapping[str, Any], date: datetime | None = None) -> Entry | None:
    """The row for what a run of `plan` measured (runtime/execute.py); None where it timed no steps. Dates are UTC."""
    if "step_seconds" not in result:
        return None
    cluster, predicted = Cluster.from_dict(plan.cluster), plan.predicted
    moment = (date or datetime.now(UTC)).astimezone(UTC)
    measured, waited = times_of(result)
    return Entry(
        plan=digest(plan), model=plan.source.model, date=moment.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        device=str(result.get("device", "")), planned_device=device_key(cluster), versions=str(result.get("versions", "")),
        stack=stack_text(plan.precision, parse_pins(plan.pins), compiled=bool(result.get("compiled"))),
        ranks=int(result["world_size"]), steps=_steps(result), predicted_seconds=predicted.step_seconds,
        measured_seconds=measured, calibration=None if cluster.pools else cluster.device.calibration,
        waited_seconds=waited, predicted_peak_bytes=predicted.peak_bytes_per_device,
        measured_peak_bytes=tuple(int(size) for size in result["peak_bytes"]),
        predicted_causes=dict(predicted.seconds), measured_phases=dict(result.get("phase_seconds", {})),
    )  # fmt: skip


def append(store: Store, entries: Sequence[Entry]) -> None:
    """Add rows to the ledger; a row that is there already stays single. Raises ClusterError where the file is not to be used."""
    store.add(runs=[run_of(entry) for entry in entries])


def entries(store: Store, plan: str | None = None) -> tuple[Entry, ...]:
    """All rows, or those of the plan with that digest, oldest first."""
    try:
        found = [parse_entry(run.value) for run in store.runs(plan)]
    except ValueError as error:
        raise ClusterError(f"profile store {store.path}: a row of the ledger cannot be read: {error}") from None
    return tuple(sorted(found, key=lambda entry: (entry.date, entry.plan)))


def run_of(entry: Entry) -> Run:
    """An entry as the store keeps it, under an id that is a hash of all of it."""
    value = asdict(entry)
    return Run(hashlib.sha256(text(value).encode()).hexdigest()[:16], entry.plan, value)


def parse_entry(value: Any) -> Entry:
    """The inverse of `asdict`; raises ValueError naming the field that is missing, unknown or wrong."""
    if not isinstance(value, dict):
        raise ValueError("a run is an object")
    known = {f.name for f in fields(Entry)}
    for name in [*sorted(set(value) - known), *(f.name for f in fields(Entry) if f.name not in value)]:
        raise ValueError(f"{'unknown' if name not in known else 'missing'} field {name!r}")
    for name, check in _CHECKS.items():
        if not check(value[name]):
            raise ValueError(f"{name}: {value[name]!r} is not what a run holds")
    return Entry(**{**value, "measured_peak_bytes": tuple(value["measured_peak_bytes"])})


def device_key(cluster: Cluster) -> str:
    """What calibrations of a cluster's devices are filed under: this machine's own key, else the name of the device."""
    return cluster.device.source("machine") or cluster.device.name


def stack_text(precision: Precision, pins: Pins, *, compiled: bool = False) -> str:
    """The software a step runs on: eager or compiled, the attention and other kernels, the dtypes of its arithmetic."""
    recipe = RECIPES.get(precision.recipe)
    dtypes = [precision.compute, *([recipe.products] if recipe is not None and recipe.products else [])]
    mode = "compiled" if compiled else "eager"
    kernels = pins.kernels or ("fused" if compiled else "eager")
    return f"{mode}, attention={pins.attention or 'flash'}, kernels={kernels}, {' and '.join(dtypes)}"


def _steps(result: Mapping[str, Any]) -> int:
    """How many steps were timed."""
    return len(result["ranks"][0]["seconds"]) if result.get("ranks") else 0


def times_of(result: Mapping[str, Any]) -> tuple[float, float]:
    """(step seconds, seconds of them that the slowest rank waited for a processor), medians over the steps."""
    ranks = result.get("ranks", ())
    waits = [rank["waited_seconds"] for rank in ranks if rank.get("waited_seconds")]
    measured = float(result["step_seconds"])
    if not waits:
        return measured, 0.0
    steps = zip(*([s - w for s, w in zip(r["seconds"], r["waited_seconds"], strict=True)] for r in ranks), strict=True)
    return measured, max(0.0, measured - statistics.median(max(step) for step in steps))


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _count(value: Any) -> bool:
    return _number(value) and isinstance(value, int)


def _figures(value: Any) -> bool:
    return isinstance(value, dict) and all(_number(one) for one in value.values())


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("plan", "model", "date", "device", "planned_device", "versions", "stack"), _text),
    **dict.fromkeys(("predicted_seconds", "measured_seconds", "waited_seconds"), _number),
    **dict.fromkeys(("ranks", "steps", "predicted_peak_bytes"), _count),
    **dict.fromkeys(("predicted_causes", "measured_phases"), _figures),
    "calibration": lambda value: value is None or (_number(value) and value > 0),
    "measured_peak_bytes": lambda value: isinstance(value, list | tuple) and all(map(_count, value)),
}

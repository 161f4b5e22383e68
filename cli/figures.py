"""Numbers as people read them: bytes, seconds, counts, fractions, rates."""

from __future__ import annotations

from collections.abc import Sequence

from ..planner.plan import Plan, Prediction

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_MEMORY = {
    "optimizer": "optimizer states", "saved": "saved activations", "gathered": "gathered weights",
    "buffers": "inputs and buffers", "cache": "keys and values",
}  # fmt: skip
_TIME = {
    "activation_communication": "communication of activations", "parameter_communication": "communication of parameters",
    "copies": "local copies", "optimizer": "optimizer step", "recompute": "running again", "bubble": "waiting (bubble)",
    "offload": "copies to and from the host",
}  # fmt: skip
_COUNT = ("", " k", " M", " B", " T")


def bytes_text(value: float) -> str:
    """1536 -> "1.50 KiB"; the unit is the largest that leaves at least 1."""
    size, unit = abs(value), 0
    while size >= 1024 and unit < len(_BINARY) - 1:
        size, unit = size / 1024, unit + 1
    sign = "-" if value < 0 else ""
    return f"{sign}{int(size)} B" if unit == 0 else f"{sign}{_three(size)} {_BINARY[unit]}"


def seconds_text(value: float) -> str:
    """0.0123 -> "12.3 ms"."""
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min")):
        if abs(value) < limit:
            return f"{_three(value * scale)} {unit}"
    return f"{_three(value / 3600)} h"


def count_text(value: float) -> str:
    """124439808 -> "124 M"."""
    size, unit = float(value), 0
    while abs(size) >= 1000 and unit < len(_COUNT) - 1:
        size, unit = size / 1000, unit + 1
    return f"{int(size)}" if unit == 0 and size == int(size) else f"{_three(size)}{_COUNT[unit]}"


def percent_text(fraction: float) -> str:
    """0.0042 -> "0.42 %"."""
    if 1e-9 < abs(fraction) < 5e-5:
        return "<0.01 %"
    return f"{_three(fraction * 100)} %" if abs(fraction) > 1e-9 else "0 %"


def change_text(change: float) -> str:
    """A relative change with its sign: 0.05 -> "+5.0 %"."""
    if abs(change) >= 10:
        return f"x {_three(change + 1)}"
    return f"{change * 100:+.1f} %"


def memory_text(cause: str) -> str:
    """The planner's short name of what takes memory, in full words."""
    return _MEMORY.get(cause, cause.replace("_", " "))


def behind_texts(plan: Plan) -> list[tuple[str, str]]:
    """(where, bytes) of what lies behind a device; nothing where all is on it."""
    found = plan.predicted
    sizes = (("in host memory", found.host_bytes_per_device), ("on disk", found.disk_bytes_per_device))
    return [(name, bytes_text(size)) for name, size in sizes if size]


def calibration_texts(plan: Plan) -> list[str]:
    """What the figures of each kind of device were multiplied by, and why; nothing where they are as they were."""
    devices = [pool["device"] for pool in plan.cluster.get("pools") or [plan.cluster] if "device" in pool]
    told = [(device.get("name", ""), device.get("sources", {}).get("calibration", "")) for device in devices]
    return [f"{name}: {source}" for name, source in dict.fromkeys(told) if source]


def time_text(cause: str) -> str:
    """The planner's short name of what takes time, in full words."""
    return _TIME.get(cause, cause.replace("_", " "))


def mesh_text(names: Sequence[str], sizes: Sequence[int]) -> str:
    """("dp", "tp"), (2, 4) -> "dp=2 x tp=4"."""
    return " x ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))


def _three(value: float) -> str:
    """Three significant digits without exponent."""
    size = abs(value)
    if size == 0:
        return "0"
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.0995 else 3
    return f"{value:.{digits}f}"


def interval_text(predicted: Prediction) -> str:
    """What nine of ten runs take: "0.9 s to 1.4 s"; "" in plans that do not say."""
    if not predicted.step_seconds_high:
        return ""
    return f"{seconds_text(predicted.step_seconds_low)} to {seconds_text(predicted.step_seconds_high)}"

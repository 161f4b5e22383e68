"""Activations that keep what they make, not what they were given (passes/fuse/ops/by_result.py).

    y = hardtanh(x, 0, 6)                     becomes      y = by_result(x, "hardtanh", [0, 6])
    z = pad(hardtanh(x, 0, 6), zeros)         becomes      z = by_result(pad(x, zeros), "hardtanh", [0, 6])

A convolution behind keeps y or z anyway, so x need not be kept. Padding goes before an activation that leaves the padded number
as it is; else y would be kept beside z. Compilers, too, find what the backward pass needs among what is kept, and write no mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..base import fake
from ..pattern import Any_, Match, call
from ..rewrite import Make, Rewriting, Row
from .convolutions import arguments_of
from .ops.by_result import by_result
from .pads import PADS, read_pad

Read = Callable[[dict[str, Any]], tuple[float, ...] | None]
"""The numbers of an activation from its arguments by name, None where its result does not tell its gradient."""


def _hardtanh(given: dict[str, Any]) -> tuple[float, ...] | None:
    low, high = float(given["min_val"]), float(given["max_val"])
    return (low, high) if low < high else None


def _leaky_relu(given: dict[str, Any]) -> tuple[float, ...] | None:
    slope = float(given["negative_slope"])
    return (slope,) if 0.0 < slope < math.inf else None


READ: dict[str, tuple[str, Read]] = {
    "aten.hardtanh": ("hardtanh", _hardtanh),
    "aten.relu6": ("hardtanh", lambda _: (0.0, 6.0)),
    "aten.leaky_relu": ("leaky_relu", _leaky_relu),
}
"""(the op's name for it, its numbers) by target."""

STAYS: dict[str, Callable[[float, tuple[float, ...]], bool]] = {
    "hardtanh": lambda value, given: given[0] <= value <= given[1],
    "leaky_relu": lambda value, given: value >= 0.0,
}
"""Whether an activation leaves a number as it is."""


def _read(match: Match, target: str) -> tuple[str, tuple[float, ...]] | None:
    name, read = READ[target]
    given = read(arguments_of(match["act"]))
    return None if given is None or not fake(match["act"]).is_floating_point() else (name, given)


def _alone(target: str):  # type: ignore[no-untyped-def]
    def by(match: Match, make: Make) -> fx.Node | None:
        found = _read(match, target)
        return make(by_result, match["x"], found[0], list(found[1])) if found is not None else None

    return by


def _padded(target: str):  # type: ignore[no-untyped-def]
    def by(match: Match, make: Make) -> fx.Node | None:
        found, pad = _read(match, target), read_pad(match.root)
        if found is None or pad is None or not STAYS[found[0]](pad.value, found[1]):
            return None
        wide = make(match.root.target, match["x"], *match.root.args[1:], **match.root.kwargs)
        return make(by_result, wide, found[0], list(found[1]))

    return by


@dataclass(frozen=True)
class KeepResults(Rewriting):
    """Activations whose result tells their gradient, with padding behind them or without."""

    name: str = "by_result"
    requires: tuple[str, ...] = ("simple",)
    table: tuple[Row, ...] = (
        *(
            Row(call(pad, call(target, Any_("x"), name="act", open=True), open=True), _padded(target))
            for pad in PADS for target in READ
        ),
        *(Row(call(target, Any_("x"), name="act", open=True), _alone(target)) for target in READ),
    )  # fmt: skip

"""A gate becomes one op: act(gate) * up (passes/fuse/ops/gated.py).

    a = silu(gate); y = mul(a, up)      becomes      y = gated(gate, up, "silu")

The chain keeps gate, act(gate) and up for the backward pass, the op only gate and up. SiLU and the quick GELU may stand written
out. Gate and up must be alike: a gate that is broadcast (squeeze and excitation) costs nothing to keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..base import fake
from ..pattern import Any_, Match, Near, Pattern, call, either
from ..rewrite import Make, Rewriting, Row
from .ops.gated import QUICK, gated

aten = torch.ops.aten
GATE, UP = Any_("gate"), Any_("up")


def _soft(inner: Pattern) -> Pattern:
    """gate times the sigmoid of `inner`."""
    return call("aten.mul", GATE, call("aten.sigmoid", inner))


_DENOMINATOR = call("aten.add", call("aten.exp", call("aten.neg", GATE)), either(Near(1.0), Near(1)))
_WRITTEN = either(_soft(GATE), call("aten.div", GATE, _DENOMINATOR))

ACTS: dict[str, Pattern] = {
    "silu": either(call("aten.silu", GATE), _WRITTEN),
    "gelu": call("aten.gelu", GATE),
    "gelu_tanh": call("aten.gelu", GATE, "tanh"),
    "quick_gelu": _soft(call("aten.mul", GATE, Near(QUICK))),
    "relu": call("aten.relu", GATE),
    "sigmoid": call("aten.sigmoid", GATE),
    "tanh": call("aten.tanh", GATE),
}
"""What computes act(gate); those that hold others stand before them."""


def _by(act: str):  # type: ignore[no-untyped-def]
    def by(match: Match, make: Make) -> fx.Node | None:
        gate, up = fake(match["gate"]), fake(match["up"])
        alike = (gate.shape, gate.dtype) == (up.shape, up.dtype) and gate.is_floating_point()
        return make(gated, match["gate"], match["up"], act) if alike else None

    return by


@dataclass(frozen=True)
class FuseGated(Rewriting):
    """SwiGLU, GeGLU, ReGLU and their like; SiLU written out, which gates itself, becomes the op."""

    name: str = "gated"
    requires: tuple[str, ...] = ("simple",)
    table: tuple[Row, ...] = (
        *(Row(call("aten.mul", act, UP), _by(name)) for name, act in ACTS.items() if name != "sigmoid"),
        Row(_WRITTEN, lambda match, make: make(aten.silu.default, match["gate"])),
        Row(call("aten.mul", ACTS["sigmoid"], UP), _by("sigmoid")),
    )

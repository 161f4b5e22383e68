"""GELU written out becomes the one op.

    0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))       gelu(x, approximate="tanh")      (GPT-2; Hendrycks and Gimpel 2016)
    0.5 x (1 + erf(x / sqrt(2)))                            gelu(x)

One op keeps its input for the backward pass where a chain keeps five tensors of its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from ..pattern import Any_, Match, Near, Pattern, call, either
from ..rewrite import Make, Rewriting, Row

aten = torch.ops.aten

X = Any_("x")
HALF, ONE = Near(0.5), either(Near(1.0), Near(1))


def _half(inner: Pattern) -> Pattern:
    """0.5 x (1 + inner), its factors in any order."""
    more = call("aten.add", inner, ONE)
    return either(
        call("aten.mul", call("aten.mul", X, HALF), more),
        call("aten.mul", call("aten.mul", X, more), HALF),
        call("aten.mul", X, call("aten.mul", more, HALF)),
    )


_CUBE = either(
    call("aten.pow", X, either(Near(3.0), Near(3))),
    call("aten.mul", call("aten.mul", X, X), X),
)
_INNER = either(
    call("aten.mul", call("aten.add", X, call("aten.mul", _CUBE, Near(0.044715))), Near(math.sqrt(2 / math.pi))),
    call(
        "aten.mul",
        call("aten.mul", X, Near(math.sqrt(2 / math.pi))),
        call("aten.add", call("aten.mul", either(call("aten.pow", X, either(Near(2.0), Near(2))), call("aten.mul", X, X)),
             Near(0.044715)), ONE),
    ),
)  # fmt: skip
_TANH = _half(call("aten.tanh", _INNER))
_ERF = _half(call("aten.erf", either(
    call("aten.div", X, Near(math.sqrt(2))), call("aten.mul", X, Near(math.sqrt(0.5))),
)))  # fmt: skip


def _by(approximate: str):  # type: ignore[no-untyped-def]
    def by(match: Match, make: Make) -> fx.Node:
        return make(aten.gelu.default, match["x"], **({"approximate": approximate} if approximate != "none" else {}))

    return by


@dataclass(frozen=True)
class FuseGelu(Rewriting):
    """GELU, exact or by tanh."""

    name: str = "gelu"
    requires: tuple[str, ...] = ("simple",)
    table: tuple[Row, ...] = (Row(_TANH, _by("tanh")), Row(_ERF, _by("none")))

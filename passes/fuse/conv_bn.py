"""A convolution and the batch norm behind it, on running statistics, become one convolution.

    c = conv2d(x, w, b); y = batch_norm(c, gamma, beta, mean, var, eps)      becomes      y = folded_conv(x, [w], [b, gamma, ...])

The weight is scaled where it is used, so that all parameters keep their own gradients (You et al. 2023, "Efficient ConvBN Blocks
for Transfer Learning and Beyond": Tune mode); c is not kept. In an inference graph the batch norm is gone (Deploy mode).
Batch norms on the batch's own statistics are left alone, as are convolutions whose result is used again.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..base import fake
from ..pattern import Any_, Match, call, either
from ..rewrite import Make, Rewriting, Row
from .convolutions import FOLDED, PLAIN, TRANSPOSED, arguments_of, emit, normed, read

_CONV = either(*(call(op, Any_("x"), name="conv", open=True) for op in (*PLAIN, *TRANSPOSED, FOLDED)))


def runs_on(norm: dict[str, object]) -> bool:
    """Whether a batch norm's statistics are given, and numbers to the backward pass."""
    mean, var = norm["running_mean"], norm["running_var"]
    given = isinstance(mean, fx.Node) and isinstance(var, fx.Node)
    return given and not norm["training"] and not any(n.meta.get("differentiable") for n in (mean, var))  # type: ignore[union-attr]


def _by(match: Match, make: Make) -> fx.Node | None:
    norm, conv = arguments_of(match.root), match["conv"]
    found = read(conv) if runs_on(norm) and fake(conv).dtype == fake(match.root).dtype else None
    found = normed(found, norm) if found is not None else None
    return emit(make, found) if found is not None else None


@dataclass(frozen=True)
class FoldNorm(Rewriting):
    """Batch norm on running statistics into the convolution before it."""

    name: str = "conv_bn"
    requires: tuple[str, ...] = ("simple",)
    table: tuple[Row, ...] = (Row(call("aten.batch_norm", _CONV, open=True), _by),)

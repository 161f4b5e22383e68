"""RMS norm written out becomes one op (passes/fuse/ops/rms_norm.py).

    v = mean(pow(to(x, float32), 2), [-1], True)
    h = mul(to(x, float32), rsqrt(add(v, eps)))                 becomes     y = rms_norm(x, w, eps, 0., float32, bfloat16)
    y = mul(w, to(h, bfloat16))

The square may be x * x, the root a power or a division by a square root, the mean a sum divided by the width; the weight may
be offset by one, or there may be none. In half precision the chain keeps x and h as float32, h as it is multiplied and more; the
op keeps x. Norms over other dims, or with a weight that is no row, are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..base import fake
from ..pattern import Any_, Match, Near, Number, Pattern, call, either
from ..rewrite import Make, Rewriting, Row
from .ops.rms_norm import rms_norm

X, WEIGHT = Any_("x"), Any_("weight")


def _cast(inner: Pattern, name: str) -> Pattern:
    return call("aten.to", inner, name=name, open=True)


def _number(value: float) -> Pattern:
    return either(Near(value), Near(int(value)))


def _normed() -> Pattern:
    """x times the reciprocal root of its mean square, x with or without a cast."""
    wide = either(_cast(X, "wide"), X)
    square = either(call("aten.pow", wide, _number(2)), call("aten.mul", wide, wide), call("aten.square", wide))
    total = call("aten.sum", square, [Number("dim")], True, name="mean")
    mean = either(
        call("aten.mean", square, [Number("dim")], True, name="mean"),
        call("aten.div", total, Number("count")),
        call("aten.mul", total, Number("share")),
    )
    under = either(call("aten.add", mean, Number("eps")), mean)
    root = either(call("aten.sqrt", under), call("aten.pow", under, Near(0.5)))
    inverse = either(call("aten.rsqrt", under), call("aten.pow", under, Near(-0.5)), call("aten.reciprocal", root))
    return either(call("aten.mul", wide, inverse, name="h"), call("aten.div", wide, root, name="h"))


_H = _normed()
_SEEN = either(_cast(_H, "normed"), _H)
_SCALES = (
    call("aten.add", either(_cast(WEIGHT, "own"), WEIGHT), Number("offset"), name="scale"),
    _cast(WEIGHT, "scale"),
    WEIGHT,
)
"""What the normed rows are multiplied by; where the op would round otherwise, the last one takes it as it stands."""


def _dtype(match: Match, name: str) -> torch.dtype | None:
    """The dtype that a cast under this name makes, where there is one."""
    node = match.get(name)
    return None if node is None else fake(node).dtype


def _is_last(match: Match) -> bool:
    """Whether the mean is over the last dim of a floating tensor, in the dtype that the product has."""
    x = fake(match["x"])
    if not x.is_floating_point() or match["dim"] % x.dim() != x.dim() - 1:
        return False
    width = x.shape[-1]
    if match.get("count", width) != width or abs(match.get("share", 1 / width) * width - 1) > 1e-6:
        return False
    return fake(match["mean"]).dtype == fake(match["h"]).dtype == (_dtype(match, "wide") or x.dtype)


def _scales_rows(match: Match) -> bool:
    """Whether the weight is a row, and no cast or sum on the way to it rounds where the op would not."""
    weight, seen = fake(match["weight"]), _dtype(match, "normed") or fake(match["h"]).dtype
    if weight.shape != fake(match["x"]).shape[-1:] or not weight.is_floating_point():
        return False
    if match.get("scale") is None:
        return True
    wider = torch.promote_types(weight.dtype, seen) == seen
    return wider and fake(match["scale"]).dtype == seen


def _by(match: Match, make: Make) -> fx.Node | None:
    weight = match.get("weight")
    if not _is_last(match) or (weight is not None and not _scales_rows(match)):
        return None
    offset = float(match.get("offset", 0.0))
    casts = {"compute": _dtype(match, "wide"), "normed": _dtype(match, "normed"), "out": _dtype(match, "out")}
    given = {name: dtype for name, dtype in casts.items() if dtype is not None}
    return make(rms_norm, match["x"], weight, float(match.get("eps", 0.0)), *([offset] if offset else []), **given)


def _rows() -> tuple[Row, ...]:
    """The largest forms first: a cast at the end, the weight, the norm alone."""
    scaled = [call("aten.mul", _SEEN, scale) for scale in _SCALES]
    patterns = [_cast(s, "out") for s in scaled] + scaled + [_cast(_H, "out"), _H]
    return tuple(Row(pattern, _by) for pattern in patterns)


@dataclass(frozen=True)
class FuseRmsNorm(Rewriting):
    """RMS norm, with or without a weight."""

    name: str = "rms_norm"
    requires: tuple[str, ...] = ("simple",)
    table: tuple[Row, ...] = _rows()

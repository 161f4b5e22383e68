"""Modes for exact comparisons: float32 casts lifted to float64, dropout off, all other random numbers one constant.

Models cast to float32 inside (norms, losses, rotary tables); in float64 those casts alone differ by 1e-7 between two
evaluation orders. One torch-function mode, active around both the reference and the capture, turns them into float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_DROPOUTS = {
    F.dropout: 1, F.dropout1d: 1, F.dropout2d: 1, F.dropout3d: 1, F.alpha_dropout: 1, F.feature_alpha_dropout: 1,
    torch.dropout: 1, torch.dropout_: 1,
}  # fmt: skip
"""Dropout functions and the position of their probability."""
_DRAWS = frozenset({
    torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.bernoulli, torch.Tensor.bernoulli,
    torch.Tensor.bernoulli_, torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.exponential_,
})  # fmt: skip
"""Functions that draw numbers (stochastic depth, noise); both sides of a comparison take `DRAWN` instead."""
DRAWN = 0.5
_ATTENTION = F.scaled_dot_product_attention
_ATTENTION_P = 4


class Lift(TorchFunctionMode):
    """While active: `casts` turns float32 into float64 wherever a call names it, `dropout=False` makes nothing random.

    Dropout then has probability zero, and drawn numbers are `DRAWN`.
    """

    def __init__(self, *, casts: bool = False, dropout: bool = True) -> None:
        super().__init__()
        self.casts = casts
        self.dropout = dropout

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not self.dropout:
            args, kwargs = _without_dropout(func, args, kwargs)
        if self.casts:
            if func is torch.Tensor.float:
                return args[0].double()
            args = tuple(_lifted(a) for a in args)
            kwargs = {k: _lifted(v) for k, v in kwargs.items()}
        result = func(*args, **kwargs)
        return result.fill_(DRAWN) if not self.dropout and func in _DRAWS else result


def lift_casts() -> Lift:
    """Context manager: every float32 cast made while it is active is a float64 cast.

    Use it around the float64 reference and, by `capture(..., lift_float64=True)`, in the capture.
    """
    return Lift(casts=True)


def without_dropout() -> Lift:
    """Context manager: nothing is random while it is active (see `Lift`)."""
    return Lift(dropout=False)


def exact() -> Lift:
    """Context manager: both `lift_casts` and `without_dropout`, for parity checks."""
    return Lift(casts=True, dropout=False)


def _lifted(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _without_dropout(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    position, key = (_DROPOUTS[func], "p") if func in _DROPOUTS else (_ATTENTION_P, "dropout_p")
    if func not in _DROPOUTS and func is not _ATTENTION:
        return args, kwargs
    if len(args) > position:
        return (*args[:position], 0.0, *args[position + 1 :]), kwargs
    return args, {**kwargs, key: 0.0}

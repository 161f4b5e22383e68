"""Optimizers by the names plans use, and a check that one may run on sharded parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..planner.precision import find_optimizer

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop, "adamax": torch.optim.Adamax, "nadam": torch.optim.NAdam, "radam": torch.optim.RAdam,
}  # fmt: skip
RATES = {"sgd": 1e-2}


def make_optimizer(name: str, parameters: Iterable[Tensor], **options: Any) -> torch.optim.Optimizer:
    """The named optimizer over parameters that take a gradient; learning rate 1e-3 (sgd 1e-2) unless given."""
    find_optimizer(name)
    maker = MAKERS.get(name)
    if maker is None:
        raise UsageError(
            f"optimizer {name!r} can be planned but torch.optim has none; known: {', '.join(sorted(MAKERS))}"
        )
    options.setdefault("lr", RATES.get(name, 1e-3))
    return maker([p for p in parameters if p.requires_grad], **options)

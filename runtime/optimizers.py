"""Optimizers by the names plans use, and a check that one may run on sharded parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..planner.precision import find_optimizer, fused

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop, "adamax": torch.optim.Adamax, "nadam": torch.optim.NAdam, "radam": torch.optim.RAdam,
}  # fmt: skip
WAYS = frozenset({"fused", "foreach", "differentiable"})
"""Options that say how torch is to run a step."""
RATES = {"sgd": 1e-2}


def make_optimizer(name: str, parameters: Iterable[Tensor], **options: Any) -> torch.optim.Optimizer:
    """The named optimizer over parameters that take a gradient; learning rate 1e-3 (sgd 1e-2) unless given.

    One kernel (`fused=True`) where torch has a right one for all of them and `options` name no other way.
    """
    name = find_optimizer(name).name
    maker = MAKERS.get(name)
    if maker is None:
        raise UsageError(
            f"optimizer {name!r} can be planned but torch.optim has none; known: {', '.join(sorted(MAKERS))}"
        )
    options.setdefault("lr", RATES.get(name, 1e-3))
    trained = [p for p in parameters if p.requires_grad]
    if WAYS.isdisjoint(options) and all(_one_kernel(name, p) for p in trained):
        options["fused"] = True
    return maker(trained, **options)


def _one_kernel(name: str, parameter: Tensor) -> bool:
    """Whether torch's fused kernel updates it rightly: it goes through memory, so elements may have no gaps between them."""
    kind = {"cuda": "gpu"}.get(parameter.device.type, parameter.device.type)
    reach = sum((size - 1) * step for size, step in zip(parameter.shape, parameter.stride(), strict=True)) + 1
    dense = parameter.numel() in (0, reach)
    return dense and fused(name, kind, str(parameter.dtype).removeprefix("torch."))

"""Counting the products of matrices and convolutions that run, those of autograd's backward passes included."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "grouped_mm", "grouped_outer")


class Products(TorchDispatchMode):
    """Inside its block, products by (name, shapes of the operands); a convolution's backward counts by what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet.__name__ in PRODUCTS:
            self.seen[packet.__name__, *(tuple(x.shape) for x in args if isinstance(x, torch.Tensor))] += 1
        if packet is aten.convolution_backward:
            for side, wanted in zip(("input", "weight"), args[-1], strict=False):
                self.seen[f"convolution {side}", *(tuple(x.shape) for x in args[:3])] += wanted
        return func(*args, **(kwargs or {}))

"""Arithmetic in the memory of an operand that nobody else reads: backward passes of composite ops hold no more than they must.

Where gradients of gradients are wanted autograd may have kept the operand, so that a new tensor is made.
"""

from __future__ import annotations

import torch
from torch import Tensor


def times(own: Tensor, other: Tensor) -> Tensor:
    """own * other, in the memory of `own` where the product has its shape and dtype."""
    return own * other if _kept(own, other) else own.mul_(other)


def minus(own: Tensor, other: Tensor) -> Tensor:
    """own - other, in the memory of `own` where the difference has its shape and dtype."""
    return own - other if _kept(own, other) else own.sub_(other)


def _kept(own: Tensor, other: Tensor) -> bool:
    fits = torch.broadcast_shapes(own.shape, other.shape) == own.shape
    return torch.is_grad_enabled() or not fits or torch.result_type(own, other) != own.dtype

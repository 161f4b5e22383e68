"""From a module to its summary in the dtype a plan computes in: capture, cleanup, outline, rules found by experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..garbage import held_back
from .capture import capture
from .discover import discover_node
from .skeleton import skeleton, to_meta
from .summarize import Summary, summarize


def prepare(
    model: nn.Module, args: Any, kwargs: Any, compute: str, *, loss_fn: Callable[..., Any] | None = None,
    lift: bool = False, cache: Path | None = None,
) -> Summary:  # fmt: skip
    """Summarise `model` without touching it: the capture is made from a weightless copy in dtype `compute`."""
    args, kwargs = cast_inputs((args, kwargs), other_dtypes(model, compute), compute)
    return prepare_bare(in_dtype(skeleton(model), compute), args, kwargs, loss_fn=loss_fn, lift=lift, cache=cache)


def prepare_bare(
    bare: nn.Module, args: Any, kwargs: Any, *, loss_fn: Callable[..., Any] | None = None, train: bool = True,
    lift: bool = False, cache: Path | None = None,
) -> Summary:  # fmt: skip
    """The same for a weightless module; `train` False summarises the inference graph (no loss).

    Ops without a rule are tried out (passes/discover.py); `cache` is a file that keeps what was found.
    """
    with held_back():
        captured = capture(bare, to_meta(args), to_meta(kwargs), loss_fn=loss_fn, train=train, lift_float64=lift)
        return summarize(captured, discover=lambda node: discover_node(node, cache=cache).instance)


def other_dtypes(model: nn.Module, compute: str) -> frozenset[torch.dtype]:
    """Floating dtypes of the parameters of `model` that are computed in `compute` instead; inputs in them are too."""
    dtype = getattr(torch, compute)
    return frozenset(p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != dtype)


def cast_inputs(values: Any, others: frozenset[torch.dtype], compute: str) -> Any:
    """Nested values with the tensors of the `others` dtypes in dtype `compute`."""
    if not others:
        return values
    dtype = getattr(torch, compute)
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.dtype in others else v, values)


def in_dtype(model: nn.Module, compute: str) -> nn.Module:
    """`model` with its floating parameters and buffers in dtype `compute`, where they are not."""
    dtype = getattr(torch, compute)
    if any(p.is_floating_point() and p.dtype != dtype for p in model.parameters()):
        return model.to(dtype)
    return model

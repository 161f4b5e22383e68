"""From a module to its summary in the dtype a plan computes in: capture, cleanup, outline, rules found by experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .capture import capture
from .discover import discover_node
from .skeleton import skeleton, to_meta
from .summarize import Summary, summarize


def prepare(
    model: nn.Module, args: Any, kwargs: Any, compute: str, *, loss_fn: Callable[..., Any] | None = None,
    lift: bool = False, cache: Path | None = None,
) -> Summary:  # fmt: skip
    """Summarise `model` without touching it: the capture is made from a weightless copy in dtype `compute`."""
    return prepare_bare(in_dtype(skeleton(model), compute), args, kwargs, loss_fn=loss_fn, lift=lift, cache=cache)


def prepare_bare(
    bare: nn.Module, args: Any, kwargs: Any, *, loss_fn: Callable[..., Any] | None = None, train: bool = True,
    lift: bool = False, cache: Path | None = None,
) -> Summary:  # fmt: skip
    """The same for a weightless module; `train` False summarises the inference graph (no loss).

    Ops without a rule are tried out (passes/discover.py); `cache` is a file that keeps what was found.
    """
    captured = capture(bare, to_meta(args), to_meta(kwargs), loss_fn=loss_fn, train=train, lift_float64=lift)
    return summarize(captured, discover=lambda node: discover_node(node, cache=cache).instance)


def in_dtype(model: nn.Module, compute: str) -> nn.Module:
    """`model` with its floating parameters and buffers in dtype `compute`, where they are not."""
    dtype = getattr(torch, compute)
    if any(p.is_floating_point() and p.dtype != dtype for p in model.parameters()):
        return model.to(dtype)
    return model

"""From a module to its summary in the dtype a plan computes in: capture, cleanup, outline, rules found by experiment."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UsageError
from ..garbage import held_back
from ..planner.inference import inference_outline
from .capture import capture
from .choose import NONE, Choice, run
from .discover import discover_node
from .observe import Observer
from .skeleton import skeleton, to_meta
from .summarize import Summary, summarize


def prepare(
    model: nn.Module, args: Any, kwargs: Any, compute: str, *, loss_fn: Callable[..., Any] | None = None,
    lift: bool = False, cache: Path | None = None, choice: Choice = NONE,
) -> Summary:  # fmt: skip
    """Summarise `model` without touching it: the capture is made from a weightless copy in dtype `compute`.

    `choice` says which optional passes run on it (passes/choose.py).
    """
    args, kwargs = cast_inputs((args, kwargs), other_dtypes(model, compute), compute)
    bare = in_dtype(skeleton(model), compute)
    return prepare_bare(bare, args, kwargs, loss_fn=loss_fn, lift=lift, cache=cache, choice=choice)


def prepare_phase(
    model: nn.Module, args: Any, kwargs: Any, compute: str, phase: str, *, choice: Choice = NONE
) -> Summary:
    """Summarise the forward pass of `model` in a phase of inference (planner/inference.py), in eval mode and without labels.

    What of the graph depends on parameters is found by capturing it as if the sum of its outputs were a loss.
    """
    args, kwargs = cast_inputs((args, kwargs), other_dtypes(model, compute), compute)
    bare = in_dtype(skeleton(model), compute).eval()
    for parameter in bare.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    summary = prepare_bare(bare, args, inference_inputs(bare, kwargs), loss_fn=_sum, choice=choice)
    return replace(summary, outline=inference_outline(summary.outline, phase))


def inference_inputs(model: nn.Module, kwargs: Any) -> dict[str, Any]:
    """Keyword inputs without optional labels; of logits only those of the last position, where the model can leave out the rest."""
    known = inspect.signature(model.forward).parameters
    optional = "labels" in known and known["labels"].default is not inspect.Parameter.empty
    found = {k: v for k, v in dict(kwargs).items() if k != "labels" or not optional}
    if "decoder_input_ids" in known and "labels" in kwargs and "labels" not in found:
        found.setdefault("decoder_input_ids", kwargs["labels"])  # what the model would have made of them, in shape
    if "logits_to_keep" in known:
        found.setdefault("logits_to_keep", 1)
    return found


def _sum(output: Any) -> Tensor:
    leaves = [v for v in tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]
    if not leaves:
        raise UsageError("the model returns no floating tensor: there is nothing to infer")
    total = leaves[0].sum()
    for leaf in leaves[1:]:
        total = total + leaf.sum()
    return total


def prepare_bare(
    bare: nn.Module, args: Any, kwargs: Any, *, loss_fn: Callable[..., Any] | None = None, train: bool = True,
    lift: bool = False, cache: Path | None = None, choice: Choice = NONE,
) -> Summary:  # fmt: skip
    """The same for a weightless module; `train` False summarises the inference graph (no loss).

    Ops without a rule are tried out (passes/discover.py); `cache` is a file that keeps what was found.
    """
    with held_back():
        captured = capture(bare, to_meta(args), to_meta(kwargs), loss_fn=loss_fn, train=train, lift_float64=lift)
        observer = Observer()
        captured = run(captured, choice, observer)
        return summarize(captured, discover=lambda node: discover_node(node, cache=cache).instance, observer=observer)


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

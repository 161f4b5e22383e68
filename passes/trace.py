"""From a module to an exported program: the model runs once on fake CPU tensors, whatever device its own live on.

So one model gives one graph on meta, CPU and GPU, nothing is computed or copied, and the module is as before
afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..errors import CaptureError
from .diagnose import explain, in_torch
from .experts.interface import lifted_experts
from .lift import lift_casts
from .torch_compat import (
    FakeTensorMode,
    fake_mode,
    is_plain,
    lazy_graphs,
    pytree,
    quiet,
    short_stacks,
    watch_autograd_functions,
)

WRAPPED = "model."
"""Prefix of names when a loss function is wrapped around the model."""


@dataclass(frozen=True)
class Traced:
    """An exported program, whether a loss function was wrapped around the model, and what was seen on the way."""

    program: ExportedProgram
    wrapped: bool
    problems: tuple[str, ...]
    notes: tuple[str, ...]


class _WithLoss(nn.Module):
    """Returns (loss_fn(output), output)."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.training = model.training  # not train(): submodules may be in another mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        return self.loss_fn(output), output


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *,
    loss_fn: Callable[[Any], torch.Tensor] | None, lift_float64: bool,
) -> Traced:  # fmt: skip
    """Export `model` on fake tensors; raises CaptureError with every problem found where it cannot be traced."""
    _check_tensors(model)
    mode = fake_mode(symbolic=True)
    swap = _Swap(mode)
    called = model if loss_fn is None else _WithLoss(model, loss_fn)
    functions: list[type] = []
    with contextlib.ExitStack() as stack:
        notes = stack.enter_context(_settings(model))
        if any(isinstance(v, torch.Tensor) and v.requires_grad for v in pytree.tree_leaves((args, kwargs))):
            notes.append("an input requires a gradient: gradients of inputs are not computed")
        stack.enter_context(swap.applied(model))
        # Every input becomes its own fake tensor: export would merge one tensor passed twice into one input.
        args, kwargs = pytree.tree_map(swap.fresh, tuple(args)), pytree.tree_map(swap.fresh, dict(kwargs))
        stack.enter_context(torch.enable_grad())
        if lift_float64:
            stack.enter_context(lift_casts())
        notes += stack.enter_context(lifted_experts(model))
        try:
            with quiet(), watch_autograd_functions(functions.append), lazy_graphs(), short_stacks(in_torch):
                program = torch.export.export(called, args, kwargs, strict=False)
        except Exception as error:
            problems = explain(called, args, kwargs, error)
            problems += [p for p in _functions(functions) if p not in problems]
            raise CaptureError(f"{type(model).__name__} cannot be captured:", problems) from error
    return Traced(program, loss_fn is not None, tuple(_functions(functions)), tuple(notes))


def _functions(seen: list[type]) -> list[str]:
    """Problems made of custom autograd functions: tracing loses their backward."""
    problems = []
    for cls in dict.fromkeys(seen):
        if cls.__name__ == "CheckpointFunction":
            problems.append(
                "reentrant activation checkpointing runs without gradients when traced; pass use_reentrant=False"
            )
        elif not cls.__module__.startswith(("torch.", f"{__package__.partition('.')[0]}.")):
            problems.append(
                f"custom autograd function {cls.__module__}.{cls.__qualname__}: its backward would be lost; "
                "register it with torch.library.custom_op and register_autograd"
            )
    return problems


def _check_tensors(model: nn.Module) -> None:
    """Only plain tensors can be swapped for fake ones."""
    problems = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not is_plain(tensor):
            problems.append(f"{name} is a {type(tensor).__name__}; only plain tensors are supported")
        elif tensor.layout is not torch.strided:
            problems.append(f"{name} has layout {tensor.layout}; only strided tensors are supported")
    if problems:
        raise CaptureError(f"{type(model).__name__} cannot be captured:", problems)


@contextlib.contextmanager
def _settings(model: nn.Module) -> Iterator[list[str]]:
    """Caches off while tracing (restored after), and notes on what tracing drops."""
    notes = []
    configs = {id(c): c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", None) is True}
    if any(getattr(m, "gradient_checkpointing", False) is True for m in model.modules()) and model.training:
        notes.append("the model's own gradient checkpointing is not kept: the plan decides what is recomputed")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        notes.append("the ambient autocast is not captured; it applies when the plan runs")
    for config in configs.values():
        config.use_cache = False
    try:
        yield notes
    finally:
        for config in configs.values():
            config.use_cache = True


class _Swap:
    """Replaces a module's tensors by fake CPU tensors for the time of a trace; tied tensors stay tied."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fresh(self, value: Any) -> Any:
        """A new fake CPU tensor like `value` (anything else is returned)."""
        if not isinstance(value, torch.Tensor):
            return value
        with self._mode:
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
        if isinstance(value, nn.Parameter):
            return nn.Parameter(fake, requires_grad=value.requires_grad)
        return fake.requires_grad_(value.requires_grad)

    def same(self, value: torch.Tensor) -> torch.Tensor:
        """The fake tensor of `value`, one per tensor object (kept alive, so that ids stay unique)."""
        if id(value) not in self._made:
            self._made[id(value)] = (value, self.fresh(value))
        return self._made[id(value)][1]

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """All parameters, buffers and plain meta tensors of the module are fake inside."""
        undo: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    self._replace(tensors, [k for k, v in tensors.items() if v is not None], undo)
                plain = [k for k, v in vars(module).items() if isinstance(v, torch.Tensor) and v.device.type != "cpu"]
                self._replace(vars(module), plain, undo)
                if isinstance(module, nn.RNNBase):  # it keeps a second list of its parameters
                    undo.append((vars(module), "_flat_weights", module._flat_weights))
                    vars(module)["_flat_weights"] = [getattr(module, name) for name in module._flat_weights_names]
            yield
        finally:
            for tensors, name, value in reversed(undo):
                tensors[name] = value

    def _replace(self, tensors: dict[str, Any], names: list[str], undo: list[tuple[dict[str, Any], str, Any]]) -> None:
        for name in names:
            undo.append((tensors, name, tensors[name]))
            tensors[name] = self.same(tensors[name])

"""Modules that keep the contract of Transformers' experts interface, made to call the one op while a model is traced.

The contract (`transformers.integrations.moe.use_experts_implementation`): a module called with (tokens [t, h], top-k index
[t, k], top-k weights [t, k]), holding `gate_up_proj` or `up_proj` and `down_proj` as stacks [e, .., ..], optionally with
`_bias` stacks, and the flags below. Only attributes are looked at, so that any module which keeps it is lifted.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .gates import GateError, trace_gate
from .op import experts

FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def lifted_experts(model: nn.Module) -> Iterator[list[str]]:
    """While active, every such module of `model` calls `shardwright::experts`; yields notes on those that cannot.

    Nothing global changes: the modules' `forward` is set on the instances and taken away afterwards.
    """
    notes: list[str] = []
    lifted: list[nn.Module] = []
    known: dict[Any, str | GateError] = {}
    for name, module in model.named_modules():
        if not keeps_contract(module) or "forward" in vars(module):
            continue
        try:
            gate = _gate(module, known)
        except GateError as error:
            notes.append(f"experts {name} are not lifted and run whole: {error}")
            continue
        vars(module)["forward"] = functools.partial(_forward, module, gate)
        lifted.append(module)
    try:
        yield notes
    finally:
        for module in lifted:
            del vars(module)["forward"]


def keeps_contract(module: nn.Module) -> bool:
    """Whether a module looks like the experts of the interface."""
    return all(isinstance(getattr(module, flag, None), bool) for flag in FLAGS) and isinstance(
        getattr(module, "down_proj", None), Tensor
    )


def _forward(module: Any, gate: str, x: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """What stands in for the module's forward: the one op."""
    up, up_bias = _inward(module)
    down_bias = module.down_proj_bias if module.has_bias else None
    arguments = x, index, scale, up, module.down_proj, up_bias, down_bias, gate, bool(module.is_transposed)
    return experts(*arguments)  # type: ignore[no-any-return]


def _inward(module: Any) -> tuple[Tensor, Tensor | None]:
    """The stacks of the first product and of its bias."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    return getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None


def _gate(module: Any, known: dict[Any, str | GateError]) -> str:
    """The program of the function between the products, remembered by what it can depend on."""
    try:
        up, _ = _inward(module)
    except AttributeError as error:
        raise GateError(str(error)) from error
    if up.dtype not in PLAIN or module.down_proj.dtype != up.dtype:
        raise GateError(f"their weights are {up.dtype} and {module.down_proj.dtype}")
    if up.dim() != 3 or module.down_proj.dim() != 3:
        raise GateError("their weights are no stacks of matrices")
    if module.has_post_expert_norm:
        raise GateError("a norm stands between the experts and their weights")
    if getattr(module, "_is_expert_parallel", False):
        raise GateError("they are already split over ranks")
    width = up.shape[2 if module.is_transposed else 1]
    scalars = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, bool | int | float | str))
    key = type(module), scalars, repr(getattr(module, "act_fn", None)), width, up.dtype
    if key not in known:
        function = module._apply_gate if module.has_gate else module.act_fn
        try:
            known[key] = trace_gate(function, width, up.dtype)
        except GateError as error:
            known[key] = error
    found = known[key]
    if isinstance(found, GateError):
        raise found
    return found


@contextlib.contextmanager
def own_loops(model: nn.Module) -> Iterator[None]:
    """While active, such modules run the loop their class was written with, in any dtype, whatever their config asks for.

    A reference in float64 needs it: torch's grouped product, the config's default, has no float64.
    """
    changed: list[nn.Module] = []
    for module in model.modules():
        original = getattr(type(module).forward, "__wrapped__", None)
        if keeps_contract(module) and original is not None and "forward" not in vars(module):
            vars(module)["forward"] = functools.partial(original, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]

"""Tensors of a model that was built on the meta device: parameters get memory without values, buffers that no file holds are
computed again.

A state dict leaves non-persistent buffers out (tables of positions, rotary frequencies), so no file of weights has them. Whoever
owns one computes it as it did when it was built: by the model's `_init_weights(module)` (Hugging Face), or the module's
`reset_parameters()` (torch's convention). Both run twice here, on a copy of the module over two different fillings: a
buffer that comes out the same was computed, one that does not was left alone, and that is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...errors import UsageError


def recomputed(model: nn.Module) -> dict[str, Tensor]:
    """Values of all non-persistent buffers that are on the meta device, by name; the model is left as it is.

    Raises UsageError naming a buffer that its module does not compute.
    """
    persistent = set(model.state_dict(keep_vars=True))
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta and prefix + n not in persistent}
        if own:
            values = _computed(model, module, own, prefix)
            found |= {prefix + name: value for name, value in values.items()}
    return found


def fill_meta(model: nn.Module, device: torch.device) -> None:
    """Give every meta tensor of a plain module memory on `device`: parameters without values (ties kept), buffers computed."""
    values = recomputed(model)
    made: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                if id(buffer) not in made:
                    value = values.get(prefix + name)
                    made[id(buffer)] = torch.empty_like(buffer, device=device) if value is None else value.to(device)
                module._buffers[name] = made[id(buffer)]


def _computed(model: nn.Module, module: nn.Module, own: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    compute = _computation(model, module)
    if compute is None:
        found: list[dict[str, Tensor]] = [{}, {}]
    else:
        found = [_once(module, own, compute, filling) for filling in (0, 1)]
    for name in own:
        values = [each.get(name) for each in found]
        if values[0] is None or values[1] is None or not torch.equal(values[0], values[1]):
            raise UsageError(
                f"the non-persistent buffer {prefix}{name} is on the meta device, no file holds it, and {type(module).__name__} "
                "does not compute it again: give the module a reset_parameters() that sets it, or build its buffers on the device"
            )
    return {name: found[0][name] for name in own}


def _computation(model: nn.Module, module: nn.Module) -> Callable[[nn.Module], object] | None:
    init = getattr(model, "_init_weights", None)
    if callable(init):
        return init  # type: ignore[no-any-return]
    if callable(getattr(module, "reset_parameters", None)):
        return lambda bare: bare.reset_parameters()  # type: ignore[operator]
    return None


def _once(
    module: nn.Module, own: dict[str, Tensor], compute: Callable[[nn.Module], object], filling: int
) -> dict[str, Tensor]:
    """The buffers after `compute` on a copy of the module whose own buffers are filled with one value."""
    bare = copy.copy(module)
    buffers = {name: torch.full(b.shape, filling, dtype=b.dtype) for name, b in own.items()}
    bare.__dict__ = {**module.__dict__, "_buffers": {**module._buffers, **buffers}}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        compute(bare)
    return {name: value for name, value in bare._buffers.items() if value is not None and name in own}

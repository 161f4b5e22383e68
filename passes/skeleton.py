"""A copy of the user's module without its weights: what later captures (other shapes, eval mode) are made from."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def skeleton(model: nn.Module) -> nn.Module:
    """Deep copy of `model` with meta parameters and shared buffers; ties between parameters are kept."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = empty
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)


def to_meta(value: Any) -> Any:
    """The same nested value with meta tensors of equal shape and dtype."""
    return torch.utils._pytree.tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, value)


class Tree(nn.Module):
    """A bare module tree that carries parameters and buffers under their original dotted names."""

    def put(self, name: str, value: Tensor | nn.Parameter, *, persistent: bool = True) -> None:
        """Register a parameter or buffer at `name`, making the modules on the way."""
        *path, last = name.split(".")
        here: nn.Module = self
        for part in path:
            # Written to the registries directly: forwarded attributes of the original must not count as taken names.
            here = here._modules.setdefault(part, Tree())  # type: ignore[assignment]
        if isinstance(value, nn.Parameter):
            here._parameters[last] = value
            return
        here._buffers[last] = value
        if not persistent:
            here._non_persistent_buffers_set.add(last)

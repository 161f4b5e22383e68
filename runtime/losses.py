"""Where the loss is in a model's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import UsageError


def loss_of(output: Any) -> Tensor:
    """The scalar `.loss`, `"loss"` or first 0-dim tensor of an output; raises UsageError when there is none."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, Tensor) and found.dim() == 0:
        return found
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.dim() == 0:
            return leaf
    raise UsageError('the output has no scalar loss: return one as .loss or "loss", or pass loss_fn=')

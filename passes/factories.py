"""Ops that make a tensor from nothing: the clean graph names no device for them, whoever runs it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .torch_compat import OpOverload, arguments


def on_device(target: Any, kwargs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """`kwargs` of a call with `device` where the op makes a tensor and reads none (full, arange, rand, ...)."""
    if not isinstance(target, OpOverload):
        return dict(kwargs)
    schema = arguments(target)
    reads = any("Tensor" in str(a.type) for a in schema)
    takes = any(a.name == "device" for a in schema)
    return {**kwargs, "device": device} if takes and not reads else dict(kwargs)

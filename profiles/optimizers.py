"""Seconds of optimizer steps over a model's parameters as the runtime holds them: distributed tensors where there are ranks.

A step of one kernel is timed on plain tensors: of distributed ones the runtime hands it the slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from ..planner.precision import fused
from .timing import device, spread_mean, time_call

SECONDS = 0.5


def time_optimizer(name: str, sizes: Sequence[int], dtype: str) -> float:
    """Seconds of one step of torch.optim's `name` over parameters of so many elements; the mean over the ranks.

    Raises ValueError for an optimizer that torch.optim does not have.
    """
    kinds: dict[str, Any] = {k.lower(): v for k, v in vars(torch.optim).items() if isinstance(v, type)}
    if name not in kinds:
        raise ValueError(f"torch.optim has no {name!r}")
    one = fused(name, "gpu" if device().type == "cuda" else "cpu", dtype)
    alone = one or not dist.is_initialized() or dist.get_world_size() == 1
    mesh = None if alone else DeviceMesh(device().type, list(range(dist.get_world_size())))
    parameters = [_parameter(size, getattr(torch, dtype), mesh) for size in sizes]
    step = kinds[name](parameters, lr=1e-3, **({"fused": True} if one else {})).step
    step()
    step()
    return spread_mean(time_call(step, SECONDS).seconds)


def _parameter(size: int, dtype: torch.dtype, mesh: DeviceMesh | None) -> torch.nn.Parameter:
    value, slope = (torch.rand(size, device=device()).to(dtype) for _ in range(2))
    if mesh is None:
        made = torch.nn.Parameter(value)
        made.grad = slope
        return made
    made = torch.nn.Parameter(DTensor.from_local(value, mesh, [Replicate()], run_check=False))
    made.grad = DTensor.from_local(slope, mesh, [Replicate()], run_check=False)
    return made

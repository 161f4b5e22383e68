"""The global gradient norm over parameters that live anywhere on the mesh, in one collective.

`torch.nn.utils.clip_grad_norm_` is right for our DTensors for every finite order, but raises on a rank whose ZeRO chunk of
some parameter is empty when the order is infinity (while the other ranks wait); this one has no such case. A slice that
several ranks hold is counted on the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from . import collectives


def total_norm(gradients: Iterable[Tensor], norm_type: float = 2.0, *, staged: torch.device | None = None) -> Tensor:
    """Norm of all gradients as one vector (0-dim, on every rank); a collective over all ranks if any is a DTensor.

    `staged` is the device of a run with a pipeline, where ranks have gradients of their own, maybe none: float64 then.
    """
    gradients = list(gradients)
    if not gradients and staged is None:
        return torch.zeros(())
    spread = staged is not None or any(isinstance(g, DTensor) for g in gradients)
    parts = [_part(g, norm_type, spread) for g in gradients]
    if staged is not None:
        parts.append(torch.zeros((), dtype=torch.float64, device=staged))
    dtype = torch.promote_types(torch.float32, max((p.dtype for p in parts), key=lambda d: torch.finfo(d).bits))
    together = torch.stack([p.to(_meeting_place(gradients, parts), dtype) for p in parts])
    total = together.max() if math.isinf(norm_type) else together.sum()
    if spread and dist.get_world_size() > 1:
        group = dist.group.WORLD
        assert group is not None
        total = collectives.all_reduce(total, group.group_name, "max" if math.isinf(norm_type) else "sum")
    return total if math.isinf(norm_type) else total ** (1.0 / norm_type)


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, *,
    counted: Collection[int] | None = None, device: torch.device | None = None,
) -> Tensor:  # fmt: skip
    """Scale the gradients so that their global norm is at most `max_norm`; returns the norm before (0-dim).

    With a pipeline (on `device`) a rank counts only the parameters whose ids are in `counted`: others may hold the rest, too.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    mine = [p.grad for p in parameters if p.grad is not None and (counted is None or id(p) in counted)]
    norm = total_norm(mine, norm_type, staged=device)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    with torch.no_grad():
        for gradient in gradients:
            own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            own.mul_(scale.to(own.device, own.dtype))
    return norm


def _meeting_place(gradients: Iterable[Tensor], parts: Iterable[Tensor]) -> str:
    """Where parts are added up: some gradients lie in host memory, and collectives want those of the mesh's devices."""
    kinds = {g.device_mesh.device_type for g in gradients if isinstance(g, DTensor)} | {p.device.type for p in parts}
    return max(kinds, key=lambda kind: kind != "cpu")


def _part(gradient: Tensor, norm_type: float, spread: bool) -> Tensor:
    """This rank's share of the norm: the largest magnitude, or the sum of powers."""
    with torch.no_grad():
        own = gradient.to_local() if isinstance(gradient, DTensor) else gradient.detach()
    if own.numel() == 0 or (spread and not _first_holder(gradient)):
        return torch.zeros((), dtype=own.dtype, device=own.device)
    norm = torch.linalg.vector_norm(own, norm_type)
    return norm if math.isinf(norm_type) else norm**norm_type


def _first_holder(gradient: Tensor) -> bool:
    """Whether this rank is the first of those that hold the same slice."""
    if not isinstance(gradient, DTensor):
        return dist.get_rank() == 0
    where = gradient.device_mesh.get_coordinate() or []
    return all(i == 0 for i, p in zip(where, gradient.placements, strict=True) if isinstance(p, Replicate))

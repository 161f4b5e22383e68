"""Parameters and other values that only some pipeline ranks have, made known to all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from . import parameters
from .mesh import Mesh
from .p2p import Link


def wholes(mesh: Mesh, own: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor | None]]:
    """Each of `names` with its whole value on every rank, None where no rank has it; `own` are this rank's.

    A collective: every rank iterates to the end over the same names.
    """
    if mesh.stages == 1:
        for name in names:
            yield name, _whole(own[name]) if name in own else None
        return
    link = Link(mesh)
    known: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{} for _ in range(mesh.stages)]
    dist.all_gather_object(known, {n: (tuple(v.shape), v.dtype) for n, v in own.items()}, group=link.group)
    for name in names:
        holders = [rank for rank, values in enumerate(known) if name in values]
        value = _whole(own[name]) if name in own else None
        if 0 < len(holders) < mesh.stages:
            shape, dtype = known[holders[0]][name]
            if value is None:
                value = torch.empty(shape, dtype=dtype, device=mesh.device)
            value = link.broadcast(value.contiguous(), holders[0])
        yield name, value


def _whole(value: Tensor) -> Tensor:
    return parameters.full(value) if parameters.is_distributed(value) else value.detach()

"""Batches that every data-parallel rank brings itself (data="local"): the ranks must bring equal shapes.

A rank cannot see what the others bring, and with unequal parts a loss averaged over the batch would be wrong without anything
failing. So the ranks compare what they bring at every call: one all-reduce of 16 bytes among processors, none of devices.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from ..errors import UsageError
from .watch import waiting


class LocalBatches:
    """The comparison, over all ranks; made on every rank at the same time, as it may make a process group."""

    def __init__(self) -> None:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.group: Any = None
        if not alone:
            self.group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self._known: dict[Any, int] = {}

    def check(self, signature: Any, args: Any, kwargs: Any) -> None:
        """Raise UsageError, on all ranks, where the ranks call with different shapes; `signature` tells them apart."""
        if self.group is None:
            return
        number = self._known.get(signature)
        if number is None:
            digest = hashlib.sha256(repr(signature).encode()).digest()
            number = self._known[signature] = int.from_bytes(digest[:7], "big")
        both = torch.tensor([number, -number])
        with waiting("agreement on the batch"):
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        if both[0] != -both[1]:
            self._refuse(args, kwargs)

    def _refuse(self, args: Any, kwargs: Any) -> None:
        ranks: list[Any] = [None] * dist.get_world_size()
        with waiting("agreement on the batch"):
            dist.all_gather_object(ranks, shapes(args, kwargs), group=self.group)
        other = next((r for r, found in enumerate(ranks) if found != ranks[0]), None)
        if other is None:
            raise UsageError(
                'data="local": some ranks train and others evaluate, or they pass other constants or dtypes'
            )
        least = min(min(size[0] for size in found.values() if size) for found in ranks if any(found.values()))
        raise UsageError(
            f'data="local": rank 0 passes {_text(ranks[0])}, rank {other} {_text(ranks[other])}; every data-parallel rank must '
            f"pass equal shapes: drop or pad the last batch (nearest legal batch: {least} on each rank), pad sequences to one "
            'length, or pass the whole batch on every rank with data="global"'
        )


def shapes(args: Any, kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a call, by its place."""
    leaves, _ = tree_flatten_with_path((tuple(args), dict(sorted(kwargs.items()))))
    return {
        "".join(str(key) for key in path[1:]).strip("[]'\""): tuple(value.shape)
        for path, value in leaves if isinstance(value, Tensor)
    }  # fmt: skip


def _text(found: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {tuple(size)}" for name, size in list(found.items())[:3]) or "no tensor"

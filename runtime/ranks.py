"""Doing something on all ranks together: where it fails on one, every rank hears of it instead of waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import CheckpointError, ShardwrightError
from .mesh import rank, world_size
from .watch import waiting

T = TypeVar("T")


def everywhere(action: Callable[[], T], doing: str, kind: type[ShardwrightError] = CheckpointError) -> T:
    """The result of `action` on this rank; raises its error here, and one of `kind` naming the rank everywhere else."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    if world_size() > 1:
        failures = gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
        first = next((r for r, text in enumerate(failures) if text is not None), None)
        if failure is None and first is not None:
            raise kind(f"rank {first} could not {doing}, though rank {rank()} could: {failures[first]}")
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def gathered(value: T) -> list[T]:
    """Every rank's value, by rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with waiting("gathering of what every rank has"):
        dist.all_gather_object(found, value)
    return found


def from_first(value: T) -> T:
    """Rank 0's value."""
    if world_size() == 1:
        return value
    box = [value]
    with waiting("broadcast of what rank 0 has"):
        dist.broadcast_object_list(box, 0)
    return box[0]

"""Tensors in host memory: pinned where there is a GPU, memory maps of no file where the "device" is a byte budget on a CPU.

A map never passes torch's allocator, so what watches that allocator sees the device alone. `is_host` tells the two apart where
tensors are at hand: the storage of every tensor made here carries a mark, which views of it share.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..torch_compat import StorageRef

MARK = "shardwright_host"
"""Attribute of storages behind the device; torch keeps the Python object of a storage as long as the storage lives."""


def marked(x: Tensor) -> Tensor:
    """`x`, known from now on to lie behind the device."""
    for storage in _storages(x):
        setattr(storage, MARK, True)
    return x


def is_host(x: Tensor) -> bool:
    """Whether a tensor lies in host memory or on disk; of a DTensor its local part."""
    return all(getattr(storage, MARK, False) for storage in _storages(x))


def _storages(x: Tensor) -> Iterator[torch.UntypedStorage]:
    if hasattr(x, "__tensor_flatten__"):
        names, _ = x.__tensor_flatten__()
        for part in (getattr(x, name) for name in names):
            if isinstance(part, Tensor):
                yield from _storages(part)
    elif x.layout == torch.strided:
        yield x.untyped_storage()


class HostMemory:
    """Host memory of one rank. A buffer that nobody holds any more is given out again for the same number of bytes."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._maps: dict[int, list[tuple[mmap.mmap, StorageRef]]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with any content."""
        size = math.prod(shape) * dtype.itemsize
        if self._pinned or not size:  # torch's allocator of pinned memory gives buffers out again itself
            return marked(torch.empty(tuple(shape), dtype=dtype, pin_memory=self._pinned and size > 0))
        known = self._maps.setdefault(size, [])
        free = next((i for i, (_, lent) in enumerate(known) if lent.expired()), None)
        memory = mmap.mmap(-1, size) if free is None else known.pop(free)[0]
        made = marked(torch.frombuffer(memory, dtype=dtype).view(tuple(shape)))
        known.append((memory, StorageRef(made.untyped_storage())))
        return made

    def holding(self, x: Tensor) -> Tensor:
        """A copy of `x`."""
        made = self.empty(x.shape, x.dtype)
        made.copy_(x.detach())
        return made

    @property
    def held_bytes(self) -> int:
        """Bytes of all maps, lent or free (pinned memory is torch's to count)."""
        return sum(size * len(known) for size, known in self._maps.items())


def from_file(path: Path, shape: Sequence[int], dtype: torch.dtype, offset: int) -> Tensor:
    """The tensor in a file at `offset`, page by page as it is read; writing to it changes memory, never the file."""
    count = math.prod(shape)
    if not count:
        return marked(torch.empty(tuple(shape), dtype=dtype))
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return marked(torch.frombuffer(pages, dtype=dtype, count=count, offset=offset).view(tuple(shape)))

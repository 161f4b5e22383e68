"""Files in the safetensors format: written to the last byte, read slice by slice, refused where the header lies.

The format (github.com/huggingface/safetensors): 8 bytes little-endian length of the header, the header as JSON, the tensors'
bytes without holes. {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [start, stop]}, "__metadata__": {...}}.
Reading here checks every figure before a byte is used, and copies only what is asked for out of a mapping of the file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...errors import CheckpointError

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000
"""Bytes of the longest header that is read, as in the safetensors library."""

DIMS_LIMIT = 64
"""Dims of a tensor; torch allows no more."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype, shape and the bytes [start, stop) of the file that hold it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """A file about to be written: its header, and each tensor's entry in the order of the file."""

    header: bytes
    entries: Mapping[str, Entry]

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return max([len(self.header), *(e.stop for e in self.entries.values())])


def dtype_name(dtype: torch.dtype, name: str) -> str:
    """The format's name of a dtype; raises CheckpointError for one it lacks, naming the tensor."""
    if dtype not in NAMES:
        raise CheckpointError(f"{name}: safetensors files hold no {dtype}; convert it first")
    return NAMES[dtype]


def lay_out(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> Layout:
    """The file of tensors given by dtype and shape; widest dtypes first, so that every tensor is aligned."""
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    records: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    spans, at = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        size = math.prod(shape) * dtype.itemsize
        records[name] = {"dtype": dtype_name(dtype, name), "shape": list(shape), "data_offsets": [at, at + size]}
        spans[name] = (at, at + size)
        at += size
    text = json.dumps(records, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    entries = {n: Entry(tensors[n][0], tuple(tensors[n][1]), base + a, base + b) for n, (a, b) in spans.items()}
    return Layout(len(text).to_bytes(8, "little") + text, entries)


def write(path: Path, layout: Layout, values: Iterable[tuple[str, Tensor]]) -> None:
    """Write a new file, the values in the order of `layout.entries`, and wait until it is on the disk.

    Raises CheckpointError where it cannot be written.
    """
    try:
        with path.open("xb") as file:
            file.write(layout.header)
            for (name, entry), (given, value) in zip(layout.entries.items(), values, strict=True):
                assert name == given
                assert (value.dtype, tuple(value.shape)) == (entry.dtype, entry.shape), name
                _put(file, value)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {error.strerror or error}") from None


def _put(file: BinaryIO, value: Tensor) -> None:
    if value.numel():
        file.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class Slices:
    """Reads boxes of tensors out of files, by mapping them; `bytes_read` counts what was copied out."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._maps: dict[Path, mmap.mmap] = {}

    def copy(self, path: Path, entry: Entry, offsets: Sequence[int], into: Tensor) -> None:
        """Copy the box at `offsets` of a tensor of the file into `into`, converting to its dtype."""
        if not into.numel():
            return
        whole = self._view(path, entry)
        for dim, (start, size) in enumerate(zip(offsets, into.shape, strict=True)):
            whole = whole.narrow(dim, start, size)
        with torch.no_grad():
            into.copy_(whole)
        self.bytes_read += into.numel() * entry.dtype.itemsize

    def _view(self, path: Path, entry: Entry) -> Tensor:
        """The tensor in the mapped file; a private mapping, so that torch has writable memory and the file stays as it is."""
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped, count = self._maps[path], math.prod(entry.shape)
        if entry.start % entry.dtype.itemsize:
            aligned = bytearray(mapped[entry.start : entry.stop])
            return torch.frombuffer(aligned, dtype=entry.dtype).view(entry.shape)
        return torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.start).view(entry.shape)


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file; raises CheckpointError naming the file and what is wrong in it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT):
                raise CheckpointError(
                    f"{path}: header length: expected 2 to {max(min(size - 8, HEADER_LIMIT), 2):,} bytes in a file of "
                    f"{size:,}, found {length:,}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
    entries = {name: _entry(path, name, r, 8 + length) for name, r in _records(path, text).items()}
    _check_spans(path, entries, 8 + length, size)
    return entries


def _records(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise CheckpointError(f"{path}: header: a name stands twice in one object")
        return found

    try:
        records = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header: not JSON ({type(error).__name__})") from None
    if not isinstance(records, dict):
        raise CheckpointError(f"{path}: header: expected a JSON object, found a {type(records).__name__}")
    records.pop("__metadata__", None)
    return records


def _entry(path: Path, name: str, record: Any, base: int) -> Entry:
    where = f"{path}: {name}"
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets")
    dtype = DTYPES.get(record["dtype"]) if isinstance(record["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: dtype: expected one of {', '.join(DTYPES)}, found {record['dtype']!r}")
    for field in ("shape", "data_offsets"):
        value = record[field]
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
            raise CheckpointError(f"{where}: {field}: expected a list of integers from 0 on, found {value!r}")
    shape, offsets = tuple(record["shape"]), record["data_offsets"]
    if len(shape) > DIMS_LIMIT:
        raise CheckpointError(f"{where}: shape: expected at most {DIMS_LIMIT} dims, found {len(shape)}")
    wanted = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != wanted:
        raise CheckpointError(f"{where}: data_offsets: expected {wanted:,} bytes for {shape}, found {offsets}")
    return Entry(dtype, shape, base + offsets[0], base + offsets[1])


def _check_spans(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """The tensors fill the file without holes or overlaps, as the format demands."""
    at = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            problem = "overlaps the tensor before it" if entry.start < at else "leaves a hole before it"
            raise CheckpointError(f"{path}: {name}: data_offsets: {problem} (byte {entry.start:,} of the file)")
        at = entry.stop
        if at > size:
            raise CheckpointError(f"{path}: {name}: data_offsets: ends at byte {at:,}, the file has {size:,}")
    if at != size:
        raise CheckpointError(f"{path}: the tensors end at byte {at:,}, the file has {size:,}")

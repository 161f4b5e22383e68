"""`checkpoint.json`: what a checkpoint holds and where, as plain JSON that is checked before anything is read by it.

Nothing in it is code and nothing in it is trusted: unknown fields, wrong types, files outside the folder, boxes outside their
tensor, boxes that overlap or leave a part uncovered, byte ranges that overlap, lie outside their file or have another
length than their box are refused with the file and the field.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ...errors import CheckpointError
from .safe_files import DIMS_LIMIT, DTYPES, Entry

FILE = "checkpoint.json"
VERSION = 1
FORMAT = "shardwright checkpoint"
SIZE_LIMIT = 1 << 30
"""Bytes of the longest metadata that is read (about four million boxes)."""
_PART = re.compile(r"rank-\d{5,}\.safetensors")
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
STEPS = 10**18
"""Steps are below this: the name of a folder has so many digits at most."""


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A box of a tensor, and the bytes [start, stop) of the file that hold it, row-major."""

    offsets: tuple[Count, ...]
    sizes: tuple[Count, ...]
    file: str
    start: Count
    stop: Count


class TensorRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One named tensor: dtype by its safetensors name, shape of the whole, and its boxes."""

    dtype: str
    shape: tuple[Count, ...]
    chunks: tuple[Chunk, ...]


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One parameter group of an optimizer: names of its parameters and its options."""

    parameters: tuple[str, ...]
    options: dict[str, Any]


class OptimizerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An optimizer: its class, groups, and what its states hold beside tensors, by parameter and key."""

    kind: str
    groups: tuple[Group, ...]
    scalars: dict[str, dict[str, Any]]


class RandomRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The runtime's seed and how many calls have drawn from it."""

    seed: Annotated[int, msgspec.Meta(ge=-(1 << 62), le=(1 << 62))]
    calls: Count


class Heading(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything in a checkpoint but tensors. `plan` is the digest of the plan it ran under, `names` tied names by first one."""

    step: Annotated[int, msgspec.Meta(ge=0, lt=STEPS)]
    data_position: Any
    world_size: Count
    extra: Any = None
    plan: str | None = None
    random: RandomRecord | None = None
    optimizer: OptimizerRecord | None = None
    names: dict[str, str] = {}


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    version: int
    heading: Heading
    tensors: dict[str, msgspec.Raw]


class Manifest(msgspec.Struct, frozen=True):
    """A checked `checkpoint.json`. `tensors` by key: "model/NAME", "optimizer/NAME/KEY", "random/DEVICE/RANK"."""

    heading: Heading
    tensors: dict[str, TensorRecord]


def dump(heading: Heading, tensors: Mapping[str, TensorRecord]) -> bytes:
    """The text of a checkpoint's metadata; raises CheckpointError for values JSON cannot hold."""
    raw = {
        "format": FORMAT, "version": VERSION, "heading": msgspec.to_builtins(heading),
        "tensors": {key: msgspec.to_builtins(tensors[key]) for key in sorted(tensors)},
    }  # fmt: skip
    return json.dumps(raw, allow_nan=False).encode()


def load(folder: Path) -> Manifest:
    """Read and check a checkpoint's metadata; raises CheckpointError naming the file and the field."""
    path = folder / FILE
    try:
        size = path.stat().st_size
        if size > SIZE_LIMIT:
            raise CheckpointError(f"{path}: {size:,} bytes; expected at most {SIZE_LIMIT:,}")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
    document = _decode(path, "", text, _Document)
    if (document.format, document.version) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path}: format: expected {FORMAT!r} version {VERSION}, found {document.format!r} version {document.version}"
        )
    tensors = {key: _decode(path, f"tensors[{key!r}]", raw, TensorRecord) for key, raw in document.tensors.items()}
    for key, record in tensors.items():
        _check_tensor(f"{path}: tensors[{key!r}]", record)
    _check_files(path, tensors)
    return Manifest(document.heading, tensors)


def entry(record: TensorRecord, chunk: Chunk) -> Entry:
    """A chunk as a tensor of its file."""
    return Entry(DTYPES[record.dtype], chunk.sizes, chunk.start, chunk.stop)


def _decode(path: Path, where: str, text: bytes | msgspec.Raw, kind: Any) -> Any:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message, _, at = str(error).partition(" - at `$")
        field = (where + at.rstrip("`")).lstrip(".") or "text"
        raise CheckpointError(f"{path}: {field}: {message or type(error).__name__}") from None


def _check_tensor(where: str, record: TensorRecord) -> None:
    """Dtype known; boxes inside the tensor, apart from each other, and all of it covered; byte ranges as long as boxes."""
    if record.dtype not in DTYPES:
        raise CheckpointError(f"{where}.dtype: expected one of {', '.join(DTYPES)}, found {record.dtype!r}")
    if len(record.shape) > DIMS_LIMIT:
        raise CheckpointError(f"{where}.shape: expected at most {DIMS_LIMIT} dims, found {len(record.shape)}")
    width, covered = DTYPES[record.dtype].itemsize, 0
    for i, chunk in enumerate(record.chunks):
        here = f"{where}.chunks[{i}]"
        if not len(chunk.offsets) == len(chunk.sizes) == len(record.shape):
            raise CheckpointError(f"{here}: expected offsets and sizes of {len(record.shape)} dims")
        if any(a + n > whole for a, n, whole in zip(chunk.offsets, chunk.sizes, record.shape, strict=True)):
            raise CheckpointError(
                f"{here}.offsets: a box of {chunk.sizes} at {chunk.offsets} lies outside {record.shape}"
            )
        wanted = math.prod(chunk.sizes) * width
        if chunk.stop - chunk.start != wanted:
            raise CheckpointError(
                f"{here}.stop: expected {wanted:,} bytes for {chunk.sizes} of {record.dtype}, found {chunk.start} to {chunk.stop}"
            )
        if not _PART.fullmatch(chunk.file):
            raise CheckpointError(
                f"{here}.file: expected rank-NNNNN.safetensors in the same folder, found {chunk.file!r}"
            )
        covered += math.prod(chunk.sizes)
    if covered != math.prod(record.shape) or not record.chunks:
        raise CheckpointError(f"{where}.chunks: hold {covered:,} of {math.prod(record.shape):,} elements")
    _check_apart(where, record)


def _check_apart(where: str, record: TensorRecord) -> None:
    """No two boxes share an element: a sweep along the longest dim."""
    if len(record.chunks) < 2 or not record.shape:
        if len(record.chunks) > 1:
            raise CheckpointError(f"{where}.chunks: a tensor without dims has one chunk, found {len(record.chunks)}")
        return
    dim = max(range(len(record.shape)), key=lambda d: record.shape[d])
    open_until: list[tuple[int, int]] = []
    for i in sorted(range(len(record.chunks)), key=lambda i: record.chunks[i].offsets[dim]):
        chunk = record.chunks[i]
        del open_until[: bisect_right(open_until, (chunk.offsets[dim], len(record.chunks)))]
        for _, j in open_until:
            other = record.chunks[j]
            sides = zip(chunk.offsets, chunk.sizes, other.offsets, other.sizes, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in sides):
                raise CheckpointError(f"{where}.chunks[{i}].offsets: the box overlaps chunks[{j}]")
        insort(open_until, (chunk.offsets[dim] + chunk.sizes[dim], i))


def _check_files(path: Path, tensors: Mapping[str, TensorRecord]) -> None:
    """Every byte range lies inside a plain file of the folder, and no two share a byte."""
    spans: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for key, record in tensors.items():
        for i, chunk in enumerate(record.chunks):
            spans[chunk.file].append((chunk.start, chunk.stop, f"tensors[{key!r}].chunks[{i}]"))
    for name, found in spans.items():
        size = _size(path, name, found)
        found.sort()
        for start, stop, where in found:
            if stop > size or start < 8:
                raise CheckpointError(
                    f"{path}: {where}.stop: bytes {start:,} to {stop:,} lie outside {name} ({size:,} bytes)"
                )
        filled = [span for span in found if span[0] < span[1]]
        for (_, end, before), (start, _, where) in itertools.pairwise(filled):
            if start < end:
                raise CheckpointError(f"{path}: {where}.start: byte {start:,} of {name} belongs to {before}")


def _size(path: Path, name: str, spans: Iterable[tuple[int, int, str]]) -> int:
    part = path.with_name(name)
    where = min(spans)[2]
    if part.is_symlink() or not part.is_file():
        raise CheckpointError(f"{path}: {where}.file: {name} is no file of {path.parent}")
    return os.path.getsize(part)

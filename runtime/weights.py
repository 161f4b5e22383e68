"""Weights alone, in safetensors files under the original names: what Hugging Face's `from_pretrained` reads and writes.

    export_safetensors(pm, "out")       model.safetensors, or model-00001-of-00003.safetensors ... and an index; config.json
    load_safetensors(pm, "out")         every rank reads its own slices, and no more

A model may be built on the meta device, planned and applied there, and get its values from files that are larger than the memory of
any rank: nothing whole is ever held.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import CheckpointError
from ..planner.planfile import write_whole
from . import parameters
from .apply import default_device
from .checkpoint import buffers, names
from .checkpoint.blocks import Held
from .checkpoint.names import Named
from .checkpoint.safe_files import Entry, Layout, Slices, lay_out, read_header, write
from .mesh import rank
from .module import ParallelModule
from .ranks import everywhere, gathered

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""Bytes of a file, at most, unless one tensor is larger (the libraries' own default)."""


@dataclass(frozen=True)
class _Source:
    """A tensor to write: what this rank has of it, and the rank that sends it to those without."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    value: Tensor | None = None
    sender: int | None = None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Loaded:
    """What `load_safetensors` did on this rank: bytes copied out of files, names only the files have, names only the module has."""

    bytes_read: int
    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def export_safetensors(pm: nn.Module, folder: str | Path, *, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write a module's parameters and persistent buffers, tied ones once, and its `config.json` where it has a config.

    All ranks call it (a collective); rank 0 writes, one whole tensor at a time in memory. The index, or the single file, is written
    last. Raises CheckpointError for a folder that holds weights already or cannot be written.
    """
    target = Path(folder)
    named = names.named(pm)
    names.check_filled(named, pm._core.unfilled if isinstance(pm, ParallelModule) else (), "export the weights")
    tensors = _everyones(_under_file_names(pm, named))
    files = _divided(tensors, max_shard_bytes)
    everywhere(lambda: _begin(target) if rank() == 0 else None, "write the weights")
    failure = None
    for file, members in files.items():
        values = _wholes({name: tensors[name] for name in members})
        if rank() == 0 and failure is None:
            try:
                _write_file(target / file, {name: tensors[name] for name in members}, values)
            except CheckpointError as error:
                failure = error
        for _ in values:  # gathering is a collective: also where nothing is written
            pass
    everywhere(lambda: _finish(target, pm, files, tensors, failure) if rank() == 0 else None, "write the weights")


def load_safetensors(pm: nn.Module, folder: str | Path, *, strict: bool = True) -> Loaded:
    """Fill a planned or plain module from the safetensors files in `folder` (or one file), each rank reading its own slices.

    Names are the module's; of tied ones any serves. Values are converted to the module's dtypes. A plain module on the meta device
    gets memory on the CPU; non-persistent buffers are computed again. All ranks call it (a collective). With `strict`, names
    that are missing or left over raise CheckpointError before anything is read.
    """
    found = everywhere(lambda: _entries(Path(folder)), "read the weights")
    if not isinstance(pm, ParallelModule):
        buffers.fill_meta(pm, torch.device("cpu"))
    named = names.named(pm)
    sources, missing = _sources(named, found)
    unused = sorted(set(found).difference(*gathered({name for n in named.tensors for name in named.names_of(n)})))
    if strict and (missing or unused):
        what = f"no {missing[0]}, which the module has" if missing else f"{unused[0]}, which the module has not"
        raise CheckpointError(f"{folder}: holds {what} (strict=False goes on without)")
    slices, offload = Slices(), pm.offload if isinstance(pm, ParallelModule) else None

    def read() -> None:
        for name, source in sources.items():
            _read(slices, f"{folder}: {source}", *found[source], named.tensors[name].detach())
            if offload is not None:
                offload.written(name)

    everywhere(read, "read the weights")
    if isinstance(pm, ParallelModule):
        pm._core.loaded(pm.state_dict(keep_vars=True), [named.tensors[name] for name in sources])
    return Loaded(slices.bytes_read, tuple(unused), tuple(missing))


def _read(slices: Slices, where: str, path: Path, entry: Entry, value: Tensor) -> None:
    if entry.shape != tuple(value.shape):
        raise CheckpointError(f"{where}: the file's shape is {entry.shape}, the module's {tuple(value.shape)}")
    if entry.dtype.is_floating_point != value.dtype.is_floating_point:
        raise CheckpointError(f"{where}: the file's dtype is {entry.dtype}, the module's {value.dtype}")
    held = Held.of(value)
    for block in held.blocks:
        slices.copy(path, entry, block.offsets, block.of(held.local))


def _sources(named: Named, found: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The file's name of each of the module's tensors, and those it lacks."""
    sources, missing = {}, []
    for name in named.tensors:
        known = next((n for n in named.names_of(name) if n in found), None)
        if known is None:
            missing.append(name)
        else:
            sources[name] = known
    return sources, missing


def _entries(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """Every tensor in a folder of weights: its file and entry; raises CheckpointError naming the file and what is wrong."""
    if folder.is_file():
        return {name: (folder, entry) for name, entry in read_header(folder).items()}
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        files = [SINGLE]
        wanted = None
    elif index.is_file():
        wanted = _weight_map(index)
        files = sorted(set(wanted.values()))
    else:
        raise CheckpointError(f"{folder}: no weights in it; expected {SINGLE} or {INDEX}")
    found = {}
    for file in files:
        for name, entry in read_header(folder / file).items():
            if wanted is None or wanted.get(name) == file:
                found[name] = (folder / file, entry)
    lost = sorted(set(wanted or ()) - set(found))
    if lost:
        raise CheckpointError(f"{index}: weight_map[{lost[0]!r}]: {(wanted or {})[lost[0]]} does not hold it")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor; files are plain names within the folder."""
    try:
        raw = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a JSON index ({type(error).__name__})") from None
    found = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(found, dict):
        raise CheckpointError(f"{index}: weight_map: expected an object of file names")
    for name, file in found.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.\-]*\.safetensors", file):
            raise CheckpointError(
                f"{index}: weight_map[{name!r}]: expected a .safetensors file of the same folder, found {file!r}"
            )
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index}: weight_map[{name!r}]: no file {file} in {index.parent}")
    return found


def _under_file_names(pm: nn.Module, named: Named) -> dict[str, Tensor]:
    """Each tensor once, under its first name that the model does not itself call tied to another (`_tied_weights_keys`)."""
    ties = getattr(pm, "_tied_weights_keys", None)
    targets = set(ties) if isinstance(ties, Mapping) else set()
    chosen = {}
    for name, value in named.tensors.items():
        known = named.names_of(name)
        chosen[next((n for n in known if n not in targets), name)] = value
    return chosen


def _everyones(own: Mapping[str, Tensor]) -> dict[str, _Source]:
    """The tensors of all ranks, in one order; those of a pipeline have different ones."""
    known = gathered({name: (value.dtype, tuple(value.shape)) for name, value in own.items()})
    found = {}
    for name in dict.fromkeys(name for each in known for name in each):
        holders = [r for r, each in enumerate(known) if name in each]
        sender = holders[0] if len(holders) < len(known) else None
        found[name] = _Source(*known[holders[0]][name], own.get(name), sender)
    return found


def _divided(tensors: Mapping[str, _Source], limit: int) -> dict[str, list[str]]:
    """Names by file, in order, each file within the limit."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, source in tensors.items():
        if groups[-1] and filled + source.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += source.bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": members for i, members in enumerate(groups, 1)}


def _wholes(tensors: Mapping[str, _Source]) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors of a file, in its order; each is gathered when it is asked for."""
    for name in _layout(tensors).entries:
        source = tensors[name]
        value = None if source.value is None else parameters.full(source.value)
        if source.sender is not None:
            if value is None:
                value = torch.empty(source.shape, dtype=source.dtype, device=default_device())
            value = value.contiguous()
            dist.broadcast(value, source.sender)
        assert value is not None
        yield name, value


def _layout(tensors: Mapping[str, _Source]) -> Layout:
    return lay_out({name: (source.dtype, source.shape) for name, source in tensors.items()}, {"format": "pt"})


def _write_file(path: Path, tensors: Mapping[str, _Source], values: Iterator[tuple[str, Tensor]]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    write(part, _layout(tensors), values)
    os.replace(part, path)


def _begin(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot write: {error.strerror or error}") from None
    held = sorted(p.name for p in target.iterdir() if re.fullmatch(r"model.*\.safetensors(\.index\.json)?", p.name))
    if held:
        raise CheckpointError(f"{target}: holds {held[0]} already; export to another folder, or remove it")


def _finish(
    target: Path,
    pm: nn.Module,
    files: Mapping[str, Sequence[str]],
    tensors: Mapping[str, _Source],
    failure: Exception | None,
) -> None:
    """The model's config and, for several files, the index: written last, it makes them one model."""
    if failure is not None:
        raise failure
    save_config = getattr(getattr(pm, "config", None), "save_pretrained", None)
    if callable(save_config):
        save_config(target)
    if len(files) > 1:
        total = sum(source.bytes for source in tensors.values())
        where = {name: file for file, members in files.items() for name in members}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2)
        write_whole(target / INDEX, text + "\n")

"""torch's distributed checkpoint (DCP) on our files: a storage writer and reader that pickle nothing to disk, and its planners.

DCP plans who writes which box (each once, spread over the ranks that hold it) and who reads which part of which box. Its own writer
keeps the metadata as a pickle, which runs code when it is read; here it is JSON (manifest.py), and boxes lie in safetensors files,
one for each rank that writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ...errors import CheckpointError, ShardwrightError
from ..watch import waiting
from . import folders, manifest, safe_files
from .blocks import Block, Held


class Item(Held):
    """A held tensor as DCP's planners ask about it."""

    def __create_write_items__(self, key: str, _: Any) -> list[WriteItem]:
        return [self._item(key, block) for block in self.blocks]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(block) for block in self.blocks]

    def _item(self, key: str, block: Block) -> WriteItem:
        data = TensorWriteData(_chunk(block), TensorProperties(dtype=self.local.dtype), self.shape)
        return WriteItem(MetadataIndex(key, block.offsets), WriteItemType.SHARD, tensor_data=data)


def save(
    held: Mapping[str, Held],
    heading: manifest.Heading,
    folder: Path,
    *,
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint of what all ranks hold (a collective over `group`, default all ranks), whole or not at all.

    Raises CheckpointError, on every rank, where one of them cannot write.
    """
    state = {key: Item(value.local, value.shape, value.blocks) for key, value in held.items()}
    writer = Writer(folder, heading, keep)
    # A save in the background has a group and a thread of its own; where the main thread waits is the main thread's to say.
    wait = waiting("a checkpoint's save") if group is None else contextlib.nullcontext()
    with wait:
        _run(lambda alone: dcp.save(state, storage_writer=writer, planner=_Save(), process_group=group, no_dist=alone))


def load(held: Mapping[str, Held], found: manifest.Manifest, folder: Path) -> int:
    """Read every held box from a checkpoint, across whatever boxes it was written in (a collective); returns bytes read.

    Raises CheckpointError, on every rank, where one of them cannot read.
    """
    state = {key: Item(value.local, value.shape, value.blocks) for key, value in held.items()}
    reader = Reader(folder, found)
    with waiting("a checkpoint's load"):
        _run(lambda alone: dcp.load(state, storage_reader=reader, planner=_Load(), no_dist=alone))
    return reader.slices.bytes_read


class Writer(dcp.StorageWriter):
    """One safetensors file a rank, then the metadata and the folder's name, by rank 0."""

    def __init__(self, folder: Path, heading: manifest.Heading, keep: int) -> None:
        super().__init__()
        self.folder, self.heading, self.keep = folder, heading, keep
        self._part = folder

    def reset(self, checkpoint_id: Any = None) -> None:
        """A writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up before the plans are known."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before anyone writes: make the folder, and tell every rank its file."""
        self._part = folders.begin(self.folder, self.heading.step)
        return [
            dataclasses.replace(plan, storage_data=(self._part.name, f"rank-{i:05d}.safetensors"))
            for i, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's boxes; the result says where each one lies."""
        part, file = plan.storage_data
        items = {_label(item): item for item in plan.items}
        values = {label: _chunk_of(item) for label, item in items.items()}
        done: Future[list[WriteResult]] = Future()
        if not items:
            done.set_result([])
            return done
        layout = safe_files.lay_out({label: (_dtype(items[label]), c.sizes) for label, c in values.items()}, {})
        path = self.folder / part / file
        safe_files.write(path, layout, ((name, _value(planner, items[name])) for name in layout.entries))
        done.set_result(
            [
                WriteResult(items[name].index, e.stop - e.start, (file, e.start, e.stop))
                for name, e in layout.entries.items()
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all have written: check that their files are here, then make the checkpoint current."""
        records: dict[str, list[manifest.Chunk]] = {}
        ends: dict[str, int] = {}
        where = {(r.index.fqn, r.index.offset): r.storage_data for rank in results for r in rank}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            for chunk in tensor.chunks:
                file, start, stop = where[key, chunk.offsets]
                ends[file] = max(ends.get(file, 0), stop)
                records.setdefault(key, []).append(
                    manifest.Chunk(tuple(chunk.offsets), tuple(chunk.sizes), file, start, stop)
                )
        for file, end in ends.items():
            _check_here(self._part / file, end)
        tensors = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            dtype = safe_files.dtype_name(tensor.properties.dtype, key)
            tensors[key] = manifest.TensorRecord(dtype, tuple(tensor.size), tuple(records[key]))
        folders.commit(self._part, manifest.dump(self.heading, tensors), keep=self.keep)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Checkpoints are folders; DCP does not choose this writer by a name."""
        return False


class Reader(dcp.StorageReader):
    """Reads boxes by a checked manifest; `slices.bytes_read` counts."""

    def __init__(self, folder: Path, found: manifest.Manifest) -> None:
        super().__init__()
        self.folder, self.found, self.slices = folder, found, safe_files.Slices()

    def reset(self, checkpoint_id: Any = None) -> None:
        """A reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """The manifest in DCP's words."""
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for key, record in self.found.tensors.items():
            properties = TensorProperties(dtype=safe_files.DTYPES[record.dtype])
            chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in record.chunks]
            found[key] = TensorStorageMetadata(properties, torch.Size(record.shape), chunks)
        return Metadata(found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **options: Any) -> None:
        """The manifest is known already."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every planned part of a box into the memory it is for."""
        places = {
            (key, chunk.offsets): (record, chunk)
            for key, record in self.found.tensors.items()
            for chunk in record.chunks
        }
        for item in plan.items:
            record, chunk = places[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            into = planner.resolve_tensor(item).detach()
            self.slices.copy(self.folder / chunk.file, manifest.entry(record, chunk), item.storage_offsets, into)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Checkpoints are folders; DCP does not choose this reader by a name."""
        return False


class _Save(dcp.DefaultSavePlanner):
    """Looks boxes up by their offsets."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _piece(self.state_dict, index)


class _Load(dcp.DefaultLoadPlanner):
    """Looks boxes up by their offsets."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """As the parent's, but for its search for meta tensors, which drops whatever is no tensor."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _piece(self.state_dict, index)


def _piece(state: Mapping[str, Any], index: MetadataIndex) -> Tensor:
    item = state[index.fqn]
    assert isinstance(item, Item)
    return item.piece(index.offset or ())


def _chunk(block: Block) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes))


def _chunk_of(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    return item.tensor_data.chunk


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype


def _label(item: WriteItem) -> str:
    """The box's name in its file: the tensor's key, and its offsets where it is a part."""
    assert item.tensor_data is not None
    offsets = ",".join(str(n) for n in item.index.offset or ())
    return item.index.fqn if item.tensor_data.size == _chunk_of(item).sizes else f"{item.index.fqn}[{offsets}]"


def _value(planner: SavePlanner, item: WriteItem) -> Tensor:
    value = planner.resolve_data(item)
    assert isinstance(value, Tensor)
    return value


def _check_here(path: Path, end: int) -> None:
    """Rank 0 names the folder for all: it must see the others' files, whole."""
    size = path.stat().st_size if path.is_file() else None
    if size != end:
        found = "is not there" if size is None else f"has {size:,} bytes, expected {end:,}"
        raise CheckpointError(f"{path}: {found} on rank 0's machine; save to a folder that all ranks share")


def _run(action: Callable[[bool], Any]) -> None:
    """Call DCP (with True where there is no process group); what it collected from the ranks becomes one clear error."""
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
            action(alone)
    except dcp.CheckpointException as problem:
        where, (error, _) = min(problem.failures.items(), key=lambda item: not isinstance(item[1][0], ShardwrightError))
        if isinstance(error, ShardwrightError):
            raise error from None
        raise CheckpointError(f"rank {where}: {type(error).__name__}: {error}") from problem

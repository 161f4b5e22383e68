"""Files of weights: the format against the library, hostile files, ties, and models on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shardwright.errors import CheckpointError, UsageError
from shardwright.runtime import state, weights
from shardwright.runtime.checkpoint.safe_files import DTYPES, Slices, lay_out, read_header, write
from torch import Tensor, nn


def values() -> dict[str, Tensor]:
    """A tensor of every dtype, of odd shapes."""
    found = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "cut": torch.arange(24.0).view(4, 6).t()}
    for name, dtype in DTYPES.items():
        found[name] = torch.arange(15).remainder(2).view(3, 5).to(dtype)
    return found


def test_the_library_reads_what_is_written_here(tmp_path: Path) -> None:
    own = values()
    layout = lay_out({n: (v.dtype, v.shape) for n, v in own.items()}, {"format": "pt"})
    write(tmp_path / "x.safetensors", layout, ((n, own[n]) for n in layout.entries))
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == own.keys()
    for name, value in own.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].double(), value.double()), name


def test_what_the_library_writes_is_read_here_box_by_box(tmp_path: Path) -> None:
    own = {n: v.contiguous() for n, v in values().items()}
    save_file(own, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries, slices = read_header(tmp_path / "x.safetensors"), Slices()
    for name, value in own.items():
        into = torch.empty_like(value)
        slices.copy(tmp_path / "x.safetensors", entries[name], (0,) * value.dim(), into)
        assert torch.equal(into.double(), value.double()), name
    before, box = slices.bytes_read, torch.empty(2, 3)
    slices.copy(tmp_path / "x.safetensors", entries["cut"], (3, 1), box)
    assert torch.equal(box, own["cut"][3:5, 1:4])
    assert slices.bytes_read - before == 24


def test_unaligned_files_are_read(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert len(text) % 4
    body = torch.tensor([1.0, 2.0]).numpy().tobytes()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + body)
    into = torch.empty(2)
    Slices().copy(tmp_path / "x", read_header(tmp_path / "x")["a"], (0,), into)
    assert into.tolist() == [1.0, 2.0]


def record(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": record(dtype="O8")}, "a: dtype: expected one of"),
        ({"a": record(dtype=["F32"])}, "a: dtype: expected one of"),
        ({"a": record(shape=[2, -2])}, "a: shape: expected a list of integers"),
        ({"a": record(shape=[True, 4])}, "a: shape: expected a list of integers"),
        ({"a": record(shape=[1 << 61, 1 << 61])}, "a: data_offsets: expected"),
        ({"a": record(shape=[1] * 65)}, "a: shape: expected at most 64 dims"),
        ({"a": record(data_offsets=[0, 12])}, "a: data_offsets: expected 16 bytes"),
        ({"a": record(data_offsets=[16, 0])}, "a: data_offsets: expected 16 bytes"),
        ({"a": record(), "b": record()}, "b: data_offsets: overlaps"),
        ({"a": record(), "b": record(data_offsets=[20, 36])}, "b: data_offsets: leaves a hole"),
        ({"a": record(), "b": record(data_offsets=[16, 32])}, "b: data_offsets: ends at byte"),
        ({}, "the tensors end at byte"),
        ({"a": record(more=1)}, "a: expected dtype, shape and data_offsets"),
        ({"a": 3}, "a: expected dtype, shape and data_offsets"),
        ([], "expected a JSON object"),
    ],
)
def test_hostile_headers_are_refused(header: Any, message: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(CheckpointError) as raised:
        weights.load_safetensors(nn.Linear(2, 2), tmp_path)
    assert message in str(raised.value)
    assert "model.safetensors" in str(raised.value)


@pytest.mark.parametrize("text", [b"", b"\x00" * 7, b"\xff" * 64, (5).to_bytes(8, "little") + b"[[[[[" + bytes(16)])
def test_files_that_are_none_are_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: header"):
        weights.load_safetensors(nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/tmp/model.safetensors", "other.bin", "lost.safetensors", 3])
def test_hostile_indices_are_refused(file: Any, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": file}}))
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map\['weight'\]"):
        weights.load_safetensors(nn.Linear(2, 2), inner)


# -- modules


class Tied(nn.Module):
    """Two names for one weight, a persistent and a computed buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(3))
        self.positions = Positions()


class Positions(nn.Module):
    """Computes its table again when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(5), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.table.copy_(torch.arange(5.0) ** 2)


def meta() -> Tied:
    with torch.device("meta"):
        return Tied()


def test_ties_and_buffers_of_a_meta_model(tmp_path: Path) -> None:
    model = Tied()
    model.count.fill_(4)
    weights.export_safetensors(model, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"embed.weight", "head.bias", "count"}
    made = meta()
    loaded = weights.load_safetensors(made, tmp_path)
    assert made.head.weight is made.embed.weight
    assert torch.equal(made.positions.table, model.positions.table)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in made.state_dict().items())
    assert loaded.bytes_read == (28 + 7 + 3) * 4
    save_file({"head.weight": torch.ones(7, 4), "head.bias": torch.ones(7), "count": torch.ones(3)}, tmp_path / "other")
    assert weights.load_safetensors(made, tmp_path / "other").missing == ()
    assert torch.equal(made.embed.weight, torch.ones(7, 4))
    state.save_checkpoint(tmp_path / "run", model, step=1)
    again = meta()
    state.load_checkpoint(tmp_path / "run", again)
    assert torch.equal(again.head.weight, model.embed.weight)
    assert torch.equal(again.positions.table, model.positions.table)


def test_a_buffer_nobody_computes_is_an_error(tmp_path: Path) -> None:
    weights.export_safetensors(Tied(), tmp_path)
    made = meta()
    made.positions.reset_parameters = lambda: None  # leaves the table as it is
    with pytest.raises(
        UsageError, match=r"buffer positions\.table is on the meta device, no file holds it, and Positions"
    ):
        weights.load_safetensors(made, tmp_path)


def test_names_and_shapes_are_checked(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    save_file({"weight": torch.ones(2, 3), "more": torch.ones(1)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="holds no bias, which the module has"):
        weights.load_safetensors(model, tmp_path / "a")
    loaded = weights.load_safetensors(model, tmp_path / "a", strict=False)
    assert (loaded.missing, loaded.unused) == (("bias",), ("more",))
    save_file({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"weight: the file's shape is \(3, 2\)"):
        weights.load_safetensors(model, tmp_path / "b")
    save_file({"weight": torch.ones(2, 3, dtype=torch.int8), "bias": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"weight: the file's dtype is torch\.int8"):
        weights.load_safetensors(model, tmp_path / "c")
    save_file({"weight": torch.full((2, 3), 0.5).half(), "bias": torch.ones(2)}, tmp_path / "d")
    weights.load_safetensors(model, tmp_path / "d")  # converted
    assert torch.equal(model.weight, torch.full((2, 3), 0.5))
    with pytest.raises(UsageError, match="have no values yet"), torch.device("meta"):
        weights.export_safetensors(nn.Linear(2, 2), tmp_path / "out")

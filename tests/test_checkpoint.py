"""Checkpoints of one process: exact resume, whole folders or none, no pickles, and what hostile files get."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from shardwright.errors import CheckpointError, UsageError
from shardwright.runtime import state
from shardwright.runtime.checkpoint import folders, manifest
from torch import nn

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.95)),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd without state": lambda p: torch.optim.SGD(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


class Run:
    """A small model with batch statistics and dropout, its optimizer, scheduler and losses."""

    def __init__(self, name: str = "adamw", seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        )
        self.model[3].weight.requires_grad_(name != "frozen")
        self.optimizer = OPTIMIZERS[name](
            [{"params": self.model[:3].parameters()}, {"params": self.model[3:].parameters(), "lr": 0.05}]
        )
        self.at = 0

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(6, 4)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.at += 1
        return loss.item()

    def save(self, folder: Path, **options: Any) -> None:
        state.save_checkpoint(folder, self.model, self.optimizer, step=self.at, data_position=self.at, **options)

    def load(self, folder: Path) -> state.Restored:
        found = state.load_checkpoint(folder, self.model, self.optimizer)
        self.at = found.step
        return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    run = Run(name)
    for _ in range(3):
        run.step()
    run.optimizer.param_groups[0]["lr"] *= 0.5
    run.save(tmp_path, extra={"scheduler": {"last_epoch": 3}})
    wanted = [run.step() for _ in range(4)]
    again = Run(name, seed=9)
    again.step()
    found = again.load(tmp_path)
    assert (found.step, found.data_position, found.extra) == (3, 3, {"scheduler": {"last_epoch": 3}})
    assert float(again.optimizer.param_groups[0]["lr"]) == float(run.optimizer.param_groups[0]["lr"])
    assert [again.step() for _ in range(4)] == wanted
    for value, other in zip(run.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(value, other)


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import safe_open

    run = Run()
    run.step()
    run.save(tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.json", "rank-00000.safetensors"]
    with safe_open(folder / "rank-00000.safetensors", "pt") as file:  # another reader of the format agrees
        assert torch.equal(file.get_tensor("model/0.weight"), run.model[0].weight)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refused)
    Run(seed=1).load(tmp_path)


def test_old_ones_are_kept_to_a_number(tmp_path: Path) -> None:
    run = Run()
    for _ in range(5):
        run.step()
        run.save(tmp_path, keep=3)
    assert [p.name for p in folders.checkpoints(tmp_path)] == ["step-00000003", "step-00000004", "step-00000005"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004", "step-00000005"]
    run.save(tmp_path, keep=3)  # the same step again
    assert len(list(tmp_path.iterdir())) == 3
    run.at = 4
    with pytest.raises(CheckpointError, match="holds step-00000005, later than step 4"):
        run.save(tmp_path)
    assert Run(seed=1).load(tmp_path / "step-00000003").step == 3


def test_background_saves_hold_the_moment_and_report_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    run.step()
    run.save(tmp_path / "a", async_=True)
    wanted = [run.step() for _ in range(2)]  # changes everything while the thread writes
    state.finish_saving(run.model)
    again = Run(seed=3)
    again.load(tmp_path / "a")
    assert [again.step() for _ in range(2)] == wanted
    (tmp_path / "b").write_text("a file where a folder is wanted")
    run.save(tmp_path / "b", async_=True)
    with pytest.raises(CheckpointError, match=r"step 3 was not saved: .*cannot write"):
        run.save(tmp_path / "a")
    run.save(tmp_path / "a")  # reported once
    assert folders.latest(tmp_path / "a") == tmp_path / "a" / "step-00000003"


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    run = Run()
    run.step()
    run.save(tmp_path)
    run.step()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write: File too large"):
            run.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert Run(seed=1).load(tmp_path).step == 1
    run.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


# -- kills


def killed_at(action: Callable[[], None], line: int) -> bool:
    """Whether a child running `action` was killed when it came to its `line`-th line in files of checkpoints or folders."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if "runtime/checkpoint" not in frame.f_code.co_filename and not frame.f_code.co_filename.endswith("shutil.py"):
            return None
        left -= event == "line"
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        action()
    except BaseException:
        os._exit(1)
    os._exit(0)


def kills(run: Run, folder: Path, lines: Iterator[int]) -> int:
    """Kill saves at these lines; after each, the newest checkpoint is whole and is the one before or the one being saved."""
    count = 0
    for line in lines:
        before = folders.latest(folder)
        assert before is not None
        run.at += 1
        if not killed_at(lambda: run.save(folder, keep=2), line):
            break
        count += 1
        found = Run(seed=1).load(folder).step
        assert found in (int(before.name[5:13]), run.at), line
    return count


def test_a_kill_at_any_line_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    run = Run()
    run.step()
    run.save(tmp_path)
    assert kills(run, tmp_path, iter(range(3, 10_000, 241))) > 5
    run.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kill_while_a_step_is_saved_again(tmp_path: Path) -> None:
    run = Run()
    run.step()
    for line in range(100, 10_000, 311):
        run.save(tmp_path)
        if not killed_at(lambda: run.save(tmp_path), line):
            break
        assert Run(seed=1).load(tmp_path).step == 1, line
    assert line > 500


@pytest.mark.nightly
def test_kills_at_every_third_line_of_a_save(tmp_path: Path) -> None:
    run = Run()
    run.step()
    run.save(tmp_path)
    assert kills(run, tmp_path, iter(range(0, 100_000, 3))) > 1000


# -- hostile files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    run = Run()
    run.step()
    run.save(tmp_path)
    return tmp_path / "step-00000001"


def spoiled(folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """Change the metadata; the message of the refusal."""
    path = folder / manifest.FILE
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    before = Run(seed=1)
    kept = {k: v.clone() for k, v in before.model.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        before.load(folder)
    assert all(torch.equal(v, kept[k]) for k, v in before.model.state_dict().items())  # nothing was loaded
    return str(raised.value)


def chunk(raw: dict[str, Any], key: str = "model/0.weight") -> dict[str, Any]:
    return raw["tensors"][key]["chunks"][0]


KEY = "tensors['model/0.weight']"
CHUNK = f"{KEY}.chunks[0]"
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another folder": (lambda r: chunk(r).update(file="../../etc/passwd"), f"{CHUNK}.file: expected rank-NNNNN"),
    "an absolute path": (lambda r: chunk(r).update(file="/etc/rank-00000.safetensors"), f"{CHUNK}.file: expected rank-"),
    "a missing file": (lambda r: chunk(r).update(file="rank-00009.safetensors"), f"{CHUNK}.file: rank-00009"),
    "bytes beyond the file": (lambda r: chunk(r).update(start=1 << 40, stop=(1 << 40) + 128), f"{CHUNK}.stop: bytes 1,099,511"),
    "bytes of the header": (lambda r: chunk(r).update(start=0, stop=128), f"{CHUNK}.stop: bytes 0 to 128 lie outside"),
    "bytes of another": (
        lambda r: chunk(r).update({k: chunk(r, "optimizer/0.weight/exp_avg")[k] for k in ("start", "stop")}),
        "belongs to tensors[",
    ),
    "too few bytes": (lambda r: chunk(r).update(stop=chunk(r)["stop"] - 4), f"{CHUNK}.stop: expected 128 bytes"),
    "negative": (lambda r: chunk(r).update(start=-8), f"{CHUNK}.start: Expected `int` >= 0"),
    "not a number": (lambda r: chunk(r).update(start="8"), f"{CHUNK}.start: Expected `int`, got `str`"),
    "more than 64 bits": (lambda r: chunk(r).update(stop=1 << 80), f"{CHUNK}.stop: "),
    "an absurd shape": (lambda r: r["tensors"]["model/0.weight"].update(shape=[1 << 40, 1 << 40]), f"{KEY}.chunks: hold 32 of"),
    "many dims": (lambda r: r["tensors"]["model/0.weight"].update(shape=[1] * 99), f"{KEY}.shape: expected at most 64"),
    "fewer dims": (lambda r: chunk(r).update(sizes=[32]), f"{CHUNK}: expected offsets and sizes of 2 dims"),
    "outside the tensor": (lambda r: chunk(r).update(offsets=[4, 0]), f"{CHUNK}.offsets: a box of (8, 4) at (4, 0) lies outside"),
    "overlapping boxes": (
        lambda r: r["tensors"]["model/0.weight"].update(
            chunks=[
                {**chunk(r), "sizes": [5, 4], "stop": chunk(r)["start"] + 80},
                {**chunk(r), "offsets": [4, 0], "sizes": [3, 4], "start": chunk(r)["start"] + 80},
            ]
        ),
        f"{KEY}.chunks[1].offsets: the box overlaps chunks[0]",
    ),
    "a part left out": (
        lambda r: chunk(r).update(sizes=[7, 4], stop=chunk(r)["stop"] - 16), f"{KEY}.chunks: hold 28 of 32 elements"
    ),
    "no boxes": (lambda r: r["tensors"]["model/0.weight"].update(chunks=[]), f"{KEY}.chunks: hold 0 of 32"),
    "a dtype of no file": (lambda r: r["tensors"]["model/0.weight"].update(dtype="O64"), f"{KEY}.dtype: expected one of"),
    "a narrower dtype": (lambda r: r["tensors"]["model/0.weight"].update(dtype="F16"), f"{CHUNK}.stop: expected 64 bytes"),
    "a wider dtype": (
        lambda r: r["tensors"]["model/0.bias"].update(
            dtype="F64", chunks=[{**chunk(r, "model/0.bias"), "stop": chunk(r, "model/0.bias")["start"] + 64}]
        ),
        "belongs to tensors[",
    ),
    "another field": (lambda r: chunk(r).update(code="import os"), f"{CHUNK}: Object contains unknown field `code`"),
    "another version": (lambda r: r.update(version=7), "format: expected 'shardwright checkpoint' version 1"),
    "no step": (lambda r: r["heading"].pop("step"), "heading: Object missing required field `step`"),
    "a missing tensor": (lambda r: r["tensors"].pop("model/0.weight"), "holds no 0.weight, which the module has"),
    "another tensor": (
        lambda r: r["tensors"].update({"model/4.more": r["tensors"].pop("optimizer/0.weight/exp_avg")}), "module has no 4.more"
    ),
    "a step without a name": (lambda r: r["heading"].update(step=10**18), "heading.step: Expected `int`"),
    "an option of another type": (
        lambda r: r["heading"]["optimizer"]["groups"][0]["options"].update(lr="fast"),
        "option lr of the optimizer's group 0: 'fast' cannot take the place of 0.1",
    ),
    "an option that is an object": (
        lambda r: r["heading"]["optimizer"]["groups"][1]["options"].update(more={"a": 1}), "option more of the optimizer's group 1"
    ),
    "a state twice": (
        lambda r: r["heading"]["optimizer"].update(scalars={"0.weight": {"exp_avg": 3}}), "scalars: 0.weight has values that no"
    ),
    "a state that is an object": (
        lambda r: r["heading"]["optimizer"].update(scalars={"0.weight": {"more": {}}}), "scalars: 0.weight has values that no"
    ),
    "another optimizer": (lambda r: r["heading"]["optimizer"].update(kind="SGD"), "is of the optimizer SGD, not AdamW"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_metadata_is_refused(case: str, saved: Path) -> None:
    change, message = HOSTILE[case]
    found = spoiled(saved, change)
    assert message in found
    assert "step-00000001" in found


def test_metadata_that_is_no_json_is_refused(saved: Path) -> None:
    path = saved / manifest.FILE

    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(saved / "attacked"),)

    for text in (pickle.dumps(Attack()), b"", b"[" * 100_000, b'{"format": "\xff"}', b"null", b'{"format": NaN}'):
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
            Run(seed=1).load(saved)
    assert not (saved / "attacked").exists()


def test_a_random_state_that_is_none_is_refused(saved: Path) -> None:
    (record,) = (chunk(raw, "random/cpu/0") for raw in [json.loads((saved / manifest.FILE).read_text())])
    with (saved / record["file"]).open("r+b") as file:
        file.seek(record["start"])
        file.write(b"\x7f" * (record["stop"] - record["start"]))
    with pytest.raises(CheckpointError, match="random/cpu/0: not the state of a random generator"):
        Run(seed=1).load(saved)


def test_links_out_of_the_folder_are_refused(saved: Path, tmp_path: Path) -> None:
    part = saved / "rank-00000.safetensors"
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is no file of"):
        Run(seed=1).load(saved)


def test_a_truncated_file_is_refused(saved: Path) -> None:
    part = saved / "rank-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="lie outside rank-00000"):
        Run(seed=1).load(saved)


def test_what_does_not_fit_is_refused(saved: Path, tmp_path: Path) -> None:
    other = Run()
    other.model[4] = nn.Linear(8, 5)
    with pytest.raises(CheckpointError, match=r"4\.weight: the checkpoint's shape is \(3, 8\), the module's \(5, 8\)"):
        state.load_checkpoint(saved, other.model)
    half = Run().model.bfloat16()
    with pytest.raises(CheckpointError, match="would lose digits"):
        state.load_checkpoint(saved, half)
    wide = Run().model.double()
    state.load_checkpoint(saved, wide)  # loses nothing
    with pytest.raises(CheckpointError, match="no checkpoint in it"):
        state.load_checkpoint(tmp_path / "nowhere", wide)
    with pytest.raises(UsageError, match="does not have"):
        state.save_checkpoint(tmp_path, wide, torch.optim.SGD(other.model.parameters()), step=1)
    with pytest.raises(CheckpointError, match="not a object"):
        state.save_checkpoint(tmp_path, wide, torch.optim.SGD([{"params": wide.parameters(), "tag": object()}]), step=1)

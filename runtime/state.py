"""Checkpoints of a training run: saved by all ranks, loaded under any plan, on any number of ranks, or with no plan at all.

    save_checkpoint("run", pm, optimizer, step=40, data_position=40)
    restored = load_checkpoint("run", pm, optimizer)        # the newest whole one; restored.step == 40

What is kept: parameters and persistent buffers, the optimizer's states and options by parameter name, random state, the step and
the position in the data. Every rank writes boxes of global tensors (checkpoint/blocks.py), each box once; a reader takes the
parts that meet its own boxes. Same plan and ranks: losses go on bit for bit. docs/checkpoints.md describes the files.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import CheckpointError, UsageError
from .checkpoint import buffers, folders, manifest, names, storage
from .checkpoint import optimizer as states
from .checkpoint.blocks import Held
from .checkpoint.names import Named
from .checkpoint.safe_files import DTYPES
from .mesh import rank, world_size
from .module import ParallelModule
from .ranks import everywhere, from_first, gathered
from .watch import active_watch, is_lost, waiting

latest = folders.latest
GROUP_SECONDS = 600.0
"""How long a rank that writes in the background waits for the others, where no watch gives the limit."""


@dataclass(frozen=True)
class Restored:
    """What was loaded: from where, the step and data position it was saved with, `extra`, and the bytes this rank read."""

    path: Path
    step: int
    data_position: Any
    extra: Any
    bytes_read: int


def save_checkpoint(
    folder: str | Path, pm: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, step: int, data_position: Any = None,
    extra: Any = None, async_: bool = False, keep: int = 2,
) -> None:  # fmt: skip
    """Save FOLDER/step-NNNNNNNN, whole or not at all, and keep the newest `keep`; all ranks call it (a collective).

    `data_position` and `extra` are any JSON values (a scheduler's state dict, say). With `async_` the call returns when
    everything is copied to host memory, and a thread writes; what goes wrong there is raised by the next call of
    `save_checkpoint`, `load_checkpoint` or `finish_saving`. Raises CheckpointError where nothing could be saved.
    """
    if keep < 1 or not 0 <= step < manifest.STEPS:
        raise UsageError(f"save_checkpoint(step={step}, keep={keep}): expected a step from 0 and keep from 1 on")
    finish_saving(pm)
    named, held, record = everywhere(lambda: _collected(pm, optimizer), "collect its state")
    heading = manifest.Heading(
        step=step, data_position=data_position, extra=extra, world_size=world_size(),
        plan=pm.plan.digest if isinstance(pm, ParallelModule) else None,
        random=_random(pm), optimizer=None if record is None else states.merged(gathered(record)), names=dict(named.first),
    )  # fmt: skip
    everywhere(lambda: manifest.dump(heading, {}), "write the metadata")
    if async_:
        _saver(pm).start(held, heading, Path(folder), keep)
    else:
        storage.save(held, heading, Path(folder), keep=keep)


def load_checkpoint(
    folder: str | Path, pm: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Restored:  # fmt: skip
    """Load the newest whole checkpoint in `folder` (or the one that `folder` is) into a module and its optimizer.

    All ranks call it (a collective). The module may run under another plan, on other ranks or be a plain one. Raises
    CheckpointError for files that are not what they claim and for a checkpoint of something else; what was loaded by then is
    loaded, so nothing should be run on after that.
    """
    finish_saving(pm)
    path = Path(from_first(str(everywhere(lambda: folders.resolve(folder), "find a checkpoint"))))
    found = everywhere(lambda: manifest.load(path), "read the checkpoint")
    if optimizer is None and not isinstance(pm, ParallelModule):
        buffers.fill_meta(pm, torch.device("cpu"))
    named = names.named(pm)
    wanted = everywhere(lambda: _wanted(path, named, optimizer, found), "load the checkpoint")
    mine = {key for key in found.tensors if key.startswith("model/")}
    left = sorted(mine.difference(*gathered(set(wanted))))
    if left:
        raise CheckpointError(f"{path}: the module has no {left[0].removeprefix('model/')}, which the checkpoint holds")
    drawn = {f"random/{d}/{rank()}": torch.empty_like(s) for d, s in _generators().items()}
    if found.heading.world_size == world_size():
        wanted |= {key: Held.of(s) for key, s in drawn.items() if _fits(found, key, s)}
    count = storage.load(wanted, found, path)
    own = {key: s for key, s in drawn.items() if key in wanted}
    everywhere(lambda: _restore(path, pm, optimizer, found, own), "take over the checkpoint")
    heading = found.heading
    return Restored(path, heading.step, heading.data_position, heading.extra, count)


def finish_saving(pm: nn.Module) -> None:
    """Wait for a checkpoint that is being written in the background; raises CheckpointError where that failed."""
    saver = vars(pm).get("_saver")
    if saver is not None:
        saver.finish()


class _Saver:
    """One module's background saves: at most one at a time, over a process group of their own."""

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.step = 0

    def start(self, held: dict[str, Held], heading: manifest.Heading, folder: Path, keep: int) -> None:
        """Copy to host memory, then write in a thread; the thread's collectives must not meet those of training."""
        if dist.is_initialized() and self.group is None:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=GROUP_SECONDS))
            watch = active_watch()
            if watch is not None:
                watch.hold(self.group, "the background save")
        copies = {key: value.on_host() for key, value in held.items()}
        self.step = heading.step

        def write() -> None:
            try:
                storage.save(copies, heading, folder, keep=keep, group=self.group)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=write, name="checkpoint")
        self.thread.start()

    def finish(self) -> None:
        with waiting("the background save"):
            if self.thread is not None:
                self.thread.join()
                self.thread = None
            error, self.error = self.error, None
            if isinstance(error, RuntimeError) and is_lost(error):
                raise error
        if error is not None:
            raise CheckpointError(f"the checkpoint of step {self.step} was not saved: {error}") from error

    def __deepcopy__(self, _: Any) -> _Saver:
        return _Saver()


def _saver(pm: nn.Module) -> _Saver:
    found: _Saver = vars(pm).setdefault("_saver", _Saver())
    return found


def _collected(
    pm: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[Named, dict[str, Held], manifest.OptimizerRecord | None]:
    """What this rank holds, by key, and its optimizer's groups."""
    named = names.named(pm)
    names.check_filled(named, _unfilled(pm), "save a checkpoint")
    held = {f"model/{name}": Held.of(value.detach()) for name, value in named.tensors.items()}
    held |= {f"random/{device}/{rank()}": Held.of(state) for device, state in _generators().items()}
    if optimizer is None:
        return named, held, None
    return named, held | states.held(optimizer, named), states.record(optimizer, named)


def _wanted(
    path: Path, named: Named, optimizer: torch.optim.Optimizer | None, found: manifest.Manifest
) -> dict[str, Held]:
    """What this rank reads, by the checkpoint's keys; raises CheckpointError where the two do not fit."""
    wanted: dict[str, Held] = {}
    saved_as: dict[str, str] = {}
    for name, value in named.tensors.items():
        candidates = (found.heading.names.get(n, n) for n in named.names_of(name))
        known = next((n for n in candidates if f"model/{n}" in found.tensors), None)
        if known is None:
            raise CheckpointError(f"{path}: holds no {name}, which the module has")
        saved_as[name], key = known, f"model/{known}"
        _check_fit(f"{path}: {name}", found.tensors[key], value)
        wanted[key] = Held.of(value.detach())
    if optimizer is not None:
        wanted |= states.prepare(optimizer, named, path, found, saved_as)
    for key, held in wanted.items():
        if key not in found.tensors or tuple(held.shape) != found.tensors[key].shape:
            raise CheckpointError(f"{path}: {key}: expected a tensor of shape {tuple(held.shape)}")
    return wanted


def _check_fit(where: str, record: manifest.TensorRecord, value: torch.Tensor) -> None:
    """Same shape, and a dtype that loses nothing."""
    if record.shape != tuple(value.shape):
        raise CheckpointError(f"{where}: the checkpoint's shape is {record.shape}, the module's {tuple(value.shape)}")
    saved = DTYPES[record.dtype]
    if saved != value.dtype and torch.promote_types(saved, value.dtype) != value.dtype:
        raise CheckpointError(
            f"{where}: the checkpoint holds {saved}, the module {value.dtype}, which would lose digits; convert the module, or "
            "export and load weights alone (export_safetensors, load_safetensors)"
        )


def _fits(found: manifest.Manifest, key: str, state: torch.Tensor) -> bool:
    record = found.tensors.get(key)
    return record is not None and record.shape == tuple(state.shape) and DTYPES[record.dtype] == state.dtype


def _generators() -> dict[str, torch.Tensor]:
    """State of torch's random generators of this process, by device."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _random(pm: nn.Module) -> manifest.RandomRecord | None:
    if not isinstance(pm, ParallelModule):
        return None
    return manifest.RandomRecord(*pm._core.random_state())


def _unfilled(pm: nn.Module) -> set[str]:
    return pm._core.unfilled if isinstance(pm, ParallelModule) else set()


def _restore(
    path: Path, pm: nn.Module, optimizer: torch.optim.Optimizer | None, found: manifest.Manifest, drawn: dict[str, torch.Tensor]
) -> None:  # fmt: skip
    """Everything that is no tensor of module or optimizer."""
    heading = found.heading
    if optimizer is not None and heading.optimizer is not None:
        states.restore_options(optimizer, heading.optimizer)
    if isinstance(pm, ParallelModule):
        tensors = pm.state_dict(keep_vars=True)
        pm._core.loaded(tensors, tensors.values())
        if heading.random is not None:
            pm._core.set_random_state(heading.random.seed, heading.random.calls)
    for key, state in drawn.items():
        put = torch.cuda.set_rng_state if key.startswith("random/cuda/") else torch.set_rng_state
        try:
            put(state)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: {key}: not the state of a random generator ({error})") from None

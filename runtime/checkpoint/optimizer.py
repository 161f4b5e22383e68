"""An optimizer's state by parameter name: tensors as boxes, everything else as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...errors import CheckpointError, UsageError
from ..optimizers import WAYS
from ..torch_compat import like_dtensor, make_dtensor
from . import manifest
from .blocks import Held
from .names import Named
from .safe_files import DTYPES

Values = Mapping[str, Any]


def key_of(name: str, slot: str) -> str:
    """The checkpoint's key of one state ("exp_avg") of a parameter."""
    return f"optimizer/{name}/{slot}"


def record(optimizer: torch.optim.Optimizer, named: Named) -> manifest.OptimizerRecord:
    """This rank's parameter groups by name, and states that are no tensors; raises CheckpointError for what JSON cannot hold."""
    groups, scalars = [], dict[str, dict[str, Any]]()
    for group in optimizer.param_groups:
        options = {k: _plain(v, f"param_groups option {k}") for k, v in group.items() if k != "params"}
        groups.append(manifest.Group(tuple(named.name_of(p) for p in group["params"]), options))
    for parameter, slots in optimizer.state.items():
        name = named.name_of(parameter)
        found = {k: _plain(v, f"state {k} of {name}") for k, v in slots.items() if not isinstance(v, Tensor)}
        if found:
            scalars[name] = found
    return manifest.OptimizerRecord(type(optimizer).__name__, tuple(groups), scalars)


def merged(records: Sequence[manifest.OptimizerRecord]) -> manifest.OptimizerRecord:
    """The records of all ranks as one: a rank of a pipeline knows only the parameters of its stage."""
    first = records[0]
    if any(len(r.groups) != len(first.groups) for r in records):
        raise CheckpointError("the ranks' optimizers have different numbers of parameter groups")
    groups = []
    for i, group in enumerate(first.groups):
        names = dict.fromkeys(name for r in records for name in r.groups[i].parameters)
        groups.append(manifest.Group(tuple(names), group.options))
    scalars = {name: values for r in records for name, values in r.scalars.items()}
    return manifest.OptimizerRecord(first.kind, tuple(groups), scalars)


def held(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, Held]:
    """What this rank holds of every state that is a tensor."""
    found = {}
    for parameter, slots in optimizer.state.items():
        name = named.name_of(parameter)
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                found[key_of(name, slot)] = _held(value, parameter, f"state {slot} of {name}")
    return found


def _held(value: Tensor, parameter: Tensor, what: str) -> Held:
    """A state placed as its parameter (also where only this rank's slice is kept, as a plain tensor), or equal on all ranks."""
    if isinstance(value, DTensor) or not isinstance(parameter, DTensor) or not value.dim():
        return Held.of(value)
    own = Held.of(parameter.detach())
    if value.shape == own.local.shape:
        return own.like(value.detach())
    raise UsageError(
        f"{what} has shape {tuple(value.shape)} on this rank, its parameter {tuple(parameter.shape)}: only states shaped as their "
        "parameter, or single numbers, can be saved under a plan"
    )


def prepare(
    optimizer: torch.optim.Optimizer, named: Named, where: Path, found: manifest.Manifest, saved_as: Mapping[str, str]
) -> dict[str, Held]:
    """Make room for the states a checkpoint holds of this rank's parameters; what to read into it, by key.

    `saved_as`: the checkpoint's name of each of the module's parameters.

    Raises CheckpointError where the checkpoint is of another kind of optimizer or of other parameter groups.
    """
    saved = found.heading.optimizer
    if saved is None:
        raise CheckpointError(f"{where}: holds no optimizer; load it with optimizer=None")
    if saved.kind != type(optimizer).__name__:
        raise CheckpointError(f"{where}: is of the optimizer {saved.kind}, not {type(optimizer).__name__}")
    _check_groups(optimizer, named, where, saved, saved_as)
    slots: dict[str, dict[str, manifest.TensorRecord]] = {}
    for key, each in found.tensors.items():
        if key.startswith("optimizer/"):
            name, _, slot = key.removeprefix("optimizer/").rpartition("/")
            slots.setdefault(name, {})[slot] = each
    wanted: dict[str, Held] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = saved_as[named.name_of(parameter)]
            state = {
                slot: _room(slot, each, parameter, group, optimizer.state[parameter].get(slot))
                for slot, each in slots.get(name, {}).items()
            }
            optimizer.state[parameter] = state
            for slot, value in state.items():
                wanted[key_of(name, slot)] = _held(value, parameter, f"state {slot} of {name}")
            plain = saved.scalars.get(name, {})
            if not all(slot not in state and _alike(value, None) for slot, value in plain.items()):
                raise CheckpointError(f"{where}: heading.optimizer.scalars: {name} has values that no optimizer keeps")
            state |= plain
            if not state:
                del optimizer.state[parameter]
    return wanted


def restore_options(optimizer: torch.optim.Optimizer, saved: manifest.OptimizerRecord) -> None:
    """Set learning rates and all other options to the checkpoint's, but for how torch runs a step: that is this run's."""
    for group, old in zip(optimizer.param_groups, saved.groups, strict=True):
        for name, value in old.options.items():
            if name in WAYS:
                continue
            now = group.get(name)
            if isinstance(now, Tensor):
                now.fill_(value)
            else:
                group[name] = tuple(value) if isinstance(value, list) and not isinstance(now, list) else value


def _room(slot: str, record: manifest.TensorRecord, parameter: Tensor, group: Values, old: object) -> Tensor:
    """A tensor for one state: the one that is there if it fits, else placed as the parameter, or whole where shaped otherwise."""
    dtype, shape = DTYPES[record.dtype], record.shape
    if isinstance(old, Tensor) and old.dtype == dtype:
        return old
    if tuple(parameter.shape) == shape and slot != "step":
        value = parameter.detach()
        if not isinstance(value, DTensor):
            return torch.empty_like(value, dtype=dtype)
        local = torch.empty_like(value.to_local(), dtype=dtype)
        if dtype == value.dtype:
            return like_dtensor(local, value)
        return make_dtensor(local, value.device_mesh, value.placements, value.shape)
    on_device = group.get("capturable") or group.get("fused")  # where torch's optimizers keep their step counts
    return torch.empty(shape, dtype=dtype, device=parameter.device if on_device else "cpu")


def _check_groups(
    optimizer: torch.optim.Optimizer,
    named: Named,
    where: Path,
    saved: manifest.OptimizerRecord,
    saved_as: Mapping[str, str],
) -> None:
    if len(saved.groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{where}: the optimizer has {len(saved.groups)} parameter groups, this one {len(optimizer.param_groups)}"
        )
    for i, (group, old) in enumerate(zip(optimizer.param_groups, saved.groups, strict=True)):
        strange = [k for k, v in old.options.items() if not _alike(v, group.get(k))]
        if strange:
            raise CheckpointError(
                f"{where}: option {strange[0]} of the optimizer's group {i}: {old.options[strange[0]]!r} cannot take the place of "
                f"{group.get(strange[0])!r}"
            )
        names, known = (named.name_of(p) for p in group["params"]), set(old.parameters)
        strange = [name for name in names if saved_as[name] not in known]
        if strange:
            raise CheckpointError(f"{where}: group {i} of the optimizer does not hold {strange[0]}")


def _alike(value: Any, now: Any) -> bool:
    """Whether a value of JSON may be an option or a state where `now` is: of one kind, or one of them nothing."""
    if isinstance(value, list):
        inside = now if isinstance(now, list | tuple) and len(now) == len(value) else [None] * len(value)
        return (now is None or isinstance(now, list | tuple)) and all(map(_alike, value, inside))
    kinds = [k for k in (bool, int | float | Tensor, str) if isinstance(value, k)]
    return value is None or (bool(kinds) and (now is None or isinstance(now, kinds[0])))


def _plain(value: Any, what: str) -> Any:
    """A value as JSON holds it: a tensor of one element as a number, a tuple as a list."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple | list):
        return [_plain(v, what) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"{what}: a checkpoint holds tensors, numbers and text, not a {type(value).__name__}")

"""The device mesh of a plan on this process: coordinates, group names, and the DTensor mesh.

Ranks are row-major over the plan's axes (the last axis varies fastest). A mesh of one rank needs no process group; its
axes have size 1 and nothing ever communicates.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import LaunchError
from ..planner.plan import MeshAxis
from .watch import active_watch, unwatch, watch_ranks

START_SECONDS = 120.0
"""Ranks may take so long to start, whatever the timeout: they import torch, on a machine that is busy with all of them."""


def ensure_process_group(device: torch.device, timeout_seconds: float = 600.0, *, ends: bool = False) -> bool:
    """Join the process group that torchrun describes in the environment; returns whether this call created it.

    Does nothing when a group exists, or when the process was not started by torchrun (then it is alone). The ranks of a group
    made here are watched: one that is lost for `timeout_seconds` is named (runtime/watch.py, where `ends` is explained).
    """
    if dist.is_initialized() or "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    start = max(timeout_seconds, START_SECONDS)
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=start))
    except dist.DistError as error:
        raise LaunchError(
            f"not all {os.environ['WORLD_SIZE']} ranks have come within {start:g} s: {str(error).splitlines()[0]}"
        ) from error
    watch_ranks(timeout_seconds, ends=ends)
    return True


def leave_process_group() -> None:
    """Leave the process group before the process ends, so that no thread of gloo's is in its way.

    A worker thread may still wait for the interpreter lock to free the tensors of the last collective. When the interpreter
    ends under it, Python unwinds that thread through C++ frames, and the process aborts. Sleeping hands it the lock.
    """
    unwatch()
    dist.destroy_process_group()
    time.sleep(0.1)


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def check_world(axes: Sequence[MeshAxis]) -> int:
    """The number of running ranks; raises LaunchError where it is not that of a mesh of `axes`."""
    wanted, found = prod(a.size for a in axes), world_size()
    if wanted != found:
        shape = " x ".join(f"{a.name}={a.size}" for a in axes) or "one device"
        raise LaunchError(
            f"the plan is for {wanted} ranks ({shape}) but {found} are running; "
            f"start it with: torchrun --nproc-per-node {wanted} ... or plan again for {found}"
        )
    return found


@dataclass
class Mesh:
    """Where this process stands in a plan's mesh.

    `device_mesh` is None for a single process without a process group. `tensor_mesh` holds the same ranks with "model"
    axes before "data" axes: parameters are DTensors on it, so that a ZeRO chunk is cut from the tensor-parallel slice.
    """

    axes: tuple[MeshAxis, ...]
    device: torch.device
    coordinate: tuple[int, ...]
    device_mesh: DeviceMesh | None = None
    tensor_mesh: DeviceMesh | None = None
    _flat: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def create(cls, axes: Sequence[MeshAxis], device: torch.device) -> Mesh:
        """The mesh of `axes` on the running ranks; raises LaunchError where their number differs from the plan's."""
        axes, found = tuple(axes), check_world(axes)
        if not dist.is_initialized():
            return cls(axes, device, (0,) * len(axes))
        ranks = torch.arange(found).reshape([a.size for a in axes] or [1])
        names = tuple(a.name for a in axes) or ("world",)
        mesh = DeviceMesh(device.type, ranks, mesh_dim_names=names)
        order = sorted(range(len(axes)), key=lambda i: axes[i].role == "data") or [0]
        tensor_mesh = mesh
        if order != list(range(len(order))):
            tensor_mesh = DeviceMesh(device.type, ranks.permute(order), mesh_dim_names=tuple(names[i] for i in order))
        hold_groups(mesh)
        where = tuple(int(i) for i in (ranks == dist.get_rank()).nonzero()[0])[: len(axes)]
        return cls(axes, device, where, mesh, tensor_mesh)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.axes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(a.size for a in self.axes)

    def index(self, axis: str) -> int:
        """Position of the named axis; raises LaunchError for a name the mesh does not have."""
        if axis not in self.names:
            raise LaunchError(f"the mesh has no axis {axis!r}; it has {', '.join(self.names) or 'none'}")
        return self.names.index(axis)

    def size(self, *axes: str) -> int:
        """Number of ranks over the named axes together."""
        return prod(self.axes[self.index(a)].size for a in axes)

    def position(self, *axes: str) -> int:
        """This rank's index within the flat group of the named axes (first axis major)."""
        flat = 0
        for name in axes:
            i = self.index(name)
            flat = flat * self.axes[i].size + self.coordinate[i]
        return flat

    def group_name(self, *axes: str) -> str:
        """Name of the process group over the named axes together, "" where it has one rank.

        Creating the group of several axes is a collective: every rank asks for the same groups in the same order.
        """
        if self.size(*axes) == 1:
            return ""
        live = tuple(a for a in axes if self.axes[self.index(a)].size > 1)
        if len(live) == 1:
            assert self.device_mesh is not None
            return self.device_mesh.get_group(live[0]).group_name
        if live not in self._flat:
            self._flat[live] = self._create_flat(live)
        return self._flat[live][0]

    def members(self, *axes: str) -> tuple[int, ...]:
        """`position(*axes)` of each member of `group_name(*axes)`, by rank within the group (groups sort their ranks)."""
        where = [self.index(a) for a in axes]
        ordered = sorted(where)
        grid = torch.arange(self.size(*axes)).reshape([self.axes[i].size for i in where])
        return tuple(grid.permute([where.index(i) for i in ordered]).reshape(-1).tolist())

    def storage_order(self, axes: Iterable[str]) -> tuple[str, ...]:
        """The axes in the order in which they cut a parameter: that of `tensor_mesh`, "model" axes first."""
        wanted = set(axes)
        return tuple(a.name for a in sorted(self.axes, key=lambda a: a.role == "data") if a.name in wanted)

    def axis_of_group(self) -> dict[str, str]:
        """Axis name ("dp", or "dp+tp" for flat groups) of every group handed out so far; for reports."""
        known = {self.group_name(a.name): a.name for a in self.axes if a.size > 1}
        return known | {group: "+".join(axes) for axes, (group,) in self._flat.items()}

    def _create_flat(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """One group for each combination of the other axes' coordinates; returns the name of this rank's."""
        dims = [self.index(a) for a in axes]
        rest = [i for i in range(len(self.axes)) if i not in dims]
        ranks = torch.arange(prod(self.sizes)).reshape(self.sizes).permute([*rest, *dims])
        own, _ = dist.new_subgroups_by_enumeration(ranks.reshape(-1, self.size(*axes)).tolist())
        watch = active_watch()
        if watch is not None:
            watch.hold(own, "+".join(axes))
        return (own.group_name,)


def hold_groups(mesh: DeviceMesh) -> None:
    """Give the groups of a mesh the time limit of the watch, if this process has one."""
    watch = active_watch()
    if watch is not None:
        for name in mesh.mesh_dim_names or ():
            watch.hold(mesh.get_group(name), name)

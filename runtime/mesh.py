"""The device mesh of a plan on this process: coordinates, group names, and the DTensor mesh.

Ranks are row-major over the plan's axes (the last axis varies fastest). With a pipeline every pipeline rank has a mesh of its own,
and `pipeline.order` says where "pp" stands among the axes. A mesh of one rank needs no process group; its
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
from ..planner.dispatch import AXIS as EXPERTS
from ..planner.plan import MeshAxis, Pipeline
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


def check_world(axes: Sequence[MeshAxis], stages: int = 1) -> int:
    """The number of running ranks; raises LaunchError where it is not that of `stages` meshes of `axes`."""
    wanted, found = stages * prod(a.size for a in axes), world_size()
    if wanted != found:
        named = [f"pp={stages}"] if stages > 1 else []
        shape = " x ".join([*named, *(f"{a.name}={a.size}" for a in axes)]) or "one device"
        raise LaunchError(
            f"the plan is for {wanted} ranks ({shape}) but {found} are running; "
            f"start it with: torchrun --nproc-per-node {wanted} ... or plan again for {found}"
        )
    return found


def _cut(axis: MeshAxis) -> int:
    """When an axis cuts a parameter: model axes first, then the one of experts, so that ZeRO chunks what both leave."""
    return 0 if axis.role == "model" else 1 if axis.name == EXPERTS else 2


@dataclass
class Mesh:
    """Where this process stands in a plan's mesh: that of its pipeline rank `stage` of `stages`.

    `device_mesh` is None for a single process without a process group. `tensor_mesh` holds the same ranks with "model"
    axes first and the one of experts next: parameters are DTensors on it, so that a ZeRO chunk is cut from the slice of a
    rank's own. `ranks` has the global rank at every (pipeline rank, *coordinate).
    """

    axes: tuple[MeshAxis, ...]
    device: torch.device
    coordinate: tuple[int, ...]
    device_mesh: DeviceMesh | None = None
    tensor_mesh: DeviceMesh | None = None
    stage: int = 0
    stages: int = 1
    ranks: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    pipeline_mesh: DeviceMesh | None = None
    _flat: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    _named: dict[str, str] = field(default_factory=dict)
    _between: dict[tuple[int, ...], str] = field(default_factory=dict)

    @classmethod
    def create(cls, axes: Sequence[MeshAxis], device: torch.device, pipeline: Pipeline | None = None) -> Mesh:
        """The mesh of `axes` on the running ranks; raises LaunchError where their number differs from the plan's."""
        axes, stages = tuple(axes), pipeline.ranks if pipeline is not None else 1
        check_world(axes, stages)
        if not dist.is_initialized():
            return cls(axes, device, (0,) * len(axes))
        ranks = rank_grid(axes, pipeline)
        names = tuple(a.name for a in axes) or ("world",)
        order = sorted(range(len(axes)), key=lambda i: _cut(axes[i])) or [0]
        mesh, whole = _device_mesh(device, ranks, names)
        tensor_mesh = mesh
        if order != list(range(len(order))):
            tensor_mesh, _ = _device_mesh(
                device, ranks.permute(0, *(i + 1 for i in order)), tuple(names[i] for i in order)
            )
        hold_groups(mesh)
        if whole is not None:
            hold_groups(whole)
        here, *where = (int(i) for i in (ranks == dist.get_rank()).nonzero()[0])
        return cls(axes, device, tuple(where[: len(axes)]), mesh, tensor_mesh, here, stages, ranks, whole)

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
        """Name of the process group over the named axes together, in any order, "" where it has one rank.

        Creating the group of several axes is a collective: every rank asks for the same groups in the same order.
        """
        if self.size(*axes) == 1:
            return ""
        live = tuple(a.name for a in self.axes if a.name in axes and a.size > 1)
        if len(live) == 1:
            assert self.device_mesh is not None
            return self.device_mesh.get_group(live[0]).group_name
        if live not in self._flat:
            self._flat[live] = self._create_flat(live)
            self._named[self._flat[live][0]] = "+".join(live)
        return self._flat[live][0]

    def pipeline_group(self, members: tuple[int, ...]) -> str:
        """Name of the group of this rank's coordinate on some pipeline ranks, "" where this one is none of them.

        As with `group_name`, every rank asks for the same groups in the same order.
        """
        assert self.pipeline_mesh is not None
        if len(members) == self.stages:
            return self.pipeline_mesh.get_group("pp").group_name
        if members not in self._between:
            rows = self.ranks[list(members)].reshape(len(members), -1).T.tolist()
            own, _ = dist.new_subgroups_by_enumeration(rows)
            watch = active_watch()
            if watch is not None and own is not None:
                watch.hold(own, "pp")
            self._between[members] = own.group_name if own is not None else ""
            self._named |= {own.group_name: "pp"} if own is not None else {}
        return self._between[members]

    def members(self, *axes: str) -> tuple[int, ...]:
        """`position(*axes)` of each member of `group_name(*axes)`, by rank within the group (groups sort their ranks)."""
        where = [self.index(a) for a in axes]
        ordered = sorted(where)
        grid = torch.arange(self.size(*axes)).reshape([self.axes[i].size for i in where])
        return tuple(grid.permute([where.index(i) for i in ordered]).reshape(-1).tolist())

    def storage_order(self, axes: Iterable[str]) -> tuple[str, ...]:
        """The axes in the order in which they cut a parameter: that of `tensor_mesh`, "model" axes first."""
        wanted = set(axes)
        return tuple(a.name for a in sorted(self.axes, key=_cut) if a.name in wanted)

    def axis_of_group(self) -> dict[str, str]:
        """Axis name ("dp", or "dp+tp" for flat groups) of every group, those still to be made included; for reports."""
        self._named |= {self.group_name(a.name): a.name for a in self.axes if a.size > 1}
        if self.pipeline_mesh is not None:
            self._named[self.pipeline_mesh.get_group("pp").group_name] = "pp"
        return self._named

    def _create_flat(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """One group for each combination of the other axes' coordinates; returns the name of this rank's."""
        dims = [self.index(a) for a in axes]
        rest = [i for i in range(len(self.axes)) if i not in dims]
        ranks = self.ranks.permute([0, *(i + 1 for i in (*rest, *dims))])
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


def rank_grid(axes: Sequence[MeshAxis], pipeline: Pipeline | None = None) -> torch.Tensor:
    """The global rank at every (pipeline rank, *coordinate); an axis that `pipeline.order` leaves out has one rank."""
    sizes = {"pp": pipeline.ranks if pipeline is not None else 1} | {a.name: a.size for a in axes}
    stated = [name for name in pipeline.order if name in sizes] if pipeline is not None and pipeline.ranks > 1 else []
    order = [*stated, *(name for name in sizes if name not in stated)]
    grid = torch.arange(prod(sizes.values())).reshape([sizes[name] for name in order])
    grid = grid.permute([order.index(name) for name in sizes])
    return grid if axes else grid.unsqueeze(-1)


def _device_mesh(
    device: torch.device, ranks: torch.Tensor, names: tuple[str, ...]
) -> tuple[DeviceMesh, DeviceMesh | None]:
    """The mesh of this process's pipeline rank, and the one of all of them where there are several."""
    if ranks.shape[0] == 1:
        return DeviceMesh(device.type, ranks[0], mesh_dim_names=names), None
    whole = DeviceMesh(device.type, ranks, mesh_dim_names=("pp", *names))
    return whole[names], whole

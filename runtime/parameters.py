"""Parameters as DTensors: where a parameter lives, how it gets there and how it becomes whole again.

A parameter has a home state per mesh axis (R, or S of one factor of a dim) and ZeRO axes, which chunk dim 0 of the home-local
tensor by the rule of `torch.chunk`, one after the other, each chunk possibly uneven or empty. As a DTensor it lies on
`Mesh.tensor_mesh`, whose "model" axes come first, so that its placements, read from left to right, say the same: `Shard` for
the major factor, a strided split for a minor one, `Shard(0)` for ZeRO. Optimizers, `clip_grad_norm_` and `full_tensor()` then
see the global tensor. Without a process group a parameter is an ordinary one. A 0-dim parameter is never chunked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..errors import UsageError
from ..planner.placement import Dims, State, local_dims, shape_of
from ..planner.placement import R as WHOLE
from . import collectives
from .groups import chunk_rows
from .mesh import Mesh
from .torch_compat import is_strided, like_dtensor, make_dtensor, strided_split
from .transitions import joined, own_slice


@dataclass(frozen=True)
class _Cut:
    """One cut along one axis of the tensor mesh: dim viewed as (outer, n, inner); `chunk` cuts may be uneven (outer 1)."""

    axis: str
    dim: int
    outer: int
    chunk: bool

    def of(self, x: Tensor, n: int, index: int) -> Tensor:
        if self.chunk:
            start, stop = chunk_rows(x.shape[0], n)[index]
            return x[start:stop]
        return own_slice(x, self.dim, self.outer, n, index)

    @property
    def placement(self) -> Placement:
        return Shard(self.dim) if self.outer == 1 else strided_split(self.dim, self.outer)


def cuts(dims: Dims, home: Sequence[State], zero_axes: Sequence[str], mesh: Mesh) -> tuple[_Cut, ...]:
    """The cuts that make this rank's slice of a parameter, in the order they are made.

    Raises UsageError for homes other than R and S, splits that do not divide, or an order DTensors cannot express.
    """
    found: list[_Cut] = []
    applied: dict[str, State] = {}
    for name in mesh.storage_order(mesh.names):
        state = home[mesh.index(name)]
        if name in zero_axes and dims:
            if state.is_split:
                raise UsageError(f"axis {name} cannot both split a parameter as {state} and chunk it for ZeRO")
            found.append(_Cut(name, 0, 1, True))
        elif state.is_split:
            if any(cut.chunk and cut.dim == state.dim for cut in found):
                raise UsageError(f"a split {state} on {name} inside a ZeRO chunk of the same dim is not supported")
            here = _local(dims, applied, mesh)
            major = [b for b in mesh.names[: mesh.index(name)] if home[mesh.index(b)] == state and b not in applied]
            outer = math.prod(here[state.dim][: state.factor]) * mesh.size(*major)
            found.append(_Cut(name, state.dim, outer, False))
            applied[name] = state
            _local(dims, applied, mesh)
        elif state != WHOLE:
            raise UsageError(f"a parameter's home on {name} is R or a split, not {state}")
    return tuple(found)


def _local(dims: Dims, applied: dict[str, State], mesh: Mesh) -> Dims:
    try:
        return local_dims(dims, tuple(applied.get(a, WHOLE) for a in mesh.names), mesh.sizes)
    except ValueError as problem:
        raise UsageError(f"a parameter of shape {shape_of(dims)}: {problem}") from None


def own_part(full: Tensor, dims: Dims, home: Sequence[State], zero_axes: Sequence[str], mesh: Mesh) -> Tensor:
    """This rank's slice of a whole parameter, in memory of its own; without values where the whole is a meta tensor."""
    part = full
    for cut in cuts(dims, home, zero_axes, mesh):
        part = cut.of(part, mesh.size(cut.axis), mesh.position(cut.axis))
    if part.is_meta:
        return torch.empty(part.shape, dtype=part.dtype, device=mesh.device)
    return part.clone(memory_format=torch.contiguous_format)


def from_part(
    part: Tensor, dims: Dims, home: Sequence[State], zero_axes: Sequence[str], mesh: Mesh, trainable: bool = True
) -> nn.Parameter:
    """The parameter whose slice on this rank is `part` (its memory is used, not copied)."""
    whole = torch.empty(shape_of(dims), device="meta")
    for cut in cuts(dims, home, zero_axes, mesh):
        whole = cut.of(whole, mesh.size(cut.axis), mesh.position(cut.axis))
    if whole.shape != part.shape:
        raise UsageError(f"this rank's slice of a parameter has shape {tuple(whole.shape)}, not {tuple(part.shape)}")
    if mesh.tensor_mesh is None:
        return nn.Parameter(part.detach(), requires_grad=trainable)
    placed = {cut.axis: cut.placement for cut in cuts(dims, home, zero_axes, mesh)}
    placements = [placed.get(a, Replicate()) for a in mesh.storage_order(mesh.names)] or [Replicate()]
    value = make_dtensor(part.detach(), mesh.tensor_mesh, placements, torch.Size(shape_of(dims)))
    return nn.Parameter(value, requires_grad=trainable)


def distribute(
    full: Tensor, dims: Dims, home: Sequence[State], zero_axes: Sequence[str], mesh: Mesh, trainable: bool = True,
    lay: Callable[[Tensor], Tensor] | None = None,
) -> nn.Parameter:  # fmt: skip
    """The parameter of which every rank passes the same whole value (no communication; `full` is copied from).

    An empty `home` means R on every axis; `dims` are then taken from `full`. `lay` puts this rank's slice elsewhere.
    """
    if not home:
        dims, home = tuple((n,) for n in full.shape), (WHOLE,) * len(mesh.axes)
    if tuple(full.shape) != shape_of(dims):
        raise UsageError(f"the parameter has shape {tuple(full.shape)}, the plan says {shape_of(dims)}")
    part = own_part(full.detach(), dims, home, zero_axes, mesh)
    return from_part(part if lay is None else lay(part), dims, home, zero_axes, mesh, trainable)


class _Local(torch.autograd.Function):
    """The local slice of a DTensor; its gradient becomes a DTensor of the same spec."""

    @staticmethod
    def forward(ctx, parameter):  # type: ignore[no-untyped-def,override]
        ctx.parameter = parameter
        ctx.set_materialize_grads(False)  # no gradient stays none, as in eager
        part = parameter.to_local()
        return part.view_as(part)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        return None if grad is None else like_dtensor(grad.contiguous(), ctx.parameter)


def local(parameter: Tensor) -> Tensor:
    """This rank's slice, sharing memory; a gradient that flows into it arrives in `parameter.grad` as a DTensor."""
    if not isinstance(parameter, DTensor):
        return parameter
    return _Local.apply(parameter)


def full(parameter: Tensor) -> Tensor:
    """The whole value on every rank, without gradient (a collective).

    Equals `full_tensor()` of DTensors made here, and needs no fitting of redistributions.
    """
    value = parameter.detach()
    if not isinstance(value, DTensor):
        return value
    mesh = value.device_mesh
    part = _memory(value).to(mesh.device_type)  # one in host memory is gathered by the devices
    where = mesh.get_coordinate() or []
    before = [torch.empty(value.shape, device="meta")]
    for i, placement in enumerate(value.placements):
        before.append(_cut_by(before[-1], placement, mesh.size(i), where[i]))
    for i in reversed(range(mesh.ndim)):
        if not isinstance(value.placements[i], Replicate) and mesh.size(i) > 1:
            part = _joined(part, value.placements[i], before[i].shape, mesh.size(i), mesh.get_group(i).group_name)
    return part.clone() if part.data_ptr() == _memory(value).data_ptr() else part


def _cut_by(x: Tensor, placement: Placement, n: int, index: int) -> Tensor:
    """The slice of x that a DTensor placement gives to rank `index` of n."""
    if is_strided(placement):
        return own_slice(x, placement.dim, placement.split_factor, n, index)
    if isinstance(placement, Shard):
        start, stop = chunk_rows(x.shape[placement.dim], n)[index]
        return x.narrow(placement.dim, start, stop - start)
    return x


def _joined(part: Tensor, placement: Placement, shape: torch.Size, n: int, group: str) -> Tensor:
    """Inverse of `_cut_by` over all ranks of the group; uneven chunks are padded for the gather."""
    if is_strided(placement):
        return joined(collectives.all_gather(part, n, group), placement.dim, placement.split_factor)
    dim = placement.dim
    spans = chunk_rows(shape[dim], n)
    short = spans[0][1] - part.shape[dim]
    if short:
        part = torch.cat([part, part.new_zeros([short if d == dim else s for d, s in enumerate(part.shape)])], dim)
    everyone = collectives.all_gather(part, n, group)
    return torch.cat([own.narrow(dim, 0, b - a) for own, (a, b) in zip(everyone, spans, strict=True)], dim)


def is_distributed(value: object) -> bool:
    """Whether a value is a tensor spread over a mesh."""
    return isinstance(value, DTensor)


def like(own: Tensor, value: Tensor) -> Tensor:
    """`value`, whole or a DTensor of any placements, placed as `own` is (a collective where it must be gathered).

    Raises UsageError where the global shapes differ.
    """
    if value.shape != own.shape:
        raise UsageError(f"a value of shape {tuple(value.shape)} for a parameter of shape {tuple(own.shape)}")
    if not isinstance(own, DTensor):
        return full(value)
    mesh = own.device_mesh
    if isinstance(value, DTensor) and value.device_mesh == mesh and value.placements == own.placements:
        return value.detach()
    part = full(value)
    for i, placement in enumerate(own.placements):
        part = _cut_by(part, placement, mesh.size(i), mesh.get_local_rank(i))
    return like_dtensor(part.to(_memory(own).device).clone(memory_format=torch.contiguous_format), own)


def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value, or a DTensor of any placements, into a parameter (a collective for a DTensor)."""
    part = _memory(like(parameter.detach(), value))
    with torch.no_grad():
        _memory(parameter).copy_(part)


def portable(parameter: Tensor) -> Tensor:
    """The same value without strided splits, for checkpoints that outlive the plan.

    A slice of a strided split is not one block of the global tensor, so `torch.distributed.checkpoint` would write it to the
    wrong place; such a parameter is gathered and cut again in blocks. Others are returned as they are.
    """
    value = parameter.detach()
    if not isinstance(value, DTensor) or not any(is_strided(p) for p in value.placements):
        return value
    placements = [Shard(p.dim) if is_strided(p) else p for p in value.placements]
    part = full(value)
    for i, placement in enumerate(placements):
        part = _cut_by(part, placement, value.device_mesh.size(i), value.device_mesh.get_local_rank(i))
    return make_dtensor(part.clone(memory_format=torch.contiguous_format), value.device_mesh, placements, value.shape)


def _memory(parameter: Tensor) -> Tensor:
    """The tensor that holds this rank's slice."""
    with torch.no_grad():
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

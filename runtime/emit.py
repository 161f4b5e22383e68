"""The ops a lowered graph calls on this rank: transitions, group collectives, implementations and seeded random ops."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from ..errors import UnsupportedOp
from ..passes.experts.op import split_experts, split_width
from ..passes.late_weights import LateOps, late_weights
from ..passes.lowered import CallForm, Emitted, Lowered
from ..passes.overlap import Early, Ends, overlap
from ..passes.random import DROPPING, drawn, seeded_call
from ..passes.summarize import target_name
from ..planner.dispatch import DISPATCH
from ..planner.placement import Dims, Step
from ..planner.plan import Plan
from ..planner.precision import sum_dtype
from ..planner.ring import RING
from ..planner.schedules import SCHEDULES
from . import groups, products, transitions
from .early import Begin, Window
from .kernels import dispatch, ring, vocab, vocab_head
from .kernels.batch_norm import batch_norm_form
from .mesh import Mesh
from .offload.engine import OffloadEmit
from .regather import Regather
from .zigzag import orders, zigzag_transition

aten = torch.ops.aten


class RankEmit:
    """`passes.lowered.Emit` for one rank of a mesh, under a plan's dtypes."""

    def __init__(
        self, mesh: Mesh, plan: Plan, *, training: bool, dropout: bool = True, zigzag: Collection[int] = ()
    ) -> None:  # fmt: skip
        """`zigzag`: axes on which positions are held in zig-zag order."""
        self.mesh, self.device, self.training, self.dropout = mesh, mesh.device, training, dropout
        self.zigzag = frozenset(a for a in zigzag if mesh.sizes[a] > 1)
        self.divided = SCHEDULES[plan.pipeline.schedule].splits_backward
        """Whether gradients of weights wait for an action of their own (runtime/halves.py)."""
        precision = plan.precision
        self.compute: torch.dtype | None = None
        self.sum: torch.dtype | None = None
        if precision.compute != precision.parameter:
            self.compute = getattr(torch, precision.compute)
            self.sum = getattr(torch, sum_dtype(precision))
        self.offload: OffloadEmit | None = None
        self.prefetch, self.reductions = plan.overlap.prefetch, plan.overlap.reductions
        self.gathers_again = False
        """Whether a graph emitted so far gathers parameters again in its backward pass."""

    def apart(self) -> RankEmit:
        """The same for another graph of the program, with an order of its own of what comes in from behind the device."""
        found = copy.copy(self)
        found.offload = self.offload.apart() if self.offload is not None else None
        return found

    def transition(self, step: Step, dims: Dims) -> Emitted:
        """One change of placement."""
        mesh = self.mesh
        group = mesh.group_name(mesh.names[step.axis])
        args = transitions.emit_args(step, dims, mesh.sizes, mesh.coordinate, group)
        if step.axis in self.zigzag and any(turned := orders(step, dims, mesh.sizes)):
            return zigzag_transition, (*args, *turned)
        return transitions.transition, args

    def gather(
        self, shapes: Sequence[tuple[int, ...]], axes: tuple[int, ...], *, keep: bool, trainable: bool
    ) -> Emitted:
        """Wholes of a parameter group; freed and gathered again in backward unless `keep`."""
        names = self.mesh.storage_order([self.mesh.names[a] for a in axes])
        rows = [s[0] if s else 1 for s in shapes]
        group, positions = self.mesh.group_name(*names), list(self.mesh.members(*names))
        sizes = [self.mesh.size(name) for name in names]
        again = self.training and not keep
        self.gathers_again |= again
        return groups.gather, (rows, positions, group, self.compute, self.sum, again, sizes)

    def fetched(self, group: Sequence[str], gather: Emitted | None) -> Emitted | None:
        """How a group comes in that lies behind the device, in place of `gather`; `gather` itself where it does not."""
        return gather if self.offload is None else self.offload.fetched(group, gather)

    def streams(self, group: Sequence[str]) -> bool:
        """Whether a group is fetched for every pass, not once a step."""
        return self.offload is not None and self.offload.streams(group)

    def leaves(self, group: Sequence[str]) -> bool:
        """Whether the gradients of a group leave the device with every microbatch."""
        return self.offload is not None and self.offload.every(group)

    def reduce(self, axes: tuple[int, ...]) -> Emitted:
        """R -> V of a list of tensors: one bucketed all-reduce backward."""
        return groups.reduce, (self.mesh.group_name(*[self.mesh.names[a] for a in axes]), None, self.sum)

    def cast(self) -> Emitted | None:
        """To the compute dtype, where that is not the stored one."""
        return None if self.compute is None else (torch.ops.aten.to.dtype, (self.compute,))

    def implementation(self, name: str, axis: int, form: CallForm) -> CallForm:
        """The op as the implementation that splitting on `axis` needs."""
        if name == RING:
            at = self.mesh.group_name(self.mesh.names[axis]), self.mesh.coordinate[axis], self.mesh.sizes[axis]
            made = ring.ring_form(form, *at, zigzag=axis in self.zigzag)
            return made if self.dropout else ring.without_dropout(made)
        make = IMPLEMENTATIONS.get(name)
        if make is None:
            raise UnsupportedOp(f"no implementation named {name!r} for {form[0]}")
        axis_name = self.mesh.names[axis]
        return make(form, self.mesh.group_name(axis_name), self.mesh.coordinate[axis], self.mesh.sizes[axis])

    def random(self, form: CallForm, salt: int) -> Callable[[fx.Node], CallForm] | None:
        """The op under a seed, if it draws random numbers; with `dropout` off, with probability zero or drawing a constant."""
        if form[0] is ring.ring_attention:
            return ring.seeded_ring(form, salt)
        seeded = seeded_call(form, salt, self.device)
        if seeded is None or self.dropout:
            return seeded
        if target_name(form[0]) in DROPPING:
            return lambda _: _at_zero(form)
        target, args, kwargs = form
        return (lambda _: (drawn, (target, *args), kwargs)) if target_name(form[0]) in DRAWS else seeded

    def shard_index(self, axes: Sequence[int]) -> int:
        """This rank's index among the shards made by `axes`."""
        return self.mesh.position(*[self.mesh.names[a] for a in axes]) if axes else 0

    def overlap(self, lowered: Lowered) -> None:
        """Let collectives run beside the ops of graphs that run eagerly, as far as the plan says."""
        if not self.prefetch and not self.reductions:
            return
        begin = Begin(Window(self.reductions))
        for module in (lowered.entry, lowered.body):
            if module is not None:
                overlap(module, Early(begin, ENDS, aten.to.dtype), self.prefetch)
        if self.training and self.reductions and not self.divided:
            ops = LateOps(
                begin, transitions.transition, transitions.end_transition, transitions.returns, PRODUCTS, VIEWS
            )
            late_weights(lowered.body, ops)

    def regather(self) -> contextlib.AbstractContextManager[Any]:
        """A fresh regathering context for one forward pass."""
        leaving = self.offload.leaving() if self.offload is not None else None
        return Regather(groups=1 + max(self.prefetch, 1), leaving=leaving, prefetch=self.prefetch)


ENDS = {
    groups.gather: Ends(groups.end_gather, groups.launch_gather, group=2, dtype=3),
    groups.reduce: Ends(groups.end_reduce, None, group=0, dtype=1),
}
"""How the collectives of parameter groups are written with a beginning and an end."""
PRODUCTS = {
    aten.linear.default: (0, products.end_linear, (1, 2)),
    aten.addmm.default: (1, products.end_addmm, (2, 0)), aten.mm.default: (0, products.end_addmm, (1,)),
}  # fmt: skip
VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
DRAWS = {f"aten.{name}" for name in ("rand", "rand_like", "randn", "randn_like", "bernoulli", "uniform", "exponential")}
DRAWS |= {"aten.normal_functional"}
"""Ops that make a tensor of drawn numbers."""


def _at_zero(form: CallForm) -> CallForm:
    target, args, kwargs = form
    position, name = DROPPING[target_name(target)]
    if len(args) > position:
        return target, (*args[:position], 0.0, *args[position + 1 :]), kwargs
    return target, args, {**kwargs, name: 0.0}


Make = Callable[[CallForm, str, int, int], CallForm]
IMPLEMENTATIONS: dict[str, Make] = {
    "vocab_embedding": vocab.embedding_form, "vocab_loss": vocab.loss_form, "vocab_head": vocab_head.head_form,
    "batch_norm": batch_norm_form,
    "experts": split_experts, "experts_width": split_width, DISPATCH: dispatch.dispatch_form,
}  # fmt: skip
"""Name of an implementation (planner rules) -> how to call it on this rank: form, group, index, size -> form."""

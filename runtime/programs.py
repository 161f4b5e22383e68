"""Lowerings on demand: one program per mode, input structure and shapes, all under one plan and one set of parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import PlanError, PlanMismatch, UsageError
from ..passes.capture import Captured
from ..passes.choose import listed
from ..passes.lowered import Lowered
from ..passes.lowerings import install
from ..passes.prepare import cast_inputs, prepare_bare
from ..passes.shard import lower
from ..passes.skeleton import buffer_of, to_meta
from ..passes.summarize import Summary
from ..planner.assign import Assignment, Storage, assign, outer_axes, parameter_groups
from ..planner.cluster import Cluster
from ..planner.legal import check_choices
from ..planner.outline import Outline, Parameter
from ..planner.placement import Dims, Placement, R, split
from ..planner.plan import Plan
from ..planner.prices import Prices
from ..planner.ring import zigzag_axes
from . import parameters
from .again import with_recipes
from .batches import LocalBatches
from .beside import Threads, beside, host_threads
from .emit import RankEmit
from .halves import with_halves
from .mesh import Mesh
from .offload.engine import Offloader
from .sources import source_digest
from .staged import Staged, Stages, build
from .step import Body, Buckets
from .torch_compat import compiled

Resolve = Callable[[Outline, Mapping[str, Storage]], Mapping[str, tuple[str, ...]]]
"""Choices for a graph that is not the plan's own, given where its parameters live."""


@dataclass(frozen=True)
class Program:
    """One lowered graph of this rank and how to feed it. `training` says that the loss is differentiated.

    `others` of its outputs were asked for; `writes` are the buffers that a call changes, with the output that is the new value.
    With a pipeline `staged` has the stages of this rank and `bodies` runs them; `lowered` is then the first of them.
    """

    captured: Captured
    summary: Summary
    assignment: Assignment
    lowered: Lowered
    body: Callable[..., Sequence[Any]]
    emit: RankEmit
    training: bool
    microbatches: int
    buckets: Buckets
    parameters: Mapping[str, str]
    device: torch.device
    compiled: bool = False
    others: tuple[str, ...] = ()
    writes: Mapping[str, str] = field(default_factory=dict)
    staged: Staged | None = None
    bodies: Mapping[int, Body] = field(default_factory=dict)

    def whole(self, args: Any, kwargs: Any, module: nn.Module) -> dict[str, Tensor]:
        """Inputs, buffers and constants by graph name, on the device."""
        found = self.captured.flatten(args, kwargs)
        for entry in self.captured.entries:
            if entry.role == "buffer":
                value = buffer_of(module, entry.fqn)
                # The backward pass may read what the call overwrites.
                found[entry.node] = value.clone() if entry.fqn in self.writes else value
            elif entry.role == "constant":
                found[entry.node] = self.captured.constants[entry.node]
        return {name: value.to(self.device) for name, value in found.items()}

    def regather(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which gathered parameters are freed after use and gathered again in backward.

        A compiled body does so itself, by its recompute tags; without anything that is made again or leaves the device, hooks on
        every saved tensor would do nothing, a tenth of the host's time of a small step.
        """
        remade = self.emit.gathers_again or self.emit.offload is not None or bool(self.assignment.again.ops)
        return self.emit.regather() if remade and not self.compiled else contextlib.nullcontext()


@dataclass
class Programs:
    """All programs of one module.

    `model` is the weightless copy later captures are made from, `summary` that of the plan's own inputs (`example` is their
    `signature`) and `own` the plan's choices on it. Tensors of the dtypes `others` enter in the compute dtype.
    """

    model: nn.Module
    plan: Plan
    summary: Summary
    own: Assignment
    mesh: Mesh
    resolve: Resolve
    compile: bool = False
    loss_fn: Callable[..., Any] | None = None
    local_batch: bool = False
    exact: bool = False
    others: frozenset[torch.dtype] = frozenset()
    example: Any = None
    stages: Stages | None = None
    offload: Offloader | None = None
    _known: dict[Any, Program] = field(default_factory=dict)
    _batches: LocalBatches | None = None
    _threads: Threads | None = None

    def __post_init__(self) -> None:
        self._threads = host_threads(self.plan, self.mesh)
        self._batches = LocalBatches() if self.local_batch else None

    def distribute(self, parameter: nn.Parameter, known: Parameter | None, mesh: Mesh) -> nn.Parameter:
        """The parameter as the plan stores it, in its dtype; one the graph does not use stays whole on every rank."""
        value = parameter.detach()
        if parameter.dtype in self.others:
            value = value.to(getattr(torch, self.plan.precision.parameter))
        if known is None or known.tensor not in self.own.storage:
            return parameters.distribute(value, (), (), (), mesh, parameter.requires_grad)
        storage = self.own.storage[known.tensor]
        axes = tuple(mesh.names[a] for a in storage.zero_axes)
        dims = self.summary.outline.tensors[known.tensor].dims
        lay = self.offload.layer(known.names[0]) if self.offload is not None else None
        made = parameters.distribute(value, dims, storage.home, axes, mesh, parameter.requires_grad, lay)
        if self.offload is not None:
            self.offload.adopt(known.names[0], made)
        return made

    @property
    def constants(self) -> list[Tensor]:
        """What the captured graphs hold on the device beside parameters and buffers."""
        held = (x for program in self._known.values() for x in program.captured.constants.values())
        return [x for x in held if x.device.type == self.mesh.device.type]

    def cast(self, args: Any, kwargs: Any) -> Any:
        """(args, kwargs) with floating inputs in the dtype that is computed in."""
        return cast_inputs((args, kwargs), self.others, self.plan.precision.compute)

    def widened(self, buffer: Tensor) -> Tensor:
        """A buffer in the compute dtype where that holds all its values; tables in more precision keep it."""
        compute = getattr(torch, self.plan.precision.compute)
        wider = buffer.is_floating_point() and torch.promote_types(buffer.dtype, compute) == compute
        return buffer.to(compute) if wider else buffer

    def get(self, args: Any, kwargs: Any, *, train: bool, grad: bool, outputs: bool) -> Program:
        """The program for this call, lowered on first demand."""
        key = (outputs, *signature(args, kwargs, train=train, grad=grad))
        if self._batches is not None:
            self._batches.check(key, args, kwargs)
        if key not in self._known:
            self._known[key] = self._make(args, kwargs, train=train, grad=grad, outputs=outputs)
        return self._known[key]

    def _make(self, args: Any, kwargs: Any, *, train: bool, grad: bool, outputs: bool) -> Program:
        args, kwargs = to_meta(args), to_meta(kwargs)
        if self.local_batch:
            data = self.mesh.size(*[a.name for a in self.mesh.axes if a.role == "data"])
            args, kwargs = tree_map(lambda v: _grown(v, data), (args, kwargs))
        summary = self._summary(args, kwargs, train=train, grad=grad, outputs=outputs)
        captured = summary.captured
        training = grad and bool(captured.loss)
        microbatches = self._microbatches(summary.outline) if training else 1
        assignment = self._assignment(summary.outline)
        zigzag = zigzag_axes(summary.outline, assignment.choices)
        emit = RankEmit(self.mesh, self.plan, training=training, dropout=not self.exact, zigzag=zigzag)
        if self.offload is not None:
            emit.offload = self.offload.emitter(summary.outline, deferred=microbatches == 1 and self.stages is None)
        others = summary.outline.outputs if outputs or not training else ()
        returned = tuple(dict.fromkeys((*others, *captured.writes.values())))
        if self.stages is not None:
            return self._staged(summary, assignment, emit, microbatches, others, training=training)
        lowered = lower(
            summary, assignment, self.mesh.sizes, emit,
            microbatches=microbatches, outputs=returned, local_batch=self.local_batch,
        )  # fmt: skip
        install(lowered, self.plan.lowerings)
        if emit.offload is not None and training:
            emit.offload.mark(lowered)
        if not self.compile:
            emit.overlap(lowered)
        if not training and not self.compile and self._threads is not None:
            prices = Prices(Cluster.from_dict(self.plan.cluster), self.plan.precision.compute)
            beside(lowered.body, summary.outline, prices, self._threads)
        body = self._body(lowered, assignment, training=training)
        names = {e.node: e.fqn for e in captured.entries if e.role == "parameter"}
        return Program(
            captured, summary, assignment, lowered, body, emit, training, microbatches, _buckets(assignment, emit), names,
            self.mesh.device, self.compile, others, captured.writes,
        )  # fmt: skip

    def _staged(
        self, summary: Summary, assignment: Assignment, emit: RankEmit, microbatches: int, others: tuple[str, ...], *,
        training: bool,
    ) -> Program:  # fmt: skip
        """The program of a pipeline's rank; `others` as the program's."""
        assert self.stages is not None
        captured = summary.captured
        returned = tuple(dict.fromkeys((*others, *captured.writes.values())))
        staged = build(
            self.stages, summary, assignment, self.mesh, emit,
            microbatches=microbatches, training=training, results=returned, local_batch=self.local_batch,
        )  # fmt: skip
        for one in staged.own.values():
            install(one, self.plan.lowerings)
            if emit.offload is not None and training:
                emit.offload.mark(one)
            if not self.compile:
                emit.overlap(one)
        lowered = replace(staged.first, outputs=tuple(others))
        names = {e.node: e.fqn for e in captured.entries if e.role == "parameter" and e.node in staged.parameters}
        buckets = _buckets(assignment, emit)
        bodies = {s: self._body(one, assignment, training=training) for s, one in staged.own.items()}
        if training and emit.divided:
            own, outline = staged.own, summary.outline
            bodies = {s: with_halves(own[s].body, own[s].body_feeds, outline, buckets) for s in own}
        return Program(
            captured, summary, assignment, lowered, lowered.body, emit, training, microbatches, buckets, names,
            self.mesh.device, self.compile, others, captured.writes, staged, bodies,
        )  # fmt: skip

    def _body(self, lowered: Lowered, assignment: Assignment, *, training: bool) -> Body:
        """What runs a lowered body: compiled, or with what it makes again in the backward pass."""
        if self.compile:
            return compiled(lowered.body, tagged=bool(assignment.again), made_by=source_digest())
        return with_recipes(lowered.body) if training else lowered.body

    def _summary(self, args: Any, kwargs: Any, *, train: bool, grad: bool, outputs: bool) -> Summary:
        """The plan's own where the call is as the example was, else a capture of it.

        Passes that give up outputs do not run for a call that asks for them.
        """
        choice = listed(self.plan, outputs=outputs)
        if signature(args, kwargs, train=train, grad=grad) == self.example and choice == listed(self.plan):
            return self.summary
        if self.model.training != train:  # submodules in a mode of their own keep it until the module's mode changes
            self.model.train(train)
        lift = self.exact and self.plan.precision.compute == "float64"
        loss_fn = self.loss_fn if grad else None
        return prepare_bare(self.model, args, kwargs, loss_fn=loss_fn, train=grad, lift=lift, choice=choice)

    def _microbatches(self, outline: Outline) -> int:
        """Microbatches of the plan's size; another batch must be a multiple of it."""
        plan = self.plan
        if plan.pipeline.microbatches == 1 and outline.batch == plan.source.batch:
            return 1
        data = self.mesh.size(*[a.name for a in self.mesh.axes if a.role == "data"])
        unit = data * plan.pipeline.micro_batch
        if plan.pipeline.microbatches == 1:
            return 1
        if outline.batch % unit:
            near = (
                max((2 * outline.batch + unit - 1) // (2 * unit), 1) * unit
            )  # the nearest multiple, the smaller of two
            part = f" ({near // data} on each of them)" if self.local_batch else ""
            raise UsageError(
                f"a batch of {outline.batch} does not divide into microbatches of {plan.pipeline.micro_batch} "
                f"on {data} data-parallel ranks; nearest legal batch: {near}{part}"
            )
        return outline.batch // unit

    def _assignment(self, outline: Outline) -> Assignment:
        """The plan's own choices where the graph has its structure and sizes divide, else choices solved for this graph."""
        if outline.fingerprint == self.summary.outline.fingerprint:
            return self.own
        try:
            assignment = assign(self.plan, outline)
            check_choices(outline, assignment, self.mesh.sizes)
            if all(
                outline.tensors[name].dims == self.summary.outline.tensors[name].dims for name in assignment.storage
            ):
                return assignment
            error: Exception = PlanMismatch("the parameters have other factors")
        except (PlanMismatch, PlanError) as found:
            error = found
        storage = self._storage(outline, error)
        choices = self.resolve(outline, storage)
        return Assignment(choices, storage, parameter_groups(outline, storage), *outer_axes(self.plan))

    def _storage(self, outline: Outline, error: Exception) -> dict[str, Storage]:
        """Where the plan has the parameters of another graph; those it does not use are whole on every rank."""
        own, placed, sizes = self.summary.outline, self.own.storage, self.mesh.sizes
        known = {n: p.tensor for p in own.parameters for n in p.names if p.tensor in placed}
        found = {}
        for parameter in outline.parameters:
            name = known.get(parameter.names[0])
            if name is None:
                found[parameter.tensor] = Storage((R,) * len(sizes), 0, ())
                continue
            home = same_split(placed[name].home, own.tensors[name].dims, outline.tensors[parameter.tensor].dims, sizes)
            if home is None:
                raise UsageError(
                    f"parameter {parameter.names[0]} is stored in a split that these inputs cannot use; plan for them"
                ) from error
            found[parameter.tensor] = replace(placed[name], home=home)
        return found


def _buckets(assignment: Assignment, emit: RankEmit) -> Buckets:
    every = tuple(g for g in assignment.groups if assignment.storage[g[0]].zero == 2 or emit.leaves(g))
    return Buckets(assignment.groups, every)


def same_split(home: Placement, dims: Dims, others: Dims, sizes: Sequence[int]) -> Placement | None:
    """`home` of a tensor with factors `dims`, in terms of the factors `others` of the same tensor; None where it has none."""
    found = []
    for state, n in zip(home, sizes, strict=True):
        if not state.is_split:
            found.append(state)
            continue
        outer, sought = math.prod(dims[state.dim][: state.factor]), others[state.dim]
        fitting = [i for i in range(len(sought)) if math.prod(sought[:i]) == outer and sought[i] % n == 0]
        if not fitting:
            return None
        found.append(split(state.dim, fitting[0]))
    return tuple(found)


def signature(args: Any, kwargs: Any, *, train: bool, grad: bool) -> tuple[Any, ...]:
    """What a capture depends on: modes, input structure, shapes and dtypes, constants."""
    leaves, spec = tree_flatten((tuple(args), dict(sorted(kwargs.items()))))
    shapes = tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in leaves)
    return train, grad, str(spec), shapes


def _grown(value: Any, times: int) -> Any:
    """A local input as the global one's shape (meta)."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.new_empty((value.shape[0] * times, *value.shape[1:]))

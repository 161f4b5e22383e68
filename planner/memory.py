"""Memory of one rank, by cause and time point.

A training step is followed backward, where its peak is. At the backward of op v are alive:

    parameters, optimizer   stored parameters and moments
    gathered                full copies of ZeRO-1/2 parameters (and compute copies); of ZeRO-3 ones those of the current region
    gradients               of parameters with a use at or after v: whole until their group is reduced, then as stored;
                            with microbatches what accumulates lives throughout, in every placement in which ops use the parameter
    saved                   buffers that ops up to v save, counted once per (storage, placement): V and R are one buffer
    temporaries             gradients of activations made up to v and used after it, and those v makes for its operands; with
                            microbatches also those of parameters, before they are added to what accumulates
    reserve                 copies of a parameter group while its collective runs, and the device's own context

Collectives that run beside computing hold memory for longer: a group that is gathered ahead is there while the one before it is
used, and the packed gradients of a group until the next one's are reduced.

Other time points: the gathering of each ZeRO-3 group in backward, the reduction of each parameter group, and the optimizer
step. What is reduced once a step, after the last microbatch, is so group after group, without what was gathered for the loop; the
gradients of a group that accumulated go as soon as it is reduced. An inference graph is followed forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from . import rule_heads
from .outline import DTYPE_BYTES, Op, Outline, Saved, Tensor
from .placement import Placement, R, State, local_elements, split
from .plan import Precision
from .precision import OPTIMIZERS, StateBytes
from .ring import split_by

PASSING = frozenset({"aten.add", "aten.sub", "aten.clone", "aten.contiguous"})
"""Ops whose operand gradient is the incoming one: no new memory where shapes agree."""

CAUSES = ("parameters", "gradients", "optimizer", "saved", "gathered", "temporaries", "buffers", "reserve")

Place = tuple[int, int]

Point = tuple[str, int]
"""A time point: ("op", index of the op whose backward runs), ("gather", group), ("reduce", group), ("finish", group),
("step", index); ("fetch", group) is one of the forward pass."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a plan is evaluated under. `staged`: collectives copy what they gather or scatter once more (gloo does).

    `foreach`: the optimizer goes over all parameters at once, as torch's default does on GPUs. `unfolds`:
    convolutions are products of columns (planner/scratch.py). `prefetch` groups are gathered ahead, `reductions` are
    under way beside the backward pass (planner/plan.py, OverlapPlan). `early`: parameters are updated in the
    backward pass (planner/updates.py). `fine`: the backward pass is followed as the runtime runs it, closer than the rows of a
    search, which are sums over ops.
    """

    precision: Precision
    optimizer: str
    reserve: int = 0
    foreach: bool = False
    staged: bool = False
    unfolds: bool = False
    prefetch: int = 0
    reductions: int = 0
    early: bool = False
    fine: bool = False

    @property
    def temporaries(self) -> int:
        """Tensors of the size of what it updates that the optimizer makes.

        By torch's default kernels, since a loop may ask for no others; a fused kernel (planner/precision.py) makes none.
        """
        return 1 if self.foreach else OPTIMIZERS[self.optimizer].temporaries


@dataclass(frozen=True, slots=True)
class Alias:
    """The tensor whose storage a tensor lives in, and where each of its factors stands there."""

    root: str
    places: Mapping[Place, Place]


@dataclass(frozen=True, slots=True)
class Span:
    """A storage with a gradient: made by op `start`, last used by op `end` (indices)."""

    root: str
    start: int
    end: int


@dataclass(frozen=True)
class Facts:
    """What does not depend on the mesh: op order, storages, spans of gradients and of parameter uses.

    `uses` are the ops (indices) that use a parameter; `low` the first use of any parameter of its region instance, where
    the backward pass is done with all of them; `high` the last op of the last region instance that uses any of those, where
    it gathers them; `touched` the region instances that use any. `given` are the bytes of inputs (of the whole batch), buffers
    and constants, by storage.
    """

    order: Mapping[str, int]
    aliases: Mapping[str, Alias]
    spans: tuple[Span, ...]
    uses: Mapping[str, tuple[int, ...]]
    saved_parameters: Mapping[str, int]
    instance: tuple[tuple[int, int], ...]
    low: Mapping[str, int]
    high: Mapping[str, int]
    touched: Mapping[str, frozenset[tuple[int, int]]]
    given: Mapping[str, int]

    def lasting(self, name: str, training: bool, microbatches: int) -> bool:
        """Whether a full copy of a parameter lives past its use in forward: backward or another microbatch needs it."""
        return not training or microbatches > 1 or name in self.saved_parameters

    def complete(self, name: str, sizes: tuple[int, ...]) -> int:
        """The op after whose backward pass a parameter's gradient is whole: of several ranks it is reduced with its group."""
        return self.low[name] if math.prod(sizes) > 1 else self.uses[name][0]

    def shared(self, name: str) -> bool:
        """Whether several ops use a parameter."""
        return len(self.uses.get(name, ())) > 1

    def parts(self, tensor: Tensor) -> int:
        """How many microbatches one that is `given` is cut into; the rank's slice of all of them is made before the first."""
        whole = self.given.get(tensor.name, 0)
        return whole // tensor.bytes if whole and tensor.bytes else 1


def facts(outline: Outline) -> Facts:
    """Analyse an outline once."""
    order = {op.name: i for i, op in enumerate(outline.ops)}
    aliases = _aliases(outline)
    start: dict[str, int] = {}
    end: dict[str, int] = {}
    flows: dict[str, bool] = {}
    uses: dict[str, list[int]] = {p.tensor: [] for p in outline.parameters}
    saved: dict[str, int] = {}
    for i, op in enumerate(outline.ops):
        for use in op.operands:
            root = aliases[use.tensor].root
            end[root] = i
            if root in uses and (not uses[root] or uses[root][-1] != i):
                uses[root].append(i)
        for use in op.results:
            root = aliases[use.tensor].root
            start.setdefault(root, i)
            end.setdefault(root, i)
            flows[root] = flows.get(root, False) or outline.tensors[use.tensor].differentiable
        for item in op.saved:
            if item.source == "operand" and aliases[op.operands[item.index].tensor].root in uses:
                saved.setdefault(aliases[op.operands[item.index].tensor].root, i)
    if not outline.training:
        end |= {aliases[name].root: len(order) for name in outline.outputs}
    kept = [r for r in start if outline.tensors[r].role == "activation" and (flows[r] or not outline.training)]
    where = {
        name: (r, k)
        for r, region in enumerate(outline.regions)
        for k, ops in enumerate(region.instances)
        for name in ops
    }
    instance = tuple(where.get(op.name, (-1, 0)) for op in outline.ops)
    last = {where: i for i, where in enumerate(instance)}
    low: dict[str, int] = {}
    high: dict[str, int] = {}
    touched: dict[str, frozenset[tuple[int, int]]] = {}
    for members in (names for region in outline.regions for names in region.parameters):
        everywhere = [i for name in members for i in uses[name]]
        for name in members:
            low[name] = min(everywhere, default=0)
            high[name] = max((last[instance[i]] for i in everywhere), default=0)
            touched[name] = frozenset(instance[i] for i in everywhere)
    return Facts(
        order, aliases, tuple(Span(r, start[r], end[r]) for r in kept), {n: tuple(u) for n, u in uses.items()}, saved,
        instance, low, high, touched, {n: t.bytes for n, t in outline.tensors.items() if _given(t)},
    )  # fmt: skip


def _given(tensor: Tensor) -> bool:
    return tensor.role in ("input", "buffer", "constant") and tensor.storage == tensor.name


def _aliases(outline: Outline) -> dict[str, Alias]:
    found = {name: Alias(name, _same(t)) for name, t in outline.tensors.items() if t.storage == name}
    for op in outline.ops:
        for result in op.results:
            tensor = outline.tensors[result.tensor]
            if tensor.storage == tensor.name:
                continue
            base = next((u for u in op.operands if outline.tensors[u.tensor].storage == tensor.storage), None)
            if base is None:
                found[tensor.name] = Alias(tensor.name, _same(tensor))
                continue
            before = found[base.tensor]
            places: dict[Place, Place] = {}
            for dim, members in enumerate(result.factors):
                for i, factor in enumerate(members):
                    place = base.place(factor)
                    if place is not None and place in before.places:
                        places[dim, i] = before.places[place]
            found[tensor.name] = Alias(before.root, places)
    return found


def _same(tensor: Tensor) -> dict[Place, Place]:
    return {(d, i): (d, i) for d, members in enumerate(tensor.dims) for i in range(len(members))}


Buffer = tuple[str, Placement]
"""A storage and the placement it stands in, V written as R."""


def buffer(found: Facts, name: str, placement: Placement) -> Buffer:
    """The buffer that `name` placed as `placement` lives in; its own where a split factor is not one of the storage's."""
    alias = found.aliases[name]
    states: list[State] = []
    for state in placement:
        if not state.is_split:
            states.append(R if state.kind == "V" else state)
        elif (state.dim, state.factor) in alias.places:
            states.append(split(*alias.places[state.dim, state.factor]))
        else:
            return name, placement
    return alias.root, tuple(states)


def local_bytes(tensor: Tensor, placement: Placement, sizes: tuple[int, ...]) -> float:
    """Bytes of the local tensor."""
    return local_elements(tensor.dims, placement, sizes) * DTYPE_BYTES[tensor.dtype]


def new_bytes(op: Op, item: Saved, choice: tuple[str, ...], sizes: tuple[int, ...]) -> float:
    """Local bytes of a new tensor that `op` saves under `choice`."""
    share = float(item.bytes)
    for name, n in zip(choice, sizes, strict=True):
        if any(i in item.factors for i in split_by(op, name)):
            share /= n
    return share


def operand_gradients(op: Op, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Operands whose gradient is new memory in the backward of `op`: not parameters, not through views or pass-through ops."""
    results = [tensors[u.tensor] for u in op.results]
    found = []
    for i, use in enumerate(op.operands):
        tensor = tensors[use.tensor]
        if not tensor.differentiable or tensors[tensor.storage].role == "parameter":
            continue
        if any(r.storage == tensor.storage for r in results):
            continue
        if op.target in PASSING and any(r.elements == tensor.elements for r in results):
            continue
        found.append(i)
    return tuple(dict.fromkeys(found))


def parameter_gradients(op: Op, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Operands that are parameters, or views of them, whose gradient the backward of `op` makes."""
    results = {tensors[u.tensor].storage for u in op.results}
    return tuple(
        i for i, use in enumerate(op.operands)
        if tensors[use.tensor].differentiable and tensors[use.tensor].storage not in results
        and tensors[tensors[use.tensor].storage].role == "parameter"
    )  # fmt: skip


FUSED_LOSS = "aten._fused_cross_entropy"
"""The target of cross-entropy as one kernel (planner/losses.py)."""


def gradient_copies(op: Op, choice: tuple[str, ...]) -> int:
    """How many tensors of the operands' size the backward of `op` makes.

    Cross-entropy goes through log-softmax and makes two; its vocabulary-parallel form makes one, and as one kernel it writes
    over its logits. With its projection it has made its gradients in the forward pass.
    """
    if op.target == FUSED_LOSS or op.kind == rule_heads.KIND:
        return 0
    classes = {f.name for f in op.factors if f.split == "vocab_loss"}
    return 2 if classes and classes.isdisjoint(choice) else 1


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes one parameter takes on a rank, by what it is for.

    `stored` with master copy, `moments`, `copy` (full copy that lives from its first use on), `gathered` (full copy while
    its region runs), `arrival` (copies while it is gathered, beyond `gathered`), `whole` (gradient before it is reduced),
    `final` (gradient as the optimizer sees it), `bucket` (copies while its gradient is reduced, beyond `whole`), `step`
    (optimizer temporaries).
    """

    stored: int
    moments: int
    copy: int
    gathered: int
    arrival: int
    whole: int
    final: int
    bucket: int
    step: int


def held(
    tensor: Tensor,
    trains: bool,
    stored: int,
    used: float,
    zero: int,
    reduced: int,
    bytes_: StateBytes,
    setting: Setting,
) -> Held:
    """What a parameter of `stored` local elements (`used` once gathered) takes at a ZeRO level.

    `reduced` is how many all-reduced gradients it has: one per wanted placement (over several axes, one after the
    other). An optimizer that goes over all parameters at once (foreach) works in place but for one tensor each.
    """
    full = math.ceil(used) * DTYPE_BYTES[tensor.dtype]
    final = stored * bytes_.gradient if trains else 0
    staged = full if setting.staged else 0
    return Held(
        stored=stored * (bytes_.parameter + (bytes_.master if trains else 0)),
        moments=stored * bytes_.moments if trains else 0,
        copy=full if zero in (1, 2) or (zero == 0 and bytes_.copy) else 0,
        gathered=full if zero == 3 else 0,
        arrival=stored * DTYPE_BYTES[tensor.dtype] + staged if zero == 3 else 0,
        whole=full if trains else 0,
        final=final,
        bucket=(max(full + final + staged, reduced * full) if zero else reduced * final) if trains else 0,
        step=setting.temporaries * stored * bytes_.parameter if trains else 0,
    )

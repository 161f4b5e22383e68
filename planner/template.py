"""Repeated regions tied: one op, tensor or parameter *class* stands for all its concrete instances, with a count.

Concrete tensors with the same producer class and the same set of consumer classes form one tensor class; so the output of the
last layer, read by the final norm instead of a next layer, is a class of its own, and every price is paid as often as it occurs.

With m microbatches, sizes are those of one microbatch; what does not depend on the loop (label counts, slices of whole
tensors) is marked `once` and keeps the sizes of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .microbatch import BatchCut, cut_batch
from .outline import DTYPE_BYTES, Factor, Op, Outline, Parameter, Saved, Tensor
from .placement import Dims

Consumer = tuple[int, int]
"""(op class, operand index)."""
Producer = tuple[int, int]
"""(op class, result index)."""


@dataclass(frozen=True, slots=True)
class OpClass:
    """The ops at one position of a region. `op` is that of the first instance, at the sizes of one microbatch."""

    op: Op
    region: int
    position: int
    count: int
    once: bool


@dataclass(frozen=True, slots=True)
class TensorClass:
    """Tensors made and read alike. `sink` says that the result is wanted whole on every rank (the loss)."""

    tensor: Tensor
    producer: Producer | None
    parameter: int | None
    consumers: tuple[Consumer, ...]
    sink: bool
    count: int
    once: bool


@dataclass(frozen=True, slots=True)
class ParameterClass:
    """The parameters at one position of a region."""

    parameter: Parameter
    tensor: Tensor
    region: int
    position: int
    count: int

    @property
    def bucket(self) -> tuple[int, bool, str]:
        """What parameters of one region have in common that share collectives, where they are stored alike."""
        return self.region, self.parameter.trainable, self.tensor.dtype


@dataclass(frozen=True, slots=True)
class Template:
    """An outline with its repeats tied; `outline` and `tensors` are at the sizes of one microbatch.

    `regathered` are the buckets with a parameter that the backward pass needs again.
    """

    outline: Outline
    microbatches: int
    tensors: Mapping[str, Tensor]
    ops: tuple[OpClass, ...]
    classes: tuple[TensorClass, ...]
    parameters: tuple[ParameterClass, ...]
    class_of: Mapping[str, int]
    parameter_of: Mapping[str, int]
    once: frozenset[str]
    regathered: frozenset[tuple[int, bool, str]]

    @property
    def cut(self) -> Cut:
        """The outline it was made from, at the sizes of one microbatch."""
        return Cut(self.outline, self.microbatches, self.once)


def batch_cut(outline: Outline) -> BatchCut:
    """How the batch of `outline` is cut into microbatches; inputs carry it where an op runs their first dim over samples."""
    places: dict[str, tuple[int, int] | None] = {
        name: None for name, t in outline.tensors.items() if t.role != "activation"
    }
    inputs = frozenset(outline.inputs)
    for op in outline.ops:
        for use in op.operands:
            if use.tensor in inputs and use.factors and use.factors[0] and op.factors[use.factors[0][0]].batch:
                places[use.tensor] = (0, 0)
    return cut_batch(outline.ops, outline.tensors, places)


def hoisted(outline: Outline, cut: BatchCut) -> frozenset[str]:
    """Activations computed before the microbatch loop: label counts, whole tensors that are cut, and what they need."""
    need = set(cut.hoisted)
    for op in outline.ops:
        names = [f.name for f in op.factors]
        choice = cut.choice[op.name]
        if choice in names:
            index = names.index(choice)
            need.update(
                u.tensor for u in op.operands if u.place(index) is not None and cut.states.get(u.tensor, "R") == "R"
            )
    for op in reversed(outline.ops):
        if any(r.tensor in need for r in op.results):
            need.update(u.tensor for u in op.operands)
    return frozenset(n for n in need if n in outline.tensors and outline.tensors[n].role == "activation")


def retyped(outline: Outline, compute: str) -> Outline:
    """`outline` as it runs at the compute dtype: floats of the parameters' dtype become `compute`, others stay."""
    floats = [outline.tensors[p.tensor] for p in outline.parameters if "float" in outline.tensors[p.tensor].dtype]
    by_dtype: dict[str, int] = {}
    for tensor in floats:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.elements
    own = max(by_dtype, key=lambda d: (by_dtype[d], d), default=compute)
    if own == compute:
        return outline
    ratio = DTYPE_BYTES[compute] / DTYPE_BYTES[own]
    tensors = {n: replace(t, dtype=compute) if t.dtype == own else t for n, t in outline.tensors.items()}
    ops = tuple(replace(op, saved=tuple(_narrow(s, ratio) for s in op.saved)) for op in outline.ops)
    return replace(outline, tensors=tensors, ops=ops)


def _narrow(saved: Saved, ratio: float) -> Saved:
    return replace(saved, bytes=int(saved.bytes * ratio)) if saved.source == "new" else saved


@dataclass(frozen=True, slots=True)
class Cut:
    """An outline at the sizes of one microbatch, with the activations that are computed once a step, before the loop."""

    outline: Outline
    microbatches: int
    once: frozenset[str]


def cut_outline(outline: Outline, microbatches: int, cut: BatchCut | None = None) -> Cut:
    """Cut the batch of `outline` into `microbatches`, which must divide every batch factor; `cut` is that of the whole model."""
    if microbatches == 1:
        return Cut(outline, 1, frozenset())
    cut = cut or batch_cut(outline)
    once = hoisted(outline, cut)
    tensors = {n: cut_tensor(t, cut, once, microbatches) for n, t in outline.tensors.items()}
    ops = tuple(cut_op(op, cut, once, microbatches) for op in outline.ops)
    return Cut(replace(outline, tensors=tensors, ops=ops), microbatches, once)


def build(outline: Outline, microbatches: int = 1) -> Template:
    """Tie the repeats of `outline`, whose batch is cut into `microbatches`."""
    return tie(cut_outline(outline, microbatches))


def tie(cut: Cut) -> Template:
    """Tie the repeats of an outline that is cut into microbatches."""
    outline, microbatches = cut.outline, cut.microbatches
    ops, tensors = cut.outline.by_name, cut.outline.tensors
    class_of: dict[str, int] = {}
    op_classes: list[OpClass] = []
    for r, region in enumerate(outline.regions):
        for i, name in enumerate(region.instances[0]):
            for instance in region.instances:
                class_of[instance[i]] = len(op_classes)
            once = any(u.tensor in cut.once for u in ops[name].results)
            op_classes.append(OpClass(ops[name], r, i, region.repeats, once))
    parameters, parameter_of = _parameters(outline, tensors)
    classes = _tensor_classes(outline, tensors, class_of, parameter_of, cut.once)
    return Template(
        cut.outline, microbatches, tensors, tuple(op_classes), classes, parameters, class_of, parameter_of, cut.once,
        _regathered(outline, parameter_of, parameters),
    )  # fmt: skip


def _regathered(
    outline: Outline, parameter_of: Mapping[str, int], parameters: tuple[ParameterClass, ...]
) -> frozenset[tuple[int, bool, str]]:
    saved = {
        outline.tensors[op.operands[s.index].tensor].storage
        for op in outline.ops
        for s in op.saved
        if s.source == "operand"
    }
    return frozenset(parameters[w].bucket for name, w in parameter_of.items() if name in saved)


def cut_tensor(tensor: Tensor, cut: BatchCut, once: frozenset[str], m: int) -> Tensor:
    """A tensor at the sizes of one of `m` microbatches."""
    state = cut.states.get(tensor.name, "R")
    if tensor.name in once or isinstance(state, str):
        return tensor
    return replace(tensor, dims=_divided(tensor.dims, state, m))


def _divided(dims: Dims, place: tuple[int, int], m: int) -> Dims:
    dim, factor = place
    return tuple(
        tuple(size // m if (d, i) == (dim, factor) else size for i, size in enumerate(members))
        for d, members in enumerate(dims)
    )


def cut_op(op: Op, cut: BatchCut, once: frozenset[str], m: int) -> Op:
    """An op at the sizes of one of `m` microbatches."""
    choice = cut.choice[op.name]
    names = [f.name for f in op.factors]
    if choice not in names or any(u.tensor in once for u in op.results):
        return op
    index = names.index(choice)
    factors = tuple(_smaller(f, m) if i == index else f for i, f in enumerate(op.factors))
    saved = tuple(replace(s, bytes=s.bytes // m) if index in s.factors else s for s in op.saved)
    return replace(op, factors=factors, saved=saved, flops=op.flops / m, backward_flops=op.backward_flops / m)


def _smaller(factor: Factor, m: int) -> Factor:
    return replace(factor, size=factor.size // m)


def _parameters(outline: Outline, tensors: Mapping[str, Tensor]) -> tuple[tuple[ParameterClass, ...], dict[str, int]]:
    by_tensor = {p.tensor: p for p in outline.parameters}
    found: list[ParameterClass] = []
    parameter_of: dict[str, int] = {}
    for r, region in enumerate(outline.regions):
        for i, name in enumerate(region.parameters[0] if region.parameters else ()):
            for instance in region.parameters:
                parameter_of[instance[i]] = len(found)
            found.append(ParameterClass(by_tensor[name], tensors[name], r, i, len(region.parameters)))
    return tuple(found), parameter_of


def _tensor_classes(
    outline: Outline, tensors: Mapping[str, Tensor], class_of: Mapping[str, int], parameter_of: Mapping[str, int],
    once: frozenset[str],
) -> tuple[TensorClass, ...]:  # fmt: skip
    consumers: dict[str, set[Consumer]] = {}
    producers: dict[str, Producer] = {}
    order: dict[str, None] = {}
    for op in outline.ops:
        for i, use in enumerate(op.operands):
            order.setdefault(use.tensor)
            consumers.setdefault(use.tensor, set()).add((class_of[op.name], i))
        for i, use in enumerate(op.results):
            order.setdefault(use.tensor)
            producers[use.tensor] = (class_of[op.name], i)
    whole = set(outline.whole)
    groups: dict[tuple[tuple[object, ...], tuple[Consumer, ...], bool], list[str]] = {}
    for name in order:
        tensor = tensors[name]
        who = tuple(sorted(consumers.get(name, ())))
        if name in producers:
            origin: tuple[object, ...] = ("op", *producers[name])
        elif name in parameter_of:
            origin = ("parameter", parameter_of[name])
        else:
            origin = ("outside", tensor.role, tensor.dims, tensor.dtype)
        groups.setdefault((origin, who, name in whole), []).append(name)
    return tuple(
        TensorClass(
            tensors[members[0]], producers.get(members[0]), parameter_of.get(members[0]), who, sink, len(members),
            members[0] in once or (members[0] not in producers and tensors[members[0]].role != "parameter"),
        )
        for (_, who, sink), members in groups.items()
    )  # fmt: skip

"""Capture: from an unmodified module to a clean, lifted fx graph of aten ops.

    captured = capture(model, (), {"input_ids": ids, "labels": labels})
    captured.graph.print_readable()

Placeholders stand in the order parameters (unique tensors once), buffers, constants, inputs. The body is functional:
no in-place ops, no asserts, no regions. The output is a flat tuple, the loss first. Every node has `meta["val"]` (a
fake CPU tensor), `meta["source"]` and `meta["differentiable"]` (a tuple for an op with several results). Names are a
function of the model and its inputs' shapes alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..errors import CaptureError, UsageError
from .base import Program, Record, run_passes, tensor_name
from .cleanup import cleanup_passes, first_passes
from .gradients import mark
from .inline import Fixed, Lifted, Slot, lift
from .torch_compat import OpOverload, full_name, pytree
from .trace import WRAPPED, trace

ROLES = ("parameter", "buffer", "constant", "input")


@dataclass(frozen=True)
class Entry:
    """A placeholder: its node, role, name in the model (or of the input), other names of a tied tensor.

    `trainable` is a parameter's `requires_grad`; `persistent` says whether a buffer stands in the state dict.
    """

    node: str
    role: str
    fqn: str
    aliases: tuple[str, ...] = ()
    trainable: bool = False
    persistent: bool = True


@dataclass(frozen=True)
class Captured:
    """A clean graph and what connects it to the model.

    `inputs` has, per leaf of (args, kwargs) in `input_spec`, a node name or a `Fixed` constant; `flat_outputs`
    likewise per leaf of the model's output in `output_spec`. `loss` names the scalar loss, "" for an inference graph.
    `writes` has, per buffer that a call changes, the output that is its new value.
    """

    graph: fx.GraphModule
    entries: tuple[Entry, ...]
    constants: Mapping[str, torch.Tensor]
    loss: str
    input_spec: pytree.TreeSpec
    inputs: tuple[str | Fixed, ...]
    output_spec: pytree.TreeSpec
    flat_outputs: tuple[str | Fixed, ...]
    train: bool
    writes: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    records: tuple[Record, ...] = field(default=(), compare=False)

    def flatten(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """Tensor inputs by node name; raises UsageError where the call differs in structure or constants from the captured one."""
        leaves, spec = pytree.tree_flatten((tuple(args), _ordered(dict(kwargs or {}), self.input_spec)))
        if spec != self.input_spec:
            raise UsageError(
                f"this call has another structure than the captured one: got {spec}, captured {self.input_spec}"
            )
        found = {}
        for leaf, known in zip(leaves, self.inputs, strict=True):
            if isinstance(known, str):
                if not isinstance(leaf, torch.Tensor):
                    raise UsageError(f"input {known} was captured as a tensor and is now {leaf!r}")
                found[known] = leaf
            elif isinstance(leaf, torch.Tensor) or leaf != known.value:
                raise UsageError(f"an input was captured as the constant {known.value!r} and is now {leaf!r}")
        return found

    def unflatten(self, values: Mapping[str, Any]) -> Any:
        """The model's own output type from values by node name (missing ones become None)."""
        leaves = [values.get(o) if isinstance(o, str) else o.value for o in self.flat_outputs]
        return pytree.tree_unflatten(leaves, self.output_spec)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs in order, the loss first."""
        return tuple(tensor_name(n) for n in _output(self.graph.graph).args[0])  # type: ignore[union-attr]

    def values(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The tensors of parameters, buffers and constants by node name: the model's own, not copies."""
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        named = {e.node: tensors[e.fqn] for e in self.entries if e.role in ("parameter", "buffer")}
        return named | dict(self.constants)


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    train: bool = True,
    lift_float64: bool = False,
    after: Callable[[str, Program], None] | None = None,
) -> Captured:
    """Capture `model(*args, **kwargs)` as a clean graph; nothing is computed and the model is left as it was.

    The loss is `loss_fn(output)` where given, else the scalar `.loss`, "loss" or first 0-dim floating output.
    `train=False` makes an inference graph. The mode (train or eval) is the model's own. `lift_float64` turns float32
    casts inside into float64 (lift.py). `after(pass name, program)` sees the graph after each pass. Raises
    CaptureError carrying every problem found.
    """
    kwargs = dict(kwargs or {})
    traced = trace(model, tuple(args), kwargs, loss_fn=loss_fn, lift_float64=lift_float64)
    lifted = lift(traced.program, model, WRAPPED if traced.wrapped else "")
    program, spec = lifted.program, traced.program.call_spec
    loss = _loss(lifted, spec.out_spec, traced.wrapped) if train else None
    program.problems += traced.problems if train else ()
    program.notes += traced.notes
    if not _kept(program):
        program.problems.append("it returns no tensor")
    if loss is None:
        for slot in lifted.slots:
            slot.node.meta["differentiable"] = False
    program, found = run_passes(first_passes(), program, after=after)
    if program.problems:
        raise CaptureError(f"{type(model).__name__} cannot be captured:", list(dict.fromkeys(program.problems)))
    program, cleaned = run_passes(cleanup_passes(), program, known=("functional",), after=after)
    return _finish(lifted, program, spec, traced.wrapped, loss, (*found, *cleaned))


def _finish(
    lifted: Lifted, program: Program, spec: Any, wrapped: bool, loss: int | None, records: tuple[Record, ...]
) -> Captured:  # fmt: skip
    """The final graph: canonical names, placeholders in order of role, loss first."""
    mark(program.graph)
    kept = _kept(program)
    graph, new = _renamed(program, lifted.slots, [] if loss is None else [kept[loss]], kept)
    outputs, output_spec = (lifted.outputs[1:], spec.out_spec.child(1)) if wrapped else (lifted.outputs, spec.out_spec)
    constants = {new[n].name: program.constants[n.name] for n in new if n.name in program.constants}
    return Captured(
        graph=fx.GraphModule({}, graph), entries=_entries(lifted.slots, program, new), constants=constants,
        loss="" if loss is None else tensor_name(new[kept[loss]]),
        input_spec=spec.in_spec, inputs=tuple(new[s.node].name if isinstance(s, Slot) else s for s in lifted.inputs),
        output_spec=output_spec, flat_outputs=tuple(tensor_name(new[kept[o]]) if isinstance(o, int) else o for o in outputs),
        train=loss is not None, writes=_writes(program, kept, new), notes=tuple(dict.fromkeys(program.notes)), records=records,
    )  # fmt: skip


def _output(graph: fx.Graph) -> fx.Node:
    return next(reversed(graph.nodes))


def _writes(program: Program, kept: list[fx.Node], new: Mapping[fx.Node, fx.Node]) -> dict[str, str]:
    """The new value of each buffer: the last outputs."""
    names = program.writes
    return {name: tensor_name(new[node]) for name, node in zip(names, kept[len(kept) - len(names) :], strict=True)}


def _kept(program: Program) -> list[fx.Node]:
    """The tensors the program returns."""
    return list(_output(program.graph).args[0])  # type: ignore[arg-type]


def _loss(lifted: Lifted, spec: pytree.TreeSpec, wrapped: bool) -> int | None:
    """Which returned tensor is the loss: loss_fn's, the scalar `.loss`, "loss", or the first 0-dim floating one."""
    kept, outputs = _kept(lifted.program), lifted.outputs
    if wrapped:
        first = outputs[0]
        if isinstance(first, int) and _is_loss(kept[first]):
            return first
        found = (
            f"a tensor of shape {tuple(kept[first].meta['val'].shape)}" if isinstance(first, int) else repr(first.value)
        )
        raise CaptureError(
            "the loss function cannot be used:", [f"it must return one 0-dim floating tensor, not {found}"]
        )
    tree = pytree.tree_unflatten([o if isinstance(o, int) else None for o in outputs], spec)
    named = tree.get("loss") if isinstance(tree, Mapping) else getattr(tree, "loss", None)
    candidates = [o for o in (named, *outputs) if isinstance(o, int)]
    loss = next((o for o in candidates if _is_loss(kept[o])), None)
    if loss is None:
        lifted.program.notes.append("no output is a scalar loss and no loss_fn is given: an inference graph")
    return loss


def _is_loss(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point()


def _renamed(
    program: Program, slots: tuple[Slot, ...], loss: list[fx.Node], kept: list[fx.Node]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy whose names do not depend on what passes did on the way."""
    graph, new = fx.Graph(), {}
    order = {slot.node: index for index, slot in enumerate(slots)}
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    placeholders = [n for n in placeholders if n.meta["role"] != "constant" or n.users]
    placeholders.sort(key=lambda n: (ROLES.index(n.meta["role"]), order.get(n, len(order))))
    constants = 0
    for node in placeholders:
        name = node.name
        if node.meta["role"] == "constant":
            name, constants = f"constant_{constants}", constants + 1
        new[node] = graph.create_node("placeholder", name, name=name)
        new[node].target = new[node].name
        new[node].meta = dict(node.meta)
    for node in program.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg(node.args, new.__getitem__), fx.map_arg(node.kwargs, new.__getitem__)
            new[node] = graph.create_node("call_function", node.target, args, kwargs, name=_base_name(node))
            new[node].meta = dict(node.meta)
    graph.output(tuple(dict.fromkeys(new[n] for n in [*loss, *kept])))
    return graph, new


def _base_name(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    assert isinstance(node.target, OpOverload)
    return full_name(node.target).split("::")[-1]


def _entries(slots: tuple[Slot, ...], program: Program, new: dict[fx.Node, fx.Node]) -> tuple[Entry, ...]:
    known = {s.node: s for s in slots}
    entries = []
    for old, node in new.items():
        if node.op != "placeholder":
            continue
        slot = known.get(old)
        if slot is None or slot.role == "constant":
            entries.append(Entry(node.name, "constant", node.name))
        else:
            entries.append(Entry(node.name, slot.role, slot.fqn, slot.aliases, slot.trainable, slot.persistent))
    return tuple(entries)


def _ordered(kwargs: dict[str, Any], spec: pytree.TreeSpec) -> dict[str, Any]:
    """Keyword arguments in the captured order, unknown ones last."""
    known = spec.child(1).context or []
    return {k: kwargs[k] for k in known if k in kwargs} | kwargs

"""From an exported program to one flat lifted graph: parameters first and once, no-grad and autocast regions inlined.

    with no_grad: y = f(x)      becomes      y = f(detach(x))

Export keeps such regions as higher-order ops. Detaching what a no-grad op reads keeps its meaning (a later pass drops
the detach where no gradient would flow anyway). An autocast region that is disabled is inlined as it stands.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from ..errors import CaptureError
from .base import Program
from .diagnose import in_torch
from .torch_compat import HigherOrderOperator

aten = torch.ops.aten
SET_GRAD, AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"


@dataclass(frozen=True)
class Slot:
    """A placeholder: role ("parameter", "buffer", "constant" or "input"), name, tied names, trained?, saved in state dicts?"""

    node: fx.Node
    role: str
    fqn: str
    aliases: tuple[str, ...] = ()
    trainable: bool = False
    persistent: bool = True


@dataclass(frozen=True)
class Lifted:
    """A program, its placeholders, and what the leaves of inputs and outputs are: a position, or a constant.

    `inputs` has a Slot or a constant for each leaf of (args, kwargs); `outputs` has an index into the graph's output
    tuple (int) or a `Fixed` constant for each leaf of the output.
    """

    program: Program
    slots: tuple[Slot, ...]
    inputs: tuple[Slot | Fixed, ...]
    outputs: tuple[int | Fixed, ...]


@dataclass(frozen=True)
class Fixed:
    """A leaf that is no tensor: the same in every call."""

    value: Any


def lift(exported: ExportedProgram, model: nn.Module, prefix: str = "") -> Lifted:
    """One flat graph of an exported program; `prefix` (of a wrapper) is removed from names."""
    if problems := _unsupported_regions(exported.graph_module):
        raise CaptureError(f"{type(model).__name__} cannot be captured:", problems)
    copy = _Copy(Program(fx.Graph()))
    source = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    slots = _parameters(copy, exported, model, prefix, source)
    slots += _buffers(copy, exported, model, prefix, source)
    slots += _constants(copy, exported, source)
    inputs = _inputs(copy, exported, source)
    slots += [s for s in inputs if isinstance(s, Slot)]
    _describe(slots)
    result = copy.body(exported.graph_module)
    outputs, kept = _outputs(copy, exported, result)
    copy.program.graph.output(tuple(kept))
    return Lifted(copy.program, tuple(slots), tuple(inputs), tuple(outputs))


def _unsupported_regions(module: nn.Module) -> list[str]:
    """Problems: higher-order ops other than those that can be inlined, in all nested graphs."""
    problems = []
    for graph_module in (m for m in module.modules() if isinstance(m, fx.GraphModule)):
        for node in graph_module.graph.nodes:
            if not isinstance(node.target, HigherOrderOperator):
                continue
            if str(node.target) not in (SET_GRAD, AUTOCAST):
                problems.append(f"{node.target} is not supported: {source_of(node)}")
            elif str(node.target) == AUTOCAST and node.args[2]:
                body = _attribute(graph_module, str(node.args[4].target))  # type: ignore[union-attr]
                problems.append(f"autocast inside the model is not supported yet: {source_of(_first(body))}")
    return list(dict.fromkeys(problems))


def _parameters(
    copy: _Copy, exported: ExportedProgram, model: nn.Module, prefix: str, source: dict[str, fx.Node]
) -> list[Slot]:
    """One slot per parameter tensor; the names of tied ones share it."""
    nodes = {
        s.target: source[s.arg.name] for s in exported.graph_signature.input_specs if s.kind == InputKind.PARAMETER
    }  # type: ignore[union-attr]
    owners: dict[int, list[str]] = {}
    tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    slots = []
    for key, names in owners.items():
        olds = [nodes[prefix + n] for n in names if prefix + n in nodes]
        new = copy.placeholder("p_" + names[0], olds)
        slots.append(Slot(new, "parameter", names[0], tuple(names[1:]), tensors[key].requires_grad))
    return slots


def _buffers(
    copy: _Copy, exported: ExportedProgram, model: nn.Module, prefix: str, source: dict[str, fx.Node]
) -> list[Slot]:
    specs = {s.target: s for s in exported.graph_signature.input_specs if s.kind == InputKind.BUFFER}
    owners: dict[int, list[str]] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        owners.setdefault(id(buffer), []).append(name)
    slots = []
    for names in owners.values():
        known = [specs[prefix + n] for n in names if prefix + n in specs]
        new = copy.placeholder("b_" + names[0], [source[s.arg.name] for s in known])
        persistent = all(s.persistent is not False for s in known)
        slots.append(Slot(new, "buffer", names[0], tuple(names[1:]), persistent=persistent))
    return slots


def _constants(copy: _Copy, exported: ExportedProgram, source: dict[str, fx.Node]) -> list[Slot]:
    slots = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind == InputKind.CONSTANT_TENSOR:
            new = copy.placeholder(f"c_{len(slots)}", [source[spec.arg.name]])
            copy.program.constants[new.name] = exported.constants[spec.target].detach()  # type: ignore[index, union-attr]
            slots.append(Slot(new, "constant", new.name))
        elif spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.USER_INPUT):
            copy.program.problems.append(f"an input of kind {spec.kind.name} ({spec.target}) is not supported")
    return slots


def _inputs(copy: _Copy, exported: ExportedProgram, source: dict[str, fx.Node]) -> list[Slot | Fixed]:
    found: list[Slot | Fixed] = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, ConstantArgument):
            found.append(Fixed(spec.arg.value))
            continue
        name = spec.arg.name
        found.append(Slot(copy.placeholder(name, [source[name]]), "input", name))
    return found


def _outputs(
    copy: _Copy, exported: ExportedProgram, result: tuple[Any, ...]
) -> tuple[list[int | Fixed], list[fx.Node]]:
    outputs: list[int | Fixed] = []
    kept: list[fx.Node] = []
    for spec, value in zip(exported.graph_signature.output_specs, result, strict=True):
        if spec.kind != OutputKind.USER_OUTPUT:
            copy.program.problems.append(f"an output of kind {spec.kind.name} ({spec.target}) is not supported")
        elif isinstance(value, fx.Node):
            outputs.append(len(kept))
            kept.append(value)
        else:
            outputs.append(Fixed(value))
    return outputs, kept


def _describe(slots: list[Slot]) -> None:
    """Role and name on each placeholder, for messages and gradients."""
    for slot in slots:
        slot.node.meta["role"] = slot.role
        slot.node.meta["fqn"] = slot.fqn
        slot.node.meta["differentiable"] = slot.trainable and _floating(slot.node)


class _Copy:
    """Copies graphs into one, regions inlined; `new` maps old nodes to new values."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.new: dict[fx.Node, Any] = {}
        self._closed: set[fx.Node] = set()  # made without gradients: needs no detach
        self._detached: dict[fx.Node, fx.Node] = {}

    def placeholder(self, name: str, olds: list[fx.Node]) -> fx.Node:
        node = self.program.graph.create_node("placeholder", re.sub(r"\W", "_", name), name=re.sub(r"\W", "_", name))
        node.target = node.name
        node.meta["source"] = name[2:] if name[:2] in ("p_", "b_", "c_") else name
        node.meta["differentiable"] = False
        if not olds:
            raise AssertionError(f"export knows no input for {name}")
        node.meta["val"] = olds[0].meta["val"]
        self.new.update(dict.fromkeys(olds, node))
        return node

    def body(self, module: fx.GraphModule, *, grad: bool = True) -> tuple[Any, ...]:
        """Copy the body of a graph (its placeholders are mapped already) and return its outputs."""
        for node in module.graph.nodes:
            if node.op == "output":
                return tuple(fx.map_arg(node.args[0], self._look))  # type: ignore[arg-type]
            if node.op == "get_attr":
                self.new[node] = _attribute(module, str(node.target))
            elif node.op == "call_function":
                self.new[node] = self._call(node, grad)
        raise AssertionError("a graph has an output")

    def _look(self, node: fx.Node) -> Any:
        return self.new[node]

    def _call(self, node: fx.Node, grad: bool) -> Any:
        if isinstance(node.target, HigherOrderOperator):
            return self._region(node, grad)
        if node.target is operator.getitem and isinstance(self.new[node.args[0]], tuple):  # type: ignore[index]
            return self.new[node.args[0]][node.args[1]]  # type: ignore[index]
        place = self._look if grad else self._look_detached
        args, kwargs = fx.map_arg(node.args, place), fx.map_arg(node.kwargs, place)
        made = self.program.graph.create_node("call_function", node.target, args, kwargs, name=node.name)  # type: ignore[arg-type]
        made.meta = {"val": node.meta.get("val"), "source": source_of(node)}
        if not grad:
            self._closed.add(made)
        return made

    def _look_detached(self, node: fx.Node) -> Any:
        value = self.new[node]
        if not isinstance(value, fx.Node) or value in self._closed or not _floating(value):
            return value
        if value not in self._detached:
            made = self.program.graph.call_function(aten.detach.default, (value,))
            made.meta = {"val": value.meta["val"].detach(), "source": value.meta["source"]}
            self._detached[value] = made
            self._closed.add(made)
        return self._detached[value]

    def _region(self, node: fx.Node, grad: bool) -> Any:
        """Inline a region; its value is the tuple of its outputs."""
        args = list(node.args)
        if str(node.target) == SET_GRAD:
            enabled, body, operands = bool(args[0]), args[1], args[2:]
        else:
            enabled, body, operands = grad, args[4], args[5:]
        module = self.new[body]  # type: ignore[index]
        inner = [n for n in module.graph.nodes if n.op == "placeholder"]
        for old, operand in zip(inner, operands, strict=True):
            self.new[old] = self.new[operand] if isinstance(operand, fx.Node) else operand
        return self.body(module, grad=enabled)


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _attribute(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _first(module: fx.GraphModule) -> fx.Node:
    return next(n for n in module.graph.nodes if n.op == "call_function")


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n\s+([^\n]+))?')


def source_of(node: fx.Node) -> str:
    """Module path and the user's innermost line of an exported node: `model.layers.0.mlp modeling.py:12: x = ...`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if not in_torch(f[0])]
    if not frames:
        return path
    file, line, code = frames[-1]
    where = f"{file.rsplit('/', 1)[-1]}:{line}: {code.strip()}"
    return f"{path} {where}" if path else where

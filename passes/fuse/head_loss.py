"""A projection to classes and the cross-entropy of its rows become one op that never makes all logits (passes/heads/op.py).

    cross_entropy(reshape(linear(x, weight)), target, sum)      linear_cross_entropy(reshape(x), weight, target)

Between the product and the loss may stand what models put there: a bias, a factor, a soft cap (cap * tanh(logits / cap): Gemma
2), casts, and views of rows (reshapes, shifts, transposed classes), which are made of x instead. The product may be
`linear`, `mm` or `matmul`, the loss `cross_entropy_loss` or `nll_loss` of `log_softmax`, summed over ids (passes/cleanup/losses.py
splits means).

Logits that the model returns as well are given up as an output (`drops_outputs`): a call with `outputs=True` needs a capture
without this pass. Logits that anything else reads (a second loss, an accuracy) stay, and with them the whole chain; so do losses
that nothing is trained by.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..base import Contract, Program, fake
from ..heads.op import linear_cross_entropy
from ..heads.steps import DTYPES, NARROW, Step, dtypes, spelled
from ..pattern import Any_, Match, Number, call, either, find, target_of
from ..rewrite import Make

aten = torch.ops.aten
SUM = 2
"""torch's number for a summed loss (aten/src/ATen/core/Reduction.h)."""

_LOGITS, _TARGET = Any_("logits"), Any_("target")
_LOSSES = either(
    call("aten.cross_entropy_loss", _LOGITS, _TARGET, None, SUM, Number("ignore"), Number("smoothing")),
    *(
        call(f"aten.{name}", call("aten.log_softmax", _LOGITS, Number("dim"), name="normed", open=True), _TARGET, None,
             SUM, Number("ignore"))
        for name in ("nll_loss_nd", "nll_loss", "nll_loss2d")
    ),
)  # fmt: skip
_SAME = frozenset({"aten.contiguous", "aten.clone", "aten.alias"})
_MOVES = frozenset({"aten.transpose", "aten.permute", "aten.slice", "aten.select"})
_TURNS = frozenset({"aten.t", "aten.transpose", "aten.permute", "aten.numpy_T"})


@dataclass
class _Chain:
    """What was found between a loss and its product, the last node first; `dim` is that of the classes where the walk stands."""

    classes: int
    dim: int
    nodes: list[fx.Node] = field(default_factory=list)
    views: list[fx.Node] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    bias: fx.Node | None = None
    x: fx.Node | None = None
    weight: fx.Node | None = None
    turned: bool = False

    def walk(self, node: fx.Node) -> bool:
        """Follow `node` back to a product; False where something else comes first."""
        while self.x is None:
            self.nodes.append(node)
            before = self._before(node)
            if before is None:
                return False
            node = before
        return self.x is not None

    def _before(self, node: fx.Node) -> fx.Node | None:
        """The node whose logits `node` makes others of; x for the product."""
        name = target_of(node)
        if name in _PRODUCTS:
            return self._product(node)
        if name in _STEPS:
            return _STEPS[name](self, node)
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if name in _SAME:
            return source
        if source is None or not (self._reshaped(node, source) if name == "aten.reshape" else self._moved(node, name)):
            return None
        self.views.append(node)
        return source

    def _product(self, node: fx.Node) -> fx.Node | None:
        """Projections with the classes last and one weight for all rows."""
        x, weight, *rest = node.args
        rank = fake(node).dim()
        if rest or node.kwargs or not isinstance(weight, fx.Node) or fake(weight).dim() != 2 or self.dim != rank - 1:
            return None
        if fake(node).shape[-1] != self.classes:
            return None
        self.x, self.weight = x, weight  # type: ignore[assignment]
        self.turned = target_of(node) != "aten.linear"
        return self.x

    def _moved(self, node: fx.Node, name: str) -> bool:
        """Transposed dims, or some of the rows."""
        if name not in _MOVES:
            return False
        rank = fake(node).dim()
        if name == "aten.select":
            self.dim += node.args[1] % (rank + 1) <= self.dim  # type: ignore[operator]
            return True
        if name == "aten.slice":
            return (node.args[1] if len(node.args) > 1 else 0) % rank != self.dim  # type: ignore[operator]
        order = list(range(rank))
        if name == "aten.permute":
            order = [d % rank for d in node.args[1]]  # type: ignore[operator, union-attr]
        else:
            a, b = (d % rank for d in node.args[1:3])  # type: ignore[operator]
            order[a], order[b] = order[b], order[a]
        self.dim = order[self.dim]
        return True

    def _reshaped(self, node: fx.Node, source: fx.Node) -> bool:
        """Rows in another shape, the classes last before and after."""
        was, now = fake(source).shape, fake(node).shape
        if not was or was[-1] != self.classes or self.dim != len(now) - 1:
            return False
        self.dim = len(was) - 1
        return True

    def cast(self, node: fx.Node) -> fx.Node | None:
        """A cast between floating dtypes."""
        source = node.args[0]
        self.steps.append(Step("to", dtype=fake(node).dtype))
        return source if fake(source).dtype.is_floating_point else None  # type: ignore[return-value, arg-type]

    def scaled(self, node: fx.Node) -> fx.Node | None:
        """A factor or divisor that is a number."""
        source, number = node.args
        if (
            node.kwargs
            or not isinstance(number, int | float)
            or isinstance(number, bool)
            or not isinstance(source, fx.Node)
        ):
            return None
        self.steps.append(Step(target_of(node).removeprefix("aten."), float(number)))
        return source

    def capped(self, node: fx.Node) -> fx.Node | None:
        """A hyperbolic tangent."""
        self.steps.append(Step("tanh"))
        return node.args[0]  # type: ignore[return-value]

    def _per_class(self, bias: fx.Node) -> bool:
        """Whether it has one number per class, for all rows."""
        shape = fake(bias).shape
        return bool(shape) and shape[-1] == shape.numel() == self.classes

    def biased(self, node: fx.Node) -> fx.Node | None:
        """One number per class added, once."""
        source, bias = node.args
        if self.bias is not None or node.kwargs or not isinstance(bias, fx.Node) or not isinstance(source, fx.Node):
            return None
        if not self._per_class(bias):
            source, bias = bias, source
        shape = fake(node).shape
        if not self._per_class(bias) or fake(source).shape != shape or self.dim != len(shape) - 1:
            return None
        if not fake(bias).dtype.is_floating_point or fake(node).dtype != fake(source).dtype:
            return None
        self.steps.append(Step("bias"))
        self.bias = bias
        return source


_PRODUCTS = frozenset({"aten.linear", "aten.mm", "aten.matmul"})
_STEPS = {
    "aten.to": _Chain.cast, "aten.mul": _Chain.scaled, "aten.div": _Chain.scaled, "aten.tanh": _Chain.capped,
    "aten.add": _Chain.biased,
}  # fmt: skip


def _found(node: fx.Node) -> tuple[Match, _Chain] | None:
    """The loss at `node` and what leads to it, where all of it can be one op."""
    match = find(_LOSSES, node)
    if match is None or not node.meta.get("differentiable"):
        return None
    logits, target = fake(match["logits"]), fake(match["target"])
    dim = min(logits.dim() - 1, 1)
    if target.dtype.is_floating_point or target.dim() != logits.dim() - 1:
        return None
    normed = match.get("normed")
    if normed is not None and match["dim"] % logits.dim() != dim:
        return None
    chain = _Chain(logits.shape[dim], dim)
    if normed is not None:
        chain.nodes.append(normed)
        if fake(normed).dtype != logits.dtype:
            chain.steps.append(Step("to", dtype=fake(normed).dtype))
    if not chain.walk(match["logits"]):
        return None
    known = {fake(n).dtype for n in (chain.x, chain.weight, *chain.nodes)} <= set(DTYPES.values())  # type: ignore[arg-type]
    return (match, chain) if known and fake(chain.weight).dtype == fake(chain.x).dtype else None  # type: ignore[arg-type]


def _program(chain: _Chain) -> str:
    """The steps as text; a last cast from half precision to float32 is done by the softmax itself."""
    steps = chain.steps[::-1]
    if steps and steps[-1].dtype == torch.float32 and dtypes(steps, fake(chain.x).dtype)[-2] in NARROW:  # type: ignore[arg-type]
        steps = steps[:-1]
    return spelled(steps)


def _outputs_to_drop(chain: _Chain, root: fx.Node, program: Program) -> frozenset[fx.Node] | None:
    """Nodes of the chain that the graph returns; None where anything but the loss needs one of them."""
    output = root.graph.output_node()
    outputs: Any = output.args[0]
    free = set(outputs[1 : len(outputs) - len(program.writes)])
    fixed = {outputs[0], *outputs[len(outputs) - len(program.writes) :]}
    inside = {root, *chain.nodes}
    for node in chain.nodes:
        if node in fixed or any(user not in inside and user is not output for user in node.users):
            return None
    return frozenset(free & set(chain.nodes))


def _made(match: Match, chain: _Chain, make: Make, chunk: int) -> fx.Node:
    """The one op, on x as the views of logits leave it."""
    assert chain.x is not None
    x, dim = chain.x, fake(chain.x).dim() - 1
    wide = fake(x).shape[-1]
    for view in reversed(chain.views):
        if target_of(view) == "aten.reshape":
            x = make(aten.reshape.default, x, [*fake(view).shape[:-1], wide])
        else:
            x = make(view.target, x, *view.args[1:], **view.kwargs)
    logits, target = fake(match["logits"]), match["target"]
    dim = min(logits.dim() - 1, 1)
    if logits.dim() > 2:
        x = make(aten.permute.default, x, [0, *range(2, logits.dim()), dim])
    rows = fake(target).numel()
    if fake(x).dim() != 2:
        x = make(aten.reshape.default, x, [rows, wide])
    if fake(target).dim() != 1:
        target = make(aten.reshape.default, target, [rows])
    weight = _untransposed(chain, make)
    given: dict[str, Any] = {}
    if chain.bias is not None:
        flat = fake(chain.bias).dim() == 1
        given["bias"] = chain.bias if flat else make(aten.reshape.default, chain.bias, [chain.classes])
    if steps := _program(chain):
        given["steps"] = steps
    options = {
        "ignore_index": (match["ignore"], -100),
        "label_smoothing": (match.get("smoothing", 0.0), 0.0),
        "chunk": (chunk, 0),
    }
    given |= {name: value for name, (value, default) in options.items() if value != default}
    made = make(linear_cross_entropy, x, weight, target, **given)
    dtype = fake(match.root).dtype
    return made if fake(made).dtype == dtype else make(aten.to.dtype, made, dtype)


def _untransposed(chain: _Chain, make: Make) -> fx.Node:
    """The weight as [classes, k]."""
    weight = chain.weight
    assert weight is not None
    if not chain.turned:
        return weight
    if target_of(weight) in _TURNS and fake(weight.args[0]).shape == fake(weight).shape[::-1] and _turns(weight):  # type: ignore[arg-type]
        return weight.args[0]  # type: ignore[return-value]
    return make(aten.transpose.int, weight, 0, 1)


def _turns(weight: fx.Node) -> bool:
    """Whether a view of a matrix swaps its dims."""
    given: Any = weight.args[1:]
    return not given or [d % 2 for d in (given[0] if isinstance(given[0], list | tuple) else given)] in ([0, 1], [1, 0])


@dataclass(frozen=True)
class FuseHeadLoss(Contract):
    """Projection and cross-entropy in chunks of rows. `chunk` are its rows; 0: by their bytes (planner/rule_heads.py)."""

    name: str = "head_loss"
    requires: tuple[str, ...] = ("simple", "summed losses")
    drops_outputs: bool = True
    chunk: int = 0

    def apply(self, program: Program) -> Program:
        for node in reversed(list(program.graph.nodes)):
            found = _found(node) if node.op == "call_function" else None
            if found is None:
                continue
            match, chain = found
            dropped = _outputs_to_drop(chain, node, program)
            if dropped is not None:
                self._replace(match, chain, dropped)
        return program

    def _replace(self, match: Match, chain: _Chain, dropped: frozenset[fx.Node]) -> None:
        root, graph = match.root, match.root.graph
        with graph.inserting_before(root):
            by = _made(match, chain, Make(root), self.chunk)
        root.replace_all_uses_with(by)
        output = graph.output_node()
        outputs: Any = output.args[0]
        output.args = (tuple(None if n in dropped else n for n in outputs),)
        weight = chain.weight
        for node in (root, *chain.nodes):
            graph.erase_node(node)
        if chain.turned and weight is not None and not weight.users and weight.op == "call_function":
            graph.erase_node(weight)

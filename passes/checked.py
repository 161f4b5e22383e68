"""Verify mode: run the graph before and after a pass on the same random numbers and compare outputs and all gradients.

Everything runs as the graphs are, in their dtypes; a capture in float64 (`capture(..., lift_float64=True)`) shows differences that
float32 hides. Random ops draw nothing (dropout has probability zero), integer inputs stay below the smallest table or number of
classes that they may index, buffers are positive (they hold variances), constants are what they are.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .base import Pass, Verdict, Weigh, fake
from .pattern import target_of
from .random import DROPPING
from .torch_compat import OpOverload, full_name

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest difference between values of a dtype, relative to the largest value where that is over one; others: 0.02."""
AS_THEY_ARE = frozenset({
    f"aten.{name}" for name in
    ("reshape", "view", "to", "pad", "slice", "transpose", "contiguous", "clone", "unsqueeze", "squeeze", "expand")
})  # fmt: skip
"""Ops behind which integers are still the numbers that came in."""


@dataclass(frozen=True)
class Verifying:
    """A `weigh` for `run_passes`: a pass that changes outputs or gradients is taken back and named.

    `constants` are the graph's by placeholder name. `also` judges what is right; with none it stays.
    """

    constants: Mapping[str, Tensor]
    seed: int = 0
    also: Weigh | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, step: Pass[Any], before: fx.Graph, after: fx.Graph) -> Verdict:
        values = dict(self.constants) | inputs_of(before, self.seed) | dict(self.given)
        dropped = _dropped(after) if step.drops_outputs else frozenset()
        wrong = difference(outcome(before, values, dropped), outcome(after, values, dropped))
        if wrong:
            return Verdict(False, f"{step.name} changes {wrong}")
        return self.also(step, before, after) if self.also is not None else Verdict(True)


@dataclass(frozen=True)
class Outcome:
    """Outputs in order and gradients by placeholder, of the sum of all floating outputs times fixed random numbers.

    An output that a pass gave up is None.
    """

    outputs: tuple[Tensor | None, ...]
    gradients: Mapping[str, Tensor | None]


def inputs_of(graph: fx.Graph, seed: int) -> dict[str, Tensor]:
    """Random values for every placeholder that is no constant."""
    generator = torch.Generator().manual_seed(seed)
    return {
        node.name: _sample(node, generator)
        for node in graph.nodes
        if node.op == "placeholder" and node.meta.get("role") != "constant"
    }


def _dropped(graph: fx.Graph) -> frozenset[int]:
    """Positions of outputs that were given up."""
    outputs: Any = graph.output_node().args[0]
    return frozenset(i for i, node in enumerate(outputs) if node is None)


def outcome(graph: fx.Graph, values: Mapping[str, Tensor], dropped: Container[int] = ()) -> Outcome:
    """Run a graph without dropout and differentiate it, but for the outputs at the positions `dropped`."""
    leaves: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            value = values[node.name].detach()
            leaves[node.name] = value.requires_grad_(
                bool(node.meta.get("differentiable")) and value.is_floating_point()
            )
    outputs = _Undropped(fx.GraphModule({}, graph)).run(*leaves.values())
    outputs = [None if i in dropped else o for i, o in enumerate(outputs)]
    generator = torch.Generator().manual_seed(0)
    ways = [o for o in outputs if o is not None and o.requires_grad]
    incoming = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in ways]
    wanted = [x for x in leaves.values() if x.requires_grad]
    found = torch.autograd.grad(ways, wanted, incoming, allow_unused=True) if ways and wanted else [None] * len(wanted)
    grads = dict(zip([n for n, x in leaves.items() if x.requires_grad], found, strict=True))
    return Outcome(tuple(None if o is None else o.detach() for o in outputs), grads)


def difference(one: Outcome, other: Outcome) -> str:
    """What differs by more than the tolerance of its dtype, with by how much; "" where nothing does."""
    if len(one.outputs) != len(other.outputs):
        return f"the number of outputs from {len(one.outputs)} to {len(other.outputs)}"
    pairs = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(one.outputs, other.outputs, strict=True))]
    pairs += [(f"the gradient of {n}", a, other.gradients.get(n)) for n, a in one.gradients.items()]
    for name, a, b in pairs:
        if (a is None) != (b is None):
            return f"{name}, which {'had one' if b is None else 'had none'} before"
        if a is None or b is None:
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name} from {a.dtype}{list(a.shape)} to {b.dtype}{list(b.shape)}"
        if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return f"where {name} is finite"
        limit = TOLERANCE.get(a.dtype, 0.02)
        first, second = (torch.nan_to_num(x.double()) for x in (a, b))
        error, most = ((float(x.abs().max()) if x.numel() else 0.0) for x in (first - second, first))
        if error > limit * max(1.0, most):
            return f"{name} by {error:.3g} (values up to {most:.3g})"
    return ""


class _Undropped(fx.Interpreter):
    """Runs a graph with ops that drop at probability zero."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packet = full_name(target).replace("::", ".") if isinstance(target, OpOverload) else ""
        if packet in DROPPING:
            position, name = DROPPING[packet]
            if len(args) > position:
                args = (*args[:position], 0.0, *args[position + 1 :])
            elif name in kwargs:
                kwargs = {**kwargs, name: 0.0}
        return super().call_function(target, args, kwargs)


def _sample(node: fx.Node, generator: torch.Generator) -> Tensor:
    value = fake(node)
    shape, dtype = tuple(value.shape), value.dtype
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not dtype.is_floating_point:
        return torch.randint(0, _bound(node), shape, generator=generator, dtype=dtype)
    if node.meta.get("role") == "buffer":
        return (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
    kernel = (
        len(shape) == 4 and node.meta.get("role") == "parameter"
    )  # every product of a convolution sums over all of it
    scale = 1.0 if len(shape) < 2 else math.prod(shape[1:] if kernel else shape[-1:]) ** -0.5
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def _bound(node: fx.Node) -> int:
    """Integers of an input stay below this: the rows of the tables and the classes of the losses that they go to, else 2."""
    sizes: list[int] = []
    queue, seen = [node], {node}
    while queue:
        here = queue.pop()
        for user in here.users:
            op = target_of(user)
            if op == "aten.embedding" and user.args[1] is here:
                sizes.append(fake(user.args[0]).shape[0])  # type: ignore[arg-type]
            elif op in ("aten.cross_entropy_loss", "aten.nll_loss", "aten.nll_loss_forward") and user.args[1] is here:
                sizes.append(fake(user.args[0]).shape[1 if fake(user.args[0]).dim() > 1 else 0])  # type: ignore[arg-type]
            elif op == "shardwright.linear_cross_entropy" and user.args[2] is here:
                sizes.append(fake(user.args[1]).shape[0])  # type: ignore[arg-type]
            elif op in AS_THEY_ARE and user not in seen:
                seen.add(user)
                queue.append(user)
    return max(min(sizes, default=2), 1)

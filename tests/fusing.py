"""What tests of fusing passes share: the pass is run on a captured model, checked on numbers, and its bytes are measured.

Values and gradients are those of the graph before and after (passes/checked.py). Predicted bytes are what the pass is judged by
(passes/gain.py), measured ones what autograd keeps in a real run of the whole graph, parameters and buffers aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from shardwright.passes.base import Pass, Program
from shardwright.passes.capture import Captured, capture
from shardwright.passes.checked import Outcome, Verifying, inputs_of, outcome
from shardwright.passes.experiment import flat, strip
from shardwright.passes.gain import Paying
from shardwright.passes.observe import SMALL
from shardwright.passes.pattern import target_of
from shardwright.passes.rewrite import rewritten
from shardwright.passes.verify import verify_rule
from shardwright.planner.prices import Prices
from shardwright.planner.rules import instantiate
from shardwright.profiles.devices import parse_cluster
from torch import Tensor, fx, nn

PRICES = Prices(parse_cluster("cpu:2"), "float32")
LOW, ROUNDED = (torch.bfloat16, torch.float16), 0.03
"""Dtypes of low precision, and how far apart results in them may be, relative to their norm (a small T5 written out is 0.013 from
float64, with attention as one op 0.012)."""
HELD = ("parameter", "buffer", "constant")


BY_DAY = 6


def drawn_seeds(count: int) -> list[Any]:
    """Seeds of random graphs: the first ones by day, all of them in nightly runs."""
    return [pytest.param(seed, marks=pytest.mark.nightly if seed >= BY_DAY else ()) for seed in range(count)]


@dataclass(frozen=True)
class Fused:
    """A captured graph before and after a pass."""

    before: Captured
    after: Captured
    step: Pass[Program]
    values: Mapping[str, Tensor] = field(repr=False)

    def count(self, name: str) -> int:
        """Calls of "aten.mul" or "shardwright.gated" after the pass."""
        return calls(self.after, name)

    @property
    def predicted(self) -> float:
        """Saved bytes that the pass takes away, as it is judged."""
        verdict = Paying(PRICES)(self.step, self.before.graph.graph, self.after.graph.graph)
        assert verdict.saved_bytes is not None
        return verdict.saved_bytes

    @property
    def measured(self) -> int:
        """Saved bytes that it takes away in a run."""
        return saved_bytes(self.before, self.values) - saved_bytes(self.after, self.values)

    @property
    def nodes(self) -> int:
        """Calls that it takes away."""
        return sum(n.op == "call_function" for n in self.before.graph.graph.nodes) - sum(
            n.op == "call_function" for n in self.after.graph.graph.nodes
        )


def calls(captured: Captured, name: str) -> int:
    return sum(target_of(n) == name for n in captured.graph.graph.nodes)


def fuse(step: Pass[Program], model: nn.Module, *args: Any, seed: int = 0, first: Any = (), **kwargs: Any) -> Fused:
    """Capture a model, run the passes of `first` and then this one; assert that outputs and all gradients are the same."""
    before = capture(model, args, kwargs, lift_float64=all(p.dtype == torch.float64 for p in model.parameters()))
    before = rewritten(before, first)
    values = dict(before.constants) | inputs_of(before.graph.graph, seed)
    low = any(p.dtype in LOW for p in model.parameters())
    values |= before.flatten(args, kwargs) | (dict(before.values(model)) if low else {})
    values = {n: v.detach() for n, v in values.items()}
    after = rewritten(before, [step], weigh=None if low else Verifying(before.constants, given=values))
    verdict = after.records[-1].verdict
    assert verdict is None or verdict.stays, verdict
    if low:
        _close(*(outcome(c.graph.graph, values) for c in (before, after)))
    return Fused(before, after, step, values)


def _close(one: Outcome, other: Outcome) -> None:
    """Half precision rounds sums in another order: outputs, and all gradients together, are the same to a few roundings.

    Together, because some gradients are nothing but rounding: those of key biases, which softmax does not see.
    """
    assert [g is None for g in one.gradients.values()] == [g is None for g in other.gradients.values()]
    for a, b in ((one.outputs, other.outputs), (one.gradients.values(), other.gradients.values())):
        pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None]
        assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in pairs)
        first, second = (torch.cat([p[i].double().flatten() for p in pairs]) for i in (0, 1))
        assert (first - second).norm() <= ROUNDED * first.norm()


def saved_bytes(captured: Captured, values: Mapping[str, Tensor]) -> int:
    """Bytes that autograd keeps when the graph runs, each storage once, without parameters, buffers and constants."""
    leaves, held = [], set()
    for node in captured.graph.graph.nodes:
        if node.op == "placeholder":
            leaf = values[node.name].clone()
            leaves.append(leaf.requires_grad_(bool(node.meta["differentiable"])))
            held |= {_storage(leaf)} if node.meta["role"] in HELD else set()
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(_storage(x), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        fx.Interpreter(captured.graph).run(*leaves)
    sizes = {s: x.untyped_storage().nbytes() for s, x in kept.items() if s not in held}
    return sum(n for n in sizes.values() if n > SMALL)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def rule_problems(target: Any, *args: Any, **kwargs: Any) -> list[str]:
    """What is wrong with the rule of one call."""
    found: list[Tensor] = []
    bare, named = strip(tuple(args), found), strip(dict(kwargs), found)
    results = flat(target(*args, **kwargs))
    rule = instantiate(str(target), bare, named, [x.shape for x in found], [r.shape for r in results])
    assert rule is not None, f"{target} has no rule for {[tuple(x.shape) for x in found]}"
    return verify_rule(target, args, kwargs, rule)

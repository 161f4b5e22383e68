"""What one unit costs under one design, worked out from the graph and apart from the region program that chose it.

Seconds and bytes of one microbatch on one rank of the inner mesh (context and model axes). Storage of parameters, data
parallelism, ZeRO and offload come on top (planner/options.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from . import rule_experts
from .assign import Assignment
from .attention import MATH
from .choices import placed
from .costs import Call, Chain, Costs
from .experts import expert_ops
from .front import Design
from .memory import Setting, buffer, local_bytes, new_bytes
from .numbers import Numbers, Pass, UnitExperts, Weights
from .outline import DTYPE_BYTES, Op, Tensor
from .part import Part
from .placement import Placement, R, State, V, local_elements
from .ring import scratch_bytes as ring_scratch
from .saves import saves
from .scratch import composite_bytes
from .template import Cut
from .timeline import Timeline
from .uses import Uses
from .work import PRODUCT_KINDS


@dataclass(frozen=True, slots=True)
class _Step:
    """One op under one choice: what it takes, wants and makes."""

    forward: float
    backward: float
    inside: float
    inside_backward: float
    weight: float
    calls: tuple[Call, ...]
    wanted: tuple[Placement, ...]
    made: tuple[Placement, ...]
    issue: float
    issue_backward: float


class Bench:
    """Measures designs of one part (at the sizes of one microbatch) on one inner mesh.

    `context` gives each op's choice on the context axis, where the mesh of `costs` has one before the model axis; `side` is then
    where inputs and tensors without a gradient stand that come from outside the part, whole where not said.
    """

    def __init__(
        self, part: Part, costs: Costs, setting: Setting, layouts: Mapping[str, Mapping[str, Placement]],
        context: Mapping[str, str] | None = None, side: Mapping[str, Placement] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.part, self.costs, self.setting, self.layouts = part, costs, setting, layouts
        self.context, self.side = context, side
        self.sizes = costs.shape.sizes
        self.tensors = dict(part.outline.tensors)
        self.mixtures = {facts.op: facts for facts in expert_ops(part.outline)}
        self._steps: dict[tuple[int, str], _Step] = {}
        self.whole: Placement = (R,) * len(self.sizes)

    def measure(self, design: Design) -> Numbers | None:
        """The numbers of a design; None where it is not possible at these sizes."""
        walk = _Walk(self, design)
        return walk.numbers() if walk.legal else None

    def full(self, op: Op, choice: str) -> tuple[str, ...]:
        """The choice of `op` on every axis, where it is `choice` on the model axis."""
        return (choice,) if self.context is None else (self.context.get(op.name, "R"), choice)

    def seconds(self, design: Design) -> tuple[float, float] | None:
        """Forward and backward seconds of a design that runs nothing again; None where it is not possible."""
        walk = _Walk(self, design)
        return walk.seconds() if walk.legal else None

    def step(self, index: int, op: Op, choice: str) -> _Step | None:
        """An op under a choice on the model axis, looked up once; None where sizes do not divide."""
        key = (index, choice)
        if key not in self._steps:
            full = self.full(op, choice)
            run = self.costs.run(op, self.tensors, full)
            if run is None:
                return None
            wanted, made = placed(op, self.tensors, full)
            share = weight_share(op, self.tensors)
            self._steps[key] = _Step(
                run.forward,
                run.backward,
                run.inside,
                run.inside_backward,
                run.backward * share,
                run.calls,
                wanted,
                made,
                run.issue,
                run.issue_backward,
            )
        return self._steps[key]


def weight_share(op: Op, tensors: Mapping[str, Tensor]) -> float:
    """The share of an op's backward pass that makes gradients of parameters: what a zero-bubble schedule may delay."""
    flows = [tensors[u.tensor] for u in op.operands if tensors[u.tensor].differentiable]
    mine = [t for t in flows if tensors[t.storage].role == "parameter"]
    if not mine:
        return 0.0
    if len(mine) == len(flows):
        return 1.0
    return len(mine) / len(flows) if op.kind in PRODUCT_KINDS else 0.0


class _Walk:
    """One design followed through its part."""

    def __init__(self, bench: Bench, design: Design) -> None:
        self.bench, self.design, self.part = bench, design, bench.part
        self.legal = True
        self.steps: dict[str, _Step] = {}
        self.made: dict[str, Placement] = dict(bench.layouts[design.entry])
        for index, (op, choice) in enumerate(zip(self.part.outline.ops, design.choices, strict=True)):
            step = bench.step(index, op, choice)
            if step is None:
                self.legal = False
                return
            self.steps[op.name] = step
            for use, placement in zip(op.results, step.made, strict=True):
                self.made[use.tensor] = placement
        self.chains = {key: bench.costs.chain(bench.tensors[key[0]], *key[1:]) for key in self._changes()}
        self.legal = all(c is not None for c in self.chains.values())

    def _changes(self) -> dict[tuple[str, Placement, Placement], None]:
        """One chain per (tensor, wanted placement), as lowering makes them."""
        found: dict[tuple[str, Placement, Placement], None] = {}
        whole = self.bench.whole
        for op in self.part.outline.ops:
            for use, want in zip(op.operands, self.steps[op.name].wanted, strict=True):
                if self.bench.tensors[use.tensor].role != "parameter":
                    source = self.made.get(use.tensor) or self.bench.side.get(use.tensor, whole)
                    found.setdefault((use.tensor, source, want))
        leaving = self.bench.layouts[self.design.exit]
        for name in self.part.exit:
            found.setdefault((name, self.made[name], leaving[name]))
        if self.part.outline.loss:
            found.setdefault((self.part.outline.loss, self.made[self.part.outline.loss], whole))
        return found

    def seconds(self) -> tuple[float, float]:
        """Forward and backward seconds, nothing run again."""
        ahead, back = self._passes()
        return ahead.seconds, back.seconds

    def _passes(self) -> tuple[Pass, Pass]:
        """The forward and the backward pass, nothing run again."""
        steps, chains = self.steps.values(), [c for c in self.chains.values() if c is not None]
        calls = [*(call for s in steps for call in s.calls), *(call for c in chains for call in c.calls)]
        return self._ahead(steps, chains, calls), Pass(
            sum(s.backward for s in steps) + sum(c.copies_backward for c in chains),
            sum(s.inside_backward for s in steps) + sum(c.backward for c in chains),
            self.bench.costs.issue(calls, backward=True) + sum(s.issue_backward for s in steps),
        )  # fmt: skip

    def _ahead(self, steps: Collection[_Step], chains: Collection[Chain], calls: Iterable[Call]) -> Pass:
        """Ops and chains in the forward direction, with the collectives among `calls` that run in it."""
        return Pass(
            sum(s.forward for s in steps) + sum(c.copies_forward for c in chains),
            sum(s.inside for s in steps) + sum(c.forward for c in chains),
            self.bench.costs.issue(calls, backward=False) + sum(s.issue for s in steps),
        )

    def numbers(self) -> Numbers:
        """All of it."""
        steps, chains = self.steps.values(), [c for c in self.chains.values() if c is not None]
        ahead, back = self._passes()
        again, kept = self._again(), self._kept()
        peak, work = self._alive(kept)
        calls: dict[Call, int] = {}
        for call in (c for s in steps for c in s.calls):
            calls[call] = calls.get(call, 0) + 1
        for call in (*(c for chain in chains for c in chain.calls), *self._called_again()):
            calls[call] = calls.get(call, 0) + 1
        weight = self._late()
        if back.compute:
            weight *= back.busy / back.compute
        return Numbers(
            ahead.seconds, back.seconds, weight, again, ahead.busy, back.busy, kept, peak, work, self.weights(),
            tuple(calls.items()), self._experts(),
        )  # fmt: skip

    def _late(self) -> float:
        """Seconds of gradients of parameters that may wait for a W action: those whose other operands are kept until then.

        What is made again for the gradients of activations is used at once (runtime/halves.py): to keep it undoes the recompute.
        """
        rerun = self.design.again
        made_again = {
            buffer(self.part.facts, use.tensor, self.made[use.tensor])
            for op in self.part.outline.ops if op.name in rerun for use in op.results
        }  # fmt: skip
        total = 0.0
        for op in self.part.outline.ops:
            step = self.steps[op.name]
            found = {buffer(self.part.facts, u.tensor, p) for u, p in zip(op.operands, step.wanted, strict=True)}
            gathered = any((root, str(placement[-1])) in self.design.regather for root, placement in found)
            if op.name not in rerun and not gathered and found.isdisjoint(made_again):
                total += step.weight
        return total

    def _again(self) -> float:
        """Seconds of what the backward pass runs and gathers again."""
        steps = [self.steps[name] for name in sorted(self.design.again)]
        return self._ahead(steps, list(self._gathered_again()), self._called_again()).seconds

    def _called_again(self) -> Iterator[Call]:
        """The collectives of that."""
        for name in sorted(self.design.again):
            yield from (call for call in self.steps[name].calls if not call.backward)
        for chain in self._gathered_again():
            yield from (call for call in chain.calls if not call.backward)

    def _gathered_again(self) -> Iterator[Chain]:
        for root, state in sorted(self.design.regather):
            for (name, p, q), chain in self.chains.items():
                alias, placement = buffer(self.part.facts, name, q)
                if alias == root and str(placement[-1]) == state and chain is not None and p != q:
                    yield chain

    def _kept(self) -> float:
        """Bytes of what the backward pass needs and does not make again; of inference, the keys and values that are kept."""
        if not self.part.outline.training:
            return self._cached()
        needed: dict[tuple[str, Placement], None] = {}
        total = 0.0
        rerun = self.design.again
        for op, choice in zip(self.part.outline.ops, self.design.choices, strict=True):
            kept = saves(op, self.bench.full(op, choice), self.bench.tensors)
            saved = {item.index for item in kept if item.source == "operand"}
            for i, use in enumerate(op.operands):
                if i in saved or op.name in rerun:
                    needed.setdefault(buffer(self.part.facts, use.tensor, self.steps[op.name].wanted[i]))
            for item in kept if op.name not in rerun else ():
                if item.source == "result":
                    use = op.results[item.index]
                    needed.setdefault(buffer(self.part.facts, use.tensor, self.made[use.tensor]))
                elif item.source == "new":
                    total += new_bytes(op, item, self.bench.full(op, choice), self.bench.sizes)
        makers = {use.tensor: op.name for op in self.part.outline.ops for use in op.results}
        bases: dict[tuple[str, Placement], None] = {}
        for root, placement in needed:
            if self.bench.tensors[root].role != "activation" or root not in self.made:
                continue
            base = buffer(self.part.facts, root, self.made[root])
            if placement != base[1] and (root, str(placement[-1])) not in self.design.regather:
                total += local_bytes(self.bench.tensors[root], placement, self.bench.sizes)
            elif makers.get(root) not in rerun:
                bases.setdefault(base)
        return total + sum(local_bytes(self.bench.tensors[r], p, self.bench.sizes) for r, p in bases)

    def _cached(self) -> float:
        """Bytes that attention keeps for the tokens to come (planner/inference.py)."""
        return sum(
            new_bytes(op, item, self.bench.full(op, choice), self.bench.sizes)
            for op, choice in zip(self.part.outline.ops, self.design.choices, strict=True)
            for item in op.saved if item.source == "new" and op.target != MATH
        )  # fmt: skip

    def _alive(self, kept: float) -> tuple[float, float]:
        """(most alive in the backward pass with everything saved, most alive in forward beyond what is kept)."""
        outline = self.part.outline
        uses = Uses({n: s.wanted for n, s in self.steps.items()}, self.made, defaultdict(list))
        choices = {op.name: self.bench.full(op, c) for op, c in zip(outline.ops, self.design.choices, strict=True)}
        line = Timeline(
            Cut(outline, 1, frozenset()), self.part.facts, self.bench.setting, self.bench.sizes,
            Assignment(choices, {}, ()), {}, uses, frozenset(),
        )  # fmt: skip
        border = sum(self._local(name) for name in (*self.part.exit, *self.part.entry))
        inside = (
            self._ring(op, choices[op.name], False) + self._mixture(op, choices[op.name], False) for op in outline.ops
        )
        passing = line.passing() + max(inside, default=0.0)
        if not outline.training:
            return 0.0, passing + border
        for i, op in enumerate(outline.ops):
            line.moment[i] += self._ring(op, choices[op.name], True)
        return line.backward() + border, max(0.0, passing - kept)

    def _ring(self, op: Op, choice: tuple[str, ...], training: bool) -> float:
        """Bytes of the buffers of a ring."""
        share = self.bench.costs.repeated.get(op.name, 1.0)
        return ring_scratch(op, self.bench.tensors, choice, self.bench.sizes, training, share)

    def _mixture(self, op: Op, choice: tuple[str, ...], training: bool) -> float:
        """Bytes inside a composite op (its backward's are in the time line)."""
        return composite_bytes(op, self.bench.tensors, choice, self.bench.sizes, training, self.bench.setting.unfolds)

    def _experts(self) -> tuple[UnitExperts, ...]:
        """The unit's mixtures of experts."""
        found = []
        for op, choice in zip(self.part.outline.ops, self.design.choices, strict=True):
            if op.name not in self.bench.mixtures:
                continue
            facts, step, full = self.bench.mixtures[op.name], self.steps[op.name], self.bench.full(op, choice)
            sizes = self.bench.costs.local_sizes(op, full)
            assert sizes is not None
            local, rows = (
                math.prod(sizes[i] for i in rule_experts.letters(op.factors, names)) for names in ("e", "tk")
            )
            gates = sum(new_bytes(op, item, full, self.bench.sizes) for item in op.saved if item.source == "new")
            width = DTYPE_BYTES[self.bench.tensors[op.operands[0].tensor].dtype]
            found.append(
                UnitExperts(
                    facts, local, rows * local / facts.experts, rows, facts.hidden * width, step.forward, step.backward,
                    step.weight, gates, (self._mixture(op, full, False), self._mixture(op, full, True)),
                    op.name in self.design.again,
                )
            )  # fmt: skip
        return tuple(found)

    def _local(self, name: str) -> float:
        return local_bytes(self.bench.tensors[name], self.made[name], self.bench.sizes)

    def weights(self) -> tuple[Weights, ...]:
        """The unit's parameters, those stored alike together."""
        wants: dict[str, set[State]] = {}
        for op in self.part.outline.ops:
            for use, want in zip(op.operands, self.steps[op.name].wanted, strict=True):
                if self.bench.tensors[use.tensor].role == "parameter":
                    wants.setdefault(use.tensor, set()).add(want[-1])
        needed = {
            op.operands[s.index].tensor for op in self.part.outline.ops for s in op.saved if s.source == "operand"
        }
        roots = {self.part.facts.aliases[name].root for name in needed}
        split = {name for facts in self.bench.mixtures.values() for name in facts.parameters}
        total: dict[tuple[bool, ...], list[float]] = {}
        for parameter in self.part.outline.parameters:
            tensor = self.bench.tensors[parameter.tensor]
            home = home_of(wants.get(parameter.tensor, {R}))
            placement = (*self.bench.whole[:-1], home)
            local = local_elements(tensor.dims, placement, self.bench.sizes)
            key = (
                parameter.trainable, not home.is_split and V in wants.get(parameter.tensor, {R}),
                parameter.tensor in self.part.borrowed, parameter.tensor in roots, parameter.tensor in split,
            )  # fmt: skip
            entry = total.setdefault(key, [0.0, 0.0])
            entry[0] += local
            entry[1] = max(entry[1], local)
        return tuple(Weights(e, r, *key) for key, (e, r) in total.items())


def home_of(wants: Sequence[State] | set[State]) -> State:
    """Where a parameter stands on the model axis: split as all its uses want it, else whole."""
    states_ = set(wants)
    if len(states_) == 1:
        (only,) = states_
        if only.is_split:
            return only
    return R

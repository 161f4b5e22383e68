"""Bytes of a backward pass in two halves (runtime/halves.py): gradients of activations first, those of parameters later.

Between the halves stay, of every product of activations with parameters, the operands that it multiplies with gradients, and the
gradient of its result; all else goes with the first half. Norms, biases and what runs again do all of it in the first half;
an embedding, which has no gradient but its table's, waits for the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from .memory import Buffer, buffer, local_bytes, parameter_gradients
from .outline import Op
from .passing import Interval, Passing
from .timeline import Timeline
from .work import PRODUCT_KINDS


class Halved(Timeline):
    """The first half over its time points, and the second op by op (`weights`)."""

    @cached_property
    def divided(self) -> tuple[int, ...]:
        """The ops (indices) whose gradients of parameters wait."""
        return tuple(i for i, op in enumerate(self.ops) if self._waits(op))

    @cached_property
    def owing(self) -> frozenset[str]:
        """The parameters whose gradients wait."""
        return frozenset(self.facts.aliases[name].root for i in self.divided for name in self._parameters(self.ops[i]))

    def _waits(self, op: Op) -> bool:
        again = self.assignment.again.ops
        if op.name in again or not self._parameters(op):
            return False
        if not any(self.tensors[name].differentiable for name in self._activations(op)):
            return True
        remade = any(self._maker.get(name) in again for name, _ in self._operands(op))
        return op.kind in PRODUCT_KINDS and not remade

    @cached_property
    def _maker(self) -> Mapping[str, str]:
        return {self.facts.aliases[use.tensor].root: op.name for op in reversed(self.ops) for use in op.results}

    def _parameters(self, op: Op) -> list[str]:
        return [op.operands[j].tensor for j in parameter_gradients(op, self.tensors)]

    def _activations(self, op: Op) -> Iterator[str]:
        roots = (self.tensors[self.facts.aliases[use.tensor].root] for use in op.operands)
        return (root.name for root in roots if root.role == "activation")

    def _operands(self, op: Op) -> list[Buffer]:
        """What an op keeps for the second half."""
        kept = (item.index for item in self.saves(op) if item.source == "operand")
        found = (buffer(self.facts, op.operands[j].tensor, self.uses.wanted[op.name][j]) for j in kept)
        return [at for at in found if self.tensors[at[0]].role == "activation"]

    @cached_property
    def kept(self) -> Mapping[Buffer, float]:
        """Operands that stay for the second half, and their bytes."""
        names = dict.fromkeys(at for i in self.divided for at in self._operands(self.ops[i]))
        return {at: local_bytes(self.tensors[at[0]], at[1], self.sizes) for at in names}

    @cached_property
    def gradients(self) -> Mapping[str, float]:
        """Results whose gradients stay for the second half, and their bytes."""
        roots = dict.fromkeys(self.facts.aliases[use.tensor].root for i in self.divided for use in self.ops[i].results)
        spans = {span.root for span in self.facts.spans}
        return {r: local_bytes(self.tensors[r], self.uses.produced[r], self.sizes) for r in roots if r in spans}

    @property
    def owed(self) -> float:
        """Bytes between the halves."""
        return sum(self.kept.values()) + sum(self.gradients.values())

    # -- the first half

    def _saved(self) -> None:
        super()._saved()
        first: dict[Buffer, int] = {}
        for i, op in enumerate(self.ops):
            for at in self._operands(op):
                first.setdefault(at, i)
        for at, amount in self.kept.items():
            self._over("saved", 0, first[at] - 1, amount)

    def _gradients_of_activations(self) -> Iterator[Interval]:
        lasting = frozenset(self.gradients)
        yield from Passing(self.outline, self.facts, self.uses, self.sizes, lasting).intervals()

    def _adding(self, name: str) -> bool:
        return self.facts.aliases[name].root not in self.owing and super()._adding(name)

    def _gradients(self) -> None:
        whole = self.held
        later = {n: h for n, h in whole.items() if n in self.owing and self.each(n)}
        self.held = {n: replace(h, whole=0) if n in later else h for n, h in whole.items()}
        super()._gradients()
        self.held = whole
        for h in later.values():
            self._over("gradients", 0, self.count - 1, h.final)
            self.standing["gradients"] += h.final

    # -- the second half

    def weights(self, *, first: bool) -> list[dict[str, float]]:
        """Bytes by cause at every op of the second half, the last op first; in a stage's `first` one gradients have nothing to be
        added to."""
        kept, gradients = dict(self.kept), dict(self.gradients)
        found = []
        for n in range(len(self.divided) - 1, -1, -1):
            op = self.ops[self.divided[n]]
            roots = [self.facts.aliases[name].root for name in self._parameters(op)]
            made = sum(self.held[r].whole for r in roots if r in self.held and not (first and not self.each(r)))
            reserve = sum(self.held[r].bucket for r in roots if r in self.held and self.each(r))
            alive = {"saved": sum(kept.values()), "temporaries": sum(gradients.values()) + made}
            found.append({**alive, "reserve": float(reserve)})
            rest = [self.ops[i] for i in self.divided[:n]]
            for at in set(self._operands(op)) - {at for other in rest for at in self._operands(other)}:
                kept.pop(at, None)
            for use in op.results:
                gradients.pop(self.facts.aliases[use.tensor].root, None)
        return found

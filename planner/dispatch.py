"""Expert parallelism as an axis of the mesh: experts split over it, tokens sent to them and back.

A plan says `pipeline.experts`: so many neighbouring data ranks hold each expert once. To run, its data axis is written as two,
`dp` (copies of all experts) and `ep` (ranks that share them), the latter the more minor; samples are split over both. Along `ep` a
mixture-of-experts op takes the choice "dispatch": tokens, their experts and weights arrive split by samples, stacks of weights
split by experts, and the result leaves split by samples. So weights of experts live split on `ep`, and their gradients are summed
over `dp` alone, by the states of the table (docs/placements.md) and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..errors import PlanError
from .outline import Op, Outline
from .placement import split
from .plan import MeshAxis, OpPlan, ParameterPlan, Plan, RegionPlan
from .rule_experts import TARGET, letters

DISPATCH = "dispatch"
"""The choice of a mixture-of-experts op whose tokens go to the ranks of their experts."""

AXIS = "ep"
"""The mesh axis of expert parallelism."""

STACKS = 3
"""Operands of the op before its stacks of weights: tokens, their experts, the weights of those."""


def dispatched(op: Op) -> tuple[int, int] | None:
    """The factors of samples and of experts that "dispatch" splits; None for an op that has none."""
    if op.target != TARGET:
        return None
    samples = [i for i in letters(op.factors, "t") if op.factors[i].batch]
    experts = letters(op.factors, "e")
    return (samples[0], experts[0]) if samples and experts else None


def factor_at(op: Op, index: int, factors: tuple[int, int]) -> int:
    """The factor along which "dispatch" splits operand `index`."""
    return factors[0] if index < STACKS else factors[1]


def spread_experts(plan: Plan, stacks: frozenset[str]) -> Plan:
    """The plan with its data axis written as `dp` and `ep`; itself without expert parallelism, or where that is done already.

    `stacks` are the names of parameters that are split by experts, on dim 0. Raises PlanError where the data axis does not divide.
    """
    ways = plan.pipeline.experts
    if ways == 1 or any(axis.name == AXIS for axis in plan.mesh):
        return plan
    at = next((i for i, axis in enumerate(plan.mesh) if axis.role == "data"), None)
    if at is None or plan.mesh[at].size % ways:
        ranks = plan.mesh[at].size if at is not None else 1
        raise PlanError(f"pipeline.experts: {ways} does not divide the {ranks} data-parallel ranks")
    data = plan.mesh[at]
    new = [MeshAxis(AXIS, ways, data.role, data.link)]
    if data.size > ways:
        new.insert(0, msgspec.structs.replace(data, size=data.size // ways))
    spread = _Spread(at, data.name, tuple(axis.name for axis in new), stacks)
    return msgspec.structs.replace(
        plan, mesh=(*plan.mesh[:at], *new, *plan.mesh[at + 1 :]), regions=tuple(spread.region(r) for r in plan.regions)
    )


class _Spread:
    """One data axis (`name`, at index `at`) written as the axes `names`, the last of them that of the experts."""

    def __init__(self, at: int, name: str, names: tuple[str, ...], stacks: frozenset[str]) -> None:
        self.at, self.name, self.names, self.stacks = at, name, names, stacks

    def region(self, region: RegionPlan) -> RegionPlan:
        return msgspec.structs.replace(
            region, ops=tuple(map(self.op, region.ops)), parameters=tuple(map(self.parameter, region.parameters))
        )

    def op(self, op: OpPlan) -> OpPlan:
        last = None
        if op.target == TARGET:
            if op.choice[self.at][:1] != "t":
                raise PlanError(
                    f"op {op.op}: {op.choice[self.at]!r} on {self.name}; expected the samples, which go to their experts"
                )
            last = DISPATCH
        result = self._doubled(op.result) if op.result else ()
        return msgspec.structs.replace(op, choice=self._doubled(op.choice, last), result=result)

    def parameter(self, parameter: ParameterPlan) -> ParameterPlan:
        stacked = not self.stacks.isdisjoint(parameter.names)
        kept = self.names[:-1] if stacked else self.names
        axes = tuple(new for a in parameter.zero_axes for new in (kept if a == self.name else (a,)))
        home = self._doubled(parameter.home, str(split(0)) if stacked else None)
        return msgspec.structs.replace(parameter, home=home, zero=parameter.zero if axes else 0, zero_axes=axes)

    def _doubled(self, words: Sequence[str], last: str | None = None) -> tuple[str, ...]:
        """One word per axis, that of the data axis for both of the new ones, or `last` for the second."""
        own = [words[self.at]] * len(self.names)
        if last is not None:
            own[-1] = last
        return (*words[: self.at], *own, *words[self.at + 1 :])


def expert_stacks(outline: Outline) -> frozenset[str]:
    """Names of the parameters that hold one entry per expert and that nothing but experts uses: they are split on dim 0."""
    stacked: set[str] = set()
    others: set[str] = set()
    for op in outline.ops:
        factors = dispatched(op)
        for i, use in enumerate(op.operands):
            held = factors is not None and i >= STACKS and use.place(factors[1]) == (0, 0)
            (stacked if held else others).add(use.tensor)
    return frozenset(
        name for p in outline.parameters if p.tensor in stacked and p.tensor not in others for name in p.names
    )

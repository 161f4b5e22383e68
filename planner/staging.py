"""Which virtual stage an op and a parameter belong to, and what crosses from which stage to which.

A stage has the ops of its units. What carries no gradient and follows from inputs, buffers and constants alone (masks, tables of
positions, label counts) is made again in every stage that reads it; everything else crosses, once for every stage that reads it,
over any number of stages in between. Dead ops are in no stage. Another graph of the same model (evaluation, another batch) has no
units of the plan: its ops go to the first stage that has their operands and holds their parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import PlanError, PlanMismatch, UsageError
from .outline import Op, Outline
from .plan import Plan


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor that stage `source` makes and stage `target` reads."""

    tensor: str
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StagePart:
    """One virtual stage: its ops in the order of the outline, parameters, what comes in and goes out, and which results it has.

    `ops` holds those made again, too. `takes` and `gives` are in the order of the outline.
    """

    ops: tuple[str, ...]
    parameters: tuple[str, ...]
    takes: tuple[Crossing, ...]
    gives: tuple[Crossing, ...]
    results: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Staging:
    """All stages of a graph, and the stages that hold each parameter (several where it is tied across stages)."""

    parts: tuple[StagePart, ...]
    holders: Mapping[str, tuple[int, ...]]

    @property
    def crossings(self) -> tuple[Crossing, ...]:
        """Everything that crosses, by source."""
        return tuple(c for part in self.parts for c in part.gives)

    def home(self, result: str) -> int:
        """The stage that has a result."""
        return next(s for s, part in enumerate(self.parts) if result in part.results)


def stages_by_runs(plan: Plan, outline: Outline) -> dict[str, int]:
    """The stage of every op, by the runs of the plan's stages; raises PlanError or PlanMismatch where they do not fit."""
    order = dict.fromkeys(entry.region or entry.name for entry in plan.regions)
    if len(order) != len(outline.regions):
        raise PlanMismatch(f"the plan has {len(order)} regions, the model has {len(outline.regions)}")
    region_of = dict(zip(order, outline.regions, strict=True))
    entries = {entry.name: entry.region or entry.name for entry in plan.regions}
    found: dict[str, int] = {}
    for s, stage in enumerate(plan.stages):
        for run in stage.runs:
            if run.use not in entries:
                raise PlanError(f"stages[{s}].runs: no region is called {run.use}")
            instances = region_of[entries[run.use]].instances
            if not 0 <= run.first <= run.first + run.count <= len(instances):
                raise PlanError(
                    f"stages[{s}].runs: instances {run.first} to {run.first + run.count - 1} of {run.use}; it has {len(instances)}"
                )
            for k in range(run.first, run.first + run.count):
                found |= dict.fromkeys(instances[k], s)
    missing = next((op.name for op in outline.ops if op.name not in found), None)
    if missing is not None:
        raise PlanError(f"stages: none holds op {missing}")
    return found


def stages_by_parameters(outline: Outline, holders: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The stage of every op of another graph: the first that comes after its operands and holds its parameters.

    `holders` are the stages by original parameter name; a parameter that is not there is on all. Raises UsageError where an op
    needs parameters of a stage before the one its operands are made in.
    """
    names = {p.tensor: p.names for p in outline.parameters}
    made: dict[str, int] = {}
    found: dict[str, int] = {}
    for op in outline.ops:
        stage = max((made[u.tensor] for u in op.operands if u.tensor in made), default=0)
        wanted = [holders[n] for u in op.operands for n in names.get(u.tensor, ())[:1] if n in holders]
        last = max((s for held in wanted for s in held), default=stage)
        fitting = [s for s in range(stage, max(last, stage) + 1) if all(s in held for held in wanted)]
        if not fitting:
            raise UsageError(
                f"op {op.name} of this call reads parameters of a stage before stage {stage}, where its operands are made; "
                "plan for these inputs"
            )
        found[op.name] = fitting[0]
        made |= dict.fromkeys((r.tensor for r in op.results), fitting[0])
    return found


def cut(outline: Outline, stage_of: Mapping[str, int], count: int, results: Sequence[str]) -> Staging:
    """The `count` stages that compute `results` (the loss, other outputs).

    Raises PlanError where a stage would read what a later one makes.
    """
    makers = {r.tensor: op for op in outline.ops for r in op.results}
    again = made_again(outline)
    live = _live(makers, results)
    roots: list[list[str]] = [[] for _ in range(count)]
    for op in outline.ops:
        if op.name in live and op.name not in again:
            roots[stage_of[op.name]] += [r.tensor for r in op.results]
    returned: list[list[str]] = [[] for _ in range(count)]
    for name in dict.fromkeys(results):
        home = stage_of[makers[name].name] if name in makers else 0
        roots[home].append(name)
        returned[home].append(name)
    order = {name: i for i, name in enumerate(makers)}
    taken: list[set[str]] = []
    ops: list[set[str]] = []
    for s in range(count):
        mine, outside = _closure(roots[s], makers, again, stage_of, s)
        late = next((t for t in sorted(outside, key=order.__getitem__) if stage_of[makers[t].name] > s), None)
        if late is not None:
            raise PlanError(f"stage {s} reads {late}, which stage {stage_of[makers[late].name]} makes")
        ops.append(mine)
        taken.append(outside)
    crossings = [
        Crossing(t, stage_of[makers[t].name], s) for s in range(count) for t in sorted(taken[s], key=order.__getitem__)
    ]
    holders: dict[str, tuple[int, ...]] = {}
    parts = []
    for s in range(count):
        kept = tuple(op for op in outline.ops if op.name in ops[s])
        used = tuple(
            dict.fromkeys(u.tensor for op in kept for u in op.operands if _role(outline, u.tensor) == "parameter")
        )
        for name in used:
            holders[name] = (*holders.get(name, ()), s)
        gives = sorted((c for c in crossings if c.source == s), key=lambda c: (order[c.tensor], c.target))
        takes = tuple(c for c in crossings if c.target == s)
        parts.append(StagePart(tuple(op.name for op in kept), used, takes, tuple(gives), tuple(returned[s])))
    return Staging(tuple(parts), holders)


def holders_of(outline: Outline, staging: Staging) -> dict[str, tuple[int, ...]]:
    """The stages that hold a parameter, by each of its original names."""
    return {
        name: staging.holders[p.tensor] for p in outline.parameters if p.tensor in staging.holders for name in p.names
    }


def _role(outline: Outline, tensor: str) -> str:
    return outline.tensors[tensor].role


def made_again(outline: Outline) -> frozenset[str]:
    """Ops without gradient that follow from inputs, buffers and constants."""
    makers = {r.tensor: op for op in outline.ops for r in op.results}
    found: set[str] = set()
    for op in outline.ops:
        if any(outline.tensors[r.tensor].differentiable for r in op.results):
            continue
        sources = [u.tensor for u in op.operands]
        if all(
            makers[t].name in found if t in makers else _role(outline, t) in ("input", "buffer", "constant")
            for t in sources
        ):
            found.add(op.name)
    return frozenset(found)


def _live(makers: Mapping[str, Op], results: Sequence[str]) -> frozenset[str]:
    """Ops that the results depend on."""
    found: set[str] = set()
    queue = [name for name in results if name in makers]
    while queue:
        op = makers[queue.pop()]
        if op.name not in found:
            found.add(op.name)
            queue += [u.tensor for u in op.operands if u.tensor in makers]
    return frozenset(found)


def _closure(
    roots: Sequence[str], makers: Mapping[str, Op], again: frozenset[str], stage_of: Mapping[str, int], stage: int
) -> tuple[set[str], set[str]]:
    """(ops a stage runs, tensors that come from other stages) for what it has to make."""
    ops: set[str] = set()
    outside: set[str] = set()
    queue = [name for name in roots if name in makers]
    while queue:
        name = queue.pop()
        op = makers[name]
        if op.name in ops:
            continue
        if op.name not in again and stage_of[op.name] != stage:
            outside.add(name)
            continue
        ops.add(op.name)
        queue += [u.tensor for u in op.operands if u.tensor in makers]
    return ops, outside

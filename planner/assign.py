"""A plan's choices spread over the ops and parameters of an outline, every repeat included; the first difference raises."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import PlanError, PlanMismatch
from .choices import placed
from .outline import Op, Outline, Region
from .placement import Placement, parse_state
from .plan import ParameterPlan, Plan, RegionPlan
from .remake import NOTHING, Again, spread, transferred


@dataclass(frozen=True, slots=True)
class Storage:
    """Where one parameter lives: home placement, ZeRO level, and the mesh axes (indices) that chunk dim 0 of it."""

    home: Placement
    zero: int
    zero_axes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """Choices by op name (one per mesh axis), storage by parameter tensor, and groups of parameters by region instance.

    `groups` are the buckets of collectives: parameters of one region instance with equal (zero, zero_axes, trainable, dtype).
    `again` is what the backward pass runs again. `data_axes` split the batch; over them and the context axes (`shared_axes`)
    gradients are reduced in one collective.
    """

    choices: Mapping[str, tuple[str, ...]]
    storage: Mapping[str, Storage]
    groups: tuple[tuple[str, ...], ...]
    data_axes: tuple[int, ...] = ()
    shared_axes: tuple[int, ...] = ()
    again: Again = NOTHING


def assign(plan: Plan, outline: Outline) -> Assignment:
    """Spread `plan` over `outline`; raises PlanMismatch where regions, ops or parameters differ, PlanError for bad states."""
    ways = _ways(plan, outline)
    choices: dict[str, tuple[str, ...]] = {}
    storage: dict[str, Storage] = {}
    by_name = outline.by_name
    names = {p.tensor: p.names for p in outline.parameters}
    for found, entries in zip(outline.regions, ways, strict=True):
        for wanted in {entry.name: entry for entry in entries}.values():
            _check_region(wanted, found, by_name, names)
        for instance, wanted in zip(found.instances, entries, strict=True):
            choices.update(zip(instance, (op.choice for op in wanted.ops), strict=True))
        for instance, wanted in zip(found.parameters, entries, strict=True):
            storage.update(zip(instance, (_storage(plan, p) for p in wanted.parameters), strict=True))
    model = next((i for i, axis in enumerate(plan.mesh) if axis.role == "model"), None)
    again = spread(outline, ways, choices, model)
    return Assignment(choices, storage, parameter_groups(outline, storage), *outer_axes(plan), again)


def outer_axes(plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(axes that split the batch, those and the ones that split positions), by index."""
    data = tuple(i for i, axis in enumerate(plan.mesh) if axis.role == "data")
    return data, tuple(i for i, axis in enumerate(plan.mesh) if axis.role in ("data", "context"))


def entries_of(plan: Plan, outline: Outline) -> list[list[RegionPlan]]:
    """The plan's entry for every instance of every region of `outline`; raises PlanMismatch where counts differ."""
    return _ways(plan, outline)


def _ways(plan: Plan, outline: Outline) -> list[list[RegionPlan]]:
    """The plan's entry for every instance of every region."""
    known: dict[str, list[RegionPlan]] = {}
    for entry in plan.regions:
        known.setdefault(entry.region or entry.name, []).append(entry)
    if len(known) != len(outline.regions):
        raise PlanMismatch(f"the plan has {len(known)} regions, the model has {len(outline.regions)}")
    runs = sorted(
        (run.first, run.use, run.count) for stage in plan.stages for run in stage.runs
    )  # fmt: skip
    found = []
    for (name, entries), region in zip(known.items(), outline.regions, strict=True):
        total = sum(entry.repeats for entry in entries)
        if total != region.repeats:
            told, mine = (len(entries[0].ops), len(region.instances[0]))
            raise PlanMismatch(
                f"region {name}: the plan has {total} x {told} ops, the model has {region.repeats} x {mine}"
            )
        if len(entries) == 1:
            found.append(entries * total)
            continue
        by_name = {entry.name: entry for entry in entries}
        placed: list[RegionPlan | None] = [None] * total
        for first, use, count in runs:
            if use in by_name:
                for k in range(first, min(first + count, total)):
                    placed[k] = by_name[use]
        missing = [k for k, entry in enumerate(placed) if entry is None]
        if missing:
            raise PlanError(f"region {name}: no stage holds instance {missing[0]}")
        found.append([entry for entry in placed if entry is not None])
    return found


def _check_region(
    wanted: RegionPlan, found: Region, by_name: Mapping[str, Op], names: Mapping[str, tuple[str, ...]]
) -> None:
    """Raise PlanMismatch where an entry's ops or parameters are not those of the region."""
    where = f"region {wanted.name}"
    if len(wanted.ops) != len(found.instances[0]):
        raise PlanMismatch(
            f"{where}: the plan has {wanted.repeats} x {len(wanted.ops)} ops, "
            f"the model has {found.repeats} x {len(found.instances[0])}"
        )
    for op, name in zip(wanted.ops, found.instances[0], strict=True):
        if op.target != by_name[name].target:
            raise PlanMismatch(f"{where}, op {op.op}: the plan has {op.target}, the model has {by_name[name].target}")
    if len(wanted.parameters) != len(found.parameters[0]):
        raise PlanMismatch(
            f"{where}: the plan has {len(wanted.parameters)} parameters, the model has {len(found.parameters[0])}"
        )
    for parameter, name in zip(wanted.parameters, found.parameters[0], strict=True):
        if parameter.names != names[name]:
            raise PlanMismatch(f"{where}: the plan has {parameter.names}, the model has {names[name]}")


def transfer(assignment: Assignment, source: Outline, target: Outline) -> Assignment:
    """The choices of `source` for the same model captured in another dtype, which differs in floating casts only.

    Raises PlanMismatch where `target` has an op or a parameter that `source` lacks.
    """
    choices: dict[str, tuple[str, ...]] = {}
    casts, ops = _apart(source)
    wanted, others = _apart(target)
    for theirs, mine in itertools.zip_longest(ops, others):
        if theirs is None or mine is None or theirs.target != mine.target:
            found = f"{mine.name} ({mine.target})" if mine is not None else "fewer ops"
            raise PlanMismatch(f"in another dtype the model has {found}, which the plan lacks")
        choices[mine.name] = assignment.choices[theirs.name]
    names = {mine.name: theirs.name for theirs, mine in zip(ops, others, strict=True)}
    for key, chain in wanted.items():
        known = casts.get(_renamed(key, names), ())
        if len(known) < len(chain):
            raise PlanMismatch(f"in another dtype the model has {chain[-1].name} (a cast), which the plan lacks")
        alike = list(zip(known, chain, strict=False))
        choices |= {mine.name: assignment.choices[theirs.name] for theirs, mine in alike}
        names |= {mine.name: theirs.name for theirs, mine in alike}
    stored = {name: assignment.storage.get(p.tensor) for p in source.parameters for name in p.names}
    storage = {p.tensor: place for p in target.parameters if (place := stored.get(p.names[0])) is not None}
    again = transferred(assignment.again, target, choices, names)
    groups = parameter_groups(target, storage)
    return Assignment(choices, storage, groups, assignment.data_axes, assignment.shared_axes, again)


def _apart(outline: Outline) -> tuple[dict[str, list[Op]], list[Op]]:
    """Casts between floating dtypes by the tensor they start from, and all other ops."""
    casts: dict[str, list[Op]] = {}
    ops: list[Op] = []
    start: dict[str, str] = {}
    for op in outline.ops:
        ends = [outline.tensors[use.tensor].dtype for use in (*op.operands, *op.results)]
        if op.target in CASTS and len(ends) == 2 and all(d.startswith(("float", "bfloat")) for d in ends):
            origin = start.get(op.operands[0].tensor, op.operands[0].tensor)
            start[op.results[0].tensor] = origin
            casts.setdefault(origin, []).append(op)
        else:
            ops.append(op)
    return casts, ops


def _renamed(tensor: str, names: Mapping[str, str]) -> str:
    op, colon, index = tensor.partition(":")
    return names.get(op, op) + colon + index


CASTS = frozenset({"aten.to", "aten._to_copy"})


def _storage(plan: Plan, parameter: ParameterPlan) -> Storage:
    axes = [axis.name for axis in plan.mesh]
    if len(parameter.home) != len(axes):
        raise PlanError(f"parameter {parameter.names[0]}: home needs one state per mesh axis ({', '.join(axes)})")
    try:
        home = tuple(parse_state(s) for s in parameter.home)
    except ValueError as error:
        raise PlanError(f"parameter {parameter.names[0]}: {error}") from None
    unknown = [a for a in parameter.zero_axes if a not in axes]
    if unknown:
        raise PlanError(
            f"parameter {parameter.names[0]}: zero_axes names {unknown[0]!r}; the mesh has {', '.join(axes)}"
        )
    return Storage(home, parameter.zero, tuple(axes.index(a) for a in parameter.zero_axes))


def parameter_groups(outline: Outline, storage: Mapping[str, Storage]) -> tuple[tuple[str, ...], ...]:
    """Buckets in region order: one region instance, equal (zero, zero_axes, trainable, dtype)."""
    trainable = {p.tensor: p.trainable for p in outline.parameters}
    found: dict[tuple[object, ...], list[str]] = {}
    for region in outline.regions:
        for k, instance in enumerate(region.parameters):
            for name in instance:
                at = storage[name]
                key = (region.name, k, at.zero, at.zero_axes, trainable[name], outline.tensors[name].dtype)
                found.setdefault(key, []).append(name)
    return tuple(tuple(members) for members in found.values())


def placements(outline: Outline, choices: Mapping[str, tuple[str, ...]]) -> dict[str, Placement]:
    """The placement each op's result is produced in; inputs, buffers and constants are whole on every rank."""
    tensors = dict(outline.tensors)
    found: dict[str, Placement] = {}
    for op in outline.ops:
        made = placed(op, tensors, choices[op.name])[1]
        found |= {use.tensor: placement for use, placement in zip(op.results, made, strict=True)}
    return found

"""A plan's choices spread over the ops and parameters of an outline, every repeat included; the first difference raises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import PlanError, PlanMismatch
from .choices import states
from .outline import Outline
from .placement import Placement, parse_state
from .plan import ParameterPlan, Plan


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
    """

    choices: Mapping[str, tuple[str, ...]]
    storage: Mapping[str, Storage]
    groups: tuple[tuple[str, ...], ...]
    data_axes: tuple[int, ...] = ()


def assign(plan: Plan, outline: Outline) -> Assignment:
    """Spread `plan` over `outline`; raises PlanMismatch where regions, ops or parameters differ, PlanError for bad states."""
    if len(plan.regions) != len(outline.regions):
        raise PlanMismatch(f"the plan has {len(plan.regions)} regions, the model has {len(outline.regions)}")
    choices: dict[str, tuple[str, ...]] = {}
    storage: dict[str, Storage] = {}
    by_name = outline.by_name
    names = {p.tensor: p.names for p in outline.parameters}
    for wanted, found in zip(plan.regions, outline.regions, strict=True):
        where = f"region {wanted.name}"
        if wanted.repeats != found.repeats or len(wanted.ops) != len(found.instances[0]):
            raise PlanMismatch(
                f"{where}: the plan has {wanted.repeats} x {len(wanted.ops)} ops, "
                f"the model has {found.repeats} x {len(found.instances[0])}"
            )
        for i, op in enumerate(wanted.ops):
            target = by_name[found.instances[0][i]].target
            if op.target != target:
                raise PlanMismatch(f"{where}, op {op.op}: the plan has {op.target}, the model has {target}")
            for instance in found.instances:
                choices[instance[i]] = op.choice
        if len(wanted.parameters) != len(found.parameters[0]):
            raise PlanMismatch(
                f"{where}: the plan has {len(wanted.parameters)} parameters, the model has {len(found.parameters[0])}"
            )
        for i, parameter in enumerate(wanted.parameters):
            if parameter.names != names[found.parameters[0][i]]:
                raise PlanMismatch(f"{where}: the plan has {parameter.names}, the model has {names[found.parameters[0][i]]}")
            for instance in found.parameters:
                storage[instance[i]] = _storage(plan, parameter)
    data_axes = tuple(i for i, axis in enumerate(plan.mesh) if axis.role == "data")
    return Assignment(choices, storage, parameter_groups(outline, storage), data_axes)


def transfer(assignment: Assignment, source: Outline, target: Outline) -> Assignment:
    """The choices of `source` for the same model captured in another dtype, which has fewer casts; ops go by name.

    Raises PlanMismatch where `target` has an op or a parameter that `source` lacks.
    """
    known = {op.name: op.target for op in source.ops}
    strange = [op for op in target.ops if known.get(op.name) != op.target]
    if strange:
        raise PlanMismatch(f"in another dtype the model has {strange[0].name} ({strange[0].target}), which the plan lacks")
    tensors = {name: p.tensor for p in source.parameters for name in p.names}
    stored = {p.tensor: assignment.storage.get(tensors.get(p.names[0], "")) for p in target.parameters}
    used = {name for region in target.regions for names in region.parameters for name in names}
    lacking = [p.names[0] for p in target.parameters if p.tensor in used and stored[p.tensor] is None]
    if lacking:
        raise PlanMismatch(f"in another dtype the model uses {lacking[0]}, which the plan lacks")
    choices = {op.name: assignment.choices[op.name] for op in target.ops}
    storage = {name: place for name, place in stored.items() if place is not None}
    return Assignment(choices, storage, parameter_groups(target, storage), assignment.data_axes)


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
        raise PlanError(f"parameter {parameter.names[0]}: zero_axes names {unknown[0]!r}; the mesh has {', '.join(axes)}")
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
    axes = len(next(iter(choices.values()))) if choices else 0
    tensors = dict(outline.tensors)
    found: dict[str, Placement] = {}
    for op in outline.ops:
        per_axis = [states(op, tensors, choice)[1] for choice in choices[op.name]]
        for i, use in enumerate(op.results):
            found[use.tensor] = tuple(per_axis[a][i] for a in range(axes))
    return found


def wanted(outline: Outline, choices: Mapping[str, tuple[str, ...]], name: str) -> tuple[Placement, ...]:
    """The placements op `name` wants of its operands, in operand order."""
    op = outline.by_name[name]
    per_axis = [states(op, dict(outline.tensors), choice)[0] for choice in choices[name]]
    return tuple(tuple(axis[i] for axis in per_axis) for i in range(len(op.operands)))



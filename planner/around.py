"""Choices for a graph that is not the plan's own, on a mesh with axes for positions and experts.

Data and model axes are solved for; the others follow. Positions are split where the graph trains and all its ops allow it, else
every rank of the context axis runs the whole sequence. Experts get their tokens sent where samples are split, else every rank
runs its own experts for all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from .assign import Storage
from .context import context_choices
from .dispatch import AXIS, DISPATCH, dispatched
from .outline import Op, Outline
from .placement import R
from .plan import MeshAxis
from .rule_experts import TARGET, letters

Solved = Callable[[tuple[MeshAxis, ...], Mapping[str, Storage]], Mapping[str, tuple[str, ...]]]
"""(axes, storage on them) -> choices by op name."""


def choices_around(
    outline: Outline, mesh: tuple[MeshAxis, ...], storage: Mapping[str, Storage], solved: Solved
) -> Mapping[str, tuple[str, ...]]:
    """Choices by op name for every axis of `mesh`, given where parameters are stored."""
    if all(axis.role in ("data", "model") and axis.name != AXIS for axis in mesh):
        return solved(mesh, storage)
    inner = _inner(mesh)
    names = [axis.name for axis in inner]
    known = solved(inner, {name: _stored(stored, mesh, names) for name, stored in storage.items()})
    context = _context(outline, mesh)

    def choice(op: Op, axis: MeshAxis) -> str:
        if axis.role == "context":
            return context.get(op.name, "R")
        found = known[op.name][names.index(axis.name if axis.role == "model" else names[0])]
        return _of_experts(op, found) if axis.name == AXIS and op.target == TARGET else found

    return {op.name: tuple(choice(op, axis) for axis in mesh) for op in outline.ops}


def _inner(mesh: Sequence[MeshAxis]) -> tuple[MeshAxis, ...]:
    """The data axes as one, first (of one rank where there are none), and the model axes."""
    data = [axis for axis in mesh if axis.role == "data"]
    link = (data or list(mesh))[0].link
    return (
        MeshAxis("dp", math.prod(axis.size for axis in data), "data", link),
        *(axis for axis in mesh if axis.role == "model"),
    )


def _stored(stored: Storage, mesh: Sequence[MeshAxis], names: Sequence[str]) -> Storage:
    """Where a parameter lives, as far as data and model axes tell."""
    home = {axis.name: state for axis, state in zip(mesh, stored.home, strict=True) if axis.role == "model"}
    roles = {mesh[a].role: mesh[a].name for a in stored.zero_axes}
    axes = tuple(
        names.index(name if role == "model" else names[0]) for role, name in roles.items() if role != "context"
    )
    return Storage(tuple(home.get(name, R) for name in names), stored.zero if axes else 0, axes)


def _context(outline: Outline, mesh: Sequence[MeshAxis]) -> Mapping[str, str]:
    """Choices on the context axis, none where the sequence stays whole."""
    ways = math.prod(axis.size for axis in mesh if axis.role == "context")
    if ways == 1 or not outline.loss:
        return {}
    cut = context_choices(outline, ways)
    return {} if cut.blockers else cut.choice


def _of_experts(op: Op, data: str) -> str:
    """What experts do along their axis where the data axis has the choice `data`."""
    factors = dispatched(op)
    if factors is not None and data == op.factors[factors[0]].name:
        return DISPATCH
    held = letters(op.factors, "e")
    return op.factors[held[0]].name if held else data

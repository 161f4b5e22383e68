"""How the modules of a plan's model are split along the tensor-parallel axis, in the words of `parallelize_module`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...planner.plan import Plan
from .facts import starred

if TYPE_CHECKING:
    from torch import nn

STYLES: Mapping[tuple[str, str], str] = {
    ("Linear", "S(0)"): "colwise", ("Linear", "S(1)"): "rowwise",
    ("Embedding", "S(0)"): "vocabulary", ("Embedding", "S(1)"): "hidden",
}  # fmt: skip
"""(class of a module, home of its weight) -> style; the weights of a Linear are (out, in), of an Embedding (rows, hidden)."""


@dataclass(frozen=True, slots=True)
class Split:
    """Styles by module name, with `*` for the number of a layer; `layers` is the name of the list of layers, "" without one."""

    styles: Mapping[str, str]
    layers: str


def split_of(plan: Plan, model: nn.Module) -> Split:
    """The split modules of a plan; `model` may be on meta. Raises UsageError for what is no module's style."""
    axis = next((i for i, a in enumerate(plan.mesh) if a.name == "tp" and a.size > 1), None)
    found: dict[str, str] = {}
    homes = list(_homes(plan, axis))
    for name, home in homes:
        if home == "R" or not name.endswith(".weight"):
            continue
        path = name.removesuffix(".weight")
        kind = type(model.get_submodule(path)).__name__
        if (kind, home) not in STYLES:
            raise UsageError(
                f"{path} is a {kind} split as {home} along tp, for which there is no style; plan with --pin tp=1"
            )
        if found.setdefault(starred(path), STYLES[kind, home]) != STYLES[kind, home]:
            raise UsageError(f"{starred(path)} is not split alike in all layers; plan with --pin tp=1")
    lone = next(
        (names[0] for names in _split(plan, axis) if not {starred(n.rpartition(".")[0]) for n in names} & set(found)),
        None,
    )
    if lone is not None:
        raise UsageError(f"{lone} is split along tp without a weight of a Linear or Embedding; plan with --pin tp=1")
    whole = {starred(n.removesuffix(".weight")) for n, h in homes if h == "R"} & set(found)
    if whole:
        raise UsageError(f"{min(whole)} is split in some layers and whole in others; plan with --pin tp=1")
    if axis is not None and not found:
        raise UsageError(
            "along tp only activations are split, no parameter; plan with --pin tp=1 or sequence_parallel=off"
        )
    return Split(found, layer_list(plan))


def _homes(plan: Plan, axis: int | None) -> Iterator[tuple[str, str]]:
    """(parameter, home along tp) of every instance of every region, tied names included."""
    for entry in plan.regions:
        for parameter in entry.parameters if axis is not None else ():
            home = parameter.home[axis] if axis is not None else "R"
            yield from ((name, home) for name in parameter.names)


def _split(plan: Plan, axis: int | None) -> Iterator[tuple[str, ...]]:
    """All names of every parameter that is split along tp."""
    for entry in plan.regions if axis is not None else ():
        yield from (p.names for p in entry.parameters if axis is not None and p.home[axis] != "R")


def layer_list(plan: Plan) -> str:
    """The list that the layers stand in ("model.layers"), by the names of the parameters that repeat; "" without one."""
    for entry in sorted(plan.regions, key=lambda e: -e.repeats):
        names = [n for p in entry.parameters for n in p.names[:1] if "*" in starred(n)]
        prefixes = {starred(n).partition(".*.")[0] for n in names}
        if names and len(prefixes) == 1:
            return prefixes.pop()
    return ""


def tied(plan: Plan) -> list[tuple[str, ...]]:
    """Parameters with several names."""
    return [p.names for entry in plan.regions for p in entry.parameters if len(p.names) > 1]

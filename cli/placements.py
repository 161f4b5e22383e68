"""A plan's placements in a few words per region and axis, for tables and the report.

The words are those people use: "batch", "column" and "row" of a matmul, "heads", "vocabulary", "sequence", "whole".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..planner.plan import MeshAxis, OpPlan, ParameterPlan, Plan, RegionPlan

_COLUMN_ROW = {"n": "column", "o": "column", "k": "row"}
_WORDS: Mapping[str, Mapping[str, str]] = {
    **{f"aten.{name}": _COLUMN_ROW for name in ("linear", "mm", "addmm", "matmul", "bmm")},
    "aten.embedding": {"v": "vocabulary", "h": "features"},
    "aten.cross_entropy_loss": {"v": "vocabulary"},
    "shardwright.linear_cross_entropy": {"v": "vocabulary"},
}
_CHOICE = re.compile(r"(?P<letter>[a-z]+)(?P<number>\d*)(?:\.(?P<factor>\d+))?")
# What a region's row leads with; the rest is counted under "other ops".
MAIN = ("linear", "mm", "addmm", "matmul", "bmm", "scaled_dot_product_attention", "embedding", "conv2d", "convolution",
        "cross_entropy_loss", "linear_cross_entropy")  # fmt: skip


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters of a region that live alike: how many, one of their names, their home on each axis, ZeRO level and axes."""

    count: int
    example: str
    home: tuple[str, ...]
    zero: int
    zero_axes: tuple[str, ...]
    trainable: bool

    def text(self, axes: tuple[str, ...]) -> str:
        """ "6 x zero-3 over dp, S(0) on tp"."""
        split = [f"{home} on {axis}" for home, axis in zip(self.home, axes, strict=True) if home != "R"]
        parts = [f"zero-{self.zero} over {', '.join(self.zero_axes)}"] if self.zero else []
        frozen = " (frozen)" if not self.trainable else ""
        return f"{self.count} x {', '.join([*parts, *split]) or 'whole'}{frozen}"


@dataclass(frozen=True, slots=True)
class RegionSummary:
    """A region: per axis a phrase, and its parameters by how they live."""

    name: str
    repeats: int
    ops: int
    axes: tuple[str, ...]
    parameters: tuple[ParameterGroup, ...]


def summaries(plan: Plan) -> tuple[RegionSummary, ...]:
    """One summary per region, in order."""
    return tuple(_summary(region, plan.mesh) for region in plan.regions)


def alike(plan: Plan) -> tuple[str, ...]:
    """For each entry the earlier entry of the same region with the same placements and parameters, "" where there is none."""
    seen: dict[tuple[object, ...], str] = {}
    found = []
    for entry in plan.regions:
        key = (entry.region or entry.name, entry.ops, entry.parameters)
        found.append(seen.get(key, ""))
        seen.setdefault(key, entry.name)
    return tuple(found)


def word(op: OpPlan, axis: int, mesh: tuple[MeshAxis, ...]) -> str:
    """What `op` does along one axis, in a word."""
    choice = op.choice[axis]
    if choice in ("R", "V"):
        return "whole"
    if re.fullmatch(r"P\d+", choice):
        return "sums pass"
    named = _named(_packet(op.target), choice)
    if named is not None:
        return "batch" if mesh[axis].role == "data" else named
    state = op.result[axis] if op.result else ""
    if _packet(op.target) == "aten.scaled_dot_product_attention" and state == "S(1)":
        return "heads"
    return _by_result(state, mesh[axis])


def _named(packet: str, choice: str) -> str | None:
    """The word for a loop of an op whose loops have usual names: samples before positions, also where the two are merged."""
    loop = _CHOICE.fullmatch(choice)
    words = _WORDS.get(packet)
    if loop is None or words is None:
        return None
    if loop["letter"] not in ("b", "m"):
        return words.get(loop["letter"])
    outer = (loop["number"] or "0") == "0" and (loop["factor"] or "0") == "0"
    return "batch" if outer else "sequence"


def _by_result(state: str, axis: MeshAxis) -> str:
    """Samples come first in activations, positions are the minor factor where the two are merged."""
    if state == "P":
        return "contracted"
    if axis.role == "data" or state == "S(0)":
        return "batch"
    match = re.fullmatch(r"S\((\d+)(?:\.(\d+))?\)", state)
    if match is None:
        return "split"
    return "sequence" if match[1] == "0" else f"dim {match[1]}"


def _packet(target: str) -> str:
    """ "aten.linear.default" -> "aten.linear"."""
    return ".".join(target.split(".")[:2])


def _summary(region: RegionPlan, mesh: tuple[MeshAxis, ...]) -> RegionSummary:
    phrases = tuple(_phrase(region, i, mesh) for i in range(len(mesh)))
    return RegionSummary(region.name, region.repeats, len(region.ops), phrases, _groups(region.parameters))


def _phrase(region: RegionPlan, axis: int, mesh: tuple[MeshAxis, ...]) -> str:
    """ "column x3, row x1, heads; rest: whole": the main ops by word, then what most of the others do."""
    if mesh[axis].size == 1:
        return "-"
    main = Counter(word(op, axis, mesh) for op in region.ops if _is_main(op))
    rest = Counter(word(op, axis, mesh) for op in region.ops if not _is_main(op))
    text = ", ".join(name if count == 1 else f"{name} x{count}" for name, count in main.items())
    if not rest:
        return text
    usual = rest.most_common(1)[0][0]
    if not main:
        return usual if len(rest) == 1 else ", ".join(f"{name} x{count}" for name, count in rest.most_common(3))
    return text if set(main) == {usual} else f"{text}; rest mostly {usual}"


def _is_main(op: OpPlan) -> bool:
    return _packet(op.target).partition(".")[2] in MAIN


def _groups(parameters: tuple[ParameterPlan, ...]) -> tuple[ParameterGroup, ...]:
    found: dict[tuple[object, ...], list[ParameterPlan]] = {}
    for parameter in parameters:
        key = (parameter.home, parameter.zero, parameter.zero_axes, parameter.trainable)
        found.setdefault(key, []).append(parameter)
    return tuple(
        ParameterGroup(len(members), members[0].names[0], first.home, first.zero, first.zero_axes, first.trainable)
        for members in found.values()
        for first in members[:1]
    )

"""In which placements an assignment has its tensors: what memory depends on (planner/timeline.py)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from .placement import Placement


@dataclass(frozen=True, slots=True)
class Uses:
    """Placements wanted of operands by op, produced by tensor, and those of parameters that take a buffer of their own.

    `wants` are all that are wanted of a tensor, `reduced` those of parameters whose gradient is summed over ranks, `turned` how
    many of a parameter's gradients are turned into that of the stored placement in a buffer of their own.
    """

    wanted: Mapping[str, tuple[Placement, ...]]
    produced: Mapping[str, Placement]
    fresh: Mapping[str, list[Placement]]
    wants: Mapping[str, Collection[Placement]] = field(default_factory=dict)
    reduced: Mapping[str, Collection[Placement]] = field(default_factory=dict)
    turned: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Borders:
    """What a part of a model takes from other parts and gives to them, by tensor, in the placement in which it crosses."""

    takes: Mapping[str, Placement] = field(default_factory=dict)
    gives: Mapping[str, Placement] = field(default_factory=dict)

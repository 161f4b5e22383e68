"""What is on a rank at its fullest moment, by region and cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .plan import Plan, StagePlan

if TYPE_CHECKING:
    from .options import Option
    from .replay import BytesOverTime
    from .simulate import Task

REST = ""
"""The region of what belongs to none: inputs, the reserve, what the op that runs makes."""

STANDING: Mapping[str, str] = {"parameters": "parameters", "optimizer": "optimizer", "gathered": "copies"}
"""What units have all the time: by cause, its name in their options."""

Alive = dict[str, dict[str, float]]
"""Bytes by region and cause."""


def alive_at_peak(
    plan: Plan, rank: int, cuts: Sequence[int], options: Sequence[Option], tasks: Sequence[Task], memory: BytesOverTime
) -> Alive:
    """Bytes of one pipeline rank at its fullest moment, of everything by the plan's entry whose units have it.

    `tasks` are what the rank does, `memory` its bytes over time; what is saved belongs to the microbatches under way then.
    """
    moments = list(zip(*memory.causes.values(), strict=True))
    at = max(range(len(moments)), key=lambda i: (sum(moments[i]), -i))
    there = {cause: amounts[at] for cause, amounts in memory.causes.items()}
    found: Alive = {}
    for s, stage in enumerate(plan.stages):
        if stage.rank == rank:
            live = _under_way(tasks, s, memory.seconds[at])
            for name, option in zip(_names(stage), options[cuts[s] : cuts[s + 1]], strict=True):
                own = found.setdefault(name, {})
                for cause, amount in _of_unit(option, live, there).items():
                    own[cause] = own.get(cause, 0.0) + amount
    known = {cause: sum(own.get(cause, 0.0) for own in found.values()) for cause in there}
    found[REST] = {cause: amount - known[cause] for cause, amount in there.items()}
    return {name: {c: x for c, x in own.items() if x >= 0.5} for name, own in found.items()}


def _of_unit(option: Option, live: int, there: Mapping[str, float]) -> dict[str, float]:
    """Bytes of one unit by cause, of causes that are `there`."""
    own = {cause: option.memory[name] for cause, name in STANDING.items()}
    own |= {"gradients": option.gradient, "saved": live * option.saved}
    return {cause: amount for cause, amount in own.items() if there.get(cause)}


def _names(stage: StagePlan) -> list[str]:
    """The entry of every unit of a stage."""
    return [run.use for run in stage.runs for _ in range(run.count)]


def _under_way(tasks: Sequence[Task], stage: int, at: float) -> int:
    """Microbatches of a stage that began before and whose last part of the backward pass is not over."""
    mine = [t for t in tasks if t.stage == stage and t.lane == "compute" and t.microbatch >= 0]
    begun = {t.microbatch for t in mine if t.start <= at}
    ends: dict[int, float] = {}
    for t in mine:
        ends[t.microbatch] = max(ends.get(t.microbatch, 0.0), t.end)
    return sum(ends[m] > at for m in begun)

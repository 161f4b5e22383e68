"""How far collectives of parameters run beside computing: the most that the memory limit leaves room for.

The search counts memory without any of it, so that a plan which fits only so is still found. What it found is then counted with as
much as fits. Seconds do not depend on it: what a device hides is in the prices (planner/overlap.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

from .evaluate import Evaluation, Evaluator
from .memory import Setting
from .plan import OverlapPlan
from .search import Candidate
from .updates import ALONE

WAYS = tuple(OverlapPlan(prefetch, reductions) for prefetch, reductions in ((1, 1), (0, 1), (1, 0), (0, 0)))
"""Most first. Reductions come before gathers: the copy of one group's gradients is less than another group gathered."""


class Figures(Protocol):
    """What a plan comes to."""

    @property
    def peak_bytes(self) -> int:
        """Bytes at the fullest moment of the fullest device."""


F = TypeVar("F", bound=Figures)


def most_overlap(limit: int, objective: str, evaluate: Callable[[OverlapPlan], F]) -> tuple[OverlapPlan, F]:
    """The most that stays within `limit` bytes, and what the plan comes to with it; none at all where least memory is the aim."""
    for way in WAYS[:-1] if objective != "memory" else ():
        found = evaluate(way)
        if found.peak_bytes <= limit:
            return way, found
    return WAYS[-1], evaluate(WAYS[-1])


def beside(setting: Setting, way: OverlapPlan) -> Setting:
    """A setting with so much of it."""
    return replace(setting, prefetch=way.prefetch, reductions=way.reductions)


def closely(setting: Setting) -> Setting:
    """The setting in which one plan is counted, where bytes are counted at all: not that of a search, whose rows are simpler."""
    return replace(setting, fine=setting.staged)


def as_found(best: Candidate, limit: int, objective: str) -> tuple[OverlapPlan, Evaluation]:
    """What runs beside computing in what a search found, and what that comes to."""
    known, assignment = best.evaluator, best.assignment(best.chosen)

    def evaluate(way: OverlapPlan) -> Evaluation:
        return Evaluator(best.template, known.facts, known.costs, closely(beside(known.setting, way))).evaluate(
            assignment
        )

    if known.setting.early:
        return ALONE, evaluate(ALONE)
    return most_overlap(limit, objective, evaluate)

"""Experts of one unit split over a part of the data axis: what changes in the unit's numbers.

A rank keeps 1/ep of its experts and works on the tokens that all ep ranks send them: as many as before times the imbalance.
Tokens go there and back by two all-to-alls in each direction, and once more where the op runs again (planner/experts.py). The
copies a rank receives are kept for the backward pass with the op, or made again with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from . import rule_experts
from .experts import ExpertParallel, expert_degrees, expert_ops, expert_parallel
from .numbers import Numbers, UnitExperts
from .outline import Outline

RECEIVED = 2
"""Buffers of token copies at once while an op runs: those dispatched to it, and its outputs or their gradients on their way."""


def expert_sizes(outline: Outline, ranks: int) -> tuple[int, ...]:
    """Sizes above 1 of an expert axis within `ranks`: they divide the ranks, and the experts of every op of the model."""
    found = [set(expert_degrees(facts, ranks)) for facts in expert_ops(outline)]
    return tuple(sorted(set.intersection(*found) - {1})) if found else ()


def spread(
    numbers: Numbers, ep: int, data: int, all_to_all: Callable[[float], float], training: bool
) -> Numbers | None:
    """The numbers with experts split over `ep` of `data` ranks; None where their number on a rank does not divide.

    Weights stay as they are: planner/options.py stores 1/ep of those of experts.
    """
    if ep == 1 or not numbers.experts:
        return numbers
    if any(unit.local % ep for unit in numbers.experts):
        return None
    for unit in numbers.experts:
        numbers = _spread(numbers, unit, ep, data, all_to_all, training)
    return numbers


def _spread(
    n: Numbers, unit: UnitExperts, ep: int, data: int, all_to_all: Callable[[float], float], training: bool
) -> Numbers:
    everyone = unit.facts.experts
    load = rule_experts.imbalance(unit.local / ep, everyone)
    slower = load / rule_experts.imbalance(unit.local, everyone) - 1.0
    tokens = math.ceil(unit.slots / unit.facts.top_k)
    found = expert_parallel(
        unit.facts, ep, data, tokens, unit.token_bytes, all_to_all, rho=load, training=training
    )  # fmt: skip
    forward, backward, weight = slower * unit.forward, slower * unit.backward, slower * unit.weight
    again = unit.forward * slower + found.forward_seconds if unit.again else 0.0
    held = _held(unit, found)
    kept = held["saved"] if training and not unit.again else 0.0
    return replace(
        n,
        forward=n.forward + forward + found.forward_seconds,
        backward=n.backward + (backward + found.backward_seconds if training else 0.0),
        weight=n.weight + (weight if training else 0.0),
        again=n.again + again,
        compute_forward=n.compute_forward + forward,
        compute_backward=n.compute_backward + (backward if training else 0.0),
        saved=n.saved + kept,
        peak=n.peak + (held["saved"] + held["backward"] if training else 0.0),
        work=max(0.0, n.work + held["forward"] - (held["copies"] if kept else 0.0)),
    )  # fmt: skip


def _held(unit: UnitExperts, found: ExpertParallel) -> dict[str, float]:
    """Bytes beyond those of the op with all experts here: saved with it, alive while it runs (both directions), token copies."""
    copies = float(found.rows * unit.token_bytes)
    more = found.rows / unit.rows - 1.0 if unit.rows else 0.0
    forward, backward = (more * size for size in unit.scratch)
    return {
        "copies": copies, "saved": max(copies + more * unit.gates, -unit.gates),
        "forward": RECEIVED * copies + forward, "backward": RECEIVED * copies + backward,
    }  # fmt: skip

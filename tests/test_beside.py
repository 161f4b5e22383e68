"""How far collectives run beside computing: memory counted with and without, and the most that a limit leaves room for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from shardwright.planner.beside import WAYS, as_found, beside
from shardwright.planner.costs import Shape
from shardwright.planner.evaluate import Evaluation, Evaluator
from shardwright.planner.outline import Outline
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import MeshAxis, OverlapPlan
from shardwright.planner.search import Candidate
from solver_outlines import transformer
from test_solver_brute_force import problem_for


def solved(zero: int, outline: Outline | None = None) -> Candidate:
    """Four layers on two data-parallel ranks at a ZeRO level."""
    problem = replace(problem_for(0, None, outline or transformer(4)), pins=parse_pins([f"zero={zero}"]))
    candidate = Candidate(problem, Shape((MeshAxis("dp", 2, "data", "link"),)), 1)
    candidate.advance()
    return candidate


def counted(candidate: Candidate, way: OverlapPlan) -> Evaluation:
    known = candidate.evaluator
    evaluator = Evaluator(candidate.template, known.facts, known.costs, beside(known.setting, way))
    return evaluator.evaluate(candidate.assignment(candidate.chosen))


def test_a_group_gathered_ahead_is_there_while_the_one_after_it_is_used() -> None:
    candidate = solved(3)
    without, ahead = (counted(candidate, OverlapPlan(n, 0)) for n in (0, 1))
    outline, facts = candidate.problem.outline, candidate.problem.facts
    layers = outline.regions[max(range(len(outline.regions)), key=lambda r: len(outline.regions[r].instances))]
    group = sum(outline.tensors[t].bytes for t in layers.parameters[0])
    arriving = group + group // 2  # the group, and this rank's half of it on its way out
    last = [facts.order[ops[-1]] for ops in layers.instances]
    for before, here in pairwise(last):
        for v in range(before + 1, here + 1):
            assert ahead.points["op", v] - without.points["op", v] == pytest.approx(arriving), v
    first = facts.order[layers.instances[0][0]]
    assert ahead.points["op", first] == without.points["op", first], "nothing with weights comes before"
    assert ahead.seconds == without.seconds
    assert ahead.traffic == without.traffic


def test_gradients_fly_until_the_next_group_is_reduced() -> None:
    candidate = solved(1)
    without, flying = (counted(candidate, OverlapPlan(0, n)) for n in (0, 1))
    outline, facts = candidate.problem.outline, candidate.problem.facts
    groups = candidate.assignment(candidate.chosen).groups
    whole = {facts.low[g[0]]: sum(outline.tensors[t].bytes for t in g) for g in groups}
    lows = sorted(whole)
    for low, above in pairwise(lows):
        for v in range(low, above):
            assert flying.points["op", v] - without.points["op", v] == pytest.approx(whole[above])
    reductions = [p for p in without.points if p[0] == "reduce"]
    assert reductions
    assert all(flying.points[p] == without.points[p] for p in reductions), "one lands before the next is packed"


def test_all_reduces_take_no_memory() -> None:
    candidate = solved(0)
    assert counted(candidate, OverlapPlan(1, 1)).points == counted(candidate, OverlapPlan(0, 0)).points


def test_a_plan_has_the_most_that_its_limit_leaves_room_for() -> None:
    candidate = solved(3)
    peaks = [counted(candidate, way).peak_bytes for way in WAYS]
    assert peaks[0] > peaks[-1], "a limit between them tells"
    assert as_found(candidate, peaks[0], "throughput")[0] == WAYS[0]
    tight, evaluation = as_found(candidate, peaks[0] - 1, "throughput")
    assert tight != WAYS[0]
    assert evaluation.peak_bytes <= peaks[0] - 1
    assert as_found(candidate, peaks[-1], "throughput")[1].peak_bytes == peaks[-1]
    assert as_found(candidate, peaks[0], "memory")[0] == OverlapPlan(0, 0)

"""Clusters of unlike devices: divisions against exhaustive search, and whole plans over two pools."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from oracles.brute import live_counts, moments
from oracles.instances import option
from shardwright.cli.main import main
from shardwright.errors import ClusterError, Infeasible, PinError, PlanError
from shardwright.planner.arcs import Line
from shardwright.planner.cluster import Cluster, default_limit_bytes, pool_names
from shardwright.planner.options import Option
from shardwright.planner.outline import Outline
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan, Precision, Source
from shardwright.planner.plancheck import first_problem, problems
from shardwright.planner.planfile import dump_plan, parse_plan
from shardwright.planner.pooled import neighbours, shared_seconds
from shardwright.planner.prices import Prices
from shardwright.planner.schedules import actions, fault, stage_rank
from shardwright.planner.simulate import simulate
from shardwright.planner.solve import Request, reprice, solve
from shardwright.planner.stagecosts import Links, StageCost
from shardwright.planner.stageproblem import Pool
from shardwright.planner.stages import Memory, Pipeline, StageProblem, StageSolve
from shardwright.profiles.devices import parse_cluster
from solver_outlines import transformer

BF16 = Precision("bf16-mixed", "bfloat16", "float32", "float32", "float32")
PAIR = "a100-sxm-80gb:4+h100-sxm:4"
KINDS = (("1f1b", 1), ("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("interleaved", 2), ("zbv", 2))

# -- divisions against exhaustive search


def instance(seed: int) -> StageProblem:
    """4 or 5 units on 2 or 3 ranks of two pools that differ in speed and memory."""
    rng = random.Random(seed)
    while True:
        name, chunks = rng.choice(KINDS)
        ranks, m = rng.choice((2, 2, 3)) if chunks == 1 else 2, rng.randint(1, 4)
        if not fault(name, ranks, chunks, m):
            break
    kinds = rng.randint(1, 2)
    regions = [rng.randrange(kinds) for _ in range(rng.randint(max(4, ranks * chunks), 5))]
    at = tuple(sorted(rng.randrange(2) for _ in range(ranks))) if ranks == 3 else (0, 1)
    at = at if len(set(at)) == 2 else (0, *at[1:-1], 1)
    at = at if rng.random() < 0.5 else tuple(reversed(at))
    options, pools = [], []
    for p in range(2):
        slower = rng.choice((1.0, 1.0, 2.0, 3.0))
        mine = [[_drawn(rng, p * kinds + r, slower) for _ in range(rng.randint(1, 2))] for r in range(kinds)]
        line = Line.of(range(kinds), [[(o.forward, o.backward) for o in group] for group in mine])
        line = Line.of(
            [p * kinds + r for r in regions],
            [[(0.0, 0.0)]] * p * kinds + [[(o.forward, o.backward) for o in g] for g in mine],
        )
        least = sum(min(o.static + o.gradient + o.saved for o in mine[r]) for r in regions) / ranks
        cap = float(round(least * rng.choice((0.9, 1.3, 2.0, 4.0)) + 15))
        pools.append(Pool(line, {}, Memory(cap)))
        options += mine
    sends = {(a, b): rng.choice((0.0, 0.2)) for a in range(ranks) for b in range(ranks)}
    placement = stage_rank(name, ranks, chunks)

    def hand(stage: int, position: int, layout: str) -> tuple[float, float]:
        one = sends[placement[stage - 1], placement[stage]]
        return one, one

    first = replace(pools[0].line, regions=tuple(regions))
    return StageProblem(
        first, options, {}, Pipeline(ranks, chunks, name, m), pools[0].memory, lambda at, layout: (0.0, 0.0), pools=tuple(pools),
        at=at, hand=hand,
    )  # fmt: skip


def _drawn(rng: random.Random, region: int, slower: float) -> Option:
    seconds, whole = slower * rng.uniform(0.5, 1.5), rng.randint
    back = seconds * rng.uniform(1.0, 2.5)
    return option(
        region, seconds, back, weight=back * rng.choice((0.0, 0.4)), finish=rng.choice((0.0, 0.3)), static=float(whole(1, 12)),
        gradient=float(whole(0, 4)), saved=float(whole(0, 10)), work=float(whole(0, 10)), step=float(whole(0, 5)),
    )  # fmt: skip


def plans(mine: StageProblem) -> Iterator[float]:
    """The simulated step of every plan that fits, over all divisions and options."""
    p = mine.pipeline
    placement, lists = stage_rank(p.schedule, p.ranks, p.chunks), actions(p.schedule, p.ranks, p.chunks, p.microbatches)
    size = len(mine.options) // 2
    for inner in itertools.combinations(range(1, len(mine.line)), p.stages - 1):
        cuts = (0, *inner, len(mine.line))
        stage_of = [s for s in range(p.stages) for _ in range(cuts[s], cuts[s + 1])]
        groups = [
            mine.options[mine.at[placement[s]] * size + r] for s, r in zip(stage_of, mine.line.regions, strict=True)
        ]
        for picked in itertools.product(*groups):
            stages = [picked[i:j] for i, j in itertools.pairwise(cuts)]
            if all(_holds(mine, lists[r], r, stages, placement) for r in range(p.ranks)):
                yield _step(mine, lists, stages, placement)


def _holds(
    mine: StageProblem, actions_of: Sequence, rank: int, stages: Sequence[Sequence[Option]], placement: Sequence[int]
) -> bool:
    cap = mine.pools[mine.at[rank]].memory.cap_bytes
    held = {s: units for s, units in enumerate(stages) if placement[s] == rank}
    units = [o for group in held.values() for o in group]
    fixed, work = sum(o.static + o.gradient for o in units), max(o.work for o in units)
    assert live_counts(actions_of, True)
    alive = [sum(n * o.saved for s, n in counts.items() for o in held[s]) for counts in moments(actions_of, True)]
    return fixed + max(alive) + work <= cap and fixed + sum(o.step for o in units) <= cap


def _step(mine: StageProblem, lists: Sequence, stages: Sequence[Sequence[Option]], placement: Sequence[int]) -> float:
    costs = [
        StageCost(
            sum(o.forward for o in units), sum(o.backward for o in units), sum(o.weight for o in units),
            finish=(("compute", sum(o.finish for o in units)),),
        )
        for units in stages
    ]  # fmt: skip
    ends = range(len(stages))
    assert mine.hand is not None
    ahead = [mine.hand(s + 1, 0, "R")[0] if s + 1 < len(stages) else 0.0 for s in ends]
    back = [mine.hand(s, 0, "R")[1] if s else 0.0 for s in ends]
    return simulate(lists, placement, costs, Links(tuple(ahead), tuple(back))).step_seconds


def compared(seed: int) -> tuple[float, float] | None:
    """(bound, step) as shares of the best of all plans; None where nothing fits."""
    mine = instance(seed)
    best = min(plans(mine), default=None)
    found = StageSolve(mine, gap=1e-6).run()
    if best is None:
        assert found.stages is None, f"instance {seed}"
        return None
    assert found.bound_seconds <= best * (1 + 1e-9), f"instance {seed}: {mine.pipeline}"
    if found.stages is None:
        return found.bound_seconds / best, float("inf")
    assert found.step_seconds >= best * (1 - 1e-9), f"instance {seed}: {mine.pipeline}"
    return found.bound_seconds / best, found.step_seconds / best

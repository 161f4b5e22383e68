"""Bounds of shapes before their lists are laid out: never above the best plan, and near it where one rank decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
from oracles.brute import best_plan
from oracles.instances import random_problem
from shardwright.planner.arcs import Line
from shardwright.planner.even import even_cuts
from shardwright.planner.live import live_vectors, local_chunks
from shardwright.planner.program import INFINITE
from shardwright.planner.schedules import actions, fault, stage_rank
from shardwright.planner.screen import Screen, held_of
from shardwright.planner.stages import Memory
from shardwright.planner.trial import merged

SAMPLE = 96
NIGHTLY = 1500


def screened(seed: int) -> float:
    """The bound of a random instance as a share of its best plan (0 where nothing fits)."""
    mine = random_problem(seed)
    best = best_plan(mine)
    found = Screen().seconds(mine, seed, 0.0, 1e6)
    if best is None:
        return 0.0
    assert found <= best.step_seconds * (1 + 1e-9), f"instance {seed}: {mine.pipeline}"
    return found / best.step_seconds


def test_never_above_the_best_plan() -> None:
    shares = [screened(seed) for seed in range(SAMPLE)]
    assert max(shares) > 0.99, "no bound is near"
    assert sum(s > 0.7 for s in shares) > SAMPLE / 4


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(SAMPLE, SAMPLE + NIGHTLY, 100))
def test_never_above_the_best_plan_at_night(first: int) -> None:
    for seed in range(first, first + 100):
        screened(seed)


def test_less_memory_never_lowers_the_bound() -> None:
    mine = replace(random_problem(11), memory=Memory(INFINITE))
    held = sum(min(o.static for o in mine.options[r]) for r in mine.line.regions)
    bounds = [
        Screen().seconds(replace(mine, memory=Memory(cap)), k, 0.0, 1e6)
        for k, cap in enumerate((INFINITE, 4 * held, 2 * held, held))
    ]
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("seed", range(12))
def test_too_few_bytes_are_told_without_a_solve(seed: int) -> None:
    mine = random_problem(seed)
    held = sum(min(o.static for o in mine.options[r]) for r in mine.line.regions)
    short = replace(mine, memory=Memory(0.99 * held / mine.pipeline.ranks))
    assert Screen().seconds(short, 0, 0.0, INFINITE) == INFINITE
    assert Screen().seconds(replace(mine, memory=Memory(INFINITE)), 1, 0.0, 1e6) < 1e6


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"])
def test_live_microbatches_stop_growing(name: str) -> None:
    for ranks in (2, 3, 4, 5, 8):
        for chunks in (1, 2, 3):
            for m in (1, 2, 3, 4, 7, 8, 2 * ranks, 3 * ranks, 5 * ranks, 37):
                if not fault(name, ranks, chunks, m):
                    placement = stage_rank(name, ranks, chunks)
                    live = live_vectors(actions(name, ranks, chunks, m), placement)
                    assert held_of(name, ranks, chunks, m).live == tuple(merged(v) for v in live), (ranks, chunks, m)


def test_even_cuts_balance_ranks() -> None:
    """Two ranks in a V hold the ends and the middle: a heavy last unit moves work away from its rank."""
    local = local_chunks(stage_rank("zbv", 2, 2))
    assert even_cuts(line_of(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), local, 100) == [0, 2, 4, 6, 8]
    cuts = even_cuts(line_of(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0), local, 100)
    busy = [sum((1.0 if k < 7 else 3.0) for s in mine for k in range(cuts[s], cuts[s + 1])) for mine in local]
    assert busy == [5.0, 5.0]


def line_of(*seconds: float) -> Line:
    return Line.of(range(len(seconds)), [[(s / 3, 2 * s / 3)] for s in seconds])

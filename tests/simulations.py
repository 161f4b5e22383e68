"""Simulated steps of equal stages, and schedules with random durations."""

from __future__ import annotations

import random
from collections.abc import Sequence

from shardwright.planner.engine import Compiled, compile_lists
from shardwright.planner.paths import makespan
from shardwright.planner.schedules import SCHEDULES, actions, fault, stage_edges, stage_rank
from shardwright.planner.simulate import Links, StageCost, Timeline, simulate

TRAINING = tuple(name for name in SCHEDULES if name not in ("none", "forward"))


def compiled(name: str, ranks: int, chunks: int, m: int) -> Compiled:
    return compile_lists(
        actions(name, ranks, chunks, m), stage_rank(name, ranks, chunks), edges=stage_edges(name, ranks * chunks)
    )


def even(name: str, ranks: int, chunks: int, m: int, f: float, b: float, w: float, send: float = 0.0) -> float:
    """Seconds of a step of equal stages."""
    n = ranks * chunks
    lists = compiled(name, ranks, chunks, m)
    return makespan(lists, lists.placement, [f] * n, [b] * n, [w] * n, [send] * n, [send] * n)[0]


def run(name: str, ranks: int, chunks: int, m: int, cost: StageCost, send: float = 0.0) -> Timeline:
    n = ranks * chunks
    links = Links((send,) * n, (send,) * n)
    return simulate(actions(name, ranks, chunks, m), stage_rank(name, ranks, chunks), [cost] * n, links)


def random_durations(draw: random.Random, n: int) -> dict[str, list[float]]:
    forward = [draw.uniform(0.6, 1.4) for _ in range(n)]
    backward = [draw.uniform(1.2, 2.8) for _ in range(n)]
    weight = [b * draw.uniform(0.2, 0.6) for b in backward]
    return {
        "forward": forward, "backward": backward, "weight": weight,
        "input": [b - w for b, w in zip(backward, weight, strict=True)],
        "send_forward": [draw.uniform(0, 0.6) for _ in range(n)], "send_backward": [draw.uniform(0, 0.6) for _ in range(n)],
        "finish": [draw.uniform(0, 4) for _ in range(n)],
    }  # fmt: skip


def timed(lists: Compiled, d: dict[str, list[float]]) -> tuple[float, object]:
    return makespan(
        lists,
        lists.placement,
        d["forward"],
        d["backward"],
        d["weight"],
        d["send_forward"],
        d["send_backward"],
        d["finish"],
    )


def random_case(draw: random.Random, names: Sequence[str] = TRAINING) -> tuple[str, int, int, int]:
    while True:
        name, ranks, chunks, m = draw.choice(names), draw.randint(1, 5), draw.randint(1, 3), draw.randint(1, 12)
        if not fault(name, ranks, chunks, m):
            return name, ranks, chunks, m

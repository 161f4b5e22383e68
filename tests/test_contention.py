"""Lanes that slow each other down, and the trace of a simulated step."""

from __future__ import annotations

import random

import pytest
from shardwright.errors import UsageError
from shardwright.planner.contention import Contention, Job, lane_kind, replay
from shardwright.planner.paths import WORLD
from shardwright.planner.schedules import actions, stage_rank
from shardwright.planner.simulate import Links, StageCost, simulate
from simulations import random_case, run

FACTORS = Contention(
    {("compute", "comm"): 1.25, ("comm", "compute"): 1.5, ("compute", "copy"): 1.1, ("copy", "compute"): 1.0}
)


def test_progressive_rates_by_hand() -> None:
    """6 s of compute beside 2 s of a collective: that takes 3 s, in which 2.4 s are computed, so 6.6 s in all."""
    jobs = [Job(0, "compute", 6.0, ()), Job(0, "dp", 2.0, ())]
    assert replay(jobs, FACTORS) == pytest.approx(6.6)
    assert replay([*jobs, Job(1, "dp", 7.0, ())], FACTORS) == pytest.approx(7.0)
    assert replay([Job(0, "dp", 2.0, ()), Job(0, "dp", 3.0, ())], FACTORS) == pytest.approx(5.0)
    assert replay([Job(0, "compute", 1.0, ()), Job(0, "dp", 2.0, (0,)), Job(0, "", 0.0, (0, 1))], FACTORS) == 3.0
    with pytest.raises(UsageError, match="at least 1"):
        replay(jobs, Contention({("compute", "comm"): 0.9}))


def test_lanes_have_kinds() -> None:
    lanes = ("compute", "copy-in", "copy-out", "disk", "host", "dp", "send 3", WORLD)
    assert [lane_kind(lane) for lane in lanes] == ["compute", "copy", "copy", "disk", "host", "comm", "comm", "comm"]


def test_contention_slows_and_without_factors_changes_nothing() -> None:
    draw = random.Random(6)
    for _ in range(40):
        name, ranks, chunks, m = random_case(draw)
        costs = [
            StageCost(
                draw.uniform(1, 2), draw.uniform(2, 4), draw.uniform(0.5, 1), offloaded_bytes=draw.choice([0, 1]),
                lanes_forward=(("tp", 0.5), ("dp", 0.3), ("tp", 0.2)), lanes_backward=(("tp", 0.9),),
                finish=((WORLD, 1.0), ("compute", 0.5)),
            )
            for _ in range(ranks * chunks)
        ]  # fmt: skip
        links = Links(*[tuple(draw.uniform(0, 0.3) for _ in costs) for _ in range(2)])
        lists, placement = actions(name, ranks, chunks, m), stage_rank(name, ranks, chunks)
        free = simulate(lists, placement, costs, links, contended=Contention({}))
        assert free.contended_seconds == pytest.approx(free.step_seconds)
        slowed = simulate(lists, placement, costs, links, contended=FACTORS)
        assert slowed.step_seconds == free.step_seconds
        assert slowed.contended_seconds is not None
        assert slowed.step_seconds < slowed.contended_seconds < 1.5 * slowed.step_seconds


def test_every_lane_has_its_tasks() -> None:
    cost = StageCost(
        1, 2, 1, saved_bytes=3, offloaded_bytes=1, copy_out_seconds=0.1, copy_in_seconds=0.1,
        lanes_forward=(("tp", 0.5),), finish=(("dp", 1),),
    )  # fmt: skip
    timeline = run("zb-h1", 3, 1, 6, cost, send=0.1)
    drawn = [t for own in timeline.tasks for t in own]
    assert all(0 <= t.start <= t.end <= timeline.step_seconds for t in drawn)
    assert {t.name for t in drawn} >= {
        "0F0",
        "2I5",
        "2W5",
        "0SEND_F0",
        "2SEND_B5",
        "0 out 0",
        "0 in 0",
        "0F0 tp",
        "finish 1.0",
    }
    names = {t.lane for t in drawn}
    assert names == {"compute", "send 0", "send 1", "send 2", "copy-out", "copy-in", "tp", "dp"}

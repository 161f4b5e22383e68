"""Lanes and bytes of a replayed step as a page shows them: alike ranks once, long schedules in blocks, peaks kept."""

from __future__ import annotations

import pytest
from shardwright.cli.report import replaycharts as r
from shardwright.planner.schedules import actions, stage_rank
from shardwright.planner.simulate import Links, StageCost, Task, Timeline, simulate
from shardwright.planner.spans import COMPUTE, Span


def step(ranks: int, microbatches: int) -> Timeline:
    costs = [StageCost(1.0, 2.0, finish=(("compute", 0.5),))] * ranks
    links = Links((0.1,) * ranks, (0.1,) * ranks)
    return simulate(actions("1f1b", ranks, 1, microbatches), stage_rank("1f1b", ranks, 1), costs, links)


def test_short_schedules_are_drawn_task_by_task() -> None:
    line = step(4, 8)
    chart = r.timeline_chart(line.tasks, line.step_seconds, 16)
    assert not chart["merged"]
    assert len(chart["tasks"]) == sum(map(len, line.tasks))
    assert max(task[1] for task in chart["tasks"]) == pytest.approx(line.step_seconds, rel=1e-5)
    assert {"forward", "backward", "handing on", "end of the step"} == set(chart["kinds"])
    assert [row[1] for row in chart["waits"]] == ["16"] * 4
    assert chart["waits"][0][3] == r.percent_text(line.bubble[0])


def test_tasks_are_drawn_by_what_they_consist_of() -> None:
    line = step(2, 4)
    spans = [
        [
            Span(t.rank, lane, t.name, cause, t.start + a * t.seconds, t.start + b * t.seconds, t.stage, t.microbatch)
            for t in own if t.lane == COMPUTE
            for lane, cause, a, b in ((COMPUTE, "compute", 0.0, 0.6), ("tp", "activation_communication", 0.6, 1.0))
        ]
        for own in line.tasks
    ]  # fmt: skip
    chart = r.timeline_chart(line.tasks, line.step_seconds, 1, spans)
    assert chart["divided"]
    assert chart["rows"] == ["rank 0, compute", "rank 0, tp", "rank 1, compute", "rank 1, tp"]
    assert set(chart["kinds"]) == {"forward", "backward", "end of the step", "communication of activations"}
    assert len(chart["tasks"]) == sum(map(len, spans))
    whole = r.timeline_chart(line.tasks, line.step_seconds)
    assert not whole["divided"]
    assert whole["waits"] == chart["waits"]


def test_long_schedules_stay_small_and_keep_their_ends() -> None:
    line = step(24, 512)
    chart = r.timeline_chart(line.tasks, line.step_seconds)
    assert chart["merged"]
    assert 100 < len(chart["tasks"]) <= r.MOST_TASKS
    assert chart["left"] == 24 - r.MOST_RANKS
    assert max(task[1] for task in chart["tasks"]) == pytest.approx(line.step_seconds, rel=1e-5)
    assert "many, in turn" in chart["kinds"]
    shown = sum(task[4] for task in chart["tasks"] if task[2] == 0)
    assert shown == sum(task.lane == "compute" for task in line.tasks[0])


def test_ranks_that_do_the_same_share_rows() -> None:
    tasks = [[Task(rank, "compute", "0F0", 0.0, 1.0, 0, 0)] for rank in range(3)]
    chart = r.timeline_chart(tasks, 2.0, 8)
    assert chart["rows"] == ["ranks 0, 1, 2, compute"]
    assert chart["waits"] == [["ranks 0, 1, 2", "24", "1.00 s", "50.0 %"]]


def test_neighbours_of_one_kind_are_joined() -> None:
    blocks = [(0.0, 1.0, "F", 1), (1.0, 2.0, "F", 1), (2.5, 3.0, "F", 1), (3.0, 4.0, "B", 1)]
    assert r.joined(blocks) == [(0.0, 2.0, "F", 2), (2.5, 3.0, "F", 1), (3.0, 4.0, "B", 1)]


def test_curves_keep_their_peak() -> None:
    count = 5000
    values = [1.0] * count
    values[1234] = 9.0
    chart = r.memory_chart(
        [{"name": "every device", "seconds": list(range(count)), "causes": {"saved": values, "none": [0.0] * count}}],
        10,
    )
    (curve,) = chart["curves"]
    assert len(curve["seconds"]) == r.MOST_POINTS
    assert curve["peak"] == 1234
    assert [name for name, _ in curve["causes"]] == ["saved"]
    assert max(curve["causes"][0][1]) == 9

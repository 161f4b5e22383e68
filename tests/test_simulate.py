"""The event simulator against an independent replay, and its own linear paths."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise

import pytest
from shardwright.errors import UsageError
from shardwright.planner.engine import Compiled
from shardwright.planner.live import live_vectors
from shardwright.planner.paths import WORLD, makespan, rank_paths
from shardwright.planner.schedules import Action, actions, stage_rank
from shardwright.planner.simulate import Links, RankCost, StageCost, simulate
from simulations import compiled, even, random_case, random_durations, run, timed

# -- against an independent replay


def naive_step(made: Compiled, d: dict[str, list[float]]) -> float:
    """Ends by recursion on what each event waits for, written without the engine's arrays."""
    lists, placement, edges = made.lists, made.placement, made.edges
    where = {(a.kind, a.stage, a.microbatch): (r, i) for r, one in enumerate(lists) for i, a in enumerate(one)}
    part = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}
    queues: dict[tuple[int, int], list[Action]] = {}
    for r, one in enumerate(lists):
        for a in one:
            ends = edges if a.kind == "F" else [(t, s) for s, t in edges]
            for target in (t for s, t in ends if s == a.stage and a.kind != "W" and placement[t] != r):
                queues.setdefault((r, placement[target]), []).append(a)

    @cache
    def done(rank: int, i: int) -> float:
        a = lists[rank][i]
        start = done(rank, i - 1) if i else 0.0
        ends = edges if a.kind == "F" else [(t, s) for s, t in edges]
        for source in (s for s, t in ends if t == a.stage and a.kind != "W"):
            kind = "F" if a.kind == "F" else ("B" if ("B", source, a.microbatch) in where else "I")
            there, j = where[kind, source, a.microbatch]
            start = max(start, done(there, j) if there == rank else arrived((there, rank), lists[there][j]))
        return start + d[part[a.kind]][a.stage]

    @cache
    def arrived(queue: tuple[int, int], a: Action) -> float:
        i = queues[queue].index(a)
        before = arrived(queue, queues[queue][i - 1]) if i else 0.0
        send = d["send_forward" if a.kind == "F" else "send_backward"][a.stage]
        return max(before, done(*where[a.kind, a.stage, a.microbatch])) + send

    step = 0.0
    for r, one in enumerate(lists):
        at, stages = done(r, len(one) - 1), [s for s, q in enumerate(placement) if q == r]
        step = max(step, at + sum(d["finish"][s] for s in stages))
    return step


def test_times_are_those_of_an_independent_replay() -> None:
    draw = random.Random(0)
    for _ in range(200):
        name, ranks, chunks, m = random_case(draw)
        lists = compiled(name, ranks, chunks, m)
        d = random_durations(draw, lists.stages)
        assert timed(lists, d)[0] == pytest.approx(naive_step(lists, d), rel=1e-12)


# -- paths


def test_paths_are_exact_at_their_durations_and_bounds_at_all_others() -> None:
    draw = random.Random(1)
    for _ in range(120):
        name, ranks, chunks, m = random_case(draw)
        lists = compiled(name, ranks, chunks, m)
        d = random_durations(draw, lists.stages)
        seconds, path = timed(lists, d)
        assert path.seconds(d) == pytest.approx(seconds, rel=1e-9)
        rows = [path, *(p for _, p in rank_paths(lists, lists.placement, *vectors(d)))]
        for scale in (0.05, 0.5, 1.0):
            other = random_durations(draw, lists.stages)
            mixed = {k: [(1 - scale) * a + scale * b for a, b in zip(d[k], other[k], strict=True)] for k in d}
            found = timed(lists, mixed)[0]
            assert all(row.seconds(mixed) <= found * (1 + 1e-12) for row in rows)


def vectors(d: dict[str, list[float]]) -> tuple[list[float], ...]:
    return tuple(d[k] for k in ("forward", "backward", "weight", "send_forward", "send_backward", "finish"))


def test_rank_paths_end_with_their_ranks() -> None:
    draw = random.Random(2)
    for name in ("1f1b", "zb-h1"):
        lists = compiled(name, 4, 1, 6)
        d = random_durations(draw, 4)
        rows = rank_paths(lists, lists.placement, *vectors(d))
        assert len(rows) == 4
        assert max(seconds for seconds, _ in rows) == timed(lists, d)[0]
        assert all(path.seconds(d) == pytest.approx(seconds, rel=1e-9) for seconds, path in rows)


def test_simulated_path_is_a_chain_of_tasks() -> None:
    draw = random.Random(3)
    for _ in range(40):
        name, ranks, chunks, m = random_case(draw)
        lists = compiled(name, ranks, chunks, m)
        d = random_durations(draw, lists.stages)
        parts = zip(d["forward"], d["backward"], d["weight"], d["finish"], strict=True)
        costs = [StageCost(f, b, w, finish=(("compute", end),)) for f, b, w, end in parts]
        links = Links(tuple(d["send_forward"]), tuple(d["send_backward"]))
        timeline = simulate(lists, lists.placement, costs, links)
        assert (timeline.step_seconds, timeline.path_coefficients()) == timed(lists, d)
        chain = timeline.critical_path()
        assert chain[0].start == 0.0
        assert chain[-1].end == timeline.step_seconds
        assert all(a.end == b.start for a, b in pairwise(chain))


def test_a_path_through_copies_is_exact_and_marked() -> None:
    cost = StageCost(1, 2, 1, saved_bytes=4, offloaded_bytes=4, copy_out_seconds=3, copy_in_seconds=3)
    timeline = run("1f1b", 3, 1, 8, cost)
    path = timeline.path_coefficients()
    assert path.copies
    durations = {"forward": [1] * 3, "backward": [2] * 3, "copy_out": [3] * 3, "copy_in": [3] * 3}
    assert path.seconds(durations | {"send_forward": [0] * 3, "send_backward": [0] * 3}) == timeline.step_seconds


def test_lower_bound_rows_are_never_above_the_simulation() -> None:
    """LB3 (planners.md section 10) for 1F1B with uneven stages and sends of c."""
    draw = random.Random(4)
    for _ in range(500):
        p, m, c = draw.randint(1, 8), draw.randint(1, 20), draw.choice([0.0, 0.1, 0.5])
        f = [draw.uniform(0.6, 1.4) for _ in range(p)]
        b = [draw.uniform(1.2, 2.8) for _ in range(p)]
        lists = compiled("1f1b", p, 1, m)
        found = makespan(lists, lists.placement, f, b, [0.0] * p, [c] * p, [c] * p)[0]
        for r in range(p):
            kappa, before = min(m, p - r), sum(f[:r]) + sum(b[:r]) + 2 * c * r
            trip = sum(f[r:]) + sum(b[r + 1 :]) + 2 * c * (p - 1 - r)
            assert before + m * (f[r] + b[r]) + max(0.0, trip - kappa * f[r]) <= found + 1e-9
            assert before + ((m - 1) // kappa + 1) * (trip + b[r]) <= found + 1e-9


def test_one_rank_is_the_sum_of_its_work() -> None:
    assert even("none", 1, 1, 7, 1.5, 2.5, 1) == 28.0
    assert even("zbv", 1, 2, 3, 1, 2, 1) == 18.0


# -- finishes


def test_finishes_run_on_their_lanes_in_order() -> None:
    """Two chunks on one rank: their reductions queue on "dp", their optimizers wait for all computing."""
    both = [[Action("F", 0, 0), Action("F", 1, 0), Action("B", 1, 0), Action("B", 0, 0)]]
    costs = [
        StageCost(1, 2, finish=(("dp", 5), ("compute", 1), ("dp", 2))),
        StageCost(1, 2, finish=(("dp", 4), ("compute", 3))),
    ]
    timeline = simulate(both, (0, 0), costs, Links.free(2))
    spans = {t.name: (t.lane, t.start, t.end) for t in timeline.tasks[0] if t.microbatch < 0}
    assert spans == {
        "finish 1.0": ("dp", 4, 8), "finish 0.0": ("dp", 8, 13), "finish 1.1": ("compute", 8, 11),
        "finish 0.1": ("compute", 13, 14), "finish 0.2": ("dp", 14, 16),
    }  # fmt: skip
    path = timeline.path_coefficients()
    assert path.counts == {
        (0, "forward"): 1,
        (1, "forward"): 1,
        (1, "backward"): 1,
        (0, "finish"): 1,
        (1, "finish0"): 1,
    }


def test_world_entries_start_together() -> None:
    costs = [StageCost(1, 2, finish=(("dp", d), (WORLD, 0.5), ("compute", 1))) for d in (1, 9, 2)]
    timeline = simulate(actions("1f1b", 3, 1, 2), (0, 1, 2), costs, Links.free(3))
    starts = {t.start for tasks in timeline.tasks for t in tasks if t.lane == WORLD}
    reduced = max(t.end for tasks in timeline.tasks for t in tasks if t.lane == "dp")
    assert starts == {reduced}
    assert timeline.step_seconds == reduced + 1.5


# -- memory


CASES = [
    ("gpipe", 3, 1, 4),
    ("1f1b", 4, 1, 6),
    ("interleaved", 2, 3, 6),
    ("zb-h1", 3, 2, 6),
    ("zbv", 3, 2, 8),
    ("dualpipev", 3, 2, 9),
]


@pytest.mark.parametrize("case", CASES)
def test_memory_peaks_are_those_of_the_live_vectors(case: tuple[str, int, int, int]) -> None:
    draw = random.Random(5)
    lists, placement = actions(*case), stage_rank(*case[:3])
    for _ in range(10):
        saved = [float(draw.randint(2, 9)) for _ in placement]
        left = [draw.uniform(0, s) for s in saved]
        costs = [StageCost(draw.uniform(0.5, 2), 2, 1, s, w) for s, w in zip(saved, left, strict=True)]
        ranks = [RankCost(static_bytes=100 + r) for r in range(case[1])]
        timeline = simulate(lists, placement, costs, Links.free(len(placement)), ranks=ranks)
        vectors = live_vectors(lists, placement, two_part=True)
        for r, (curve, found) in enumerate(zip(timeline.memory, vectors, strict=True)):
            stages = [s for s, at in enumerate(placement) if at == r]
            weights = [saved[s] for s in stages] + [left[s] for s in stages]
            assert curve.peak_bytes == pytest.approx(
                100 + r + max(sum(map(float.__mul__, map(float, v), weights)) for v in found)
            )
            assert curve.bytes[-1] == pytest.approx(100 + r)
            assert min(curve.bytes) == pytest.approx(100 + r)
            assert list(curve.seconds) == sorted(curve.seconds)


def test_working_bytes_live_while_their_action_runs() -> None:
    cost = StageCost(
        1, 2, 1, saved_bytes=10, work_forward_bytes=3, work_backward_bytes=7, finish=(("compute", 1), ("dp", 1))
    )
    timeline = simulate(
        actions("1f1b", 2, 1, 3), (0, 1), [cost] * 2, Links.free(2), ranks=[RankCost(1, 2), RankCost(1, 90)]
    )
    assert [c.peak_bytes for c in timeline.memory] == [1 + 20 + 7, 91]
    assert timeline.memory[0].peak_seconds == 4.0
    assert timeline.memory[1].peak_seconds == 1 + 3 * 3


def test_copies_run_beside_compute_and_free_what_they_carry() -> None:
    """One rank, gpipe: out after each forward, back from when the rank takes up the action before the backward."""
    plain = StageCost(2, 2, saved_bytes=10)
    moved = StageCost(2, 2, saved_bytes=10, offloaded_bytes=8, copy_out_seconds=1, copy_in_seconds=1)
    kept, copied = (simulate(actions("gpipe", 1, 1, 5), (0,), [cost], Links.free(1)) for cost in (plain, moved))
    assert kept.step_seconds == copied.step_seconds == 20
    # While the last forward runs, the one before it is on its way out, the first on its way back, two are away.
    assert [c.memory[0].peak_bytes for c in (kept, copied)] == [50, 3 * 10 + 2 * 2]
    assert copied.memory[0].peak_seconds == 8
    spans = {t.name: (t.start, t.end) for t in copied.tasks[0] if t.lane != "compute"}
    outs = {f"0 out {i}": (2 * i + 2, 2 * i + 3) for i in range(5)}
    assert spans == outs | {f"0 in {i}": (2 * i + 8, 2 * i + 9) for i in range(5)}


def test_slow_copies_hold_the_backward_up() -> None:
    slow = StageCost(1, 1, saved_bytes=10, offloaded_bytes=8, copy_out_seconds=4, copy_in_seconds=4)
    timeline = simulate(actions("gpipe", 1, 1, 2), (0,), [slow], Links.free(1))
    assert timeline.step_seconds == 1 + 4 + 4 + 4 + 1
    assert timeline.path_coefficients().counts == {
        (0, "forward"): 1,
        (0, "copy_out"): 2,
        (0, "copy_in"): 1,
        (0, "backward"): 1,
    }


def test_a_microbatch_whose_backward_is_next_is_not_copied() -> None:
    cost = StageCost(1, 1, saved_bytes=10, offloaded_bytes=8, copy_out_seconds=1, copy_in_seconds=1)
    timeline = simulate(actions("1f1b", 2, 1, 4), (0, 1), [cost] * 2, Links.free(2))
    assert {t.lane for t in timeline.tasks[1]} == {"compute", "send 0"}
    assert "copy-out" in {t.lane for t in timeline.tasks[0]}


def test_costs_of_another_number_of_stages_are_refused() -> None:
    lists = actions("1f1b", 2, 1, 2)
    with pytest.raises(UsageError, match="2 stages"):
        simulate(lists, (0, 1), [StageCost(1, 2)] * 3, Links.free(2))
    with pytest.raises(UsageError, match="2 stages"):
        simulate(lists, (0, 1), [StageCost(1, 2)] * 2, Links.free(3))
    with pytest.raises(UsageError, match="2 stages"):
        makespan(lists, (0, 1), [1.0], [1.0], [1.0], [0.0], [0.0])

"""The event simulator against published formulas, an independent replay, and its own linear paths."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
from shardwright.errors import UsageError
from shardwright.planner.contention import Contention, Job, lane_kind, replay
from shardwright.planner.engine import Compiled, compile_lists
from shardwright.planner.live import live_vectors
from shardwright.planner.paths import WORLD, makespan, rank_paths
from shardwright.planner.schedules import SCHEDULES, Action, actions, fault, stage_rank
from shardwright.planner.simulate import Links, RankCost, StageCost, Timeline, simulate
from shardwright.planner.trace import trace_events

TRAINING = tuple(name for name in SCHEDULES if name not in ("none", "forward"))


def compiled(name: str, ranks: int, chunks: int, m: int) -> Compiled:
    return compile_lists(actions(name, ranks, chunks, m), stage_rank(name, ranks, chunks))


def even(name: str, ranks: int, chunks: int, m: int, f: float, b: float, w: float, send: float = 0.0) -> float:
    """Seconds of a step of equal stages."""
    n = ranks * chunks
    lists = compiled(name, ranks, chunks, m)
    return makespan(lists, lists.placement, [f] * n, [b] * n, [w] * n, [send] * n, [send] * n)[0]


def run(name: str, ranks: int, chunks: int, m: int, cost: StageCost, send: float = 0.0) -> Timeline:
    n = ranks * chunks
    links = Links((send,) * n, (send,) * n)
    return simulate(actions(name, ranks, chunks, m), stage_rank(name, ranks, chunks), [cost] * n, links)


# -- bubbles, as fractions of the ideal time m (F + B) of a rank; a chunk takes 1/v of a stage


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 4), (4, 8), (4, 16), (8, 32), (5, 5), (3, 20)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b(name: str, p: int, m: int) -> None:
    """(p - 1) / m: Huang et al. 2019, Narayanan et al. 2021 section 2.2."""
    assert even(name, p, 1, m, 1, 2, 1) / (3 * m) - 1 == pytest.approx((p - 1) / m)
    assert max(run(name, p, 1, m, StageCost(1, 2)).bubble) == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 4), (4, 2, 8), (4, 4, 16), (8, 2, 32), (8, 4, 16), (3, 3, 6)])
def test_bubble_of_interleaved(p: int, v: int, m: int) -> None:
    """(p - 1) / (v m), m a multiple of p: Narayanan et al. 2021 section 2.2."""
    assert even("interleaved", p, v, m, 1 / v, 2 / v, 1 / v) / (3 * m) - 1 == pytest.approx((p - 1) / (v * m))


@pytest.mark.parametrize(("m", "v", "gain"), [(32, 2, 0.099), (16, 2, 0.179), (16, 4, 0.296)])
def test_megatron_gain_of_interleaving(m: int, v: int, gain: float) -> None:
    """p = 8: the "10+ %" of Narayanan et al. 2021."""
    plain, interleaved = even("1f1b", 8, 1, m, 1, 2, 1), even("interleaved", 8, v, m, 1 / v, 2 / v, 1 / v)
    assert plain / interleaved - 1 == pytest.approx(gain, abs=0.0006)


def test_sends_make_fewer_chunks_the_best() -> None:
    """Interleaving sends v times as much (Narayanan et al. 2021, section 2.2), so the best v falls as sends take longer."""
    best = []
    for c in (0, 0.1, 0.3):
        steps = {v: even("interleaved", 8, v, 32, 1 / v, 2 / v, 1 / v, c) for v in (2, 4, 8)}
        best.append(min(steps, key=lambda v: steps[v]))
    assert best == [8, 4, 2]


@pytest.mark.parametrize(("p", "m"), [(2, 8), (4, 12), (8, 24)])
@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (1, 1.2, 0.8), (1, 1.5, 1), (2, 2.5, 1.5)])
def test_bubble_of_zb_h1(p: int, m: int, f: float, i: float, w: float) -> None:
    """(p - 1)(F + I - W) against (p - 1)(F + I + W) of 1F1B: Qi et al. 2023, table 2 (their B is I). A third where equal."""
    ideal = m * (f + i + w)
    assert even("1f1b", p, 1, m, f, i + w, w) - ideal == pytest.approx((p - 1) * (f + i + w))
    assert even("zb-h1", p, 1, m, f, i + w, w) - ideal == pytest.approx((p - 1) * (f + i - w))


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 20)])
def test_zbv_leaves_no_bubble(p: int, m: int) -> None:
    """F = I = W: no rank waits between its first and its last action (Qi et al. 2023, section 6).

    Ranks start one half-stage forward after each other: that is all the step loses, a sixth of what 1F1B does.
    """
    timeline = run("zbv", p, 2, m, StageCost(1, 2, 1))
    assert timeline.step_seconds == 6 * m + (p - 1)
    for tasks in timeline.tasks:
        computed = [t for t in tasks if t.lane == "compute"]
        assert computed[-1].end - computed[0].start == pytest.approx(6 * m)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 20), (8, 16)])
@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (1, 1.2, 0.8), (1, 1.4, 1)])
def test_bubble_of_dual_pipe_v(p: int, m: int, f: float, i: float, w: float) -> None:
    """At most (p - 1)(F&B + B - 3W) with F&B = F + B, of half-stages: the table of DeepSeek's DualPipe repository."""
    bubble = even("dualpipev", p, 2, m, f, i + w, w) - 2 * m * (f + i + w)
    assert 0 <= bubble <= (p - 1) * (f + 2 * (i + w) - 3 * w) + 1e-9


def test_forward_only_fills_and_drains() -> None:
    assert even("forward", 4, 1, 10, 1, 0, 0) == 13
    timeline = run("forward", 4, 1, 10, StageCost(1, saved_bytes=5, work_forward_bytes=3))
    assert [c.peak_bytes for c in timeline.memory] == [3] * 4


# -- against an independent replay


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


def naive_step(lists: Sequence[Sequence[Action]], placement: Sequence[int], d: dict[str, list[float]]) -> float:
    """Ends by recursion on what each event waits for, written without the engine's arrays."""
    where = {(a.kind, a.stage, a.microbatch): (r, i) for r, one in enumerate(lists) for i, a in enumerate(one)}
    part = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}
    queues: dict[tuple[int, int], list[Action]] = {}
    for r, one in enumerate(lists):
        for a in one:
            target = a.stage + (1 if a.kind == "F" else -1)
            if a.kind != "W" and 0 <= target < len(placement) and placement[target] != r:
                queues.setdefault((r, placement[target]), []).append(a)

    @cache
    def done(rank: int, i: int) -> float:
        a = lists[rank][i]
        start = done(rank, i - 1) if i else 0.0
        source = a.stage + (-1 if a.kind == "F" else 1)
        if a.kind != "W" and 0 <= source < len(placement):
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
        assert timed(lists, d)[0] == pytest.approx(naive_step(lists.lists, lists.placement, d), rel=1e-12)


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


# -- contention and trace

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


def test_the_trace_is_json_with_every_task_and_the_memory() -> None:
    cost = StageCost(
        1, 2, 1, saved_bytes=3, offloaded_bytes=1, copy_out_seconds=0.1, copy_in_seconds=0.1,
        lanes_forward=(("tp", 0.5),), finish=(("dp", 1),),
    )  # fmt: skip
    timeline = run("zb-h1", 3, 1, 6, cost, send=0.1)
    events = json.loads(json.dumps(trace_events(timeline)))["traceEvents"]
    drawn = [e for e in events if e["ph"] == "X"]
    assert len(drawn) == sum(map(len, timeline.tasks))
    assert all(e["ts"] >= 0 and e["dur"] >= 0 and isinstance(e["tid"], int) for e in drawn)
    assert {e["name"] for e in drawn} >= {
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
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {"compute", "send 0", "send 1", "send 2", "copy-out", "copy-in", "tp", "dp"}
    peak = max(e["args"]["bytes"] for e in events if e["ph"] == "C" and e["pid"] == 0)
    assert peak == timeline.memory[0].peak_bytes


def test_costs_of_another_number_of_stages_are_refused() -> None:
    lists = actions("1f1b", 2, 1, 2)
    with pytest.raises(UsageError, match="2 stages"):
        simulate(lists, (0, 1), [StageCost(1, 2)] * 3, Links.free(2))
    with pytest.raises(UsageError, match="2 stages"):
        simulate(lists, (0, 1), [StageCost(1, 2)] * 2, Links.free(3))
    with pytest.raises(UsageError, match="2 stages"):
        makespan(lists, (0, 1), [1.0], [1.0], [1.0], [0.0], [0.0])

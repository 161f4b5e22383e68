"""Bubbles of the schedules against published formulas, as fractions of the ideal time m (F + B) of a rank."""

from __future__ import annotations

import pytest
from shardwright.planner.simulate import StageCost
from simulations import even, run

# Of interleaved schedules a chunk takes 1/v of a stage.


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

"""benchmarks/local_truth.py: what it counts, without running a plan."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import local_truth
from local_truth import CASES, Case, Outcome, compared, held, own_cores, spearman, summary


def outcome(predicted: float, measured: float) -> Outcome:
    return Outcome(f"{predicted}", predicted, measured, predicted_bytes=105, measured_bytes=100)


def test_rank_correlation() -> None:
    assert spearman([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == 1.0
    assert spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == -1.0
    assert spearman([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]) == pytest.approx(0.8)


def test_refused_plans_have_no_figures() -> None:
    refused = Outcome("x", refused="not supported by the runtime: recompute")
    found = summary([outcome(1.1, 1.0), outcome(1.9, 2.0), outcome(3.3, 3.0), refused])
    assert found["plans"] == 3
    assert found["median"] == pytest.approx(0.1)
    assert found["worst"] == pytest.approx(0.1)
    assert found["memory"] == pytest.approx(0.05)
    assert held(found)
    assert not held({**found, "worst": 0.3})
    assert "not supported" in local_truth.line(refused)


def test_waiting_is_taken_off_and_calm_steps_count() -> None:
    predicted = SimpleNamespace(step_seconds=1.0, peak_bytes_per_device=110, seconds={"compute": 1.0})
    ranks = [
        {"seconds": [1.5, 1.2, 4.0, 5.0], "waited_seconds": [0.4, 0.1, 2.0, 3.5]},
        {"seconds": [1.4, 1.3, 4.1, 4.0], "waited_seconds": [0.1, 0.2, 2.5, 2.0]},
    ]
    found = compared(
        Case("gpt2", {}, 8, 128, 2, "tp=2"), SimpleNamespace(predicted=predicted),  # type: ignore[arg-type]
        {"ranks": ranks, "peak_bytes": [90, 100], "load": 1.0},
    )  # fmt: skip
    assert found.measured == pytest.approx(1.1)  # of steps 0 and 1: the slowest rank less the longest wait
    assert found.error == pytest.approx(1.0 / 1.1 - 1.0)
    assert found.wall == pytest.approx(2.8)
    assert found.memory_error == pytest.approx(0.1)


def test_the_plans_are_enough_and_of_every_kind() -> None:
    run = [c for c in CASES if "recompute" not in c.pins and "offload" not in c.pins]
    assert len(run) >= 12
    assert len({c.family for c in run}) >= 3
    assert {c.ranks for c in run} == {1, 2}
    text = " ".join(c.pins for c in run)
    for pin in ("zero=0", "zero=1", "zero=2", "zero=3", "tp=2", "sequence_parallel=on", "micro_batch"):
        assert pin in text


def test_ranks_have_a_core_each() -> None:
    import os

    before = os.sched_getaffinity(0)
    with own_cores(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before

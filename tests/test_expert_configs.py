"""Forty published configurations given as pins: each has a price, and no free plan is slower than it beyond its proven gap.

`data/published_runs.jsonl` holds what those runs state, with their sources, one distinct (model, cluster, batch) a line. The
same as a table: `python benchmarks/expert_configs.py --runs tests/data/published_runs.jsonl`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
if str(HERE.parent / "benchmarks") not in sys.path:
    sys.path.append(str(HERE.parent / "benchmarks"))

import expert_configs  # noqa: E402
import run_jobs  # noqa: E402
from published_runs import read_runs  # noqa: E402

QUESTIONS = expert_configs.pick(expert_configs.cases(read_runs(HERE / "data" / "published_runs.jsonl")), None)
ALWAYS = (
    "vtrain-single-0000-tp1dp1pp2-mb8", "vtrain-single-0084-tp1dp2pp1-mb8", "vtrain-single-0928-tp1dp1pp2-mb1",
    "vtrain-single-0762-tp1dp1pp4-mb4", "vtrain-single-0712-tp1dp1pp2-mb1", "mosaic-a100_80gb-132-125m-s16384-g8",
)  # fmt: skip
"""Questions of every run: of several sets, and quick."""


def parameters() -> Iterator[object]:
    for case in sorted(QUESTIONS, key=lambda c: not set(ALWAYS).intersection(run.id for run in c.rows)):
        name = case.rows[0].id
        yield pytest.param(case, id=name, marks=() if name in ALWAYS else pytest.mark.nightly)


@pytest.fixture(scope="module")
def jobs() -> run_jobs.Jobs:
    return run_jobs.Jobs()


@pytest.mark.parametrize("case", parameters())
def test_a_free_plan_is_no_slower_than_an_experts(case: expert_configs.Case, jobs: run_jobs.Jobs) -> None:
    for found in expert_configs.priced(case, jobs):
        assert found.status in ("priced", "over memory"), f"{' '.join(found.pins)}: {found.error}"
        assert found.pinned_seconds > 0
        assert found.status == "over memory" or found.within, (
            f"{found.ratio:.4f} with a gap of {found.gap:.3%}: {' '.join(found.pins)}"
        )


def test_the_questions() -> None:
    """Forty, all different, of every set that is described well enough to be priced."""
    assert len(QUESTIONS) == 40
    assert len({case.rows[0].case for case in QUESTIONS}) == 40
    assert len({case.set for case in QUESTIONS}) == 10
    assert all(case.rows[0].devices > 1 for case in QUESTIONS)
    assert {case.rows[0].id for case in QUESTIONS}.issuperset(ALWAYS)

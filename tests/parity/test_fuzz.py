"""Random feasible plans over all dimensions and families: parity with the eager modules, and every prediction against the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import draw, faults
from pool import Pool
from running import observe
from shardwright.planner.planfile import save_plan

SAMPLE = (
    35, 36, 42, 46, 48, 58, 68, 73, 76, 87, 92, 101, 114, 116, 125, 132, 148, 149, 150, 151,
    155, 156, 158, 159, 162, 163, 165, 166, 168, 174, 204, 211, 213, 225, 232, 242, 259, 272, 273, 299,
)  # fmt: skip
"""Quick ones, with every family and every value of every dimension at least twice."""
NIGHTLY = tuple(seed for seed in range(301) if seed not in SAMPLE)


def check(seed: int, pools: dict[int, Pool], folder: Path) -> None:
    drawn = draw(seed)
    save_plan(drawn.plan, folder / "plan.json")
    try:
        wrong = faults(drawn, pools[drawn.world].run(observe, drawn.name, drawn.plan))
    except AssertionError as error:
        wrong = [str(error)]
    if wrong:
        pytest.fail(f"{drawn}: {folder / 'plan.json'}:\n" + "\n".join(wrong))


@pytest.mark.parametrize("seed", SAMPLE)
def test_sample(seed: int, pools: dict[int, Pool], tmp_path: Path) -> None:
    check(seed, pools, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", NIGHTLY)
def test_many(seed: int, pools: dict[int, Pool], tmp_path: Path) -> None:
    check(seed, pools, tmp_path)

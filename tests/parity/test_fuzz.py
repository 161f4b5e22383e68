"""Random feasible plans over all dimensions and families: parity with the eager modules, and every prediction against the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import draw, faults
from pool import Pool
from running import observe
from shardwright.planner.planfile import save_plan

SAMPLE = (*range(38), 114, 155)
NIGHTLY = tuple(seed for seed in range(300) if seed not in SAMPLE)


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

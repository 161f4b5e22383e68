"""Random feasible plans over all dimensions and families at parity with the eager modules: loss, gradients, three steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import draw
from pool import Pool
from running import differences
from shardwright.planner.planfile import save_plan

SAMPLE = range(6)
NIGHTLY = (*range(6, 16), *range(100, 390))


def check(seed: int, pools: dict[int, Pool], folder: Path) -> None:
    drawn = draw(seed)
    found = pools[drawn.world].run(differences, drawn.name, drawn.plan)
    wrong = [d for d in found[0] if not d["ok"]]
    if wrong or any(answer != found[0] for answer in found):
        save_plan(drawn.plan, folder / "plan.json")
        pytest.fail(
            f"seed {seed}: {drawn.name} on {drawn.world} ranks, {drawn.pins}: {folder / 'plan.json'}: {wrong[:3]}"
        )


@pytest.mark.parametrize("seed", SAMPLE)
def test_sample(seed: int, pools: dict[int, Pool], tmp_path: Path) -> None:
    check(seed, pools, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", NIGHTLY)
def test_many(seed: int, pools: dict[int, Pool], tmp_path: Path) -> None:
    check(seed, pools, tmp_path)

"""Padding removal on ranks that share a batch: each packs the rows of its own samples."""

from __future__ import annotations

import pytest
from pool import Pool
from running import differences, plan_of


@pytest.mark.parametrize("pins", ["dp=2", "dp=2 zero=3 micro_batch=2"])
def test_every_rank_packs_its_own_rows(pins: str, pools: dict[int, Pool]) -> None:
    plan = plan_of("bert-classify", f"{pins} passes=padding", 2)
    assert [one.name for one in plan.passes] == ["padding"]
    assert plan.semantics == "VALID"
    found = pools[2].run(differences, "bert-classify", plan)
    assert [d for d in found[0] if not d["ok"]] == []
    assert {d["kind"] for d in found[0]} >= {"loss", "gradient", "parameter after 3 steps"}

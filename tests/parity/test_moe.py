"""Mixture-of-experts models at parity with their eager loops: experts split as a whole, and in width."""

from __future__ import annotations

import pytest
from pool import Pool
from running import differences, plan_of

CASES = [("mixtral", "tp=2", "e"), ("gpt-oss", "tp=2", "f")]
"""(case, pins, what the experts split on)"""


@pytest.mark.parametrize(("name", "pins", "factor"), CASES)
def test_experts(name: str, pins: str, factor: str, ranks2: Pool) -> None:
    plan = plan_of(name, pins, 2)
    chosen = [op.choice for region in plan.regions for op in region.ops if op.target == "shardwright.experts"]
    assert chosen
    assert all(choice == (factor,) for choice in chosen)
    found = ranks2.run(differences, name, plan)[0]
    assert [d for d in found if not d["ok"]] == []
    assert {d["kind"] for d in found} == {"loss", "gradient", "parameter after 3 steps"}

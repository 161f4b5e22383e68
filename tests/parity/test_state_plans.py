"""Checkpoints of plans with stages, and of plans whose states lie off the device: resumed, and loaded under other plans."""

from __future__ import annotations

from pathlib import Path

import pytest
from offloading import offloaded
from pool import Pool
from running import plan_of
from shardwright.planner.plan import Plan
from test_state import loaded_under, saved_under, trained

STAGES = "pp=2 tp=1 cp=1 schedule=1f1b micro_batch=2 recompute=none offload=none"


def staged(name: str) -> Plan:
    return plan_of(name, STAGES, 2, device="a100-sxm-80gb", runnable=False)


@pytest.mark.parametrize("kind", ["stages", "host"])
def test_a_resumed_run_goes_on_bit_for_bit(kind: str, ranks2: Pool, tmp_path: Path) -> None:
    """What the device keeps a copy of is brought up to date by a load."""
    plan = staged("gpt2") if kind == "stages" else offloaded("gpt2", "offload=optimizer zero=3 dp=2", 2)
    wanted = ranks2.run(trained, "gpt2", plan, str(tmp_path / "a"), 4, 9, False)[0]
    first = ranks2.run(trained, "gpt2", plan, str(tmp_path / "b"), 2, 2, False)[0]
    then = ranks2.run(trained, "gpt2", plan, str(tmp_path / "b"), 4, 9, False)[0]
    assert first + then == wanted
    assert len(set(wanted)) == 4


def test_a_pipelines_checkpoint_is_loaded_without_stages(ranks2: Pool, tmp_path: Path) -> None:
    folder = str(tmp_path / "c")
    found = ranks2.run(saved_under, "llama", staged("llama"), folder, "adamw")
    wanted = ranks2.run(loaded_under, "llama", plan_of("llama", "dp=2 zero=1", 2), folder, "adamw")
    held = found[0][0] | found[1][0]
    assert held.keys() == wanted[0][0].keys()
    assert all(bool((held[name] == wanted[0][0][name]).all()) for name in held)
    assert found[0][1] == pytest.approx(wanted[0][1], abs=1e-11)

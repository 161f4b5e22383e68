"""`explain PLAN [REGION]`: the figures of a region's other choices are those of the plan edited that way, and of fresh plans."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from shardwright.api import plan_model
from shardwright.cli.edited import captured
from shardwright.cli.main import main
from shardwright.cli.reasons import details, reasons
from shardwright.errors import Infeasible
from shardwright.planner.alternatives import JointWays, with_entry
from shardwright.planner.plainways import PlainWays
from shardwright.planner.plan import Plan
from shardwright.planner.planfile import dump_plan, parse_plan, save_plan
from shardwright.planner.repricing import reprice
from solver_outlines import FakePrices, transformer
from test_region import cluster, plan_of

GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 1024,
    "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 6, "hidden_size": 512,
    "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048,
    "max_position_embeddings": 512,
}  # fmt: skip
ASKED: dict[str, tuple[dict[str, Any], str, int, tuple[str, ...]]] = {
    "gpt2": (GPT2, "h100-sxm:8", 32, ("pp=2", "tp=2")),
    "llama": (LLAMA, "a100-sxm-40gb:4", 64, ("dp=2", "tp=2", "pp=1", "micro_batch=8")),
    "counted op by op": (GPT2, "cpu:2", 4, ("pp=2", "micro_batch=1")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explain")


@cache
def planned(folder: Path, name: str, *more: str) -> Plan:
    config, where, batch, pins = ASKED[name]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return plan_model(f"hf:{path}", where, batch=batch, pins=[*pins, *more]).plan


def told(plan: Plan, folder: Path, *words: str) -> Result:
    save_plan(plan, folder / "plan.json")
    return CliRunner().invoke(main, ["explain", str(folder / "plan.json"), *words])


@pytest.mark.parametrize("name", list(ASKED))
def test_every_choice_costs_what_the_plan_edited_that_way_costs(folder: Path, name: str) -> None:
    plan = planned(folder, name)
    given = captured(plan, lambda text: None)
    made = JointWays(plan, *given)
    shown = json.loads(told(plan, folder, "--json").stdout)["regions"]
    assert [each["region"] for each in shown] == [entry.name for entry in plan.regions]
    seen = set()
    for entry, each in zip(plan.regions, shown, strict=True):
        found = made.of(entry)
        assert found.step_seconds == plan.predicted.step_seconds
        assert len(each["alternatives"]) == len(found.ways) > 0
        for way, row in list(zip(found.ways, each["alternatives"], strict=True))[:12]:
            seen |= {*way.changes}
            assert (row["step_seconds"], row["peak_bytes_per_device"]) == (way.step_seconds, way.peak_bytes)
            edited = parse_plan(dump_plan(with_entry(plan, way.entry)))
            try:
                priced = reprice(edited, *given).predicted
            except Infeasible:
                assert not way.fits
                continue
            assert way.fits
            assert (priced.step_seconds, priced.peak_bytes_per_device) == (way.step_seconds, way.peak_bytes)
    shared = any(axis.role == "data" and axis.size > 1 for axis in plan.mesh)
    assert seen >= ({"recompute", "zero"} if shared else {"recompute"})


def test_a_choice_costs_what_a_fresh_plan_with_that_pin_costs(folder: Path) -> None:
    rest = ("zero=1", "offload=none")
    plan, fresh = planned(folder, "llama", *rest), planned(folder, "llama", *rest, "recompute=full")
    layers = max(plan.regions, key=lambda entry: entry.repeats)
    assert not layers.recompute
    shown = json.loads(told(plan, folder, layers.name, "--json").stdout)["regions"][0]
    full = [a for a in shown["alternatives"] if a["changes"] == {"recompute": {"from": "none", "to": "full"}}]
    assert [a["step_seconds"] for a in full] == [fresh.predicted.step_seconds]
    assert [a["peak_bytes_per_device"] for a in full] == [fresh.predicted.peak_bytes_per_device]
    assert shown["seconds"]["compute"] > 0


def test_what_goes_against_a_pin_says_so(folder: Path) -> None:
    plan = planned(folder, "llama", "zero=1", "offload=none")
    shown = json.loads(told(plan, folder, "--json").stdout)["regions"]
    levels = [a for each in shown for a in each["alternatives"] if "zero" in a["changes"]]
    assert levels
    assert all("zero=1" in a["against"] for a in levels)
    assert not any(a["against"] for each in shown for a in each["alternatives"] if [*a["changes"]] == ["recompute"])


def test_a_choice_that_the_limit_bars_is_what_binds(folder: Path) -> None:
    full = planned(folder, "llama", "zero=1", "offload=none", "recompute=full")
    pinned = msgspec.structs.replace(full, pins=tuple(p for p in full.pins if not p.startswith("recompute")))
    tight = msgspec.structs.replace(pinned, memory_limit_bytes=full.predicted.peak_bytes_per_device + 2**20)
    layers = max(tight.regions, key=lambda entry: entry.repeats)
    found = JointWays(tight, *captured(tight, lambda text: None)).of(layers)
    kept = [way for way in found.ways if way.changes == {"recompute": ("full", "none")}]
    assert [(way.fits, way.step_seconds < found.step_seconds) for way in kept] == [(False, True)]
    sentence = reasons(tight, found)
    assert "Memory binds it" in sentence
    assert "above the limit" in sentence
    assert any(line.startswith("Nothing run again: a step") and "does not fit" in line for line in details(found))


def test_sentences_of_one_region_are_of_that_region(folder: Path) -> None:
    plan = planned(folder, "gpt2")
    done = told(plan, folder, "r1")
    assert done.exit_code == 0, done.output
    assert "Region r1 (transformer.h.0 and 3 like it)" in done.stdout
    assert "Region r0" not in done.stdout
    assert "Attention run again (selective): a step" in done.stdout
    assert "Next best:" in done.stdout


def test_an_unknown_region_is_refused_with_those_there_are(folder: Path) -> None:
    plan = planned(folder, "gpt2")
    for words, message in (
        (("r9",), "its regions are r0, r1, r2"),
        (("r1", "--why-not", "tp=1"), "leave out the region"),
    ):
        done = told(plan, folder, *words)
        assert done.exit_code == 2
        assert message in done.output


def test_without_its_model_a_plan_says_what_it_knows(folder: Path) -> None:
    plan = planned(folder, "gpt2")
    live = msgspec.structs.replace(plan, source=msgspec.structs.replace(plan.source, kind="module", config=None))
    done = told(live, folder)
    assert done.exit_code == 0, done.output
    assert "is not known without the plan's model" in done.stdout
    assert told(live, folder, "r1").exit_code == 2


def test_one_plain_stage_has_its_levels_and_layouts_priced() -> None:
    outline = transformer(layers=3, batch=8)
    given = (outline, cluster(4), FakePrices())
    plan = plan_of(4, ("dp=2", "tp=2", "zero=0"), outline=outline)
    made, seen = PlainWays(plan, *given), set()
    for entry in plan.regions:
        found = made.of(entry)
        assert not found.seconds
        for way in found.ways:
            seen |= {*way.changes}
            priced = reprice(with_entry(plan, way.entry), *given).predicted
            assert (priced.step_seconds, priced.peak_bytes_per_device) == (way.step_seconds, way.peak_bytes)
            assert way.against or "zero" not in way.changes
    assert {"zero"} <= seen

"""`simulate --largest` and `check --modules`: the largest size that fits, and what each module keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from click.testing import CliRunner, Result
from shardwright.again import asked_again
from shardwright.api import plan_model
from shardwright.cli.largest import FINE, search
from shardwright.cli.main import main
from shardwright.errors import Infeasible
from shardwright.passes.capture import capture
from shardwright.passes.summarize import summarize
from shardwright.planner.bymodule import by_module
from shardwright.planner.planfile import load_plan, save_plan
from torch import nn

TOY = f"{Path(__file__).parent / 'toy.py'}:build"
BATCH = 16


def ask(*words: str) -> Result:
    return CliRunner().invoke(main, words)


@pytest.mark.parametrize("start", [1, 3, 64, 1000])
@pytest.mark.parametrize("most", [0, 1, 5, 63, 64, 65, 777, 100_000])
def test_the_search_ends_next_to_what_does_not_fit(start: int, most: int) -> None:
    rows = search(start, lambda size: {"size": size} | ({} if size <= most else {"why": "too large"}))
    sizes = [row["size"] for row in rows]
    fits, fails = [s for s in sizes if s <= most], [s for s in sizes if s > most]
    assert len(set(sizes)) == len(sizes)
    assert len(sizes) < 40
    low = max(fits, default=0)
    assert min(fails) - low <= max(1, low / FINE)


def test_the_search_gives_up_where_all_fits() -> None:
    rows = search(1, lambda size: {"size": size})
    assert rows[-1]["size"] == 2**20


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan under a limit that a larger microbatch breaks."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    pins = ["dp=2", "zero=0", "recompute=none", "offload=none"]
    own = plan_model(TOY, "cpu:2", batch=BATCH, pins=pins).plan.predicted.peak_bytes_per_device
    save_plan(plan_model(TOY, "cpu:2", batch=BATCH, memory_limit=own + 2**17, pins=pins).plan, path)
    return path


def test_the_largest_microbatch_has_a_plan_and_the_next_has_none(plan_file: Path) -> None:
    done = ask("simulate", str(plan_file), "--largest", "micro_batch", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    plan, most = load_plan(plan_file), found["largest"]
    fails = next(row for row in found["points"] if "why" in row)
    assert "nothing fits" in fails["why"]
    assert most < fails["size"]

    def at(row: dict[str, Any]) -> int:
        return asked_again(plan, row["changes"]).predicted.peak_bytes_per_device

    best = next(row for row in found["points"] if row["size"] == most)
    assert best["changes"] == {
        "batch": str(most * plan.source.batch // plan.pipeline.micro_batch), "micro_batch": str(most)
    }  # fmt: skip
    assert at(best) == best["peak_bytes_per_device"] <= plan.memory_limit_bytes
    with pytest.raises(Infeasible):
        at(fails)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--largest", "seq"), "no sequence length"),
        (("--largest", "seq", "--sweep", "tp=1"), "goes alone"),
        (("--largest", "tp"), "is not one of"),
    ],
)
def test_what_cannot_grow_is_refused(plan_file: Path, words: tuple[str, ...], message: str) -> None:
    done = ask("simulate", str(plan_file), *words)
    assert (done.exit_code, message in done.output) == (2, True), done.output


class Blocks(nn.Module):
    """Six equal blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(6))
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x).tanh()
        return nn.functional.cross_entropy(self.head(x), target)


def eager_bytes(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """What autograd keeps, each piece of memory once; parameters, inputs and scalars aside."""
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *inputs.values())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in there and tensor.numel() > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(**inputs)
        total = sum(t.untyped_storage().nbytes() for t in kept.values())
    loss.backward()
    return total


def test_modules_hold_what_eager_keeps() -> None:
    model, inputs = Blocks(), {"x": torch.randn(8, 16), "target": torch.randint(0, 8, (8,))}
    rows = {m.name: m for m in by_module(summarize(capture(model, (), inputs)).outline)}
    assert rows["blocks.*.0"].count == 6
    assert rows["blocks.*.0"].parameters == 6 * (16 * 32 + 32)
    assert rows["blocks.*.1"].saved_bytes == 6 * 8 * 32 * 4  # GELU keeps its input
    assert sum(m.parameters for m in rows.values()) == sum(p.numel() for p in model.parameters())
    assert sum(m.saved_bytes for m in rows.values()) == pytest.approx(eager_bytes(model, inputs), abs=64)


def test_modules_are_shown() -> None:
    done = ask("check", TOY, "--modules", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["modules"]
    assert {row["name"] for row in rows} >= {"up", "down"}
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in toy.Toy().parameters())
    shown = ask("check", TOY, "--modules").stdout
    assert "of kept" in shown
    assert ask("check", TOY, "--modules", "--passes").exit_code == 2

"""The examples do what they say, on tiny sizes: those for several ranks on two gloo ranks. Nightly under torchrun, as shown."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import shardwright
import torch
from pool import Pool

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def started(name: str, folder: str, arguments: list[str]) -> str:
    """Rank function: what an example prints that is started so in a folder."""
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), mock.patch.object(sys, "argv", [name, *arguments]):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return said.getvalue()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def losses(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss (\d+\.\d+)", text)]


def test_the_training_loop(ranks2: Pool, tmp_path: Path) -> None:
    """Under a plan for two ranks, all print the losses of an ordinary loop."""
    source: dict[str, Any] = runpy.run_path(str(EXAMPLES / "train.py"), run_name="train")
    torch.manual_seed(0)
    model = source["Classifier"]()
    batch = {"x": torch.randn(32, 64), "target": torch.randint(0, 10, (32,))}
    plan = shardwright.make_plan(model, batch, "cpu:2")
    shardwright.save_plan(plan, tmp_path / "plan.json")

    found = ranks2.run(started, "train.py", str(tmp_path), ["--steps", "7", "--plan", "plan.json"])

    optimizer, wanted = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(7):
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    for text in found:
        assert losses(text) == pytest.approx([wanted[i] for i in (0, 5, 6)], abs=2e-4)


def test_adapters_are_trained_and_saved(ranks2: Pool, config: Path) -> None:
    from safetensors.torch import load_file

    given = [
        "--config",
        "config.json",
        "--steps",
        "3",
        "--batch",
        "4",
        "--seq",
        "16",
        "--rank",
        "2",
        "--cluster",
        "cpu:2",
    ]
    first, second = ranks2.run(started, "finetune.py", str(config), [*given, "--memory-limit", "40MiB"])
    found = losses(first)
    assert len(found) == 3
    assert found[-1] < found[0]
    assert "of 40 MiB" in first
    assert second == ""
    saved = load_file(config / "trained.safetensors")
    assert len(saved) == 2 * 7 * TINY["num_hidden_layers"]  # type: ignore[operator]
    assert all("lora_" in name for name in saved)
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_b" in name)


def test_a_cluster_is_planned_for_and_exported(config: Path) -> None:
    given = ["--model", "hf:config.json", "--cluster", "h100-sxm:2", "--batch", "8", "--seq", "32", "--pin", "tp=2"]
    text = started("plan_cluster.py", str(config), given)
    best, pinned = (float(found) for found in re.findall(r"^(?:best|tp=2) +(\S+) s a step", text, re.MULTILINE))
    plan = shardwright.load_plan(config / "plan.json")
    assert best == pytest.approx(plan.predicted.step_seconds, rel=1e-2)
    assert best <= pinned
    assert "--num-layers=2" in (config / "megatron.args").read_text()


def _shown(name: str) -> list[str]:
    """The commands in the docstring of an example."""
    text = (EXAMPLES / name).read_text(encoding="utf-8").split('"""')[1]
    return re.findall(r"^((?:python|torchrun) .*?)(?:  .*)?$", text, re.MULTILINE)


@pytest.mark.nightly
@pytest.mark.parametrize("line", [line for path in sorted(EXAMPLES.glob("*.py")) for line in _shown(path.name)])
def test_as_shown(line: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(line)
    start = ["-m", "torch.distributed.run"] if program == "torchrun" else []
    words = [str(EXAMPLES / Path(w).name) if w.startswith("examples/") else w for w in arguments]
    done = subprocess.run([sys.executable, *start, *words], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout


def test_every_example_is_tested_and_says_how_it_is_run() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in tests, path.name
        assert _shown(path.name), path.name

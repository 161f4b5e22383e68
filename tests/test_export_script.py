"""Exported programs run under torchrun, and have the loss and gradients of the original model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from exported import plan
from shardwright.cli.exports.base import export
from shardwright.cli.exports.facts import facts_of
from shardwright.cli.exports.read import TARGETS
from shardwright.errors import UsageError
from test_watch import free_port

CASES = {
    "zero 3, recompute": ("llama", "cpu:2", "dp=2", "zero=3", "recompute=full", "micro_batch=2"),
    "zero 0": ("gpt2", "cpu:2", "dp=2", "zero=0", "micro_batch=2"),
    "zero 2": ("gpt2", "cpu:2", "dp=2", "zero=2", "micro_batch=2", "recompute=full"),
    "tensor": ("llama", "cpu:2", "tp=2", "sequence_parallel=off"),
    "tensor and positions": ("llama", "cpu:2", "tp=2", "sequence_parallel=on"),
    "a function": ("network", "cpu:4", "tp=2", "dp=2", "zero=3", "sequence_parallel=off", "micro_batch=2"),
    "1f1b": ("llama", "cpu:2", "pp=2", "schedule=1f1b", "micro_batch=2"),
    "gpipe, zero 3": ("llama", "cpu:4", "pp=2", "dp=2", "zero=3", "schedule=gpipe", "micro_batch=1", "recompute=full"),
    "interleaved": ("llama", "cpu:2", "pp=2", "vpp=2", "schedule=interleaved", "micro_batch=2"),
    "stages, tensor and positions": (
        "llama", "cpu:4", "pp=2", "tp=2", "schedule=1f1b", "micro_batch=2", "sequence_parallel=on", "recompute=full",
    ),
    "zero 1, tensor and positions": (
        "llama", "cpu:4", "dp=2", "tp=2", "zero=1", "sequence_parallel=on", "micro_batch=2", "recompute=full",
    ),
}  # fmt: skip
QUICK = ("a function", "stages, tensor and positions", "zero 1, tensor and positions")


def program(case: str) -> tuple[str, int]:
    """The program of a case and its number of ranks."""
    made = plan(*CASES[case])
    return export(TARGETS["script"], facts_of(made)).text, made.ranks


def launch(text: str, ranks: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program under torchrun, where nothing of the package can be imported by a path of the tests."""
    file = folder / "program.py"
    file.write_text(text)
    own = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    own.pop("PYTHONPATH", None)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        f"--master-port={free_port()}",
        str(file),
    ]
    return subprocess.run([*command, *arguments], cwd=folder, env=own, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.nightly) for case in CASES]
)  # fmt: skip
def test_loss_and_gradients_are_the_original_models(case: str, tmp_path: Path) -> None:
    text, ranks = program(case)
    assert "shardwright" not in text.partition('"""\n')[2]
    done = launch(text, ranks, tmp_path, "--check")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    assert "missing: []" in done.stdout
    assert float(done.stdout.rpartition("differ by at most ")[2].split()[0]) < 1e-12


def test_the_check_can_fail_and_training_lowers_the_loss(tmp_path: Path) -> None:
    text, ranks = program("stages, tensor and positions")
    wrong = text.replace(
        '"rowwise, scattered": RowwiseParallel(output_layouts=positions)', '"rowwise, scattered": RowwiseParallel()'
    )
    assert wrong != text
    assert launch(wrong, ranks, tmp_path, "--check").returncode != 0
    text, ranks = program("a function")
    doubled = text.replace("loss.backward()", "(2 * loss).backward()")
    assert doubled != text
    done = launch(doubled, ranks, tmp_path, "--check")
    assert "differ by at most 1.00e+00" in done.stdout
    assert done.returncode != 0
    done = launch(text, ranks, tmp_path, "--steps", "3", "--rate", "0.01")
    losses = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 3, done.stderr[-2000:]
    assert losses[2] < losses[0]


@pytest.mark.parametrize("case", CASES)
def test_programs_hold_only_what_they_need(case: str) -> None:
    text, _ = program(case)
    assert "# [" not in text
    assert ("fully_shard" in text) == any(pin.startswith("dp=") for pin in CASES[case])
    assert ("parallelize_module" in text) == any(pin.startswith("tp=") for pin in CASES[case])
    assert ("pipelining" in text) == any(pin.startswith("pp=") for pin in CASES[case])
    assert ("checkpoint_wrapper(" in text) == ("recompute=full" in CASES[case])
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F,E9", "--quiet", "-"]
    done = subprocess.run(ruff, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("gpt2", "cpu:2", "tp=2"), "is a Conv1D split as .* plan with --pin tp=1"),
        (("gpt2", "cpu:2", "pp=2", "schedule=1f1b", "micro_batch=2"), "are one parameter of two stages.* plan with --pin pp=1"),
        (("llama", "cpu:2", "pp=2", "schedule=zb-h1", "micro_batch=2"), "no schedule=zb-h1; plan with --pin schedule=gpipe"),
        (("llama", "cpu:2", "cp=2"), "there is no cp .here 2.; plan with --pin cp=1"),
        (("network", "cpu:2", "tp=2", "sequence_parallel=on"), "split positions; plan with --pin sequence_parallel=off"),
    ],
)  # fmt: skip
def test_what_the_program_cannot_run_is_refused(case: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export(TARGETS["script"], facts_of(plan(*case)))

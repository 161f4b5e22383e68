"""Runs that are saved, killed and gone on with: by the command line, and with ranks killed at random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool, RankError
from shardwright.api import make_plan
from shardwright.planner.plan import Plan
from shardwright.runtime import state
from shardwright.runtime.apply import apply
from test_end_to_end import TOY, Shell
from torch import Tensor, nn

# -- the command line


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder with a plan of the toy model for two ranks."""
    made = Shell(tmp_path_factory.mktemp("saved"))
    (made.folder / "toy.py").write_text(TOY.read_text())
    arguments = ("plan", "toy.py:build", "--cluster", "cpu:2", "--batch", "8", "--pin", "tp=2", "-o", "plan.json")
    assert made.here(*arguments).exit_code == 0
    return made


def run(shell: Shell, *arguments: str) -> dict[str, Any]:
    done = shell("run", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_run_saves_and_goes_on(shell: Shell) -> None:
    wanted = run(shell, "plan.json", "--steps", "7")["losses"]
    kept = ("--save", "kept", "--every", "3", "--resume", "kept")
    first = run(shell, "plan.json", "--steps", "1", *kept)
    assert first["checkpoints"] == {"resumed_from": None, "saved_step": 6}
    assert sorted(p.name for p in (shell.folder / "kept").iterdir()) == ["step-00000003", "step-00000006"]
    then = run(shell, "plan.json", "--steps", "1", *kept)
    assert then["checkpoints"]["resumed_from"] == "kept/step-00000006"
    assert first["losses"] + then["losses"] == wanted


def test_wrong_use_is_refused(shell: Shell) -> None:
    done = shell.here("run", "plan.json", "--every", "3")
    assert done.exit_code == 2
    assert "--every N needs --save FOLDER" in done.stderr


# -- kills


class Net(nn.Module):
    """Enough parameters that writing takes a while, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(16, 512), nn.Linear(512, 512), nn.Linear(512, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(torch.relu(self.up(x)), 0.2, self.training)
        return self.down(torch.relu(self.middle(x))).square().mean()


def batch(at: int) -> dict[str, Tensor]:
    """The batch of a step."""
    return {"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(at))}


def plan() -> Plan:
    with torch.device("meta"):
        model = Net()
    return make_plan(model, batch(0), "h100-sxm:2", pins=["zero=3", "dtype=fp32"])


def train(made: Plan, folder: str, log: str, steps: int, async_: bool) -> None:
    """Rank function: go on from the newest checkpoint up to `steps`, saving each; rank 0 notes every loss when it is known."""
    torch.manual_seed(1)
    pm = apply(Net(), (), batch(0), made)
    optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-3)
    at = state.load_checkpoint(folder, pm, optimizer).data_position if state.latest(folder) else 0
    while at < steps:
        optimizer.zero_grad()
        loss = pm(**batch(at))
        loss.backward()
        optimizer.step()
        at += 1
        if torch.distributed.get_rank() == 0:
            with open(log, "a") as file:
                file.write(f"{at} {loss.item().hex()}\n")
        state.save_checkpoint(folder, pm, optimizer, step=at, data_position=at, async_=async_)
    state.finish_saving(pm)


def losses(log: Path) -> dict[int, str]:
    """Loss by step; every time a step was done it must have had the same."""
    found: dict[int, str] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        at, _, value = line.partition(" ")
        if value.endswith(("+", "-")) or "p" not in value:
            continue  # the line that a kill cut off
        assert found.setdefault(int(at), value) == value, f"step {at} went otherwise the second time"
    return found


def killed_runs(
    folder: Path, made: Plan, kills: int, steps: int, seed: int, longest: float, async_: bool
) -> tuple[int, int]:
    """Train in ranks of which one or both are killed at random moments; (kills that hit, steps that were done)."""
    draw, hits = random.Random(seed), 0
    pool = Pool(2, timeout=60.0)
    try:
        while hits < kills:
            pool.close()
            pool._start()
            victims = [p.pid for p, _ in pool._workers]
            victims = victims if draw.random() < 0.5 else [draw.choice(victims)]
            timer = threading.Timer(
                draw.uniform(0.0, longest), lambda pids: [os.kill(p, signal.SIGKILL) for p in pids], [victims]
            )
            timer.start()
            try:
                pool.run(train, made, str(folder / "run"), str(folder / "log"), steps, async_)
                kills = 0  # it came to its end
            except RankError:
                hits += 1
            timer.cancel()
            timer.join()
            found = state.latest(folder / "run")
            if found is not None:
                state.load_checkpoint(found, Net())  # whole, whatever the moment
        pool.close()
        pool.run(train, made, str(folder / "run"), str(folder / "log"), steps, async_)
    finally:
        pool.close()
    return hits, len(losses(folder / "log"))


@pytest.fixture
def uninterrupted(ranks2: Pool, tmp_path: Path) -> tuple[Plan, list[str], float]:
    """The plan, the losses of a run that nobody kills, and its seconds."""
    made, start = plan(), time.monotonic()
    ranks2.run(train, made, str(tmp_path / "whole"), str(tmp_path / "whole.log"), 12, False)
    return made, list(losses(tmp_path / "whole.log").values()), time.monotonic() - start


def survives(folder: Path, hits: int, run: tuple[Plan, list[str], float]) -> None:
    """Kill runs until so many kills have hit one: every run, gone on with, has the losses of the run that nobody killed."""
    made, wanted, seconds = run
    for i in range(10 * hits):
        place = folder / str(i)
        place.mkdir()
        found = killed_runs(place, made, min(hits, 6), 12, 100 + i, seconds, i % 2 == 0)[0]
        hits -= found
        seconds *= 1.2 if found else 0.6  # aim at the time that a run takes now
        assert list(losses(place / "log").values()) == wanted, i
        if hits <= 0:
            return
    pytest.fail(f"{hits} kills more were to hit a run")


def test_killed_runs_go_on_as_if_nothing_had_happened(
    uninterrupted: tuple[Plan, list[str], float], tmp_path: Path
) -> None:
    survives(tmp_path, 2, uninterrupted)


@pytest.mark.nightly
def test_fifty_kills(uninterrupted: tuple[Plan, list[str], float], tmp_path: Path) -> None:
    survives(tmp_path, 50, uninterrupted)

"""Ranks killed at random moments of training, saving and loading: a run that goes on has the losses of one that nobody killed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from pool import Pool, RankError
from shardwright.api import make_plan
from shardwright.planner.plan import Plan
from shardwright.runtime import state
from shardwright.runtime.apply import apply
from torch import Tensor, nn

STEPS = 12
KEPT_SHARDED = ("zero=3", "dtype=fp32"), 2
PIPELINED = ("pp=2", "dp=2", "zero=1", "micro_batch=2", "schedule=1f1b", "dtype=fp32"), 4


class Block(nn.Module):
    """A layer with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(64, 512), nn.Linear(512, 64), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(x))))


class Net(nn.Module):
    """Enough parameters that writing takes a while, and layers to cut between."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(dropout) for _ in range(4)), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


def batch(at: int) -> dict[str, Tensor]:
    """The batch of a step."""
    return {"x": torch.randn(8, 64, generator=torch.Generator().manual_seed(at))}


def plan(pins: tuple[str, ...], ranks: int, dropout: float = 0.2) -> Plan:
    with torch.device("meta"):
        model = Net(dropout)
    return make_plan(model, batch(0), f"h100-sxm:{ranks}", pins=pins, runnable=False)


def train(made: Plan, folder: str, log: str, steps: int, async_: bool, dropout: float = 0.2) -> None:
    """Rank function: go on from the newest checkpoint up to `steps`, saving each; rank 0 notes every loss when it is known."""
    torch.manual_seed(1)
    pm = apply(Net(dropout), (), batch(0), made)
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


def killed_runs(folder: Path, made: Plan, kills: int, seed: int, longest: float, async_: bool) -> int:
    """Train in ranks of which one or all are killed at random moments, then to the end; the kills that hit."""
    draw, hits = random.Random(seed), 0
    run, log = str(folder / "run"), str(folder / "log")
    pool = Pool(made.ranks, timeout=60.0)
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
                pool.run(train, made, run, log, STEPS, async_)
                kills = 0  # it came to its end
            except RankError:
                hits += 1
            timer.cancel()
            timer.join()
            found = state.latest(run)
            if found is not None:
                state.load_checkpoint(found, Net())  # whole, whatever the moment
        pool.close()
        pool.run(train, made, run, log, STEPS, async_)
    finally:
        pool.close()
    return hits


def survives(folder: Path, hits: int, pins: tuple[str, ...], pool: Pool) -> None:
    """Kill runs until so many kills have hit one: every run, gone on with, has the losses of the run that nobody killed."""
    made, start = plan(pins, pool.world_size), time.monotonic()
    assert made.ranks == pool.world_size
    pool.run(train, made, str(folder / "whole"), str(folder / "whole.log"), STEPS, False)
    wanted, seconds = list(losses(folder / "whole.log").values()), time.monotonic() - start
    assert len(set(wanted)) == STEPS
    for i in range(10 * hits):
        place = folder / str(i)
        place.mkdir()
        found = killed_runs(place, made, min(hits, 6), 100 + i, seconds, i % 2 == 0)
        hits -= found
        seconds *= 1.2 if found else 0.6  # aim at the time that a run takes now
        assert list(losses(place / "log").values()) == wanted, i
        if hits <= 0:
            return
    pytest.fail(f"{hits} kills more were to hit a run")


def test_killed_runs_go_on_as_if_nothing_had_happened(ranks2: Pool, tmp_path: Path) -> None:
    survives(tmp_path, 2, KEPT_SHARDED[0], ranks2)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("pins", "ranks", "kills"), [(*KEPT_SHARDED, 35), (*PIPELINED, 15)], ids=["zero-3", "pipeline"]
)
def test_fifty_kills(pins: tuple[str, ...], ranks: int, kills: int, pools: dict[int, Pool], tmp_path: Path) -> None:
    survives(tmp_path, kills, pins, pools[ranks])


def test_a_run_that_changes_plan_and_ranks_has_the_curve_of_one_that_does_not(
    pools: dict[int, Pool], tmp_path: Path
) -> None:
    """A pipeline of 4 ranks, then ZeRO-3 on 2, then tensor parallel: optimizer, step and data go on; float64, no dropout."""
    parts = [("pp=2", "dp=2", "zero=1", "micro_batch=2", "schedule=1f1b"), ("dp=2", "zero=3"), ("tp=2", "dp=1")]
    plans = [plan((*pins, "dtype=fp64"), ranks, 0.0) for pins, ranks in zip(parts, (4, 2, 2), strict=True)]
    pools[2].run(train, plans[1], str(tmp_path / "whole"), str(tmp_path / "whole.log"), 6, False, 0.0)
    for i, made in enumerate(plans):
        pools[made.ranks].run(train, made, str(tmp_path / "run"), str(tmp_path / "log"), 2 * i + 2, i == 1, 0.0)
    wanted, found = (losses(tmp_path / name) for name in ("whole.log", "log"))
    assert found.keys() == wanted.keys() == set(range(1, 7))
    for at, value in wanted.items():
        assert float.fromhex(found[at]) == pytest.approx(float.fromhex(value), rel=1e-11), at

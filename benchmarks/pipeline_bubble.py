"""How much of a step do pipeline ranks wait: measured on two gloo ranks, and simulated with the durations of the same step.

    python benchmarks/pipeline_bubble.py
    python benchmarks/pipeline_bubble.py --schedule zb-h1 --width 512 --steps 5 --json

A stack of GPT-2 blocks runs under every schedule, one thread a rank. The runtime names its actions for profilers; here a clock
stands in the place of torch's. A rank's bubble is what its actions leave of the step. The simulator gets the mean duration of every
kind of action of every stage. Of several steps the quickest counts. Exits with 1 where a rank's bubble is further than --points
from the simulated one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from shardwright.api import apply_plan, make_plan
from shardwright.planner.plan import Plan
from shardwright.planner.planfile import load_plan, save_plan
from shardwright.planner.schedules import COMPUTE, actions, parse_action, stage_rank
from shardwright.planner.simulate import Links, StageCost, simulate
from shardwright.runtime import pipeline
from torch import Tensor, nn

RANKS = 2
CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zbv": 2, "dualpipev": 2}
SEQ, VOCAB = 256, 512

Durations = dict[tuple[int, str], list[float]]
"""Seconds of every action, by (stage, kind)."""


@dataclass(frozen=True)
class Row:
    """One schedule: mean milliseconds of its actions by kind, and waiting as fractions of the step, by rank."""

    schedule: str
    milliseconds: Mapping[str, float]
    step_seconds: float
    simulated_seconds: float
    measured: tuple[float, ...]
    simulated: tuple[float, ...]

    @property
    def points(self) -> float:
        """The greatest difference, in percentage points."""
        return 100 * max(abs(a - b) for a, b in zip(self.measured, self.simulated, strict=True))


def model(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor]]:
    """GPT-2 of some blocks and a small vocabulary, with a batch."""
    import transformers

    torch.manual_seed(0)
    sizes = {"n_layer": options.layers, "n_embd": options.width, "n_head": options.width // 64, "vocab_size": VOCAB}
    ends = {"n_positions": SEQ, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**sizes, **ends, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ids = torch.randint(0, VOCAB, (options.microbatches * options.micro_batch, SEQ))
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def planned(schedule: str, options: argparse.Namespace) -> Plan:
    """Everything pinned but where the stages are cut."""
    made, batch = model(options)
    pins = f"pp={RANKS} vpp={CHUNKS[schedule]} schedule={schedule} micro_batch={options.micro_batch} dtype=fp32"
    return make_plan(
        made, batch, f"a100-sxm-80gb:{RANKS}", pins=[*pins.split(), "recompute=none", "offload=none"], runnable=False
    )


class Clock:
    """In the place of `record_function`: (name, seconds) of every action in `spent`."""

    spent: ClassVar[list[tuple[str, float]]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.spent.append((self.name, time.perf_counter() - self.start))


def steps(rank: int, folder: str, schedule: str, options: argparse.Namespace) -> None:
    """One rank: step seconds and durations of every step, written to the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{schedule}", rank=rank, world_size=RANKS)
    made, batch = model(options)
    pm = apply_plan(made, batch, load_plan(Path(folder) / f"{schedule}.json"))
    with patch.object(pipeline, "record_function", Clock):
        found = [one_step(pm, batch) for _ in range(options.steps + 1)]
    (Path(folder) / f"{schedule}.{rank}").write_text(json.dumps(found[1:]))
    dist.destroy_process_group()


def one_step(pm: nn.Module, batch: Mapping[str, Tensor]) -> tuple[float, list[tuple[str, float]]]:
    """Seconds of the call, which runs the whole schedule, and of its actions."""
    Clock.spent.clear()
    dist.barrier()
    start = time.perf_counter()
    loss = pm(**batch).loss
    seconds = time.perf_counter() - start
    loss.backward()
    pm.zero_grad()
    return seconds, list(Clock.spent)


def row(schedule: str, folder: Path, options: argparse.Namespace) -> Row:
    """The quickest step of a schedule beside its simulation."""
    ranks = [json.loads((folder / f"{schedule}.{r}").read_text()) for r in range(RANKS)]
    best = min(range(options.steps), key=lambda i: max(found[i][0] for found in ranks))
    seconds = max(found[best][0] for found in ranks)
    durations: Durations = {}
    for found in ranks:
        for name, spent in found[best][1]:
            action = parse_action(name)
            durations.setdefault((action.stage, action.kind), []).append(spent)
    lists = actions(schedule, RANKS, CHUNKS[schedule], options.microbatches)
    placement = stage_rank(schedule, RANKS, CHUNKS[schedule])
    costs = [cost(durations, stage) for stage in range(len(placement))]
    timeline = simulate(lists, placement, costs, Links.free(len(placement)))
    kinds = {kind: 1e3 * statistics.fmean(d for (_, k), held in durations.items() if k == kind for d in held)
             for kind in COMPUTE if any(k == kind for _, k in durations)}  # fmt: skip
    busy = [sum(spent for _, spent in found[best][1]) for found in ranks]
    measured = tuple(1 - b / seconds for b in busy)
    return Row(schedule, kinds, seconds, timeline.step_seconds, measured, timeline.bubble)


def cost(durations: Durations, stage: int) -> StageCost:
    """The mean durations of a stage."""
    mean = {kind: statistics.fmean(durations.get((stage, kind), [0.0])) for kind in COMPUTE}
    divided = mean["I"] + mean["W"]
    return StageCost(mean["F"], divided or mean["B"], mean["W"] if divided else 0.0)


def main() -> int:
    """Plan, run, print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", action="append", choices=tuple(CHUNKS), help="default: all but dualpipev")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--micro-batch", type=int, default=3)
    parser.add_argument("--microbatches", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--points", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.schedule = options.schedule or ["gpipe", "1f1b", "interleaved", "zb-h1", "zbv"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for schedule in options.schedule:
            save_plan(planned(schedule, options), Path(folder) / f"{schedule}.json")
            multiprocessing.spawn(steps, (folder, schedule, options), nprocs=RANKS)
            rows.append(row(schedule, Path(folder), options))
    if options.json:
        print(json.dumps({"load": os.getloadavg()[0], "rows": [asdict(r) for r in rows]}, indent=1))
    else:
        table(rows)
    return int(any(r.points > options.points for r in rows))


def table(rows: list[Row]) -> None:
    """Print the rows."""
    print(f"load average {os.getloadavg()[0]:.1f}")
    print(
        f"{'schedule':<12} {'actions, ms':<34} {'step, s':>8} {'simulated':>10}  bubble by rank: measured, simulated, %"
    )
    for r in rows:
        kinds = ", ".join(f"{kind} {ms:.0f}" for kind, ms in r.milliseconds.items())
        pairs = "   ".join(f"{100 * a:5.1f} {100 * b:5.1f}" for a, b in zip(r.measured, r.simulated, strict=True))
        print(
            f"{r.schedule:<12} {kinds:<34} {r.step_seconds:>8.2f} {r.simulated_seconds:>10.2f}  {pairs}  ({r.points:.1f})"
        )


if __name__ == "__main__":
    sys.exit(main())

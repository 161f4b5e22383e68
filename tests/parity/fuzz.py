"""Random feasible plans: pins drawn over all dimensions of the joint search, for a case and a number of ranks.

    python tests/parity/fuzz.py SEED FILE      writes the plan of a seed, and says what asks for it

Plans are for CPU ranks with host memory behind them, so that everything they predict can be held against what runs: parity with the
eager module, collectives and bytes, offload traffic, peak memory.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import build
from offloading import cluster
from running import Moved, Observed, moved_bytes, plan_of
from shardwright.errors import Infeasible, PinError, PlanError
from shardwright.passes.choose import listed
from shardwright.passes.prepare import prepare
from shardwright.planner.capability import check_plan
from shardwright.planner.offloaded import copied
from shardwright.planner.plan import Plan
from shardwright.planner.planfile import save_plan
from shardwright.planner.prices import Prices

FAMILIES = (
    "gpt2", "llama", "llama-deep", "bert", "vit", "mixtral", "t5", "bart", "whisper", "tied", "unet", "convnext", "swin",
    "resnet", "adapter", "qwen3-moe", "deepseek",
)  # fmt: skip
TRIES = 40
"""Draws until one is feasible; most are not (sizes that do not divide, pins that contradict each other)."""
PEAK = 0.08
"""Share of the measured peak by which the predicted one may be off."""
HELD = ("optimizer", "gradients", "states")
"""Classes of which copies are held against runs, `params` too where everything trains. Activations are not: what attention with
dropout keeps on a CPU is less than is planned for."""
NOTHING = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Drawn:
    """A plan, and what asks for it again."""

    seed: int
    name: str
    world: int
    pins: str
    plan: Plan

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.name} on {self.world} ranks, {self.pins}"


def draw(seed: int, worlds: tuple[int, ...] = (2, 4), families: tuple[str, ...] = FAMILIES) -> Drawn:
    """The plan of a seed. Raises LookupError where no draw of it is feasible."""
    dice = random.Random(seed)
    for _ in range(TRIES):
        name, world = dice.choice(families), dice.choice(worlds)
        pins = " ".join(_pins(dice, world))
        try:
            plan = plan_of(name, pins, world, 8, device=cluster, runnable=False)
            check_plan(plan)
        except (PinError, Infeasible, PlanError):
            continue
        return Drawn(seed, name, world, pins, plan)
    raise LookupError(f"seed {seed}: no feasible plan in {TRIES} draws")


def _pins(dice: random.Random, world: int) -> list[str]:
    """Degrees that multiply to `world`, and one value of every other dimension."""
    left, pins = world, []
    for axis in dice.sample(["pp", "tp", "cp"], 3):
        size = dice.choice([n for n in (1, 1, 2, 4) if left % n == 0])
        pins.append(f"{axis}={size}")
        left //= size
    degree: dict[str, Any] = dict(pin.split("=") for pin in pins)
    pins.append(f"dp={left}")
    pins.append(f"ep={dice.choice([n for n in (1, 1, 2) if left % n == 0])}")
    if degree["pp"] != "1":
        chunks = dice.choice([1, 1, 2])
        schedules = ["interleaved", "zbv", "dualpipev"] if chunks > 1 else ["gpipe", "1f1b", "zb-h1"]
        pins += [f"vpp={chunks}", f"schedule={dice.choice(schedules)}"]
    if degree["tp"] != "1":
        pins.append(f"sequence_parallel={dice.choice(['on', 'off'])}")
    pins.append(f"zero={dice.randrange(4)}" if left > 1 else "zero=0")
    pins.append(f"micro_batch={dice.choice([n for n in (1, 2, 4, 8) if 8 // left % n == 0])}")
    pins.append(f"recompute={dice.choice(['none', 'selective', 'full'])}")
    pins.append(f"offload={dice.choice(['none', 'none', 'optimizer', 'activations', 'params'])}")
    # Dice of its own: what a seed drew before there were passes it still draws.
    pins.append(f"passes={random.Random(' '.join(pins)).choice(['auto', 'none'])}")
    return pins


def expected_copies(drawn: Drawn, stage: int) -> Moved:
    """What a step is predicted to copy between the device and the host by class, on the mean rank of a pipeline rank."""
    case, compute = build(drawn.name, 8), drawn.plan.precision.compute
    choice = listed(drawn.plan)
    outline = prepare(case.model, case.args, dict(case.kwargs), compute, loss_fn=case.loss_fn, choice=choice).outline
    where = cluster(drawn.world)
    found = copied(drawn.plan, outline, where, Prices(where, compute), stage)
    return {what: moved_bytes(t) for what, t in found.items()}


def faults(drawn: Drawn, seen: list[Observed]) -> list[str]:
    """Everything in which a run differs from the eager module or from the plan's predictions."""
    found = [f"rank {r} differs from the original: {one.wrong}" for r, one in enumerate(seen) if one.wrong]
    offloads = any(region.offload for region in drawn.plan.regions)
    for stage in sorted({one.stage for one in seen}):
        mine = [one for one in seen if one.stage == stage]
        found += _traffic_faults(drawn.plan, stage, mine)
        found += _copy_faults(drawn.plan, stage, mine, expected_copies(drawn, stage)) if offloads else []
    predicted, ratio = drawn.plan.predicted.peak_bytes_per_device, peak_ratio(drawn.plan, seen)
    if abs(ratio - 1) > PEAK:
        found.append(f"peak of {[one.peak for one in seen]} bytes, predicted {predicted} ({ratio:.3f} of it)")
    most = max(one.peak for one in seen)
    if most > drawn.plan.memory_limit_bytes:
        found.append(f"peak of {most} bytes above the limit of {drawn.plan.memory_limit_bytes}")
    return found


def peak_ratio(plan: Plan, seen: list[Observed]) -> float:
    """The predicted peak over that of the fullest pipeline rank: of its fullest device, or where tokens are sent to experts,
    which depends on the data, of its mean one."""
    sends = any(t.collective == "all_to_all" and t.axis == "ep" for t in plan.predicted.traffic)
    peaks = [[one.peak for one in seen if one.stage == stage] for stage in {one.stage for one in seen}]
    return plan.predicted.peak_bytes_per_device / max(sum(p) / len(p) if sends else max(p) for p in peaks)


def _copy_faults(plan: Plan, stage: int, seen: list[Observed], told: Moved) -> list[str]:
    """Differences in copies of one pipeline rank. Chunks of ZeRO may be uneven: the mean rank is predicted."""
    trains = all(p.trainable for region in plan.regions for p in region.parameters)
    found = []
    for what in (*HELD, *(("params",) if trains else ())):
        ran = [one.moved.get(what, NOTHING) for one in seen]
        mean = tuple(sum(sizes) / len(ran) for sizes in zip(*ran, strict=True))
        if mean != told.get(what, NOTHING):
            found.append(f"pipeline rank {stage} copied {mean} of {what}, predicted {told.get(what)}")
    return found


def _traffic_faults(plan: Plan, stage: int, seen: list[Observed]) -> list[str]:
    """Differences in collectives of one pipeline rank. What goes to experts depends on the data: the mean rank is predicted."""
    predicted = {(t.collective, t.axis): (t.count, t.bytes) for t in plan.predicted.traffic_of(stage)}
    found = []
    for key in sorted({*predicted, *(key for one in seen for key in one.traffic)}):
        ran = [one.traffic.get(key, (0, 0)) for one in seen]
        if key == ("all_to_all", "ep"):
            ran = [(count, round(sum(size for _, size in ran) / len(ran))) for count, _ in ran]
        if set(ran) != {predicted.get(key, (0, 0))}:
            found.append(f"pipeline rank {stage}, {' on '.join(key)}: ran {ran}, predicted {predicted.get(key)}")
    return found


if __name__ == "__main__":
    made = draw(int(sys.argv[1]))
    save_plan(made.plan, Path(sys.argv[2]))
    print(made)

"""Random feasible plans: pins drawn over all dimensions of the joint search, for a case and a number of ranks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from running import plan_of
from shardwright.errors import Infeasible, PinError, PlanError
from shardwright.planner.capability import check_plan
from shardwright.planner.plan import Plan

CLUSTER = "a100-sxm-80gb"
FAMILIES = (
    "gpt2",
    "llama",
    "llama-deep",
    "bert",
    "vit",
    "mixtral",
    "t5",
    "bart",
    "tied",
    "unet",
    "convnext",
    "swin",
    "adapter",
)
TRIES = 40
"""Draws until one is feasible; most are not (sizes that do not divide, pins that contradict each other)."""


@dataclass(frozen=True)
class Drawn:
    """A plan, and what asks for it again."""

    seed: int
    name: str
    world: int
    pins: str
    plan: Plan


def draw(seed: int, worlds: tuple[int, ...] = (2, 4)) -> Drawn:
    """The plan of a seed. Raises LookupError where no draw of it is feasible."""
    dice = random.Random(seed)
    for _ in range(TRIES):
        name, world = dice.choice(FAMILIES), dice.choice(worlds)
        pins = " ".join(_pins(dice, world))
        try:
            plan = plan_of(name, pins, world, 8, device=CLUSTER, runnable=False)
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
    return pins

"""A unit, its storage and machines in closed form, for tests of its options."""

from __future__ import annotations

from dataclasses import replace

from shardwright.planner.cluster import Host
from shardwright.planner.front import Design
from shardwright.planner.fronts import Named
from shardwright.planner.numbers import Numbers, Weights
from shardwright.planner.options import Option, Storing
from shardwright.planner.precision import RECIPES
from shardwright.planner.prices import Prices
from shardwright.planner.stored import Data
from shardwright.profiles.devices import parse_cluster

CLUSTER = parse_cluster("a100-sxm-80gb:8x8")
DEVICE = replace(CLUSTER.device, overlap_fraction=0.0)
HOST = Host(4, int(512e9), 20e9, 400e9, 1e-9, copy_latency_seconds=1e-5, disk_bytes=int(4e12),
            disk_read_bytes_per_second=8e9, disk_write_bytes_per_second=4e9)  # fmt: skip
NAMED = Named(Design("R", "R", (), frozenset(), frozenset()), "single", "none")
ELEMENTS, SAVED = 4e7, 3e8


def storing(recipe: str = "zero", **more) -> Storing:
    prices = more.pop("prices", Prices(CLUSTER, "bfloat16"))
    return Storing(prices, DEVICE, RECIPES[recipe].precision(), "adamw", True, False, **more)


def numbers(seconds: float = 1.0, elements: float = ELEMENTS, **more) -> Numbers:
    """A unit that computes for `seconds` forward and twice as long backward."""
    figures = {"saved": SAVED, "peak": SAVED + 1e7, "work": 2e7, "again": 0.0} | more
    return Numbers(
        seconds, 2 * seconds, seconds, figures["again"], seconds, 2 * seconds, figures["saved"], figures["peak"],
        figures["work"], (Weights(elements, elements / 4, True, False, False, True),),
    )  # fmt: skip


def data(ranks: int = 8, microbatches: int = 4, stages: int = 2) -> Data:
    return Data(ranks, 1, 1, microbatches, stages)


def by_label(found: list[Option]) -> dict[tuple[int, str], Option]:
    made = {(o.zero, o.offload): o for o in found}
    assert len(made) == len(found)
    return made

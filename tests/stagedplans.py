"""A hand-made plan with a pipeline: the blocks of `plans.plan()` run in two ways on two ranks with two stages each."""

from __future__ import annotations

import msgspec
import plans
from shardwright.planner import plan as p

AGAIN = ("layer_norm", "gelu", "linear -> R")


def regions() -> tuple[p.RegionPlan, ...]:
    """Four blocks keep all, two run something again and have their optimizer states in the host."""
    embed, block, head = plans.regions()
    kept = msgspec.structs.replace(block, name="h.1", repeats=4, region="h", policy="none")
    again = msgspec.structs.replace(
        block, name="h.2", repeats=2, region="h", recompute=AGAIN, offload=("optimizer/3",), entry="S", exit="S"
    )
    return embed, kept, again, head


def stages() -> tuple[p.StagePlan, ...]:
    """Embedding and a block, the two that run again, two blocks, a block and the head."""
    runs = (
        (p.RunPlan("embed", 0, 1), p.RunPlan("h.1", 0, 1)), (p.RunPlan("h.2", 1, 2),), (p.RunPlan("h.1", 3, 2),),
        (p.RunPlan("h.1", 5, 1), p.RunPlan("head", 0, 1)),
    )  # fmt: skip
    return tuple(p.StagePlan(i % 2, held, 0.002, 0.004, 0.001, (6 + i % 2) * 2**30) for i, held in enumerate(runs))


def search(count: int = 30) -> p.Search:
    """Three shapes solved, the others cut."""
    mesh = {"pp": 2, "dp": 2, "tp": 2}
    shapes = [
        p.ShapeRecord(mesh, 4, "solved", 0.124, 0.125 + i / 100, schedule="interleaved", chunks=2 + i, micro_batch=2)
        for i in range(3)
    ]
    shapes += [
        p.ShapeRecord(mesh, 8 + i, "cut", 0.2 + i / 100, schedule="1f1b", micro_batch=1) for i in range(count - 3)
    ]
    return p.Search(bound_seconds=0.124, gap=0.008, shapes=tuple(shapes), solver="highs")


def plan(**changes: object) -> p.Plan:
    """The plan, with fields replaced."""
    pipeline = p.Pipeline(4, "interleaved", 2, 4, 2, 2, ("pp", "dp", "tp"))
    causes = {"compute": 0.1, "recompute": 0.01, "offload": 0.005, "bubble": 0.01}
    predicted = msgspec.structs.replace(plans.predicted(), seconds=causes, memory={"gathered": 2**29, "saved": 2**30})
    levels = [{**plans.cluster()["levels"][0]}, {**plans.cluster()["levels"][1], "ranks": 8}]  # type: ignore[index]
    cluster = {**plans.cluster(), "spec": "toy:2x4", "devices": 8, "levels": levels}
    made = {
        "cluster": cluster,
        "pipeline": pipeline,
        "regions": regions(),
        "stages": stages(),
        "search": search(),
        "predicted": predicted,
    }
    return plans.plan(**{**made, **changes})

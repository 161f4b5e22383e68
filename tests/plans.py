"""A small hand-made plan: two blocks of a language model on a 2 x 2 mesh, tensor parallel inside, ZeRO-1 outside."""

from __future__ import annotations

import msgspec
from shardwright.planner import plan as p

LINKS = ("network", "nvlink")


def cluster() -> dict[str, object]:
    """The description of a machine of four devices."""
    device = {"name": "toy", "memory_bytes": 16_000_000_000, "kind": "gpu", "peak_flops": {"float32": 1e13}}
    levels = [
        {"name": "nvlink", "ranks": 2, "bytes_per_second": 3e11, "latency_seconds": 2e-6, "source": "datasheet"},
        {"name": "network", "ranks": 4, "bytes_per_second": 2.5e10, "latency_seconds": 5e-6, "source": "datasheet"},
    ]
    return {"name": "toy", "spec": "toy:2x2", "devices": 4, "per_node": 2, "device": device, "levels": levels}


def regions() -> tuple[p.RegionPlan, ...]:
    """Embedding, two equal blocks, head."""
    data = ("S(0)", "R")
    embed = p.RegionPlan(
        "embed",
        1,
        (p.OpPlan("embedding", "aten.embedding", ("b", "V"), data),),
        (p.ParameterPlan(("wte.weight", "lm_head.weight"), ("R", "R"), 1, ("dp",)),),
    )
    block = p.RegionPlan(
        "h",
        2,
        (
            p.OpPlan("layer_norm", "aten.layer_norm", ("b", "R"), data),
            p.OpPlan("linear", "aten.linear", ("b", "n"), ("S(0)", "S(2)")),
            p.OpPlan("gelu", "aten.gelu", ("b", "k"), ("S(0)", "S(2)")),
            p.OpPlan("linear_1", "aten.linear", ("b", "k"), ("S(0)", "P")),
            p.OpPlan("add", "aten.add", ("b", "R"), data),
        ),
        (
            p.ParameterPlan(("h.0.ln.weight",), ("R", "R"), 1, ("dp",)),
            p.ParameterPlan(("h.0.up.weight",), ("R", "S(0)"), 1, ("dp",)),
            p.ParameterPlan(("h.0.down.weight",), ("R", "S(1)"), 1, ("dp",)),
        ),
    )
    loss = p.OpPlan("cross_entropy", "aten.cross_entropy_loss", ("b", "R"), ("P", "R"))
    return (embed, block, p.RegionPlan("head", 1, (loss,), ()))


def predicted() -> p.Prediction:
    """Figures of a step that add up."""
    memory = {
        "parameters": 600_000_000, "gradients": 600_000_000, "optimizer states": 1_200_000_000,
        "saved activations": 4_000_000_000, "temporaries": 300_000_000, "reserve": 0,
    }  # fmt: skip
    return p.Prediction(
        step_seconds=0.125,
        tokens_per_second_per_device=16384.0,
        mfu=0.41,
        peak_bytes_per_device=sum(memory.values()),
        memory=memory,
        seconds={"compute": 0.1, "communication": 0.02, "optimizer": 0.005},
        traffic=(
            p.Traffic("all_reduce", "tp", 8, 268_435_456, 0.012),
            p.Traffic("reduce_scatter", "dp", 3, 600_000_000, 0.008),
        ),
        sources={"compute": "datasheet", "communication": "datasheet"},
        error=0.2,
    )


def search() -> p.Search:
    """A search over three shapes."""
    shapes = (
        p.ShapeRecord({"dp": 2, "tp": 2}, 2, "chosen", 0.1245, 0.125, 6_700_000_000),
        p.ShapeRecord({"dp": 4, "tp": 1}, 2, "infeasible", reason="19.2 GB of 14.7 GB"),
        p.ShapeRecord({"dp": 1, "tp": 4}, 2, "cut", 0.21, reason="bound above the incumbent"),
    )
    return p.Search(bound_seconds=0.1245, gap=0.004, shapes=shapes, solver="highs", given_up=("no pipeline stages",))


def plan(**changes: object) -> p.Plan:
    """The plan, with fields replaced."""
    made = p.Plan(
        version=p.VERSION,
        source=p.Source("hf", "hf:tiny", batch=16, seq=512, config={"model_type": "gpt2", "n_layer": 2, "n_embd": 64}),
        graph="0123456789abcdef",
        cluster=cluster(),
        cluster_fingerprint="fedcba9876543210",
        objective="throughput",
        optimizer="adamw",
        precision=p.Precision("fp32", "float32", "float32", "float32", "float32"),
        semantics="EXACT",
        mesh=(p.MeshAxis("dp", 2, "data", LINKS[0]), p.MeshAxis("tp", 2, "model", LINKS[1])),
        pipeline=p.Pipeline(microbatches=2, micro_batch=4),
        regions=regions(),
        memory_limit_bytes=14_720_000_000,
        predicted=predicted(),
        search=search(),
        pins=("dp=2",),
        runners_up=(p.ShapeRecord({"dp": 2, "tp": 2}, 1, "worse", 0.13, 0.131, 9_000_000_000),),
        notes=("the final projection is tied to the embedding",),
    )
    return msgspec.structs.replace(made, **changes)

"""Plan a large model for a cluster from Python, compare layouts, and take the plan to the tool that you run already.

python examples/plan_cluster.py                                                        Llama-3 70B on 64 H100s, a minute or two
python examples/plan_cluster.py --model hf:gpt2 --cluster rtx-4090:4 --batch 32 --seq 512    another model, another cluster

No GPU, no weights and no process group are needed. It writes `plan.json`, which `shardwright report`, `explain` and `run` take, and
`megatron.args`, the arguments with which Megatron-LM runs the same layout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import shardwright

GIB = 2**30


def show(name: str, plan: shardwright.Plan) -> None:
    """One line about a plan."""
    predicted, pipeline = plan.predicted, plan.pipeline
    axes = " ".join(f"{axis.name}={axis.size}" for axis in plan.mesh)
    print(
        f"{name:12} {predicted.step_seconds:.3g} s a step "
        f"({predicted.step_seconds_low:.3g} to {predicted.step_seconds_high:.3g}), "
        f"{predicted.peak_bytes_per_device / GIB:.1f} of {plan.memory_limit_bytes / GIB:.1f} GiB; "
        f"pp={pipeline.ranks} {axes}, schedule {pipeline.schedule}, {pipeline.microbatches} microbatches"
    )


def main() -> None:
    """Plan freely and under a pin, print both, and write the better one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="hf:llama3-70b")
    parser.add_argument("--cluster", default="h100-sxm:8x8")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--pin", default="tp=8", help="the habit to compare with, such as tp=8 or zero=3")
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()

    def planned(*pins: str) -> shardwright.Plan:
        found = shardwright.plan_model(options.model, options.cluster, batch=options.batch, seq=options.seq, pins=pins)
        return found.plan

    best = planned()
    show("best", best)
    print(f"{'':12} no plan of the search space is faster than {best.search.bound_seconds:.3g} s")
    for cause, held in sorted(best.predicted.memory.items(), key=lambda item: -item[1])[:4]:
        print(f"{'':12} {cause:18} {held / GIB:8.2f} GiB at the peak")
    try:
        show(options.pin, planned(options.pin))
    except shardwright.Infeasible as error:
        print(f"{options.pin:12} {str(error).splitlines()[0]}")

    shardwright.save_plan(best, options.folder / "plan.json")
    again = shardwright.load_plan(options.folder / "plan.json")
    try:
        exported = shardwright.export_plan(again, "megatron")
    except shardwright.UsageError as error:
        print(f"Megatron-LM does not run it: {error}")
        return
    (options.folder / "megatron.args").write_text(exported.text, encoding="utf-8")
    for loss in exported.losses:
        print(f"not in Megatron-LM: {loss}")


if __name__ == "__main__":
    main()

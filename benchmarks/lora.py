"""LoRA fine-tuning: bytes that wait for the backward pass and step time of real models, eager and ours.

    python benchmarks/lora.py [--only TEXT]... [--variants NAME,NAME] [--repeats N] [--batch N]

All linear maps of the blocks have adapters of rank 8 beside frozen weights; embeddings, norms and head are frozen. Each variant
lives in a process of its own with the same weights, batch (of 256 tokens), dtype (float32), optimizer (fused AdamW) and two
threads; one runs at a time. Steps come in the order A B B A of eager and the variant; the ratio is the median of pairs with its
95 % interval. Kept bytes are what the forward pass leaves alive, from allocator events: outputs, saved tensors and what they hang
on, parameters, gradients and states aside.

Variants: `eager`; `ours`, the plan's passes, not compiled; `compiled`, the same compiled; `again`, not compiled, with
`recompute=selective`; `third`, not compiled, with what the planner has run again under the greatest memory limit at which it
keeps at most a third of what eager keeps. Exit status 1 where a loss differs.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from shardwright.errors import Infeasible

from passes import RATE, THREADS, WARMUP, Variant
from runtime import interval

MODELS = ("llama", "gpt2", "bert")
RANK, SCALE = 8, 2.0


# -- in the process of a variant


def adapted(model: Any) -> Any:
    """The model with frozen parameters and adapters beside every linear map of its blocks: y = W x + 2 B A x."""
    from torch import nn

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module, width: int, out: int) -> None:
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(width, RANK, bias=False), nn.Linear(RANK, out, bias=False)
            nn.init.normal_(self.up.weight, std=0.02)

        def forward(self, x: Any) -> Any:
            return self.base(x) + self.up(self.down(x)) * SCALE

    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split(".")):
            width, out = module.weight.shape if kind == "Conv1D" else reversed(module.weight.shape)
            home, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(home), leaf, Adapter(module, width, out))
    return model


def serve(variant: str, case_name: str, batch: int, _: int, link: Connection) -> None:
    """Answer "step" with (seconds, loss), "kept" with bytes and "plan" with a text, until the link closes."""
    import pass_models
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model, inputs = getattr(pass_models, case_name)(batch)
    model = adapted(model).train()
    runner, plan = _runner(variant, model, inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)

    def forward() -> Any:
        found = runner(**inputs)
        return found if isinstance(found, torch.Tensor) else found.loss

    def step() -> tuple[float, float]:
        begin = time.perf_counter()
        loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin, float(loss.detach())

    answers: dict[str, Callable[[], Any]] = {"step": step, "kept": lambda: _kept(forward), "plan": lambda: plan}
    while (asked := link.recv()) is not None:
        link.send(answers[asked]())


def _kept(forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass leaves alive."""
    from shardwright.runtime.monitor import measure_peak

    return measure_peak(forward).retained


def _runner(name: str, model: Any, inputs: dict[str, Any]) -> tuple[Any, str]:
    if name == "eager":
        return model, ""
    from shardwright.api import apply_plan, make_plan

    # One microbatch: what waits for the backward pass waits outside of the call.
    pins = ["passes=auto", "offload=none", f"micro_batch={len(next(iter(inputs.values())))}"]
    if name == "third":
        plan = _third(model, inputs, pins)
    else:
        plan = make_plan(model, inputs, "cpu:1", pins=[*pins, *(("recompute=selective",) if name == "again" else ())])
    text = ",".join(one.name for one in plan.passes)
    return apply_plan(model, inputs, plan, compile=name == "compiled"), text


def _third(model: Any, inputs: dict[str, Any], pins: Sequence[str]) -> Any:
    """The plan under the greatest limit, to a hundredth, at which it is to keep at most a third of what eager keeps."""
    from shardwright.api import make_plan

    allowed = _kept(lambda: model(**inputs).loss) / 3
    whole = make_plan(model, inputs, "cpu:1", pins=pins).predicted
    most, least, found = whole.peak_bytes_per_device, whole.peak_bytes_per_device - whole.memory["saved"], None
    while most - least > whole.memory["saved"] / 100:
        limit = (most + least) // 2
        try:
            plan = make_plan(model, inputs, "cpu:1", pins=pins, memory_limit=limit)
        except Infeasible:
            least = limit
            continue
        if plan.predicted.memory["saved"] <= allowed:
            least, found = limit, plan
        else:
            most = limit
    if found is None:
        raise Infeasible("no plan keeps so little")
    return found


# -- from outside


def compared(case: str, name: str, repeats: int, batch: int) -> tuple[str, bool]:
    """One row of the table, and whether losses agree. Raises RuntimeError where a process died."""
    running = [Variant(each, case, batch, target=serve) for each in ("eager", name)]
    try:
        losses = [[v.ask("step")[1] for _ in range(WARMUP)][-1] for v in running]
        seconds: list[list[float]] = [[], []]
        for _ in range(repeats):
            for i in (0, 1, 1, 0):
                seconds[i].append(running[i].ask("step")[0])
        kept, plan = [v.ask("kept") for v in running], running[1].ask("plan")
    finally:
        for variant in running:
            variant.close()
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    low, high = interval(ratios)
    held = math.isclose(*losses, rel_tol=2e-3)
    median = statistics.median(ratios)
    cells = (
        f"{kept[0] / 2**20:9.1f} {kept[1] / 2**20:9.1f} {kept[1] / kept[0]:6.3f} {median:7.3f} {low:6.3f} {high:6.3f}"
    )
    return f"{case:8}{name:10}{cells}  {plan}{'' if held else '  <- losses differ'}", held


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="models whose name has this in it")
    parser.add_argument("--variants", default="ours,compiled,again", help="which to hold against eager")
    parser.add_argument("--repeats", type=int, default=4, help="times A B B A: two pairs each")
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    columns = f"{'eager MiB':>9} {'ours MiB':>9} {'kept':>6} {'time':>7} {'low':>6} {'high':>6}"
    print(f"{'model':8}{'variant':10}{columns}  plan", flush=True)
    agree = True
    for case in MODELS:
        if options.only and not any(text in case for text in options.only):
            continue
        for name in options.variants.split(","):
            row, held = compared(case, name, options.repeats, options.batch)
            agree &= held
            print(row, flush=True)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

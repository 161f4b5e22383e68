"""Run a plan: the program that torchrun starts on every rank (`python -m shardwright.runtime.execute plan.json ...`).

Rank 0 loads the plan and broadcasts it; every rank rebuilds the model from the plan's source, checks that graph and plan
agree, then trains for some steps and measures. The result is one JSON document, written by rank 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ShardwrightError, UsageError
from ..passes.models import rebuild
from ..planner.plan import Plan
from ..planner.planfile import load_plan, to_plain, write_whole
from ..planner.updates import BACKWARD as IN_BACKWARD
from ..profiles.clock import Watch
from ..profiles.heap import keep_pages
from ..profiles.local import device_name, versions
from .apply import agree, apply, default_device
from .collectives import CommLedger
from .elastic import plan_for_world
from .keeping import Keeping
from .losses import loss_of
from .mesh import check_world, ensure_process_group, leave_process_group, rank, world_size
from .module import ParallelModule
from .monitor import measure_step
from .optimizers import make_optimizer
from .phases import BACKWARD, BOTH, FORWARD, OPTIMIZER, Phases, slowest
from .ranks import gathered
from .tracing import trace_step
from .verify import verify
from .watch import RankFailure, waiting, watched

WARMUP = 2
"""Steps before timing: the first one builds the lowering and the optimizer states."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of one rank; returns the exit status."""
    options = parsed(argv)
    device = default_device()
    made = False
    try:
        made = ensure_process_group(device, options.timeout, ends=True)
        result = run_plan(options, device)
        if rank() == 0:
            _deliver(result, options.result)
            if not result["fits"]:
                print(f"error: {_excess(result)}", file=sys.stderr)
        return 0 if result["fits"] and all(d["ok"] for d in result["verify"]) else 1
    except ShardwrightError as error:
        if error.first if isinstance(error, RankFailure) else rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        if made:
            leave_process_group()


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a rank, as `run_plan` takes them."""
    parser = argparse.ArgumentParser(prog="shardwright run")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--data", type=Path, help="text file; its bytes are the tokens")
    parser.add_argument("--trace", type=Path, help="Chrome trace of one step of rank 0")
    parser.add_argument("--elastic", action="store_true", help="plan again where another number of ranks runs")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds after which a rank counts as lost")
    parser.add_argument("--save", type=Path, help="folder for checkpoints")
    parser.add_argument("--every", type=int, default=0, help="steps between checkpoints (default: one at the end)")
    parser.add_argument("--resume", type=Path, help="folder of checkpoints to go on from")
    parser.add_argument("--result", type=Path, help="where rank 0 writes the result (default: stdout)")
    return parser.parse_args(argv)


def run_plan(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything one rank does; the same dictionary on every rank."""
    given = agree(lambda: load_plan(options.plan))
    plan = given
    if options.elastic and given.ranks != world_size():
        plan = agree(lambda: _planned_again(given))
    check_world(plan.mesh, plan.pipeline.ranks)
    loaded = rebuild(plan.source)
    if device.type == "cpu":
        keep_pages()
    limit = plan.memory_limit_bytes
    found: dict[str, Any] = {
        "plan": str(options.plan), "verify": [], "world_size": world_size(), "memory_limit_bytes": limit, "fits": True,
        "device": device_name(device, world_size()), "versions": versions(), "compiled": bool(options.compile),
    }  # fmt: skip
    if plan is not given:
        found["planned_again"] = to_plain(plan)
    if options.verify:

        def build(model: Any, args: Any, kwargs: Any, plan: Plan, exact: str) -> ParallelModule:
            return apply(model, args, kwargs, plan, device=device, exact=exact)

        differences = verify(loaded.model, loaded.args, loaded.kwargs, plan, build)
        found["verify"] = [d.to_dict() for d in differences]
    if options.steps > 0:
        pm = apply(loaded.model, loaded.args, loaded.kwargs, plan, device=device, compile=options.compile)
        loaded.model.to("meta")  # the plan's own copy is what trains; the original's memory is given back
        found |= _train(pm, plan, lambda start: batches(loaded, plan, options.data, start), options)
        found["fits"] = max(found["peak_bytes"]) <= limit
    return found


def _planned_again(plan: Plan) -> Plan:
    """The plan made again for the ranks that run, on rank 0, which says so."""
    print(f"{plan.ranks} ranks were planned, {world_size()} run: planning again", file=sys.stderr)
    meta = rebuild(plan.source, device="meta")
    made = plan_for_world(plan, world_size(), meta.model, meta.args, meta.kwargs)
    print(f"planned again: {made.notes[-1]}", file=sys.stderr)
    return made


def _excess(result: Mapping[str, Any]) -> str:
    """What a run that took more memory than its plan allows says."""
    peaks, limit = result["peak_bytes"], result["memory_limit_bytes"]
    most = max(peaks)
    return (
        f"rank {peaks.index(most)} held {most:,} bytes at its peak, the plan's limit is {limit:,} "
        f"({result['predicted']['peak_bytes']:,} were predicted); plan again with --memory-limit {2 * limit - most}"
    )


def batches(loaded: Any, plan: Plan, data: Path | None, start: int = 0) -> Iterator[tuple[Any, Any]]:
    """(args, kwargs) of each step from step `start` on: the model's example inputs, or consecutive windows of a text's bytes."""
    if data is None:
        while True:
            yield loaded.args, loaded.kwargs
    ids = loaded.kwargs.get("input_ids")
    if ids is None or "labels" not in loaded.kwargs:
        raise UsageError("--data needs a language model that takes input_ids and labels")
    text = torch.frombuffer(bytearray(data.read_bytes()), dtype=torch.uint8).long()
    batch, seq = ids.shape
    if text.numel() < batch * seq:
        raise UsageError(f"{data} has {text.numel()} bytes; one batch needs {batch * seq}")
    at = start % (text.numel() // (batch * seq)) * batch * seq
    while True:
        if at + batch * seq > text.numel():
            at = 0
        window = text[at : at + batch * seq].view(batch, seq)
        at += batch * seq
        yield loaded.args, {**loaded.kwargs, "input_ids": window, "labels": window.clone()}


def _train(
    pm: ParallelModule, plan: Plan, take: Callable[[int], Iterator[tuple[Any, Any]]], options: argparse.Namespace
) -> dict[str, Any]:
    """Train and measure; `take` gives the batches from the one of a step on."""
    optimizer = make_optimizer(plan.optimizer, pm.parameters())
    if plan.update == IN_BACKWARD:
        pm.update_in_backward(optimizer)
    keeping = Keeping.begin(pm, optimizer, options, WARMUP)
    data, timed = take(keeping.steps), keeping.left(WARMUP)
    losses: list[float] = []
    phases, steps = Phases(pm.device_of_run), list[dict[str, float]]()
    # With several microbatches the call runs forward and backward of all, and backward() hands the gradients out.
    ahead, back = (FORWARD, BACKWARD) if plan.pipeline.microbatches * plan.pipeline.stages == 1 else (BOTH, BOTH)

    @watched()
    def step() -> None:
        args, kwargs = next(data)
        phases.start()
        optimizer.zero_grad()
        loss = loss_of(pm(*args, **kwargs))
        phases.end(ahead)
        loss.backward()
        phases.end(back)
        optimizer.step()
        phases.end(OPTIMIZER)
        losses.append(float(loss.detach()))
        keeping.steps += 1

    seconds, waited = [], []
    for _ in range(timed + WARMUP):
        _barrier()
        watch = Watch(team=world_size() == 1)
        step()
        _barrier()
        span = watch.stop()
        seconds.append(span.seconds)
        waited.append(span.waited)
        steps.append(phases.seconds())
        keeping.between_steps()
    peak = measure_step(step, pm, optimizer, device=pm.device_of_run)
    ledger = CommLedger(pm.axis_names)
    with ledger:
        step()
    if options.trace is not None:
        found = trace_step(step, pm.axis_names)
        if rank() == 0:
            write_whole(options.trace, json.dumps(found))
    keeping.at_end()
    mine = {
        "seconds": seconds[WARMUP:], "waited_seconds": waited[WARMUP:], "peak_bytes": peak.bytes,
        "collectives": _traffic(ledger), "phases": steps[WARMUP:],
    }  # fmt: skip
    return {
        "losses": losses,
        "checkpoints": {"resumed_from": keeping.resumed, "saved_step": keeping.saved},
        **_together(gathered(mine), timed),
        "predicted": {"step_seconds": plan.predicted.step_seconds, "peak_bytes": plan.predicted.peak_bytes_per_device},
    }


def _together(ranks: list[dict[str, Any]], timed: int) -> dict[str, Any]:
    """What all ranks measured in `timed` steps: the slowest rank counts."""
    return {
        "step_seconds": statistics.median(max(r["seconds"][i] for r in ranks) for i in range(timed)),
        "phase_seconds": slowest([r.pop("phases") for r in ranks]),
        "peak_bytes": [r["peak_bytes"] for r in ranks],
        "collectives": ranks[0]["collectives"],
        "ranks": ranks,
    }


def _traffic(ledger: CommLedger) -> list[dict[str, Any]]:
    """Calls and full-tensor bytes by collective and axis."""
    found: dict[tuple[str, str], list[int]] = {}
    for record in ledger.records:
        entry = found.setdefault((record.collective, record.axis), [0, 0])
        entry[0] += 1
        entry[1] += record.bytes
    return [{"collective": c, "axis": a, "count": n, "bytes": b} for (c, a), (n, b) in sorted(found.items())]


def _deliver(result: dict[str, Any], path: Path | None) -> None:
    text = json.dumps(result, indent=1)
    if path is None:
        print(text)
    else:
        write_whole(path, text)


def _barrier() -> None:
    if dist.is_initialized():
        with waiting("barrier"):
            dist.barrier()


if __name__ == "__main__":
    sys.exit(main())

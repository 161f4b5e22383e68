"""Speed of training steps against what torch offers for the same: `torch.compile`, DDP, FSDP2, `parallelize_module`.

    python benchmarks/runtime.py [--only TEXT]... [--repeats N] [--store FILE] [--json] [--layers N --width N ...]

Both models of a comparison live in the same processes, with the same weights, batch, dtype (float32) and optimizer (AdamW as
torch makes it by default); a step is forward, backward, the optimizer's step and zero_grad, and takes as long as its slowest
rank. Steps come in the order A B B A, each pair of neighbours gives one ratio, ours over theirs, and the figure is the median
of these ratios with its 95 % interval (order statistics: no assumption about their distribution). Losses are held against
each other step by step. One process has two threads; two processes have one thread each and talk by gloo.

On a machine that others use too, `cpu` tells more: the ratio of processor seconds, all threads and ranks of a step together.
Exit status 1 where a median is above its limit or losses differ.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime_peers import Size
    from shardwright.planner.plan import Plan

COMPILED, PICKED, PINNED = 1.02, 1.03, 1.05
"""Limits of the ratio: one compiled process; the plan that the planner picks; a scheme pinned alike."""
FREE = ("ddp", "fsdp", "fsdp-kept", "tensor")
"""What the planner's own plan is held against: the quickest of these counts."""
WARMUP, RATE, CASE_SECONDS = 2, 1e-5, 900.0
DATASHEET = "cpu:2"
"""What pinned plans are priced for: nothing is left to measure where the pins decide."""


@dataclass(frozen=True)
class Case:
    """Ours under `pins` against `peers`, of which the quickest counts; the ratio's `limit`, none where it is told only."""

    name: str
    model: str
    ranks: int
    peers: tuple[str, ...]
    pins: str = ""
    limit: float | None = PINNED
    compile: bool = False
    dropout: float = 0.0


def cases() -> list[Case]:
    """All comparisons, by name."""
    found = [
        Case("gpt2 compiled", "gpt2", 1, ("compile",), limit=COMPILED, compile=True),
        Case("gpt2 compiled dropout", "gpt2", 1, ("compile",), limit=COMPILED, compile=True, dropout=0.1),
        Case("llama compiled", "llama", 1, ("compile",), limit=COMPILED, compile=True),
    ]
    found += [Case(f"{m} eager", m, 1, ("eager",), limit=None) for m in ("gpt2", "llama")]
    schemes = (
        ("ddp", "dp=2 zero=0"), ("fsdp", "dp=2 zero=3"), ("fsdp-kept", "dp=2 zero=2"),
        ("tensor", "tp=2 sequence_parallel=off"),
    )  # fmt: skip
    for model in ("gpt2", "llama"):
        found += [Case(f"{model} {peer}", model, 2, (peer,), pins) for peer, pins in schemes]
    found.append(Case("llama tensor-sequence", "llama", 2, ("tensor-sequence",), "tp=2 sequence_parallel=on"))
    return found + [Case(f"{model} picked", model, 2, FREE, limit=PICKED) for model in ("gpt2", "llama")]


@dataclass(frozen=True)
class Steps:
    """Wall seconds (slowest rank) and processor seconds (all ranks) of steps in pairs, ours and theirs, and the losses."""

    wall: Sequence[tuple[float, float]]
    cpu: Sequence[tuple[float, float]]
    losses: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Outcome:
    """One comparison: medians of both in seconds, ratio with its interval, ratio of processor seconds."""

    case: str
    peer: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    cpu: float
    loss_error: float
    limit: float | None
    same: bool
    mesh: str
    others: dict[str, float] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Whether the losses are the same and the median is within its limit."""
        return self.same and (self.limit is None or self.ratio <= self.limit)


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of the median: the k-th value from either end.

    k is the largest with P(B(n, 1/2) < k) <= (1 - level) / 2. Below six values there is none; the extremes are returned.
    """
    ordered, n = sorted(values), len(values)
    below, k = 0.0, 0
    while below + math.comb(n, k) / 2**n <= (1 - level) / 2:
        below += math.comb(n, k) / 2**n
        k += 1
    k = max(k - 1, 0)
    return ordered[k], ordered[n - 1 - k]


def compared(case: Case, peer: str, steps: Steps, mesh: str) -> Outcome:
    """Medians of one pair of models."""
    ratios = [a / b for a, b in steps.wall]
    error = max(abs(a - b) / abs(b) for a, b in steps.losses)
    return Outcome(
        case.name, peer, statistics.median(a for a, _ in steps.wall), statistics.median(b for _, b in steps.wall),
        statistics.median(ratios), *interval(ratios), statistics.median(a / b for a, b in steps.cpu), error, case.limit,
        error <= (0.05 if case.dropout else 1e-4), mesh,
    )  # fmt: skip


def judged(found: Sequence[Outcome]) -> Outcome:
    """The comparison that counts: with the peer that our plan is slowest against, which is the quickest."""
    worst = max(found, key=lambda o: o.ratio)
    others = {o.peer: o.ratio for o in found if o is not worst}
    return Outcome(**{**asdict(worst), "others": others, "same": all(o.same for o in found)})


# -- on the ranks


def run_rank(case: Case, size: Size, repeats: int, folder: Path) -> None:
    """What every process of a case does; rank 0 writes what was measured."""
    import torch
    from runtime_peers import MODELS, PEERS, part
    from shardwright.api import apply_plan
    from shardwright.planner.planfile import load_plan
    from shardwright.profiles.heap import keep_pages
    from shardwright.runtime.mesh import ensure_process_group, leave_process_group, rank

    torch.set_num_threads(2 // case.ranks)
    keep_pages()
    made = ensure_process_group(torch.device("cpu"))
    torch.manual_seed(0)
    model, batch = MODELS[case.model](size, case.dropout)
    ours = apply_plan(model, batch, load_plan(folder / "plan.json"), compile=case.compile)
    found = {}
    for name in case.peers:
        ours.load_state_dict(model.state_dict())
        peer = PEERS[name](copy.deepcopy(model))
        share = 1 if name.startswith("tensor") else case.ranks
        theirs = stepper(peer, part(batch, rank(), share) if share > 1 else batch)
        found[name] = asdict(taken(stepper(ours, batch), theirs, repeats, case.ranks))
        del peer, theirs
    if rank() == 0:
        (folder / "result.json").write_text(json.dumps(found))
    if made:
        leave_process_group()


Step = Callable[[], tuple[float, float, float]]
"""One training step: wall seconds, processor seconds of all threads, the loss."""


def stepper(model: Any, batch: dict[str, Any]) -> Step:
    """Steps of a model in an unmodified loop."""
    import torch
    import torch.distributed as dist

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def step() -> tuple[float, float, float]:
        if dist.is_initialized():
            dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        found = model(**batch)
        loss = found if isinstance(found, torch.Tensor) else found.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - wall, time.process_time() - cpu, loss.item()

    return step


def taken(ours: Step, theirs: Step, repeats: int, ranks: int) -> Steps:
    """Warm-up steps of both, then `repeats` times A B B A: two pairs each."""
    from shardwright.runtime.ranks import gathered

    for _ in range(WARMUP):
        ours(), theirs()
    pairs = []
    for _ in range(repeats):
        first, second = ours(), theirs()
        pairs.append((first, second))
        second, first = theirs(), ours()
        pairs.append((first, second))
    every = gathered(pairs)
    spread = range(len(pairs))

    def over(what: int, join: Callable[[list[float]], float]) -> list[tuple[float, float]]:
        return [(join([r[i][0][what] for r in every]), join([r[i][1][what] for r in every])) for i in spread]

    return Steps(over(0, max), over(1, sum), over(2, statistics.fmean))


# -- from outside


def planned(case: Case, size: Size, store: Path | None) -> Plan:
    """The case's plan: with pins for a data sheet, without for this machine as it is measured."""
    import torch
    from runtime_peers import MODELS
    from shardwright.api import make_plan

    with torch.device("meta"):
        model, batch = MODELS[case.model](size, case.dropout)
    cluster = DATASHEET if case.pins else f"local-cpu:{case.ranks}" if case.ranks > 1 else "cpu:1"
    return make_plan(model, batch, cluster, pins=case.pins.split(), store=store)


def executed(case: Case, size: Size, repeats: int, plan: Plan) -> list[Outcome]:
    """Run one case in processes of its own. Raises RuntimeError."""
    from shardwright.planner.planfile import save_plan

    with tempfile.TemporaryDirectory(prefix="shardwright-") as name:
        folder = Path(name)
        save_plan(plan, folder / "plan.json")
        start = [sys.executable]
        if case.ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
        sizes = [f"--{key}={value}" for key, value in asdict(size).items()]
        command = [*start, __file__, f"--rank-of={case.name}", f"--folder={folder}", f"--repeats={repeats}", *sizes]
        threads = str(2 // case.ranks)
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": interface}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CASE_SECONDS, env=environment, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{case.name}: exit status {done.returncode}\n{done.stderr[-3000:]}")
        found = json.loads((folder / "result.json").read_text())
    mesh = " ".join(f"{a.name}={a.size}" for a in plan.mesh if a.size > 1)
    return [compared(case, peer, Steps(**steps), mesh) for peer, steps in found.items()]


HEAD = f"{'case':24} {'ours s':>8} {'peer s':>8} {'ratio':>7} {'95 % interval':>15} {'limit':>6} {'cpu':>7} {'loss':>8}  peer"


def line(o: Outcome) -> str:
    """One row of the table."""
    limit = f"{o.limit:6.2f}" if o.limit else f"{'':6}"
    rest = "".join(f", {name} {ratio:.3f}" for name, ratio in o.others.items()) + (f" ({o.mesh})" if o.others else "")
    return (
        f"{o.case:24} {o.ours:8.3f} {o.theirs:8.3f} {o.ratio:7.3f} {o.low:7.3f} {o.high:7.3f} {limit} {o.cpu:7.3f}"
        f" {o.loss_error:8.0e}  {o.peer}{rest}{'' if o.held else '  <- not held'}"
    )


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    from runtime_peers import Size

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="cases whose name has this in it")
    parser.add_argument("--repeats", type=int, default=4, help="times A B B A: two pairs each")
    parser.add_argument("--store", type=Path, help="profile store for the planner's own plans (default: a fresh one)")
    parser.add_argument("--json", action="store_true")
    for entry in fields(Size):
        parser.add_argument(f"--{entry.name}", type=int, default=entry.default)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    from runtime_peers import Size

    options = options_of(arguments)
    size = Size(**{entry.name: getattr(options, entry.name) for entry in fields(Size)})
    if options.rank_of is not None:
        run_rank(next(c for c in cases() if c.name == options.rank_of), size, options.repeats, options.folder)
        return 0
    if not options.json:
        print(HEAD, flush=True)
    outcomes = []
    for case in cases():
        if options.only and not any(text in case.name for text in options.only):
            continue
        outcomes.append(judged(executed(case, size, options.repeats, planned(case, size, options.store))))
        if not options.json:
            print(line(outcomes[-1]), flush=True)
    if options.json:
        print(json.dumps([{**asdict(o), "held": o.held} for o in outcomes], indent=1))
    return 0 if all(o.held for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

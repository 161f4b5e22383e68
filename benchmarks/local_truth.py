"""Predicted against measured seconds and bytes of real training steps on this machine.

    python benchmarks/local_truth.py [--store FILE] [--only TEXT]... [--steps N] [--json]

Small models of four families are profiled for one and two processes of `local-cpu` as `shardwright profile` does, into the
profile store FILE (a fresh one where none is given), and planned under pins; each plan is then run for real, as `shardwright run`
does, with warm-up steps. Every process has one core and one thread. The measured step is the median over steps of the slowest
rank, less the time its ranks stood ready but had no processor (other users of the machine; profiles/clock.py), over the half of the
steps that waited least; `wall` is the median with that time in it. A shared machine has slow spells of seconds, in which the same
step takes up to half as long again: all plans run one after the other, twice, and of each the quicker run counts, as
profiles do. Nothing is fitted on these plans. Exit status 1 where a figure misses its target.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from published_errors import spearman

if TYPE_CHECKING:
    from shardwright.planner.plan import Plan

GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 6, "n_embd": 384, "n_head": 6,
    "n_positions": 128, "vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 512,
    "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128,
    "vocab_size": 4096, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "num_hidden_layers": 4, "hidden_size": 384,
    "intermediate_size": 1536, "num_attention_heads": 6, "max_position_embeddings": 128, "vocab_size": 8192,
}  # fmt: skip
VIT = {
    "model_type": "vit", "architectures": ["ViTForImageClassification"], "num_hidden_layers": 6, "hidden_size": 384,
    "intermediate_size": 1536, "num_attention_heads": 6, "image_size": 80, "patch_size": 8, "num_labels": 1000,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One plan: a model, its batch and length, ranks, and pins written with spaces between them."""

    family: str
    config: dict[str, Any]
    batch: int
    seq: int | None
    ranks: int
    pins: str

    @property
    def name(self) -> str:
        return f"{self.family} x{self.ranks} {self.pins}".strip()


CASES = (
    Case("gpt2", GPT2, 8, 128, 1, ""),
    Case("gpt2", GPT2, 8, 128, 1, "micro_batch=2"),
    Case("gpt2", GPT2, 8, 128, 2, "dp=2 zero=0"),
    Case("gpt2", GPT2, 8, 128, 2, "dp=2 zero=2 micro_batch=2"),
    Case("gpt2", GPT2, 8, 128, 2, "tp=2"),
    Case("llama", LLAMA, 8, 128, 1, ""),
    Case("llama", LLAMA, 8, 128, 2, "dp=2 zero=3"),
    Case("llama", LLAMA, 8, 128, 2, "tp=2 sequence_parallel=off"),
    Case("llama", LLAMA, 8, 128, 2, "tp=2 sequence_parallel=on"),
    Case("bert", BERT, 16, 128, 1, "micro_batch=4"),
    Case("bert", BERT, 16, 128, 2, "dp=2 zero=1"),
    Case("bert", BERT, 16, 128, 2, "tp=2 sequence_parallel=on"),
    Case("vit", VIT, 16, None, 1, ""),
    Case("vit", VIT, 16, None, 2, "dp=2 zero=2"),
    Case("vit", VIT, 16, None, 2, "tp=2"),
    Case("gpt2", GPT2, 8, 128, 1, "recompute=full"),
    Case("llama", LLAMA, 8, 128, 2, "dp=2 recompute=selective"),
    Case("gpt2", GPT2, 8, 128, 1, "offload=optimizer"),
)
"""What the runtime's capability mask refuses is listed, without a figure."""

TARGETS = {"median": 0.12, "worst": 0.25, "memory": 0.08, "rank": 0.9}
RUN_SECONDS = 240.0
ROUNDS = 2


@dataclass(frozen=True)
class Outcome:
    """Predicted and measured seconds of a step and bytes at its peak; `refused` says why there are none.

    `wall` is the median step with the waiting in it, `waited` the share of wall time that waiting took, `load` the machine's
    load average at the end.
    """

    case: str
    predicted: float = 0.0
    measured: float = 0.0
    wall: float = 0.0
    waited: float = 0.0
    predicted_bytes: int = 0
    measured_bytes: int = 0
    load: float = 0.0
    refused: str = ""
    seconds: dict[str, float] | None = None
    phases: dict[str, float] | None = None

    @property
    def error(self) -> float:
        """Relative error of the predicted step, signed."""
        return self.predicted / self.measured - 1.0

    @property
    def memory_error(self) -> float:
        """Relative error of the predicted peak, signed."""
        return self.predicted_bytes / self.measured_bytes - 1.0


@contextmanager
def own_cores(ranks: int) -> Iterator[None]:
    """As many cores as ranks, so that every rank has one thread: threads of one rank wait for each other out of sight."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:ranks])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def profiled(cases: Sequence[Case], folder: Path, store: Path, seconds: float) -> None:
    """What `shardwright profile` measures for each model of `cases`, once."""
    from shardwright.passes.profiling import profile
    from shardwright.profiles.store import Store

    for case in {c.family: c for c in cases}.values():
        config = folder / f"{case.family}.json"
        config.write_text(json.dumps(case.config))
        profile(
            f"local-cpu:{case.ranks}", f"hf:{config}", store=Store(store), budget_seconds=seconds, batch=case.batch,
            seq=case.seq,
        )  # fmt: skip


def planned(cases: Sequence[Case], folder: Path, store: Path) -> dict[str, Plan | str]:
    """Each case's plan by name, or why there is none."""
    from shardwright.api import plan_model
    from shardwright.errors import ShardwrightError

    found: dict[str, Plan | str] = {}
    for case in cases:
        config = folder / f"{case.family}.json"
        config.write_text(json.dumps(case.config))
        try:
            found[case.name] = plan_model(
                f"hf:{config}", f"local-cpu:{case.ranks}", batch=case.batch, seq=case.seq, pins=case.pins.split(), store=store
            ).plan  # fmt: skip
        except ShardwrightError as error:
            found[case.name] = f"not supported by the runtime: {error}"
    return found


def executed(plans: Sequence[Plan], ranks: int, folder: Path, steps: int) -> list[dict[str, Any]]:
    """What running the plans one after the other on one set of ranks measured, by torchrun. Raises RuntimeError."""
    from shardwright.planner.planfile import save_plan

    for i, plan in enumerate(plans):
        save_plan(plan, folder / f"plan{i}.json")
        (folder / f"result{i}.json").unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__,
        f"--ranks-of={folder}", f"--count={len(plans)}", f"--steps={steps}",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_SECONDS * len(plans), env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return [json.loads((folder / f"result{i}.json").read_text()) for i in range(len(plans))]


def run_ranks(folder: Path, count: int, steps: int) -> None:
    """What each rank does: every plan as `shardwright run` does it."""
    import torch
    from shardwright.runtime.execute import parsed, run_plan
    from shardwright.runtime.mesh import ensure_process_group, leave_process_group, rank

    device = torch.device("cpu")
    torch.set_num_threads(1)
    made = ensure_process_group(device)
    for i in range(count):
        options = parsed([str(folder / f"plan{i}.json"), f"--steps={steps}"])
        result = run_plan(options, device)
        if rank() == 0:
            (folder / f"result{i}.json").write_text(json.dumps({**result, "load": os.getloadavg()[0]}))
    if made:
        leave_process_group()


def compared(case: Case, plan: Plan, found: dict[str, Any]) -> Outcome:
    """Prediction and measurement of one plan."""
    ranks = found["ranks"]
    steps = range(len(ranks[0]["seconds"]))
    walls = [max(r["seconds"][i] for r in ranks) for i in steps]
    waits = [max(r["waited_seconds"][i] for r in ranks) for i in steps]
    calm = sorted(steps, key=lambda i: waits[i] / walls[i])[: max(1, len(steps) // 2)]
    return Outcome(
        case.name, plan.predicted.step_seconds, statistics.median(walls[i] - waits[i] for i in calm),
        statistics.median(walls), sum(waits[i] for i in calm) / sum(walls[i] for i in calm),
        plan.predicted.peak_bytes_per_device, max(found["peak_bytes"]), found["load"],
        seconds=dict(plan.predicted.seconds), phases=found.get("phase_seconds"),
    )  # fmt: skip


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Median and worst error of step time, worst memory error, rank correlation."""
    run = [o for o in outcomes if not o.refused]
    return {
        "plans": len(run),
        "median": statistics.median(abs(o.error) for o in run),
        "worst": max(abs(o.error) for o in run),
        "bias": statistics.median(o.error for o in run),
        "memory": max(abs(o.memory_error) for o in run),
        "memory_median": statistics.median(abs(o.memory_error) for o in run),
        "rank": spearman([o.predicted for o in run], [o.measured for o in run]) if len(run) > 1 else 1.0,
    }


def held(found: dict[str, float]) -> bool:
    """Whether every target is met."""
    return all(found[k] <= TARGETS[k] for k in ("median", "worst", "memory")) and found["rank"] >= TARGETS["rank"]


def line(o: Outcome) -> str:
    if o.refused:
        return f"{o.case:40} {o.refused.split(';')[0][:90]}"
    return (
        f"{o.case:40} {o.predicted:8.3f} {o.measured:8.3f} {o.error:+7.1%}  {o.wall:7.3f} {o.waited:5.0%}"
        f"  {o.predicted_bytes / 1e6:8.1f} {o.measured_bytes / 1e6:8.1f} {o.memory_error:+7.1%}  {o.load:5.1f}"
    )


HEAD = (
    f"{'plan':40} {'predict':>8} {'measure':>8} {'error':>7}  {'wall':>7} {'wait':>5}  {'pred MB':>8} {'meas MB':>8} {'error':>7}"
    f"  {'load':>5}"
)


def measure(
    cases: Sequence[Case], store: Path | None, steps: int, seconds: float, show: Callable[[Outcome], None]
) -> list[Outcome]:
    """Profile each model for `seconds`, plan and run `cases`, those of one number of ranks together; `show` hears of each."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="shardwright-") as name:
        folder = Path(name)
        for ranks in sorted({case.ranks for case in cases}):
            mine = [case for case in cases if case.ranks == ranks]
            with own_cores(ranks):
                kept = store or folder / "profiles.sqlite"
                if seconds:
                    profiled(mine, folder, kept, seconds)
                plans = planned(mine, folder, kept)
                good = [case for case in mine if not isinstance(plans[case.name], str)]
                runs = [executed([plans[c.name] for c in good], ranks, folder, steps) for _ in range(ROUNDS) if good]
            found = {
                case.name: min((compared(case, plans[case.name], r) for r in results), key=lambda o: o.measured)
                for case, *results in zip(good, *runs, strict=True)
            }
            for case in mine:
                outcomes.append(found.get(case.name) or Outcome(case.name, refused=str(plans[case.name])))
                show(outcomes[-1])
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="profile store to use (default: a fresh one)")
    parser.add_argument("--only", action="append", default=[], help="cases whose name has this in it")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--profile-seconds", type=float, default=120.0, help="measuring of each model (0: plan's own alone)"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ranks-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranks_of is not None:
        run_ranks(options.ranks_of, options.count, options.steps)
        return 0
    chosen = [c for c in CASES if not options.only or any(text in c.name for text in options.only)]
    if not options.json:
        print(HEAD, flush=True)
    outcomes = measure(
        chosen,
        options.store,
        options.steps,
        options.profile_seconds,
        lambda o: None if options.json else print(line(o), flush=True),
    )
    found = summary(outcomes)
    if options.json:
        print(json.dumps({"summary": found, "targets": TARGETS, "plans": [asdict(o) for o in outcomes]}, indent=1))
    else:
        print("  ".join(f"{k} {v:.3g}" for k, v in found.items()))
    return 0 if held(found) else 1


if __name__ == "__main__":
    sys.exit(main())

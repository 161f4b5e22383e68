"""How much slower other planners' plans are, in the same prices.

    python benchmarks/planners.py [--case NAME]... [--peer NAME]... [--json]

Each case is planned by us and by every peer of peers.py, which says what is modelled of each and where it is from. All plans are
priced by one simulator and one memory model. Every peer's plan is a member of our space, so none may be faster than the bound
that ours proved; where one is, it is listed as a violation, and the command exits with 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_desk import Desk, Planned
from peers import PEERS, Peer
from run_jobs import one_thread
from run_models import config_of
from shardwright.api import cluster_of
from shardwright.errors import ShardwrightError
from shardwright.job import Clock, Job
from shardwright.passes.models import Loaded, load_model, rebuild
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan, Source
from shardwright.planner.precision import choose_precision
from shardwright.planner.solve import make_bench

HERE = Path(__file__).resolve().parent
SLACK = 1e-9
"""Relative difference below which two step times are equal."""


@dataclass(frozen=True)
class Case:
    """A model (a name as on the command line, or a Hugging Face config), a cluster, the batch, and a limit on memory per device."""

    name: str
    model: str | Mapping[str, Any]
    cluster: str
    batch: int
    seq: int | None = None
    memory_limit: str | None = None

    def load(self) -> Loaded:
        """The model on the meta device."""
        if isinstance(self.model, str):
            return load_model(self.model, batch=self.batch, seq=self.seq)
        return rebuild(Source("hf", self.name, self.batch, self.seq, config=dict(self.model)), device="meta")


def _sizes(family: str, layers: int, hidden: int, ffn: int, heads: int, vocab: int, seq: int) -> dict[str, Any]:
    sizes = {"layers": layers, "hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": heads, "vocab": vocab}
    return config_of({"family": family}, sizes, seq, 0.1)


GPT2_XL = _sizes("GPT", 48, 1600, 6400, 25, 50257, 1024)
BERT_LARGE = _sizes("BERT", 24, 1024, 4096, 16, 30522, 512)
T5_3B = {**_sizes("T5", 24, 1024, 16384, 32, 32128, 512), "d_kv": 128}
VIT_HUGE = {
    "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 1280, "num_hidden_layers": 32,
    "num_attention_heads": 16, "intermediate_size": 5120, "patch_size": 14, "image_size": 224,
}  # fmt: skip

CASES = (
    Case("gpt2-xl-8", GPT2_XL, "a100-sxm-40gb:8", 64, 1024),
    Case("llama3-8b-8", "hf:llama3-8b", "a100-sxm-80gb:8", 64, 4096),
    Case("llama3-8b-64", "hf:llama3-8b", "h100-sxm:8x8", 512, 4096),
    Case("llama3-70b-64", "hf:llama3-70b", "h100-sxm:8x8", 256, 4096),
    Case("llama3-70b-512", "hf:llama3-70b", "h100-sxm:8x64", 1024, 8192),
    Case("mixtral-8x7b-64", "hf:mixtral-8x7b", "h100-sxm:8x8", 512, 4096),
    Case("t5-3b-32", T5_3B, "v100-sxm-32gb:8x4", 256, 512),
    Case("bert-large-16", BERT_LARGE, "rtx-3090:4x4", 1024, 512),
    Case("vit-huge-16", VIT_HUGE, "a100-pcie-40gb:4x4", 4096),
    Case("unet-16", f"{HERE / 'models' / 'unet.py'}:unet", "l4:8x2", 256),
)


@dataclass(frozen=True)
class Answer:
    """One peer's plan in one case. `ratio` is its seconds over ours, 0 where it has no plan; `violates`: it is faster than our
    bound; `told` is what it chose."""

    case: str
    peer: str
    seconds: float = 0.0
    ratio: float = 0.0
    peak_bytes: int = 0
    told: str = "does not fit"
    violates: bool = False
    search_seconds: float = 0.0


def job_of(case: Case) -> Job:
    """A case, captured and priced."""
    loaded, cluster = case.load(), cluster_of(case.cluster, case.memory_limit)
    return Job.create(
        loaded.model, loaded.args, loaded.kwargs, cluster, parse_pins(()), choose_precision(cluster.device), loaded.source,
        optimizer="adamw", objective="throughput", loss_fn=None, store=None, clock=Clock(),
    )  # fmt: skip


def compare(name: str, job: Job, peers: Sequence[Peer] = PEERS) -> Iterator[Answer]:
    """Our plan of a job, then every peer's. Raises ShardwrightError where we have none."""
    start = time.perf_counter()
    plan = job.solve()
    yield _ours(name, plan, time.perf_counter() - start)
    for peer, desk in zip(peers, desks(job, peers), strict=True):
        start = time.perf_counter()
        found = peer.plan(desk)
        yield _answer(name, peer, plan, found, time.perf_counter() - start)


def desks(job: Job, peers: Iterable[Peer]) -> Iterator[Desk]:
    """One desk for the peers that see the host and one for the others, with the same designs of regions."""
    made: dict[bool, Desk] = {}
    for peer in peers:
        tiers = peer.tiers and job.cluster.host is not None
        if tiers not in made:
            bench, shapes = make_bench(job.outline, job.cluster, job.prices, job.request, tiers=tiers)
            for other in made.values():
                bench.fronts = other.bench.fronts
            made[tiers] = Desk(bench, shapes)
        yield made[tiers]


def _ours(case: str, plan: Plan, seconds: float) -> Answer:
    pipeline = plan.pipeline
    mesh = " ".join(f"{a.name}={a.size}" for a in plan.mesh)
    told = f"pp={pipeline.ranks} {mesh} ep={pipeline.experts} {pipeline.schedule} x{pipeline.chunks}, "
    told += f"{pipeline.microbatches} x {pipeline.micro_batch}, gap {plan.search.gap:.2%}"
    return Answer(
        case, "shardwright", plan.predicted.step_seconds, 1.0, plan.predicted.peak_bytes_per_device, told,
        search_seconds=seconds,
    )  # fmt: skip


def _answer(case: str, peer: Peer, plan: Plan, found: Planned | None, seconds: float) -> Answer:
    if found is None:
        return Answer(case, peer.name, search_seconds=seconds)
    return Answer(
        case, peer.name, found.seconds, found.seconds / plan.predicted.step_seconds, found.peak_bytes, told(found),
        found.seconds < plan.search.bound_seconds * (1 - SLACK), seconds,
    )  # fmt: skip


def told(found: Planned) -> str:
    """What a peer chose: its shape, and how many layers take which style, recompute policy, ZeRO level and offload."""
    ways: dict[str, int] = {}
    for o in found.plan.options:
        name = f"{o.style}/{o.policy or 'mixed'}/z{o.zero}" + (f"/{o.offload}" if o.offload else "")
        ways[name] = ways.get(name, 0) + 1
    most = sorted(ways.items(), key=lambda pair: (-pair[1], pair[0]))[:3]
    return f"{found.plan.shape.told()}: " + ", ".join(f"{n} {name}" for name, n in most)


def summary(found: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """By peer: cases, those it has a plan for, median and worst ratio, violations."""
    names = dict.fromkeys(a.peer for a in found if a.peer != "shardwright")
    made = {}
    for name in names:
        mine = [a for a in found if a.peer == name]
        ratios = [a.ratio for a in mine if a.seconds]
        made[name] = {
            "cases": len(mine), "plans": len(ratios), "median": statistics.median(ratios) if ratios else 0.0,
            "worst": max(ratios, default=0.0), "violations": sum(a.violates for a in mine),
        }  # fmt: skip
    return made


def show(found: Sequence[Answer]) -> None:
    """Print a table by case, then one by peer."""
    print(f"{'case':17}{'planner':13}{'seconds':>9}{'ratio':>8}{'GB':>7}{'search':>8}  plan")
    for a in found:
        figures = (
            f"{a.seconds:9.3f}{a.ratio:8.3f}{a.peak_bytes / 1e9:7.1f}" if a.seconds else f"{'-':>9}{'-':>8}{'-':>7}"
        )
        print(f"{a.case:17}{a.peer:13}{figures}{a.search_seconds:7.1f}s  {a.told}{'  VIOLATION' if a.violates else ''}")
    print(f"\n{'planner':13}{'plans':>9}{'median':>9}{'worst':>9}{'violations':>12}")
    for name, row in summary(found).items():
        plans = f"{row['plans']:.0f}/{row['cases']:.0f}"
        print(f"{name:13}{plans:>9}{row['median']:9.3f}{row['worst']:9.3f}{row['violations']:12.0f}")


def _line(a: Answer) -> str:
    figures = f"{a.seconds:9.3f}{a.ratio:8.3f}{a.peak_bytes / 1e9:7.1f}" if a.seconds else f"{'-':>9}{'-':>8}{'-':>7}"
    return f"{a.case:17}{a.peer:13}{figures}{a.search_seconds:7.1f}s  {a.told}{'  VIOLATION' if a.violates else ''}"


def main() -> None:
    """Compare, print; exits with 1 where a peer is faster than our bound, or we have no plan."""
    parser = argparse.ArgumentParser(description="Other planners' plans in the same prices.")
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES], help="only this case (repeatable)")
    parser.add_argument("--peer", action="append", choices=[p.name for p in PEERS], help="only this peer (repeatable)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    one_thread()
    peers = [p for p in PEERS if given.peer is None or p.name in given.peer]
    found: list[Answer] = []
    failed = False
    for case in CASES:
        if given.case is not None and case.name not in given.case:
            continue
        try:
            for answer in compare(case.name, job_of(case), peers):
                found.append(answer)
                print(_line(answer), file=sys.stderr)
        except ShardwrightError as error:
            failed = True
            print(f"{case.name}: no plan of ours: {error}", file=sys.stderr)
    if given.json:
        print(json.dumps({"planners": summary(found), "answers": [asdict(a) for a in found]}, indent=1))
    else:
        show(found)
    if failed or any(a.violates for a in found):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Measured gains of published runs against the planner's own prices: captured models, pinned configurations, whole steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest
from shardwright.job import Clock, Job
from shardwright.passes.models import rebuild
from shardwright.planner.pins import Pins, parse_pins
from shardwright.planner.plan import Plan, Source
from shardwright.planner.precision import choose_precision
from shardwright.profiles.devices import parse_cluster


@dataclass(frozen=True)
class Gpt:
    """A row of table 3 of Korthikanti et al. 2022, tp=8 throughout, and its seconds per iteration of table 5.

    `full`: tensor parallel with full recompute; `new`: sequence parallel with selective recompute.
    """

    layers: int
    hidden: int
    heads: int
    pp: int
    vpp: int
    batch: int
    micro_batch: int
    full: float
    new: float

    @property
    def devices(self) -> int:
        return 8 * self.pp


RUNS = {
    "22B": Gpt(48, 6144, 64, 1, 1, 4, 4, 1.42, 1.10),
    "175B": Gpt(96, 12288, 96, 8, 3, 64, 1, 18.13, 13.75),
    "530B": Gpt(105, 20480, 128, 35, 3, 280, 1, 49.05, 37.83),
    "1T": Gpt(128, 25600, 160, 64, 1, 512, 1, 94.42, 71.49),
}
SEQUENCE, VOCABULARY = 2048, 51200
FULL, NEW = ("sequence_parallel=off", "recompute=full"), ("sequence_parallel=on", "recompute=selective")


@cache
def job(name: str) -> Job:
    """A GPT with dropout on A100 of 80 GB, eight a node with eight links of 200 Gb/s, as in section 6 of the paper."""
    run = RUNS[name]
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu", "n_layer": run.layers,
        "n_embd": run.hidden, "n_head": run.heads, "n_positions": SEQUENCE, "vocab_size": VOCABULARY,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    source = Source("hf", name, run.batch, SEQUENCE, config=config)
    cluster = parse_cluster("a100-sxm-80gb:8" + (f"x{run.pp}@1600Gbps" if run.pp > 1 else ""))
    loaded = rebuild(source, device="meta")
    precision = choose_precision(cluster.device, recipe="megatron")
    return Job.create(
        loaded.model, loaded.args, loaded.kwargs, cluster, Pins(), precision, source, optimizer="adamw",
        objective="throughput", loss_fn=None, store=None, clock=Clock(),
    )  # fmt: skip


@cache
def plan(name: str, more: tuple[str, ...]) -> Plan:
    """The plan of the paper's configuration, with attention as the separate kernels of its time."""
    run, asked = RUNS[name], job(name)
    pins = ["tp=8", f"pp={run.pp}", f"micro_batch={run.micro_batch}", "attention=math", *more]
    if run.pp > 1:
        pins += [f"vpp={run.vpp}", "schedule=interleaved" if run.vpp > 1 else "schedule=1f1b"]
    return replace(asked, request=replace(asked.request, pins=parse_pins(pins))).solve()


@pytest.fixture(params=["22B", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("175B", "530B", "1T"))])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each run in turn; captures of the larger ones take 10 s and more."""
    yield request.param
    job.cache_clear()
    plan.cache_clear()


def test_sequence_parallelism_and_selective_recompute_against_full_recompute(name: str) -> None:
    """Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models"), table 5: throughput rises by
    29.0, 31.8, 29.7 and 32.1 %. Held to within 10 points of it, and steps to within 20 % of the measured seconds.

    Predicted: 38.7, 37.8, 34.6 and 36.0 %. Ops are priced one by one, and Megatron fuses bias, dropout and addition, and scale,
    mask and softmax: what full recompute runs again, and what every tensor-parallel rank runs whole, is dearer here by that.
    """
    run = RUNS[name]
    full, new = (plan(name, pins).predicted.step_seconds for pins in (FULL, NEW))
    assert full > new
    assert full / new - 1 == pytest.approx(run.full / run.new - 1, abs=0.10)
    assert full == pytest.approx(run.full, rel=0.20)
    assert new == pytest.approx(run.new, rel=0.20)
    for pins in (FULL, NEW):
        assert plan(name, pins).predicted.peak_bytes_per_device < 80e9

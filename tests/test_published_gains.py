"""Measured gains of published runs against the planner's own prices: captured models, pinned configurations, whole steps."""

from __future__ import annotations

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
def plan(name: str, more: tuple[str, ...], memory_bytes: int = int(80e9 * 0.92)) -> Plan:
    """The plan of the paper's configuration, with attention as the separate kernels of its time."""
    run, asked = RUNS[name], job(name)
    pins = ["tp=8", f"pp={run.pp}", f"micro_batch={run.micro_batch}", "attention=math", *more]
    if run.pp > 1:
        pins += [f"vpp={run.vpp}", "schedule=interleaved" if run.vpp > 1 else "schedule=1f1b"]
    return replace(
        asked, request=replace(asked.request, pins=parse_pins(pins), memory_limit_bytes=memory_bytes)
    ).solve()


LARGER = [pytest.param(name, marks=pytest.mark.nightly) for name in RUNS if name != "22B"]
"""Captures of these take 10 s and more each."""


@pytest.mark.parametrize("name", ["22B", *LARGER])
def test_sequence_parallelism_and_selective_recompute_against_full_recompute(name: str) -> None:
    """Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models"), table 5: throughput rises by
    29.0, 31.8, 29.7 and 32.1 %. Held to within 10 points of it, and steps to within 20 % of the measured seconds.

    Predicted: 38.7, 37.8, 34.6 and 36.0 %. They are higher because the plan keeps what sequence parallelism gathers for the
    products while it fits, which Megatron gathers again (section 4.2.2; 5 points of the 22B), and because ops are priced one by
    one: what full recompute runs again is dearer here than Megatron's fused bias, dropout and addition.
    """
    run = RUNS[name]
    full, new = (plan(name, pins).predicted.step_seconds for pins in (FULL, NEW))
    assert full > new
    assert full / new - 1 == pytest.approx(run.full / run.new - 1, abs=0.10)
    assert full == pytest.approx(run.full, rel=0.20)
    assert new == pytest.approx(run.new, rel=0.20)
    for pins in (FULL, NEW):
        assert plan(name, pins).predicted.peak_bytes_per_device < 80e9


def layer_seconds(sequence: str, recompute: str) -> float:
    """A layer's share of the step of the 22B, all but the optimizer, with memory for everything."""
    found = plan("22B", (f"sequence_parallel={sequence}", f"recompute={recompute}"), 10**12).predicted.seconds
    return (found["compute"] + found["activation_communication"] + found["recompute"]) / RUNS["22B"].layers


@pytest.mark.parametrize(
    ("sequence", "recompute", "overhead"),
    [("off", "full", 0.39), ("off", "selective", 0.07), ("on", "none", -0.03), ("on", "selective", 0.04)],
)
def test_overheads_of_a_layer(sequence: str, recompute: str, overhead: float) -> None:
    """Korthikanti et al. 2022, table 4: one layer of the 22B forward and backward, 19.6 ms without either technique.

    Predicted: 40, 9, -10 and -1 % of 24 ms.
    """
    plain = layer_seconds("off", "none")
    assert plain == pytest.approx(0.0196, rel=0.25)
    assert layer_seconds(sequence, recompute) / plain - 1 == pytest.approx(overhead, abs=0.08)

"""Loss, gradients and parameters after three optimizer steps against the user's eager module, by model and plan."""

from __future__ import annotations

import math
from typing import Any

import pytest
from models import FAMILIES, FURTHER
from pool import Pool
from running import differences, plan_of
from shardwright.errors import PinError

MATRIX = (
    *FAMILIES, "bert-classify", "gpt2-6heads", "llama-3kv", "llama-ignored", "mlp", "loss-fn", "tied", "adapter", "teacher",
)  # fmt: skip
PINS = (
    "dp=2", "tp=2", "dp=2 zero=0", "dp=2 zero=1", "dp=2 zero=2", "dp=2 zero=3", "tp=2 sequence_parallel=on", "",
    "dp=2 tp=2", "dp=4 zero=0", "dp=4 zero=1", "dp=4 zero=2", "dp=4 zero=3",
)  # fmt: skip
"""Pin sets; "" is free choice."""

SAMPLE = [
    ("llama", "tp=2 sequence_parallel=on dtype=fp32", 1), ("llama", "", 1), ("llama", "dp=2 zero=3 dtype=bf16", 1),
    ("bert", "dp=2 zero=2 dtype=fp32", 4), ("llama-3kv", "tp=2", 1), ("llama-ignored", "dp=2", 4), ("mlp", "tp=2", 4),
    ("loss-fn", "dp=2 zero=2", 4), ("teacher", "dp=2 zero=2", 1),
]  # fmt: skip
"""(case, pins, microbatches) run every time."""

MORE = [
    ("gpt2", "dp=2", 1), ("gpt2", "dp=2 tp=2 zero=3", 1), ("tied", "dp=2 tp=2 zero=1", 1), ("adapter", "tp=2", 1),
    ("gpt2", "tp=2", 4), ("llama", "tp=2", 1), ("bert", "dp=2 tp=2", 1), ("vit", "tp=2", 1), ("bert-classify", "dp=2 zero=3", 1),
    ("adapter", "dp=2 zero=3", 4), ("phi3", "tp=2", 1), ("swin", "dp=2", 1), ("llama", "dp=4 zero=3", 4), ("vit", "dp=2 zero=1", 4),
    ("gpt2-6heads", "tp=4", 1), ("t5", "tp=2", 1), ("albert", "dp=2 zero=3", 2),
]  # fmt: skip
"""As `SAMPLE`, with the default dtype, nightly."""


def ranks_of(pins: str) -> int:
    """Product of dp and tp; 2 where neither is pinned."""
    sizes = [int(pin[3:]) for pin in pins.split() if pin[:3] in ("dp=", "tp=")]
    return math.prod(sizes) if sizes else 2


def pinned(pins: str, batch: int, microbatches: int) -> str:
    """The pins with `micro_batch` such that a step has so many microbatches."""
    if microbatches == 1:
        return pins
    data = next((int(p[3:]) for p in pins.split() if p.startswith("dp=")), 1 if "tp=" in pins else ranks_of(pins))
    return f"{pins} micro_batch={batch // data // microbatches}"


def check(name: str, pins: str, microbatches: int, pools: dict[int, Pool], **options: Any) -> None:
    world = ranks_of(pins)
    batch = 16 if world == 4 else 8
    pins = pinned(pins, batch, microbatches)
    plan = plan_of(name, pins, world, batch, **options)
    found = pools[world].run(differences, name, plan, batch)
    assert all(answer == found[0] for answer in found)
    wrong = [d for d in found[0] if not d["ok"]]
    assert not wrong, (wrong, plan.mesh, plan.pipeline)
    expected = {("float64", "loss"), ("float64", "gradient"), ("float64", "parameter after 3 steps")}
    if "dtype=fp32" in pins:
        expected |= {("float32", "loss"), ("float32", "gradient")}
    assert {(d["dtype"], d["kind"]) for d in found[0]} == expected


@pytest.mark.parametrize(("name", "pins", "microbatches"), SAMPLE)
def test_sample(name: str, pins: str, microbatches: int, pools: dict[int, Pool]) -> None:
    check(name, pins, microbatches, pools)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "pins", "microbatches"), MORE)
def test_more(name: str, pins: str, microbatches: int, pools: dict[int, Pool]) -> None:
    check(name, pins, microbatches, pools)


@pytest.mark.nightly
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("pins", PINS)
@pytest.mark.parametrize("name", MATRIX)
def test_matrix(name: str, pins: str, microbatches: int, pools: dict[int, Pool]) -> None:
    if name == "vit" and "sequence_parallel=on" in pins:
        with pytest.raises(PinError, match="17 positions"):
            check(name, f"{pins} dtype=fp32", microbatches, pools)
        return
    check(name, f"{pins} dtype=fp32", microbatches, pools)


@pytest.mark.nightly
@pytest.mark.parametrize("pins", ["tp=2", "dp=2 zero=3 micro_batch=2", "dp=2 tp=2 zero=1", ""])
@pytest.mark.parametrize("name", FURTHER)
def test_further_families(name: str, pins: str, pools: dict[int, Pool]) -> None:
    if name == "resnet" and "micro_batch" in pins:
        with pytest.raises(PinError, match="mixes samples"):
            check(name, f"{pins} dtype=fp32", 1, pools)
        return
    check(name, f"{pins} dtype=fp32", 1, pools)


def test_sequence_parallel_refuses_an_odd_number_of_patches() -> None:
    with pytest.raises(PinError, match="197"):
        plan_of("vit-197", "tp=2 sequence_parallel=on", 2)

"""Activation bytes of a transformer layer against the formulas of Korthikanti et al. 2022 ("Reducing Activation Recomputation in
Large Transformer Models", equations 1, 2 and 4): a captured GPT-2 layer of the 22B model's sizes, in bfloat16 with dropout.

    one rank                          s b h (34 + 5 a s / h)
    tensor parallel, t ranks          s b h (10 + 24 / t + 5 a s / (h t))
    and sequence parallel             s b h / t (34 + 5 a s / h)
    attention run again (selective)   the same without 5 a s / h
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from shardwright.passes.kernels import dropping_attention
from shardwright.passes.prepare import prepare
from shardwright.planner.attention import byte_masks, math_attention
from shardwright.planner.fronts import Fronts, copies
from shardwright.planner.memory import Setting
from shardwright.planner.part import chain
from shardwright.planner.pins import Pins
from shardwright.planner.precision import RECIPES
from shardwright.planner.prices import Prices
from shardwright.planner.residual import residual_factors
from shardwright.profiles.devices import parse_cluster

S, B, H, A = 2048, 1, 6144, 64
SCORES = 5 * A * S / H
CLOSE = 0.005
"""The formulas leave out the statistics of norms."""


@functools.cache
def fronts() -> Fronts:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=H, n_head=A, n_layer=2, n_positions=S, vocab_size=128, bos_token_id=0, eos_token_id=0,
        activation_function="gelu", use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = GPT2LMHeadModel(config).to(torch.bfloat16).train()
        ids = torch.zeros(B, S, dtype=torch.long)
    summary = prepare(model, (), {"input_ids": ids, "labels": ids}, "bfloat16")
    dropping = dropping_attention(summary.calls)
    assert len(dropping) == 2
    outline = byte_masks(math_attention(summary.outline, dropping))
    prices = Prices(parse_cluster("a100-sxm-80gb:8"), "bfloat16")
    setting = Setting(RECIPES["megatron"].precision(), "adamw")
    return Fronts(chain(outline), prices, Pins(), setting, residual_factors(outline))


def saved(ways: int, style: str, policy: str) -> float:
    """Bytes a layer keeps, in units of s b h. What is gathered for a product is kept as its shard (section 4.2.2)."""
    bench = fronts().bench(1, ways, 1)
    (named, *_) = (named for named, _ in fronts().numbers(1, ways, 1) if (named.style, named.policy) == (style, policy))
    numbers = bench.measure(replace(named.design, regather=named.design.regather | copies(bench, named.design)))
    assert numbers is not None
    return numbers.saved / (S * B * H)


@pytest.mark.parametrize(("policy", "scores"), [("none", SCORES), ("selective", 0.0)])
def test_one_rank(policy: str, scores: float) -> None:
    assert saved(1, "single", policy) == pytest.approx(34 + scores, rel=CLOSE)


@pytest.mark.parametrize("ways", [2, 8])
@pytest.mark.parametrize(("policy", "scores"), [("none", SCORES), ("selective", 0.0)])
def test_tensor_parallel(ways: int, policy: str, scores: float) -> None:
    assert saved(ways, "tensor", policy) == pytest.approx(10 + (24 + scores) / ways, rel=CLOSE)


@pytest.mark.parametrize("ways", [2, 8])
@pytest.mark.parametrize(("policy", "scores"), [("none", SCORES), ("selective", 0.0)])
def test_tensor_and_sequence_parallel(ways: int, policy: str, scores: float) -> None:
    assert saved(ways, "tensor+sequence", policy) == pytest.approx((34 + scores) / ways, rel=CLOSE)


@pytest.mark.parametrize(("policy", "scores"), [("none", SCORES), ("selective", 0.0)])
def test_both_are_among_the_designs(policy: str, scores: float) -> None:
    """Copies kept, and gathered again as the formula has it."""
    found = [n for named, n in fronts().numbers(1, 8, 1) if (named.style, named.policy) == ("tensor+sequence", policy)]
    kept, again = sorted(found, key=lambda n: n.again)
    assert again.saved / (S * B * H) == pytest.approx((34 + scores) / 8, rel=CLOSE)
    assert kept.saved > again.saved
    assert kept.again < again.again


def test_full_recompute_keeps_the_input_of_the_layer() -> None:
    assert saved(1, "single", "full") == pytest.approx(2, rel=CLOSE)


def test_what_selective_recompute_saves() -> None:
    """5 a s / h of 34 + 5 a s / h: 70 % at the sizes of GPT-3 (section 5 of the paper), 76 % at these."""
    share = 1 - saved(1, "single", "selective") / saved(1, "single", "none")
    assert share == pytest.approx(SCORES / (34 + SCORES), abs=CLOSE)
    assert share == pytest.approx(0.76, abs=0.01)

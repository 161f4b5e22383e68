"""What the software keeps per element: fused kernels, forms of the loss, communicators and the allocator's allowance."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from shardwright.passes.prepare import prepare
from shardwright.planner.attention import byte_masks, fused_attention
from shardwright.planner.cluster import default_limit_bytes
from shardwright.planner.fusedsaves import fused_saves
from shardwright.planner.losses import cast_loss
from shardwright.planner.memory import FUSED_LOSS, facts
from shardwright.planner.outline import Outline
from shardwright.planner.part import chain
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Source
from shardwright.planner.precision import RECIPES, state_bytes
from shardwright.planner.prices import Prices
from shardwright.planner.progress import silent
from shardwright.planner.shapes import Arrangement
from shardwright.planner.solve import Request, make_task, workbench
from shardwright.planner.workbench import Workbench
from shardwright.profiles.devices import load_device, parse_cluster
from shardwright.profiles.presets import allocator_loss, build_device, device_file

S, B, H, F, V = 256, 2, 512, 1408, 1024
BF16 = RECIPES["zero"].precision()


@functools.cache
def llama() -> Outline:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=H, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=3, intermediate_size=F, vocab_size=V,
        max_position_embeddings=S, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
        ids = torch.zeros(B, S, dtype=torch.long)
    return byte_masks(fused_attention(prepare(model, (), {"input_ids": ids, "labels": ids}, "bfloat16").outline))


def kept(outline: Outline, region: int) -> float:
    """Bytes of activations that one unit keeps, in units of s b h; statistics and masks left out."""
    part = chain(outline).parts[region]
    tensors, found = part.outline.tensors, dict[str, int]()
    for op in part.outline.ops:
        for item in op.saved:
            if item.source == "new":
                found[f"{op.name}/{item.index}"] = item.bytes
                continue
            use = (op.operands if item.source == "operand" else op.results)[item.index]
            root = tensors[tensors[use.tensor].storage]
            if root.role == "activation" and root.differentiable:
                found[root.name] = root.bytes
    return sum(n for n in found.values() if n > S * B * H // 4) / (S * B * H)


def test_an_eager_layer_keeps_what_its_ops_ask_for() -> None:
    """Two norms of 4 + 2 + 2, queries, keys, values and result 8; gate, its SiLU, up and their product 8 f / h."""
    assert kept(llama(), 1) == pytest.approx(16 + 8 + 8 * F / H, rel=1e-3)


def test_fused_kernels_keep_inputs_and_what_they_write() -> None:
    """Input and result of each norm, 4; no SiLU of the gate."""
    assert kept(fused_saves(llama()), 1) == pytest.approx(8 + 8 + 6 * F / H, rel=1e-3)


def test_fusing_never_keeps_more_and_again_changes_nothing() -> None:
    once = fused_saves(llama())
    assert fused_saves(once) == once
    for r in range(len(llama().regions)):
        assert kept(once, r) <= kept(llama(), r)
    assert [op.name for op in once.ops] == [op.name for op in llama().ops]


def test_what_is_kept_can_be_had() -> None:
    """Every kept tensor exists: saved operands are operands of their ops."""
    for op in fused_saves(llama()).ops:
        assert all(
            s.source == "new" or s.index < len(op.operands if s.source == "operand" else op.results) for s in op.saved
        )


@pytest.mark.parametrize(("form", "logit_bytes"), [("float", 4), ("compute", 2), ("fused", 2)])
def test_the_loss_keeps_so_many_bytes_a_logit(form: str, logit_bytes: int) -> None:
    outline = cast_loss(llama(), form)
    op = next(op for op in outline.ops if op.kind == "loss")
    logits = outline.tensors[op.operands[0].tensor]
    new = sum(s.bytes for s in op.saved if s.source == "new")
    mine = logits.bytes if any(s.source == "operand" and s.index == 0 for s in op.saved) else 0
    assert new + mine == pytest.approx(logit_bytes * logits.elements, rel=4 / V)
    assert (op.target == FUSED_LOSS) == (form == "fused")
    assert logits.dtype == ("float32" if form == "float" else "bfloat16")
    facts(outline)


def peak_of(*pins: str) -> float:
    cluster = parse_cluster("a100-sxm-80gb:1")
    request = Request(Source("module", "test", B), "adamw", BF16, 2**40, parse_pins(pins))
    bench = workbench(make_task(llama(), cluster, Prices(cluster, "bfloat16"), request), silent, tiers=False)
    named = max(bench.fronts.numbers(2, 1, 1), key=lambda found: found[1].saved)
    return named[1].peak


def test_forms_of_the_loss_by_their_peak() -> None:
    """Log-probabilities and two gradients in float32; a third less in half precision; logits alone where they are written over."""
    logits = B * S * V
    assert peak_of("loss=float") - peak_of("loss=compute") == pytest.approx(6 * logits, rel=0.1)
    assert peak_of("loss=compute") > peak_of("loss=fused")


def bench_of(spec: str) -> Workbench:
    cluster = parse_cluster(spec)
    request = Request(Source("module", "test", B), "adamw", BF16, default_limit_bytes(cluster), parse_pins(()))
    return workbench(make_task(llama(), cluster, Prices(cluster, "bfloat16"), request), silent, tiers=False)


SHAPE = Arrangement(1, 1, 1, 1, 1, 1, "none", 1, B)


@pytest.mark.parametrize(
    ("axes", "communicators"),
    [
        ({}, 0), ({"dp": 8}, 1), ({"dp": 4, "tp": 2}, 3), ({"pp": 2, "dp": 2, "tp": 2}, 4), ({"dp": 8, "ep": 8}, 1),
        ({"dp": 8, "ep": 4}, 3),
    ],
)  # fmt: skip
def test_communicators_take_memory(axes: dict[str, int], communicators: int) -> None:
    bench, device = bench_of("a100-sxm-80gb:8"), load_device("a100-sxm-80gb")
    shape = replace(SHAPE, **axes)
    assert bench.reserve(shape) == device.context_bytes + communicators * device.communicator_bytes
    assert bench.memory(shape).cap_bytes == pytest.approx(
        bench.task.limit_bytes - bench.reserve(shape) - bench.given_bytes
    )


def test_the_allocators_share_is_a_quantile_of_failed_runs() -> None:
    share, source = allocator_loss()
    assert 0.02 < share < 0.15
    assert "out-of-memory messages" in source
    device = load_device("h100-sxm")
    assert (device.reserve_fraction, device.sources["reserve_fraction"]) == (share, source)
    assert load_device("cpu").reserve_fraction == 0.08


def test_a_devices_file_may_say_its_own_share() -> None:
    data = {**device_file("h100-sxm"), "reserve_fraction": {"value": 0.02, "source": "expandable segments"}}
    assert build_device(data, where="x").reserve_fraction == 0.02
    data["reserve_fraction"] = 1.0
    with pytest.raises(Exception, match="reserve_fraction"):
        build_device(data, where="x")


def test_half_precision_with_a_master_copy() -> None:
    found = state_bytes(RECIPES["zero-fp16"].precision(), "adamw")
    assert (found.parameter, found.gradient, found.master, found.moments) == (2, 2, 4, 8)

"""Inference: prefill and decode derived from a capture, what is kept for the tokens to come, and the fastest plans of both."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from attention_outlines import Form, decoder
from click.testing import CliRunner
from shardwright.cli.main import main
from shardwright.errors import PinError, PlanError
from shardwright.planner.capability import check_plan
from shardwright.planner.cluster import Cluster, default_limit_bytes
from shardwright.planner.goal import Aim
from shardwright.planner.inference import forward_only, inference_outline
from shardwright.planner.outline import Factor, Op, Outline, Use
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan, Source
from shardwright.planner.planfile import dump_plan, parse_plan
from shardwright.planner.precision import model_precision
from shardwright.planner.prices import Prices
from shardwright.planner.pursue import pursue
from shardwright.planner.repricing import reprice
from shardwright.planner.solve import Request
from shardwright.planner.template import retyped
from shardwright.profiles.devices import parse_cluster

BF16 = model_precision("bfloat16")
FORM = Form(layers=4, batch=4, seq=1024, heads=32, width=128, vocab=4096)
GROUPED = replace(FORM, groups=8)
WIDE = replace(FORM, layers=2, heads=64)


def captured(form: Form = FORM) -> Outline:
    """A decoder that returns its logits beside the loss, at the dtype it computes in."""
    return retyped(replace(decoder(form), outputs=("wh.y",)), "bfloat16")


@cache
def outline(phase: str, form: Form = FORM) -> Outline:
    return inference_outline(captured(form), phase)


@cache
def cluster(spec: str) -> Cluster:
    return parse_cluster(spec)


@cache
def plan(phase: str, *pins: str, spec: str = "h100-sxm:8", form: Form = FORM) -> Plan:
    where = cluster(spec)
    asked = Request(
        Source("module", "test", form.batch), "adamw", BF16, default_limit_bytes(where), parse_pins(pins), "latency"
    )
    return pursue(outline(phase, form), where, Prices(where, "bfloat16"), asked, Aim(phase=phase))


def attention(found: Outline) -> Op:
    return next(op for op in found.ops if op.kind == "attention")


def weights(found: Outline) -> float:
    """Bytes of the matrices, which every step reads."""
    return sum(found.tensors[u.tensor].bytes for op in found.ops if op.projection for u in op.operands[1:2])


# -- outlines


def test_the_forward_pass_alone_has_no_loss_and_saves_nothing() -> None:
    found = forward_only(captured())
    assert not found.training
    assert {op.kind for op in captured().ops} - {op.kind for op in found.ops} == {"loss", "reduction"}
    assert all(not op.saved and not op.backward_flops for op in found.ops)
    named = [name for region in found.regions for names in region.instances for name in names]
    assert named == [op.name for op in found.ops]
    assert found.outputs == ("wh.y",)


@pytest.mark.parametrize("form", [FORM, GROUPED], ids=["plain", "grouped"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_keys_and_values_are_kept_once(form: Form, phase: str) -> None:
    found = outline(phase, form)
    kept = sum(item.bytes for op in found.ops for item in op.saved)
    heads = form.heads // form.groups
    assert kept == form.layers * 2 * 2 * form.batch * heads * form.seq * form.width
    assert all(op.kind == "attention" for op in found.ops if op.saved)


def test_an_encoder_keeps_nothing() -> None:
    found = outline("prefill", replace(FORM, causal=False))
    assert not any(op.saved for op in found.ops)
    assert "cache" not in {
        c for c, n in plan("prefill", spec="h100-sxm:1", form=replace(FORM, causal=False)).predicted.memory.items() if n
    }


def test_decoding_runs_over_one_position() -> None:
    whole, one = outline("prefill"), outline("decode")
    assert (whole.tokens, one.tokens) == (4 * 1024, 4)
    for before, after in zip(whole.ops, one.ops, strict=True):
        sizes = {f.name: f.size for f in after.factors if f.token and not f.batch}
        if before.kind == "attention":
            assert sorted(sizes.values()) == [1, 1024]
            assert after.flops == 4.0 * 4 * 32 * 1024 * 128
        else:
            assert set(sizes.values()) <= {1}
            assert before.flops == pytest.approx(after.flops * (1024 if sizes else 1))
    assert one.tensors["l0.wk.y"].bytes == whole.tensors["l0.wk.y"].bytes // 1024
    assert one.tensors["l0.wk"] == whole.tensors["l0.wk"]


def _with_op(found: Outline, op: Op) -> Outline:
    """`found` with another op on its logits."""
    region = found.regions[-1]
    instances = ((*region.instances[0], op.name),)
    tensors = {**found.tensors, "extra": replace(found.tensors["wh.y"], name="extra", storage="extra")}
    return replace(
        found, tensors=tensors, ops=(*found.ops, op), regions=(*found.regions[:-1], replace(region, instances=instances)),
        outputs=("extra",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("factors", "out", "named"),
    [
        (("free", "free"), ((0,), (), (2,)), "sums over positions"),
        (("never", "free"), ((0,), (1,), (2,)), "mixes positions without being attention"),
    ],
)
def test_what_mixes_positions_cannot_be_decoded(factors: tuple[str, str], out: tuple, named: str) -> None:
    split, other = factors
    op = Op(
        "mix", "aten.mix", "other", (Use("wh.y", ((0,), (1,), (2,))),), (Use("extra", out),),
        (Factor("b", 4, "free", True, True), Factor("s", 1024, split, False, True), Factor("v", 4096, other)),
    )  # fmt: skip
    with pytest.raises(PinError, match=f"mix .*{named}"):
        inference_outline(_with_op(captured(), op), "decode")
    assert inference_outline(_with_op(captured(), op), "prefill").ops[-1].name == "mix"


def test_what_is_not_causal_attention_cannot_be_decoded() -> None:
    with pytest.raises(PinError, match="not known to be causal"):
        outline("decode", replace(FORM, causal=False))
    with pytest.raises(PinError, match=r"pairs positions|has no attention"):
        outline("decode", replace(FORM, eager=True))
    with pytest.raises(PinError, match="roll"):
        outline("decode", replace(FORM, shift=True))
    with pytest.raises(PinError, match="nothing but its loss"):
        inference_outline(decoder(FORM), "prefill")
    with pytest.raises(PinError, match="phase=dream"):
        inference_outline(captured(), "dream")


# -- plans


@pytest.mark.parametrize("spec", ["h100-sxm:1", "h100-sxm:8", "l4:4", "a100-sxm-80gb:4x2"])
def test_no_token_is_faster_than_its_weights_are_read(spec: str) -> None:
    found, where = plan("decode", spec=spec), cluster(spec)
    assert (found.objective, found.phase) == ("latency", "decode")
    assert found.pipeline.microbatches == 1
    split = {a.name: a.size for a in found.mesh}.get("tp", 1)
    seconds = weights(outline("decode")) / split / where.device.memory_bytes_per_second
    assert found.predicted.step_seconds >= seconds
    assert found.search.bound_seconds <= found.predicted.step_seconds
    assert {"saved", "recompute"} & {
        c for c, n in {**found.predicted.memory, **found.predicted.seconds}.items() if n
    } == set()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_tensor_parallelism_lowers_latency(phase: str) -> None:
    one, four = (plan(phase, "pp=1", f"tp={n}", spec=f"h100-sxm:{n}", form=WIDE) for n in (1, 4))
    assert four.predicted.step_seconds < one.predicted.step_seconds
    free = plan(phase, spec="h100-sxm:4", form=WIDE)
    assert free.predicted.step_seconds <= four.predicted.step_seconds * (1 + 1e-9)


def test_what_a_token_costs_grows_with_what_is_kept() -> None:
    short, long = (plan("decode", spec="h100-sxm:1", form=replace(FORM, seq=seq)) for seq in (1024, 65536))
    read = 4 * 2 * 2 * 4 * 32 * 128 * (65536 - 1024)
    device = cluster("h100-sxm:1").device
    grown = long.predicted.step_seconds - short.predicted.step_seconds
    assert grown >= 0.9 * read / device.memory_bytes_per_second
    assert long.predicted.memory["cache"] == 64 * short.predicted.memory["cache"]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_heads_share_what_is_kept_and_groups_keep_less(phase: str) -> None:
    one = plan(phase, spec="h100-sxm:1")
    assert one.predicted.memory["cache"] == 4 * 2 * 2 * 4 * 32 * 1024 * 128
    half = plan(phase, "tp=2", spec="h100-sxm:2")
    assert half.predicted.memory["cache"] in (one.predicted.memory["cache"] // 2, one.predicted.memory["cache"])
    assert plan(phase, spec="h100-sxm:1", form=GROUPED).predicted.memory["cache"] == one.predicted.memory["cache"] // 8


def test_stages_hand_one_microbatch_on() -> None:
    found = plan("decode", "pp=2", "tp=1", "dp=1", spec="h100-sxm:2")
    assert found.pipeline.ranks == 2
    assert (found.pipeline.schedule, found.pipeline.microbatches) == ("gpipe", 1)
    assert found.predicted.step_seconds > sum(s.forward_seconds for s in found.stages)
    assert all(s.backward_seconds == 0.0 for s in found.stages)


def test_a_plan_of_inference_goes_to_a_file_and_is_priced_again() -> None:
    found = plan("decode", "tp=2", spec="h100-sxm:2")
    read = parse_plan(dump_plan(found))
    with pytest.raises(PlanError, match="a phase of inference"):
        check_plan(read)
    assert (read.phase, read.edited) == ("decode", False)
    where = cluster("h100-sxm:2")
    again = reprice(read, outline("decode"), where, Prices(where, "bfloat16"))
    assert again.predicted.step_seconds == pytest.approx(found.predicted.step_seconds, rel=1e-9)


def test_memory_and_devices_of_inference() -> None:
    where = cluster("h100-sxm:4")
    prices = Prices(where, "bfloat16")
    asked = Request(Source("module", "test", 4), "adamw", BF16, default_limit_bytes(where), parse_pins(()), "memory")
    least = pursue(outline("decode"), where, prices, asked, Aim(phase="decode"))
    assert least.predicted.peak_bytes_per_device <= plan("decode", spec="h100-sxm:4").predicted.peak_bytes_per_device
    target = plan("decode", spec="h100-sxm:2").predicted.step_seconds * 1.0001
    few = pursue(
        outline("decode"),
        where,
        prices,
        replace(asked, objective="devices"),
        Aim(phase="decode", target_seconds=target),
    )
    assert few.cluster["devices"] <= 2
    assert few.phase == "decode"


@pytest.mark.parametrize(
    ("phase", "pins", "named"),
    [
        ("decode", ("cp=2",), "cp=2"),
        ("prefill", ("attention=math",), "attention=math"),
        ("prefill", ("recompute=full",), "recompute=full"),
        ("decode", ("zero=2",), "zero=2"),
        ("decode", ("offload=optimizer",), "offload=optimizer"),
        ("decode", ("sequence_parallel=on",), "sequence_parallel=on"),
    ],
)
def test_pins_of_training_are_refused(phase: str, pins: tuple[str, ...], named: str) -> None:
    with pytest.raises(PinError, match=named):
        plan(phase, *pins)


# -- the command line

TINY = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": 128,
    "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return f"hf:{path}"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_command_plans_inference(config: str, phase: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    arguments = ["--cluster", "h100-sxm:2", "--batch", "2", "--seq", "64", "--objective", "latency", "--phase", phase]
    done = CliRunner().invoke(main, ["plan", config, *arguments, "-o", str(file), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["objective"], found["phase"]) == ("latency", phase)
    assert found["precision"]["parameter"] == "bfloat16"
    whole = 2 * 2 * 2 * 2 * 128 * 64
    assert found["predicted"]["memory"]["cache"] in (whole, whole // 2)
    assert found["estimate"]["trainable"] == 0
    assert parse_plan(file.read_text()).phase == phase


def test_the_command_says_what_it_sought(config: str) -> None:
    done = CliRunner().invoke(main, ["plan", config, "--cluster", "h100-sxm:2", "--batch", "2", "--seq", "64",
                                     "--objective", "cost", "--price-per-device-hour", "2", "--frontier"])  # fmt: skip
    assert done.exit_code == 0, done.output
    for text in ("cheapest step", "Numbers of devices", "Frontier"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--cluster", "local-cpu:1", "--objective", "latency"], "named clusters"),
        (["--cluster", "h100-sxm:2", "--phase", "decode"], "phase=decode needs the objective"),
        (["--cluster", "h100-sxm:2", "--target-seconds", "1"], "target-seconds needs the objective"),
        (["--cluster", "h100-sxm:2", "--objective", "devices", "--target-seconds", "0"], "expected a number above zero"),
        (["--cluster", "h100-sxm:2", "--objective", "memory", "--batch", "auto"], "batch=auto seeks throughput"),
        (["--cluster", "l4:2", "--objective", "cost", "--target-seconds", "1", "--target-tokens-per-second", "2"], "two ways"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_the_command_refuses(config: str, more: list[str], named: str) -> None:
    done = CliRunner().invoke(main, ["plan", config, *more])
    assert done.exit_code == 2, done.output
    assert named in done.stderr

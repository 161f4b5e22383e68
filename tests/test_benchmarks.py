"""The scripts in benchmarks/: rows of published runs as models, clusters and pins; free against pinned plans; speed cases."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

import expert_configs  # noqa: E402
import plan_speed  # noqa: E402
import run_jobs  # noqa: E402
import run_models  # noqa: E402
from published_runs import Run, read_row, read_runs, summary  # noqa: E402
from shardwright.api import cluster_of  # noqa: E402
from shardwright.passes.models import load_model, rebuild  # noqa: E402
from shardwright.passes.prepare import prepare  # noqa: E402
from shardwright.planner.pins import KEYS  # noqa: E402
from shardwright.planner.plan import Source  # noqa: E402

GPT = {
    "family": "GPT 22B",
    "layers": 2,
    "hidden": 128,
    "ffn": 512,
    "heads": 4,
    "kv_heads": 4,
    "vocab": 512,
    "seq_len": 64,
}


def row(**changes: Any) -> dict[str, Any]:
    """A complete synthetic row; `changes` replace entries of its parts, None drops them."""
    parts: dict[str, dict[str, Any]] = {
        "model": dict(GPT),
        "hardware": {"gpu": "A100 80GB SXM", "gpus": 16, "gpus_per_node": 8, "inter_node": "8x200Gbps HDR InfiniBand per node"},
        "parallelism": {
            "framework": "Megatron-LM", "dp": 2, "tp": 4, "pp": 2, "micro_batch": 2, "global_batch": 32,
            "recompute": "full", "precision": "bf16", "schedule": "1F1B", "zero_stage": 1, "sp": True,
        },
        "result": {"iteration_time_s": 2.0},
    }  # fmt: skip
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if value is None:
            parts[part].pop(name, None)
        else:
            parts[part][name] = value
    return {"id": "x", "set": "synthetic", **parts}


def pins(run: Run) -> dict[str, str]:
    return dict(pin.split("=") for pin in run.pins if "!=" not in pin)


def test_a_complete_row() -> None:
    run = read_row(row())
    assert run.usable
    assert run.cluster == "a100-sxm-80gb:8x2@1600Gbps"
    assert cluster_of(run.cluster).devices == run.devices == 16
    assert (run.batch, run.seq, run.precision, run.measured_seconds) == (32, 64, "megatron", 2.0)
    assert pins(run) == {
        "dp": "2", "tp": "4", "pp": "2", "cp": "1", "micro_batch": "2", "schedule": "1f1b", "vpp": "1", "zero": "1",
        "sequence_parallel": "on", "recompute": "full", "offload": "none", "attention": "math", "kernels": "fused",
        "loss": "float",
    }  # fmt: skip
    assert run.config["n_layer"] == 2
    assert run.config["resid_pdrop"] == 0.1


def test_every_pin_is_one_of_the_planner() -> None:
    changes = (
        {}, {"parallelism__vpp": 2}, {"parallelism__schedule": "ZB-1p"}, {"parallelism__offload": "optimizer on CPU"},
        {"model__attention": "unfused (pre-flash)"}, {"model__attention": "flash_attention2 + RMS kernel"},
        {"parallelism__recompute": "selective (attention)"}, {"parallelism__fsdp": "SHARD_GRAD_OP"},
    )  # fmt: skip
    for change in changes:
        run = read_row(row(**change))
        assert run.usable
        for key, value in pins(run).items():
            KEYS[key].read(key, value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parallelism__vpp": 2}, {"schedule": "interleaved", "vpp": "2"}),
        ({"parallelism__schedule": "GPipe"}, {"schedule": "gpipe", "vpp": "1"}),
        ({"parallelism__schedule": "ZB-1p"}, {"schedule": "zb-h1"}),
        ({"parallelism__schedule": "ZB-2p"}, {"schedule": None, "vpp": "1"}),
        ({"parallelism__schedule": None}, {"schedule": "1f1b", "vpp": "1"}),
        ({"parallelism__zero_stage": None, "parallelism__fsdp": "FULL_SHARD (x)"}, {"zero": "3"}),
        ({"parallelism__zero_stage": 3, "parallelism__fsdp": "SHARD_GRAD_OP (x)"}, {"zero": "2"}),
        ({"parallelism__zero_stage": None}, {"zero": None}),
        ({"parallelism__offload": None}, {"offload": "none"}),
        ({"parallelism__recompute": "selective"}, {"recompute": "selective"}),
        ({"parallelism__recompute": "selective", "parallelism__framework": "PyTorch FSDP1"}, {"recompute": None}),
        ({"parallelism__recompute": "fraction 1.0 of layers"}, {"recompute": "full"}),
        ({"parallelism__framework": "PyTorch FSDP1 + torch.compile"}, {"attention": "flash", "kernels": "fused"}),
        ({"parallelism__framework": "PyTorch FSDP1"}, {"attention": "flash", "kernels": "eager"}),
        ({"parallelism__framework": "NeMo/Megatron-Core", "hardware__gpu": "H100 80GB"}, {"attention": "flash3"}),
        ({"parallelism__framework": "NeMo/Megatron-Core"}, {"attention": "flash", "kernels": "fused"}),
        ({"model__attention": "flash/triton (yaml attn_impl: flash)"}, {"attention": "flash1"}),
        ({"parallelism__sp": None}, {"sequence_parallel": None}),
        ({"parallelism__recompute": "none (not stated)"}, {"recompute": "none"}),
        ({"parallelism__recompute": "fraction 0.5 of layers"}, {"recompute": None}),
        ({"parallelism__offload": "activation_cpu_offload=False"}, {"offload": "none"}),
        ({"parallelism__offload": "optimizer on CPU; GPU-update stride 5"}, {"offload": "optimizer"}),
        ({"parallelism__offload": "CPU offload"}, {"offload": "params"}),
        ({"model__attention": "unfused (use_flash_attn False)"}, {"attention": "math"}),
        ({"model__attention": "flash_attention2 + RMS kernel"}, {"attention": "flash", "kernels": "fused"}),
        ({"model__attention": "torch"}, {"attention": "math", "kernels": "fused"}),
    ],
)
def test_pins(changes: dict[str, Any], expected: dict[str, str | None]) -> None:
    found = pins(read_row(row(**changes)))
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"parallelism__precision": "fp16"}, "precision fp16"),
        ({"parallelism__schedule": "ZB-2p"}, "schedule ZB-2p"),
        ({"parallelism__recompute": "auto"}, "recompute auto"),
        ({"parallelism__offload": "optimizer on CPU; GPU-update stride 5"}, "stride"),
        ({"parallelism__fsdp": "HSDP"}, "HSDP"),
    ],
)
def test_what_pins_cannot_say_is_kept(changes: dict[str, Any], lost: str) -> None:
    run = read_row(row(**changes))
    assert run.usable
    assert any(lost in text for text in run.lost)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__layers": None}, "sizes of the model not stated"),
        ({"model__seq_len": None}, "sequence length not stated"),
        ({"hardware__gpu": None}, "GPU not stated"),
        ({"hardware__gpu": "Tesla P40 24GB"}, "no device preset for Tesla P40 24GB"),
        ({"hardware__gpus": 12}, "12 GPUs are not whole nodes of 8"),
        ({"parallelism__global_batch": None}, "global batch not stated"),
        ({"parallelism__micro_batch": None}, "microbatch not stated"),
        ({"parallelism__tp": None}, "tp not stated"),
        ({"parallelism__dp": 4}, "dp x tp x pp x cp is not the 16 devices"),
        ({"parallelism__global_batch": 30}, "a batch of 30 is not whole microbatches of 2 x dp 2"),
        ({"parallelism__ep": 8}, "number of experts not stated"),
        ({"result__memory_gib_per_gpu": 104.8}, "needs more memory than the device has, by its own figures"),
        ({"parallelism__other": "QLoRA"}, "trains adapters or quantised weights, not the model"),
    ],
)
def test_reasons(changes: dict[str, Any], reason: str) -> None:
    run = read_row(row(**changes))
    assert not run.usable
    assert reason in run.reasons
    assert run.pins == ()


def test_out_of_memory_needs_no_result() -> None:
    run = read_row(row(result__iteration_time_s=None, result__other="OOM Error"))
    assert run.out_of_memory
    assert run.complete
    assert not run.usable
    assert not read_row(row(result__other="OOM at batch 64")).out_of_memory


def test_one_device() -> None:
    alone = {"hardware__gpus": 1, "parallelism__dp": 1, "parallelism__tp": 1, "parallelism__pp": 1}
    run = read_row(row(**alone))
    assert run.usable
    assert run.cluster == "a100-sxm-80gb:1"
    cluster = cluster_of(run.cluster)
    whole = run_jobs.whole_nodes(cluster, run.node_ranks)
    assert cluster.host is not None
    assert whole.host is not None
    assert whole.host.rank_host_bytes == 8 * cluster.host.rank_host_bytes
    assert whole.host.host_update_seconds_per_element == cluster.host.host_update_seconds_per_element


def test_a_microbatch_is_what_the_batch_leaves() -> None:
    fsdp = {
        "parallelism__framework": "PyTorch FSDP1", "parallelism__dp": 16, "parallelism__tp": None, "parallelism__pp": None,
        "parallelism__zero_stage": 3, "parallelism__micro_batch": None,
    }  # fmt: skip
    assert pins(read_row(row(**fsdp)))["micro_batch"] == "2"
    assert pins(read_row(row(**fsdp, parallelism__grad_accum=2)))["micro_batch"] == "1"
    counted = read_row(row(**{**fsdp, "parallelism__micro_batch": 4, "parallelism__global_batch": None}))
    assert (counted.batch, pins(counted)["micro_batch"]) == (64, "4")


def test_seconds_from_flops() -> None:
    sizes = {"layers": 24, "hidden": 2304, "ffn": 9216, "heads": 24, "kv_heads": 24, "vocab": 51200}
    # Narayanan et al. 2021, equation 3: 96 B s l h^2 (1 + s / 6h + V / 16 l h).
    whole = 96 * 512 * 2048 * 24 * 2304**2 * (1 + 2048 / (6 * 2304) + 51200 / (16 * 24 * 2304))
    assert run_models.step_flops(sizes, "gpt", 512, 2048, recomputed=True) == pytest.approx(whole)
    assert run_models.step_flops(sizes, "gpt", 512, 2048, recomputed=False) < whole
    changes = {"result__iteration_time_s": None, "result__tflops_per_gpu": 100.0, "result__tflops_kind": "model"}
    run = read_row(row(**changes))
    mine = {k: GPT[k] for k in ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab")}
    told = run_models.step_flops(mine, "gpt", 32, 64, recomputed=False)
    assert run.measured_seconds == pytest.approx(told / (100e12 * 16))


def test_one_layer_is_no_step() -> None:
    run = read_row({**row(), "kind": "measured (single layer fwd+bwd)"})
    assert run.reasons == ("times one layer, not a step",)


@pytest.mark.parametrize(
    "name",
    [
        "LLAMA2-70B",
        "Llama-2 70b",
        "Llama-3(.1) 8B",
        "Llama-3.1 405B",
        "OPT-350M (HF facebook/opt-350m)",
        "GPT3-175B",
        "Nemotron-340B",
    ],
)
def test_models_known_by_name(name: str) -> None:
    assert run_models.named_sizes(name)


def test_what_the_numbers_imply() -> None:
    run = read_row(row(parallelism__dp=None))
    assert pins(run)["dp"] == "2"
    plain = read_row(row(parallelism__dp=16, parallelism__tp=None, parallelism__pp=None))
    assert (pins(plain)["tp"], pins(plain)["pp"]) == ("1", "1")
    assert "schedule" not in pins(plain)
    assert "sequence_parallel" not in pins(plain)


def test_sizes_that_are_left_out() -> None:
    assumed: list[str] = []
    found = run_models.sizes_of({"family": "LLAMA 13B", "layers": 40, "hidden": 5120, "heads": 40}, "", assumed)
    assert found is not None
    assert (found["ffn"], found["kv_heads"], found["vocab"]) == (13824, 40, 32000)
    assert len(assumed) == 2
    named = run_models.sizes_of({"family": "LLAMA2-70B"}, "", [])
    assert named is not None
    assert (named["layers"], named["kv_heads"]) == (80, 8)
    padded = run_models.sizes_of({"family": "GPT", "layers": 2, "hidden": 64, "heads": 4}, "Megatron-LM", [])
    assert padded is not None
    assert (padded["vocab"], padded["ffn"]) == (51200, 256)
    assert run_models.sizes_of({"family": "GPT", "layers": 2, "hidden": 100, "heads": 3}, "", []) is None


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        ({"gpu": "A100", "gpus": 4, "gpus_per_node": 8}, "a100-sxm-80gb:4"),
        ({"gpu": "A100 40GB (ALCF Polaris)", "gpus": 8, "gpus_per_node": 4}, "a100-sxm-40gb:4x2"),
        (
            {"gpu": "V100 SXM2 32GB", "gpus": 8, "gpus_per_node": 4, "inter_node": "23-57 Gbps"},
            "v100-sxm-32gb:4x2@57Gbps",
        ),
        ({"gpu": "V100 16GB", "gpus": 8, "gpus_per_node": 8}, "v100-sxm-16gb:8"),
        (
            {"gpu": "H100 (DGX-H100)", "gpus": 96, "gpus_per_node": 8, "inter_node": "2 Tb/s RoCE"},
            "h100-sxm:8x12@2Tbps",
        ),
        ({"gpu": "2x RTX 4090 24GB", "gpus": 2, "gpus_per_node": 2}, "rtx-4090:2"),
        ({"gpu": "A100 80GB", "gpus": 16, "inter_node": "EDR 12.5 GB/s per link"}, "a100-sxm-80gb:8x2"),
        ({"gpu": "A100 80GB", "gpus": 16, "inter_node": "overlay ~1.25 GB/s"}, "a100-sxm-80gb:8x2@1.25GB/s"),
    ],
)
def test_clusters(hardware: dict[str, Any], expected: str) -> None:
    spec = run_models.cluster_string(hardware, [], [])
    assert spec == expected
    assert cluster_of(spec).devices == hardware["gpus"]


def test_precision_is_the_frameworks() -> None:
    cases = {
        "megatron": {}, "zero": {"parallelism__framework": "DeepSpeed"}, "zero-fp16": {"hardware__gpu": "V100 32GB"},
        "fp16": {"hardware__gpu": "V100 32GB", "parallelism__framework": "PyTorch FSDP1"},
        "fsdp-bf16": {"parallelism__framework": "PyTorch FSDP1"}, "fp32": {"parallelism__precision": "fp32"},
        "megatron-fp8": {"parallelism__precision": "FP8", "hardware__gpu": "H100 80GB"},
        "fsdp-fp8": {"parallelism__precision": "amp_fp8", "parallelism__framework": "PyTorch FSDP1"},
    }  # fmt: skip
    for expected, changes in cases.items():
        run = read_row(row(**changes))
        assert run.precision == expected


def test_reading_a_file(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    other = {**row(), "set": "other"}
    file.write_text("\n".join(json.dumps(r) for r in (row(), row(model__layers=None), other)) + "\n\n")
    assert len(read_runs(file)) == 3
    assert summary(read_runs(file, ["synthetic"])) == {
        "rows": 2, "usable": 1, "cases": 1, "models": 1, "clusters": 1, "inexact": 0,
    }  # fmt: skip
    file.write_text(json.dumps(row(parallelism__dp="four")))
    (odd,) = read_runs(file)
    assert "no number" in odd.reasons[0]
    file.write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match="line 1: not a published run"):
        read_runs(file)


@pytest.mark.parametrize("family", ["GPT", "LLAMA", "BERT", "T5", "Mixtral", "Nemotron"])
def test_families_are_captured(family: str) -> None:
    model = {**GPT, "family": family, **({"experts": 4} if family == "Mixtral" else {})}
    sizes = run_models.sizes_of(model, "", [])
    assert sizes is not None
    config = run_models.config_of(model, sizes, 64, 0.0)
    loaded = rebuild(Source("hf", family, 2, 64, config=config), device="meta")
    outline = prepare(loaded.model, loaded.args, loaded.kwargs, "bfloat16").outline
    assert outline.batch == 2
    assert not outline.notes


def small(**changes: Any) -> dict[str, Any]:
    """A row that one stage can run."""
    base = {
        "parallelism__dp": 4,
        "parallelism__tp": 4,
        "parallelism__pp": 1,
        "parallelism__recompute": "none",
        "parallelism__sp": None,
    }
    return row(**{**base, **changes})


def test_free_against_pinned() -> None:
    runs = [
        read_row(small()),
        read_row(small(parallelism__tp=2, parallelism__dp=8)),
        read_row(small(parallelism__global_batch=64)),
    ]
    found = expert_configs.cases(runs)
    assert [len(case.rows) for case in found] == [2, 1]
    jobs = run_jobs.Jobs()
    priced = [p for case in expert_configs.pick(found, None) for p in expert_configs.priced(case, jobs)]
    assert jobs.captures == 1
    assert [p.status for p in priced] == ["priced"] * 3
    assert all(p.within and p.peak_bytes > 0 and p.measured_seconds == 2.0 for p in priced)
    assert len({p.free_seconds for p in priced}) == 2
    figures = expert_configs.summary(priced)
    assert (figures["pinned"], figures["priced"], figures["within"], figures["refused"]) == (3, 3, 3, 0)
    assert figures["median gain"] >= 0


def test_what_cannot_be_priced_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    impossible = read_row(small())
    case = expert_configs.Case("synthetic", (expert_configs.Run(**{**vars(impossible), "pins": ("tp=3",)}),))
    tight = run_jobs.Jobs(memory_limit="1MiB")
    refused = expert_configs.priced(case, run_jobs.Jobs())
    over = expert_configs.priced(expert_configs.Case("synthetic", (impossible,)), tight)
    assert [p.status for p in refused + over] == ["refused", "over memory"]
    assert over[0].pinned_seconds > 0
    assert "tp=3" in refused[0].error
    expert_configs.show(refused + over)
    assert "over memory" in capsys.readouterr().out


def test_picking_spreads_over_sets() -> None:
    found = [
        expert_configs.Case(name, (read_row(row(model__layers=n + 1)),))
        for name, n in zip("aaaab", range(5), strict=True)
    ]
    picked = expert_configs.pick(found, 3)
    assert sorted(case.set for case in picked) == ["a", "a", "b"]
    assert expert_configs.pick(found, 9) == expert_configs.pick(found, None)
    assert expert_configs.spread(range(10), 3) == [0, 3, 6]


def test_speed_cases() -> None:
    assert len({case.name for case in plan_speed.CASES}) == len(plan_speed.CASES)
    largest = next(case for case in plan_speed.CASES if case.name == "llama3-405b")
    assert cluster_of(largest.cluster).devices == 16384
    assert (largest.seconds, largest.gigabytes) == (90.0, 3.0)
    assert plan_speed.command(largest)[3:] == [
        "plan", "hf:llama3-405b", "--cluster", "h100-sxm:8x2048", "--batch", "2048", "--json", "--seq", "8192",
    ]  # fmt: skip
    case = plan_speed.Case("refused", "hf:gpt2", "h100-sxm:8", 8, 0, 60.0)
    outcome = plan_speed.measure(case)
    assert (outcome.status, outcome.passed) == (2, False)
    assert "--seq" in outcome.error
    assert outcome.gigabytes > 0


def test_the_unet_has_over_200_distinct_ops() -> None:
    loaded = load_model(f"{BENCHMARKS / 'models' / 'unet.py'}:unet", batch=4, device="meta")
    outline = prepare(loaded.model, loaded.args, loaded.kwargs, "bfloat16").outline
    distinct = {(op.target, tuple(f.size for f in op.factors)) for op in outline.ops}
    assert len(distinct) > 200
    assert not any("batch_norm" in op.target for op in outline.ops)
    assert outline.batch == 4

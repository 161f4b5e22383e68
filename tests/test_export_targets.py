"""Configurations for other tools: names as published, what is lost is said, and what is read back predicts the same seconds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import plans
import pytest
import shardwright
from click.testing import CliRunner
from exported import name_of, plan
from shardwright.api import plan_model
from shardwright.cli.exports import deepspeed, megatron
from shardwright.cli.exports.base import Export, export, flat
from shardwright.cli.exports.facts import facts_of, numbered, starred
from shardwright.cli.exports.read import TARGETS, form_of, pins_of, read_like
from shardwright.cli.main import main
from shardwright.errors import UsageError
from shardwright.planner.plan import Plan
from shardwright.planner.planfile import save_plan

DATA = Path(__file__).parent / "data"
SPLIT = (
    "llama",
    "cpu:8",
    "dp=2",
    "tp=2",
    "pp=2",
    "zero=1",
    "schedule=1f1b",
    "sequence_parallel=on",
    "recompute=full",
    "micro_batch=2",
)
SHARDED = ("llama", "cpu:4", "dp=4", "zero=3", "micro_batch=1", "recompute=none")
CHUNKS = ("llama", "cpu:2", "pp=2", "vpp=2", "schedule=interleaved", "micro_batch=2", "recompute=none")
MIXED = ("llama", "h100-sxm:4", "tp=2", "dp=2", "zero=3", "sequence_parallel=off", "recompute=none", "micro_batch=2")
OFFLOAD = (
    "llama",
    "h100-sxm:2",
    "dp=2",
    "zero=3",
    "offload=optimizer",
    "precision=zero",
    "micro_batch=2",
    "recompute=none",
)
PLANS = {"split": SPLIT, "sharded": SHARDED, "chunks": CHUNKS, "mixed": MIXED, "offload": OFFLOAD}


def written(form: str, made: Plan) -> Export:
    return export(TARGETS[form], facts_of(made))


def settings_table(name: str) -> dict[str, list[str]]:
    """Published names: a line each, the name first, then its type and choices."""
    lines = [line for line in (DATA / name).read_text().splitlines() if not line.startswith("#")]
    return {name: rest for name, *rest in (line.split(maxsplit=2) for line in lines)}


def parser() -> argparse.ArgumentParser:
    """Megatron-LM's arguments, as far as exports write them."""
    made = argparse.ArgumentParser(allow_abbrev=False)
    for name, (kind, *choices) in settings_table("megatron_arguments.txt").items():
        if kind == "switch":
            made.add_argument(name, action="store_true")
        else:
            allowed = choices[0].split(",") if choices else None
            made.add_argument(name, type={"int": int, "float": float, "str": str}[kind], choices=allowed)
    return made


# What has to be said by hand, by plan and target (nothing where it is not listed). None: the target refuses the plan.
STAGES = {"pp", "vpp", "ep"}
"""What DeepSpeed's configuration is silent about."""
LOST: dict[str, dict[str, set[str] | None]] = {
    "split": {"hf": None, "torchtitan": {"zero"}, "deepspeed": STAGES | {"schedule", "sequence_parallel"}},
    "sharded": {"deepspeed": STAGES | {"recompute"}},
    "chunks": {"hf": {"vpp", "schedule"}, "deepspeed": STAGES | {"schedule", "recompute"}},
    "mixed": {"torchtitan": {"sequence_parallel"}, "megatron": {"precision"}, "deepspeed": STAGES | {"recompute"}},
    "offload": {"hf": {"precision"}, "torchtitan": {"precision"}, "deepspeed": STAGES | {"recompute"},
                "script": {"offload", "precision"}},
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("form", TARGETS)
def test_what_is_read_back_predicts_the_same_seconds(name: str, form: str) -> None:
    model, cluster, *pins = PLANS[name]
    made, lost = plan(model, cluster, *pins), LOST[name].get(form, set())
    facts = facts_of(made)
    if lost is None:
        with pytest.raises(UsageError, match="cannot run this plan"):
            written(form, made)
        return
    done = written(form, made)
    assert form_of(done.text) == form
    said = pins_of(done.text, form)
    implied = TARGETS[form].implied
    assert {k for k, v in facts.pins.items() if said.pins.get(k) != v and k not in implied} == lost
    for key in lost & {"zero", "sequence_parallel", "precision", "schedule", "offload"}:
        assert any(loss.startswith(f"{key}={facts.pins[key]}") for loss in done.losses), done.losses
    by_hand = {key: facts.pins[key] for key in lost}
    again = plan_model(
        name_of(model), cluster, batch=said.batch or 8, seq=said.seq or 16,
        pins=[f"{k}={v}" for k, v in {**said.pins, **by_hand}.items()],
    ).plan  # fmt: skip
    assert again.predicted.step_seconds == pytest.approx(made.predicted.step_seconds, rel=max(made.search.gap, 1e-9))
    assert again.predicted.peak_bytes_per_device == made.predicted.peak_bytes_per_device


@pytest.mark.parametrize("name", [name for name in PLANS if name != "sharded"])
def test_megatron_arguments_parse(name: str) -> None:
    text = written("megatron", plan(*PLANS[name])).text
    found = parser().parse_args(shlex.split(text, comments=True))
    facts = facts_of(plan(*PLANS[name]))
    assert found.tensor_model_parallel_size == facts.count("tp")
    assert found.pipeline_model_parallel_size == facts.count("pp")
    assert (found.global_batch_size, found.micro_batch_size, found.seq_length) == (8, 2, 16)
    assert (found.num_layers, found.hidden_size, found.num_query_groups, found.swiglu) == (4, 32, 2, True)
    assert found.untie_embeddings_and_output_weights
    assert found.use_megatron_fsdp == (facts.count("zero") == 3)
    assert found.optimizer_cpu_offload == (name == "offload")
    assert found.sequence_parallel == (name == "split")


def test_every_megatron_argument_is_published() -> None:
    known = settings_table("megatron_arguments.txt")
    assert {row.name for row in megatron.ROWS} <= set(known)
    assert {
        flag.partition("=")[0]
        for flags in (*megatron.FAMILIES.values(), *megatron.PRECISION.values())
        for flag in flags
    } <= set(known)


def test_uneven_stages_are_laid_out() -> None:
    """E the embedding, t a layer, L the loss: read by Megatron-LM's own parser when this was written."""
    made = facts_of(plan(*CHUNKS))
    text = TARGETS["megatron"].write(dataclasses.replace(made, cuts=(9, 1, 8, 7)), ())
    assert "\n--pipeline-model-parallel-layout=Et*9|t|t*8|t*7L\n" in text
    assert "--num-virtual-stages-per-pipeline-rank" not in text
    assert pins_of(text, "megatron").pins["vpp"] == "2"


@pytest.mark.parametrize("name", PLANS)
def test_torchtitan_settings_are_published(name: str) -> None:
    known = settings_table("torchtitan_settings.txt")
    document = {
        k: v for k, v in flat(tomllib.loads(written("torchtitan", plan(*PLANS[name])).text)).items() if "." in k
    }
    for key, value in document.items():
        kind = " ".join(known[key])
        assert type(value).__name__ in kind or repr(value) in kind.replace('"', "'"), (key, value, kind)
    facts = facts_of(plan(*PLANS[name]))
    assert document["parallelism.tensor_parallel_degree"] == facts.count("tp")
    parts = document.get("parallelism.module_fqns_per_model_part", [[]])
    layers = [part for modules in parts for part in modules if part.startswith("layers.")]
    assert layers == ([f"layers.{i}" for i in range(4)] if len(parts) > 1 else [])


def world(document: dict[str, Any]) -> Any:
    """What DeepSpeed asks for its number of data-parallel ranks."""
    ranks = (
        document["train_batch_size"]
        // document["train_micro_batch_size_per_gpu"]
        // document["gradient_accumulation_steps"]
    )
    return type("Ranks", (), {"get_data_parallel_world_size": lambda self: ranks})()


@pytest.mark.parametrize("name", PLANS)
def test_deepspeed_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes agree, and DeepSpeed's own classes take it where it is installed."""
    document = json.loads(written("deepspeed", plan(*PLANS[name])).text)
    facts = facts_of(plan(*PLANS[name]))
    assert world(document).get_data_parallel_world_size() == facts.count("dp")
    assert document["zero_optimization"]["stage"] == facts.count("zero")
    known = settings_table("deepspeed_settings.txt")
    for key, value in flat(document).items():
        if not isinstance(value, dict):
            kind, *choices = known[key]
            assert type(value).__name__ == kind
            assert not choices or str(value) in choices[0].split(",")
    if name == "offload":
        assert document["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
        assert document["bf16"] == {"enabled": True}
    assert {row.name for row in deepspeed.ROWS} <= set(known)
    config = pytest.importorskip("deepspeed.runtime.config")
    monkeypatch.setattr(config.dist, "get_rank", lambda: 0)
    taken = config.DeepSpeedConfig(document, mpu=world(document))
    assert taken.zero_config.stage == facts.count("zero")


def test_transformers_takes_the_configuration() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.distributed import DistributedConfig

    document = json.loads(written("hf", plan(*MIXED)).text)
    config = DistributedConfig(**document["distributed_config"])
    assert (config.tp_size, config.fsdp_size, config.dp_size) == (2, 2, 2)
    assert config.fsdp_plan == {"model.layers.*": "free_full_weight"}
    known = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    assert set(document["training_arguments"]) <= known
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=4)
    )
    model.tp_plan = config.tp_plan  # refuses styles it does not know
    assert config.tp_plan["model.layers.*.self_attn.q_proj"] == "colwise"
    assert config.tp_plan["model.layers.*.mlp.down_proj"] == "rowwise"


def toy(**changes: Any) -> Plan:
    return msgspec.structs.replace(plans.plan(), **changes)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("megatron", {"optimizer": "radam"}, "it has no optimizer radam; plan with --pin optimizer=adamw|sgd|lion"),
        ("deepspeed", {"precision": msgspec.structs.replace(plans.plan().precision, recipe="fp64")}, "it trains in fp64"),
        ("torchtitan", {"optimizer": "sgd"}, "it has no optimizer sgd"),
        ("hf", {"source": msgspec.structs.replace(plans.plan().source, kind="module", config=None)}, "none of its models"),
        ("script", {"source": msgspec.structs.replace(plans.plan().source, kind="module")}, "plan it as file.py:function"),
        ("megatron", {"phase": "decode"}, "one of inference"),
    ],
)  # fmt: skip
def test_what_would_be_something_else_is_refused(
    form: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    save_plan(toy(**changes), path)
    done = CliRunner().invoke(main, ["export", str(path), "--to", form, "-o", str(tmp_path / "out")])
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_mixed_plans_are_said_to_be() -> None:
    """What differs from region to region is no pin, and is not dropped either."""
    first, block, head = plans.regions()
    own = tuple(msgspec.structs.replace(p, zero=3, zero_axes=("dp",)) for p in block.parameters)
    mixed = toy(regions=(first, msgspec.structs.replace(block, parameters=own), head))
    facts = facts_of(mixed)
    assert facts.pins["zero"] == "3", "what fits in the memory that the plan fits in"
    assert any("1 in embed, 3 in h" in line and "exported as 3" in line for line in facts.beyond)
    searched = toy(regions=(first, msgspec.structs.replace(block, recompute=("gelu",)), head))
    (said,) = [line for line in facts_of(searched).beyond if "op by op" in line]
    assert "gelu" in said
    assert "--pin recompute=none|selective|full" in said


def test_like_on_the_command_line(tmp_path: Path) -> None:
    made = plan(*SPLIT)
    file, out = tmp_path / "plan.json", tmp_path / "plan.args"
    save_plan(made, file)
    done = CliRunner().invoke(main, ["export", str(file), "--to", "megatron", "-o", str(out), "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["to"], found["output"], found["text"]) == ("megatron", str(out), out.read_text())
    assert [f"# {loss}" for loss in found["losses"]] == [
        line for line in out.read_text().splitlines() if line.startswith("# ")
    ][1:]
    for like in (out, file):
        done = CliRunner().invoke(main, ["plan", name_of("llama"), "--cluster", "cpu:8", "--like", str(like), "--json"])
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["predicted"]["step_seconds"] == pytest.approx(made.predicted.step_seconds)
    done = CliRunner().invoke(
        main, ["plan", name_of("llama"), "--cluster", "cpu:8", "--like", str(out), "--pin", "zero=0", "--json"]
    )
    assert "zero=0" in json.loads(done.stdout)["pins"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "nothing that can be pinned"), ("[1]", "not a configuration of DeepSpeed"), ("", "nothing that can be pinned"),
        ("a = [", "not a configuration of torchtitan"),
        ('"""Written by `shardwright export --to script`"""\nPLAN = {', "not a configuration of a program"),
        ('{"regions": [], "pipeline": {}}', "version"),
    ],
)  # fmt: skip
def test_files_that_say_nothing_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    done = CliRunner().invoke(main, ["plan", "hf:gpt2", "--cluster", "cpu:2", "--like", str(tmp_path / "file")])
    assert done.exit_code == 2
    assert message in done.stderr.replace("\n", " ")
    with pytest.raises(UsageError, match="cannot read"):
        read_like(tmp_path / "missing")


def test_configurations_that_people_wrote_are_read() -> None:
    """Spaces for equal signs, "auto", defaults of a tool, and a program that is not run."""
    assert pins_of("python pretrain_gpt.py --tensor-model-parallel-size 4 --bf16 --sequence-parallel", "megatron").pins == {
        "tp": "4", "pp": "1", "cp": "1", "ep": "1", "vpp": "1", "zero": "0", "offload": "none", "recompute": "none",
        "sequence_parallel": "on", "precision": "megatron",
    }  # fmt: skip
    found = pins_of('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "bf16": {"enabled": true}, '
                    '"train_batch_size": "auto", "optimizer": {"type": "AdamW"}}', "deepspeed")  # fmt: skip
    assert found.batch is None
    assert found.pins == {
        "tp": "1",
        "cp": "1",
        "offload": "params",
        "zero": "3",
        "precision": "zero",
        "optimizer": "adamw",
    }
    found = pins_of("[parallelism]\ndata_parallel_shard_degree = -1\ntensor_parallel_degree = 8\n", "torchtitan")
    assert {k: found.pins.get(k) for k in ("dp", "zero", "tp", "sequence_parallel")} == {
        "dp": None, "zero": "3", "tp": "8", "sequence_parallel": "on",
    }  # fmt: skip


def test_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of docs/export.md, one after the other; the last prices what Megatron-LM would be told."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "export.md").read_text(encoding="utf-8")
    lines = [shlex.split(line[2:]) for line in page.splitlines() if line.startswith("$ ")]
    assert [line[4] for line in lines[1:-1]] == list(TARGETS)
    for line in lines[:-1]:
        done = CliRunner().invoke(main, line[1:])
        assert done.exit_code == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {line[-1] for line in lines[:-1]}
    done = CliRunner().invoke(main, [*lines[-1][1:], "--pin", "precision=fsdp-fp32", "--json"])
    assert done.exit_code == 0, done.stderr
    planned = json.loads((tmp_path / "plan.json").read_text())["predicted"]["step_seconds"]
    assert json.loads(done.stdout)["predicted"]["step_seconds"] == pytest.approx(planned)


def test_names_of_layers() -> None:
    assert numbered("model.layers.0.mlp.experts.3.weight", 5) == "model.layers.5.mlp.experts.3.weight"
    assert starred("transformer.h.11.attn") == "transformer.h.*.attn"
    assert (numbered("wte.weight", 2), starred("wte")) == ("wte.weight", "wte")


def test_export_from_python() -> None:
    mine = plan("llama", "h100-sxm:2", "tp=2")
    made = shardwright.export_plan(mine, "hf")
    assert made == export(TARGETS["hf"], facts_of(mine))
    with pytest.raises(UsageError, match="no export to 'jax'; expected one of hf, torchtitan"):
        shardwright.export_plan(mine, "jax")

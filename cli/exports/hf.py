"""Transformers: its distributed configuration and training arguments as JSON (names of transformers 5.23).

`distributed_config` is what `DistributedConfig(**...)` takes (`from_pretrained(..., distributed_config=...)`),
`training_arguments` what `TrainingArguments(output_dir=..., **...)` takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .base import Document, Reading, Refused, Row, Target, chosen, flat, nested, number, pins_in, values, whole
from .facts import Facts
from .modules import layer_list, split_of

STYLES = {"colwise": "colwise", "rowwise": "rowwise", "vocabulary": "embedding_rowwise", "hidden": "embedding_colwise"}
"""Our style -> the one of Transformers."""

OPTIMIZERS = {"adamw": "adamw_torch_fused", "sgd": "sgd", "adagrad": "adagrad", "rmsprop": "rmsprop"}
PRECISION: Mapping[str, Mapping[str, Any]] = {
    "fsdp-fp32": {"training_arguments.bf16": True, "training_arguments.fp16": False},
    "fp16": {"training_arguments.bf16": False, "training_arguments.fp16": True},
    "fp32": {"training_arguments.bf16": False, "training_arguments.fp16": False},
}
NEAREST = {"fsdp-bf16": "fsdp-fp32", "megatron": "fsdp-fp32", "zero": "fsdp-fp32", "zero-fp16": "fp16", "fsdp-fp8": "fsdp-fp32",
           "megatron-fp8": "fsdp-fp32"}  # fmt: skip


def _recipe(facts: Facts) -> Mapping[str, Any]:
    recipe = facts.pins["precision"]
    return PRECISION[NEAREST.get(recipe, recipe)]


def tp_plan(facts: Facts) -> dict[str, str] | None:
    """Module patterns -> styles; rules of the model's own plan that this one lacks become "replicate"."""
    if facts.count("tp") == 1:
        return None
    model: Any = facts.loaded.model
    found = {name: STYLES[style] for name, style in split_of(facts.plan, model).styles.items()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = {id(module): name for name, module in model.named_modules()}
    if found.get(names.get(id(head), "")) == "colwise":
        found[names[id(head)]] = "colwise_gather_output"  # its loss is of whole logits
    own = dict.fromkeys(getattr(model, "tp_plan", None) or {}, "replicate")
    return own | found


def _fsdp_plan(facts: Facts) -> dict[str, str] | None:
    """The layers as units of FSDP: freed after use (ZeRO-3) or kept (ZeRO-2)."""
    layers = layer_list(facts.plan)
    if facts.count("zero") == 0 or not layers:
        return None
    return {f"{layers}.*": "free_full_weight" if facts.count("zero") == 3 else "keep_full_weight"}


def _level(value: Any, document: Document) -> dict[str, str]:
    styles = set(value.values()) if isinstance(value, dict) else set()
    return {"zero": "2" if "keep_full_weight" in styles else "3"} if styles else {}


def _dp(value: Any, document: Document) -> dict[str, str]:
    """`dp` is replicas times shards; without shards there is nothing of ZeRO."""
    shards = document.get("distributed_config.fsdp_size") or 1
    return {"dp": str(value * shards)} | ({"zero": "0"} if shards == 1 and value > 1 else {}) if whole(value) else {}


ROWS = (
    number("distributed_config.tp_size", "tp"),
    Row("distributed_config.tp_plan", tp_plan, lambda v, d: {"sequence_parallel": "off"} if v else {}),
    Row("distributed_config.fsdp_size", lambda f: f.count("dp") if f.count("zero") else 1),
    Row("distributed_config.dp_replicate_size", lambda f: 1 if f.count("zero") else f.count("dp"), _dp),
    Row("distributed_config.fsdp_plan", _fsdp_plan, _level),
    Row("distributed_config.fsdp_mixed_precision",
        lambda f: True if f.count("zero") and _recipe(f) == PRECISION["fsdp-fp32"] else None),
    Row("distributed_config.fsdp_cpu_offload", lambda f: True if f.away == {"optimizer", "params"} else None,
        lambda v, d: {"offload": "optimizer"} if v is True else {}),
    number("distributed_config.pp_size", "pp"),
    number("distributed_config.ep_size", "ep"),
    number("training_arguments.per_device_train_batch_size", "micro_batch"),
    Row("training_arguments.gradient_accumulation_steps", lambda f: f.plan.pipeline.microbatches),
    Row("training_arguments.bf16", lambda f: _recipe(f)["training_arguments.bf16"]),
    Row("training_arguments.fp16", lambda f: _recipe(f)["training_arguments.fp16"]),
    chosen("training_arguments.gradient_checkpointing", "recompute", {"full": True, "none": False}),
    chosen("training_arguments.optim", "optimizer", OPTIMIZERS),
)  # fmt: skip


def _write(facts: Facts, losses: tuple[str, ...]) -> str:
    return json.dumps(nested(values(ROWS, facts)), indent=2) + "\n"


def read(text: str) -> Reading:
    """What such a file says; the global batch is known where all sizes are."""
    document = flat(json.loads(text))
    pins = pins_in(ROWS, document)
    for recipe, settings in PRECISION.items():
        if all(document.get(name) == value for name, value in settings.items()):
            pins["precision"] = recipe
    if pins.get("tp") == "1":
        pins.pop("sequence_parallel", None)
    steps = document.get("training_arguments.gradient_accumulation_steps")
    if steps is None or not whole(steps) or not {"dp", "micro_batch"} <= set(pins):
        return Reading(pins)
    return Reading(pins, steps * int(pins["dp"]) * int(pins["micro_batch"]))


def _notes(facts: Facts) -> tuple[str, ...]:
    said = (
        (
            facts.plan.source.seq is not None,
            f"seq={facts.plan.source.seq}: sequences are as long as the data set makes them",
        ),
        (facts.count("pp") > 1, f"Transformers cuts stages by itself; here they hold {facts.cuts} layers"),
        (facts.count("ep") > 1, "how experts are spread is the model's own ep_plan"),
    )
    return tuple(text for holds, text in said if holds)


TARGET = Target(
    "hf", "Transformers", _write, read,
    (
        Refused(lambda f: f.plan.source.kind != "hf", lambda f: f"{f.plan.source.model} is none of its models",
                "export it as a script (--to script)"),
        Refused(lambda f: f.count("cp") > 1, lambda f: f"its distributed configuration has no cp (here {f.pins['cp']})",
                "plan with --pin cp=1"),
        Refused(lambda f: f.count("pp") > 1 and f.count("dp") > 1,
                lambda f: f"it does not combine pp={f.pins['pp']} with dp={f.pins['dp']}", "plan with --pin pp=1 or --pin dp=1"),
        Refused(lambda f: f.pins["precision"] not in PRECISION and f.pins["precision"] not in NEAREST,
                lambda f: f"it trains in {f.pins['precision']}", "plan with --pin dtype=fp32, bf16 or fp16"),
        Refused(lambda f: f.pins["optimizer"] not in OPTIMIZERS, lambda f: f"it has no optimizer {f.pins['optimizer']}",
                f"plan with --pin optimizer={'|'.join(OPTIMIZERS)}"),
    ),
    {
        "zero": "FSDP frees gathered parameters (free_full_weight: ZeRO-3) or keeps them (keep_full_weight: ZeRO-2)",
        "sequence_parallel": "enable_sequence_parallel is reserved, not wired up: positions stay whole between layers",
        "recompute": "gradient_checkpointing runs whole layers again, or nothing",
        "schedule": "Transformers chooses the schedule itself",
        "vpp": "Transformers has one stage a rank",
        "precision": "Transformers computes in bf16 or fp16 over float32 parameters; bytes differ",
        "offload": "fsdp_cpu_offload moves parameters, gradients and optimizer states together",
        "update": "the trainer steps after the backward pass",
    },
    _notes,
    silent={"tp": "1", "pp": "1", "cp": "1", "ep": "1", "vpp": "1", "offload": "none", "recompute": "none"},
)  # fmt: skip

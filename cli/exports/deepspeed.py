"""DeepSpeed: its configuration as JSON (names of deepspeed 0.19, `deepspeed/runtime/config.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from .base import Document, Reading, Refused, Row, Target, flat, nested, number, pins_in, values, whole
from .facts import Facts

PRECISION: Mapping[str, Mapping[str, Any]] = {
    "zero": {"bf16.enabled": True},
    "megatron": {"bf16.enabled": True, "data_types.grad_accum_dtype": "fp32"},
    "pure-bf16": {"bf16.enabled": True, "bf16.bf16_master_weights_and_grads": True, "bf16.bf16_optimizer_states": True},
    "zero-fp16": {"fp16.enabled": True},
    "fsdp-fp32": {"torch_autocast.enabled": True, "torch_autocast.dtype": "bfloat16"},
    "fp16": {"torch_autocast.enabled": True, "torch_autocast.dtype": "float16"},
    "fp32": {"bf16.enabled": False, "fp16.enabled": False},
}
"""Recipe -> settings that keep as many bytes per parameter: bf16 with a float32 master copy, autocast over float32 parameters."""

NEAREST: Mapping[str, str] = {
    "fsdp-bf16": "fsdp-fp32", "fsdp-fp8": "fsdp-fp32", "megatron-fp8": "megatron", "pure-fp16": "zero-fp16",
}  # fmt: skip
OPTIMIZERS: Mapping[str, str] = {
    "adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "adagrad": "Adagrad", "lion": "Lion",
}  # fmt: skip
"""Names of DeepSpeed's own and of torch.optim."""


def _precision(name: str) -> Row:
    """One setting of `PRECISION`."""

    def of(facts: Facts) -> Any:
        recipe = facts.pins["precision"]
        return PRECISION[NEAREST.get(recipe, recipe)].get(name)

    return Row(name, of)


def _recipe(document: Document) -> str | None:
    """The recipe all of whose settings stand in a document, the one with the most of them first."""
    order = sorted(PRECISION, key=lambda recipe: -len(PRECISION[recipe]))
    held = (r for r in order if all(document.get(k, False) == v for k, v in PRECISION[r].items()))
    return next(held, None)


def _offloaded(what: str) -> Callable[[Facts], Any]:
    """The device of what leaves the GPU."""
    return lambda f: "cpu" if what in f.away else None


ROWS = (
    Row("train_batch_size", lambda f: f.batch),
    number("train_micro_batch_size_per_gpu", "micro_batch"),
    Row("gradient_accumulation_steps", lambda f: f.plan.pipeline.microbatches),
    Row("optimizer.type", lambda f: OPTIMIZERS[f.pins["optimizer"]],
        lambda v, d: {"optimizer": str(v).lower()} if str(v).lower() in OPTIMIZERS else {}),
    Row("zero_optimization.stage", lambda f: f.count("zero"), 
        lambda v, d: {"zero": str(int(v))} if v in (0, 1, 2, 3) else {}),
    Row("zero_optimization.offload_param.device", _offloaded("params"),
        lambda v, d: {"offload": "params"} if v in ("cpu", "nvme") else {}),
    Row("zero_optimization.offload_optimizer.device", _offloaded("optimizer"),
        lambda v, d: {"offload": "optimizer"} if v in ("cpu", "nvme") else {}),
    *(_precision(name) for name in dict.fromkeys(key for settings in PRECISION.values() for key in settings)),
    Row("tensor_parallel.autotp_size", lambda f: f.count("tp") if f.count("tp") > 1 else None,
        lambda v, d: {"tp": str(v), "sequence_parallel": "off"} if whole(v) else {}),
    Row("sequence_parallel_size", lambda f: f.count("cp") if f.count("cp") > 1 else None,
        lambda v, d: {"cp": str(v)} if whole(v) else {}),
    Row("data_parallel_size", lambda f: f.count("dp") if f.count("cp") > 1 else None),
    Row("activation_checkpointing.partition_activations", lambda f: False if f.pins.get("recompute") == "full" else None),
    Row("activation_checkpointing.number_checkpoints",
        lambda f: f.layers if f.pins.get("recompute") == "full" else None,
        lambda v, d: {"recompute": "full"} if whole(v) else {}),
)  # fmt: skip


def _write(facts: Facts, losses: tuple[str, ...]) -> str:
    return json.dumps(nested(values(ROWS, facts)), indent=2) + "\n"


def read(text: str) -> Reading:
    """What a DeepSpeed configuration says; "auto" says nothing."""
    document = flat(json.loads(text))
    pins = pins_in(ROWS, document)
    known = {row.name for row in ROWS} & set(document)
    if known and (recipe := _recipe(document)) is not None:
        pins["precision"] = recipe
    batch: Any = document.get("train_batch_size")
    micro: Any = document.get("train_micro_batch_size_per_gpu")
    steps: Any = document.get("gradient_accumulation_steps")
    if whole(batch) and whole(micro) and whole(steps):
        pins["dp"] = str(batch // (micro * steps))
    return Reading(pins, batch if whole(batch) else None)


def _notes(facts: Facts) -> tuple[str, ...]:
    said = (
        (facts.plan.source.seq is not None, f"seq={facts.plan.source.seq}: the training script makes the sequences"),
        (facts.pins.get("recompute") == "full",
         "recompute=full: the configuration sets up deepspeed.checkpointing; the model has to call it"),
        (facts.count("cp") > 1, "cp is Ulysses' exchange of heads in DeepSpeed; attention has to be wrapped in the script"),
        (len(facts.plan.stages) > 1, f"the {len(facts.plan.stages)} stages hold {facts.cuts} layers: pass that to PipelineModule"),
    )  # fmt: skip
    return tuple(text for holds, text in said if holds)


TARGET = Target(
    "deepspeed", "DeepSpeed", _write, read,
    (
        Refused(lambda f: f.pins["precision"] not in PRECISION and f.pins["precision"] not in NEAREST,
                lambda f: f"it trains in {f.pins['precision']}", "plan with --pin dtype=fp32, bf16 or fp16"),
        Refused(lambda f: f.pins["optimizer"] not in OPTIMIZERS, lambda f: f"it has no optimizer {f.pins['optimizer']}",
                f"plan with --pin optimizer={'|'.join(OPTIMIZERS)}"),
        Refused(lambda f: f.count("pp") > 1 and f.count("zero") > 1,
                lambda f: f"PipelineModule does not go with zero={f.count('zero')}", "plan with --pin pp=1, zero=0 or zero=1"),
    ),
    {
        "pp": "stages are no setting: give num_stages to deepspeed.pipe.PipelineModule in the training script",
        "schedule": "PipelineModule runs 1f1b",
        "vpp": "PipelineModule has one stage a rank",
        "ep": "expert parallelism is no setting: give ep_size to deepspeed.moe.layer.MoE",
        "sequence_parallel": "automatic tensor parallelism leaves positions whole between its products",
        "recompute": "DeepSpeed checkpoints whole layers, where the model calls for it",
        "offload": "DeepSpeed moves optimizer states or parameters, not this",
        "update": "DeepSpeed steps after the backward pass",
        "optimizer": "not one of DeepSpeed's; pass it to deepspeed.initialize",
    },
    _notes,
    silent={"tp": "1", "cp": "1", "offload": "none"},
)  # fmt: skip

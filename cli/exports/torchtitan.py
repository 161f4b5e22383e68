"""torchtitan: a job configuration as TOML (names of torchtitan 0.2, `torchtitan/config/job_config.py`).

From 0.3 on torchtitan takes the same names as arguments (`--parallelism.tensor_parallel_degree 4`) and Python functions.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from .base import (
    Document,
    Reading,
    Refused,
    Row,
    Target,
    chosen,
    flat,
    nested,
    number,
    pins_in,
    spelled_by,
    values,
    whole,
)
from .facts import Facts

SCHEDULES: Mapping[str, str] = {
    "gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zb-h1": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble", "dualpipev": "DualPipeV",
}  # fmt: skip
OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam"}
RESHARD = {"0": "never", "1": "never", "2": "never", "3": "always"}
"""ZeRO level -> `fsdp_reshard_after_forward`: "never" keeps parameters gathered and shares gradients out, which is ZeRO-2."""

PRECISION: Mapping[str, Mapping[str, Any]] = {
    "fsdp-fp8": {"training.dtype": "float32", "training.mixed_precision_param": "bfloat16",
                 "model.converters": ["quantize.linear.float8"]},
    "fsdp-fp32": {"training.dtype": "float32", "training.mixed_precision_param": "bfloat16"},
    "fp32": {"training.dtype": "float32", "training.mixed_precision_param": "float32"},
    "pure-bf16": {"training.dtype": "bfloat16", "training.mixed_precision_param": "bfloat16"},
}  # fmt: skip
NEAREST = {"fsdp-bf16": "fsdp-fp32", "megatron": "fsdp-fp32", "zero": "fsdp-fp32", "megatron-fp8": "fsdp-fp8"}


def _precision(name: str) -> Row:
    def of(facts: Facts) -> Any:
        recipe = facts.pins["precision"]
        return PRECISION[NEAREST.get(recipe, recipe)].get(name)

    return Row(name, of)


def _shards(facts: Facts) -> bool:
    """Whether data-parallel ranks share parameters: torchtitan replicates them only where nothing else is split."""
    return facts.count("zero") > 0 or any(facts.count(key) > 1 for key in ("tp", "pp", "cp", "ep"))


def _degree(value: Any, document: Document) -> dict[str, str]:
    """`dp` of two degrees, and the level: replicas alone are ZeRO-0; -1 ("all other ranks") says nothing of `dp`.

    By default torchtitan frees gathered parameters, but not in stages.
    """
    replicas = document.get("parallelism.data_parallel_replicate_degree", 1)
    found = {"dp": str(value * replicas)} if whole(value) and whole(replicas) else {}
    if value == 1:
        return {**found, "zero": "0"} if replicas > 1 else found
    deep = document.get("parallelism.pipeline_parallel_degree", 1) != 1
    level = {"always": "3", "never": "2"}.get(
        str(document.get("parallelism.fsdp_reshard_after_forward")), "2" if deep else "3"
    )
    return {**found, "zero": level}


def _parts(facts: Facts) -> list[list[str]] | None:
    """Modules of every virtual stage by torchtitan's names; None for one stage."""
    if len(facts.cuts) < 2:
        return None
    made, first = list[list[str]](), 0
    for count in facts.cuts:
        made.append([f"layers.{i}" for i in range(first, first + count)])
        first += count
    made[0].insert(0, "tok_embeddings")
    made[-1] += ["norm", "output"]
    return made


ROWS = (
    Row("training.local_batch_size",
        lambda f: f.count("micro_batch") * (f.plan.pipeline.microbatches if f.count("pp") > 1 else 1),
        lambda v, d: {"micro_batch": str(v)} if whole(v) and d.get("parallelism.pipeline_parallel_degree", 1) == 1 else {}),
    Row("training.global_batch_size", lambda f: f.batch),
    Row("training.seq_len", lambda f: f.plan.source.seq),
    *(_precision(name) for name in ("training.dtype", "training.mixed_precision_param", "model.converters")),
    Row("training.enable_cpu_offload", lambda f: True if f.away == {"optimizer", "params"} else None,
        lambda v, d: {"offload": "optimizer"} if v is True else {}),
    chosen("optimizer.name", "optimizer", OPTIMIZERS),
    Row("optimizer.early_step_in_backward", lambda f: True if f.pins.get("update") == "backward" else None,
        lambda v, d: {"update": "backward"} if v is True else {}),
    Row("parallelism.data_parallel_replicate_degree", lambda f: 1 if _shards(f) else f.count("dp")),
    Row("parallelism.fsdp_reshard_after_forward", lambda f: RESHARD[f.pins.get("zero", "0")]),
    Row("parallelism.data_parallel_shard_degree", lambda f: f.count("dp") if _shards(f) else 1, _degree),
    Row("parallelism.tensor_parallel_degree", lambda f: f.count("tp"),
        lambda v, d: ({"tp": str(v)} | ({"sequence_parallel": "on"} if v > 1 else {})) if whole(v) else {}),
    Row("parallelism.enable_async_tensor_parallel", lambda f: True if f.pins.get("tp_overlap") == "on" else None,
        lambda v, d: {"tp_overlap": "on"} if v is True else {}),
    number("parallelism.pipeline_parallel_degree", "pp"),
    Row("parallelism.pipeline_parallel_schedule", lambda f: SCHEDULES[f.pins["schedule"]] if f.count("pp") > 1 else None,
        lambda v, d: spelled_by("schedule", SCHEDULES, v)),
    Row("parallelism.pipeline_parallel_microbatch_size", lambda f: f.count("micro_batch") if f.count("pp") > 1 else None,
        lambda v, d: {"micro_batch": str(v)} if whole(v) else {}),
    Row("parallelism.module_fqns_per_model_part", _parts,
        lambda v, d: {"vpp": str(len(v) // d.get("parallelism.pipeline_parallel_degree", 1))}),
    number("parallelism.context_parallel_degree", "cp"),
    number("parallelism.expert_parallel_degree", "ep"),
    chosen("activation_checkpoint.mode", "recompute", {"none": "none", "selective": "selective", "full": "full"}),
    Row("activation_checkpoint.selective_ac_option", lambda f: "op" if f.pins.get("recompute") == "selective" else None),
)  # fmt: skip


def _write(facts: Facts, losses: tuple[str, ...]) -> str:
    found = values(ROWS, facts)
    found.setdefault("activation_checkpoint.mode", "none")  # torchtitan's own default is to recompute
    lines = [f"# {line}" for line in (f"{facts.plan.ranks} ranks; of {facts.plan.source.model}", *losses)]
    for table, settings in nested(found).items():
        lines += ["", f"[{table}]", *(f"{name} = {_toml(value)}" for name, value in settings.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A value as TOML: of those that a row has, all are spelled as in JSON."""
    return json.dumps(value)


def read(text: str) -> Reading:
    """What a torchtitan job configuration says."""
    document = flat(tomllib.loads(text))
    pins = pins_in(ROWS, document)
    order = sorted(PRECISION, key=lambda recipe: -len(PRECISION[recipe]))
    recipe = next((r for r in order if all(document.get(k) == v for k, v in PRECISION[r].items())), None)
    if recipe is not None:
        pins["precision"] = recipe
    batch, seq = document.get("training.global_batch_size"), document.get("training.seq_len")
    return Reading(pins, batch if whole(batch) else None, seq if whole(seq) else None)


def _notes(facts: Facts) -> tuple[str, ...]:
    return (
        f"which model is meant: model.name and model.flavor are torchtitan's own names for {facts.plan.source.model}",
    )


TARGET = Target(
    "torchtitan", "torchtitan", _write, read,
    (
        Refused(lambda f: f.pins["precision"] not in PRECISION and f.pins["precision"] not in NEAREST,
                lambda f: f"it trains in {f.pins['precision']}", "plan with --pin dtype=fp32 or bf16"),
        Refused(lambda f: f.pins["optimizer"] not in OPTIMIZERS, lambda f: f"it has no optimizer {f.pins['optimizer']}",
                f"plan with --pin optimizer={'|'.join(OPTIMIZERS)}"),
    ),
    {
        "zero": "torchtitan shares out parameters (always: ZeRO-3) or keeps them gathered and shares gradients (never: ZeRO-2)",
        "sequence_parallel": "torchtitan's tensor parallelism always splits positions too",
        "precision": "torchtitan stores float32 parameters and computes in bf16, without a copy of its own; bytes differ",
        "offload": "torchtitan moves parameters, gradients and optimizer states together, or nothing",
    },
    _notes,
    silent={"tp": "1", "pp": "1", "cp": "1", "ep": "1", "vpp": "1", "offload": "none"},
)  # fmt: skip

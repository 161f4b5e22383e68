"""Megatron-LM: an argument list for its training scripts (names of `megatron/training/arguments.py`, checked in 2026-08).

One argument a line, comments with `#`: `torchrun ... pretrain_gpt.py $(grep -v '^#' FILE) ...`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ...errors import UsageError
from .base import Document, Reading, Refused, Row, Target, chosen, number, pins_in, spelled_by, values, whole
from .facts import Facts
from .sizes import sizes_of

PRECISION: Mapping[str, tuple[str, ...]] = {
    "megatron": ("--bf16",),
    "zero": ("--bf16", "--grad-reduce-in-bf16"),
    "zero-fp16": ("--fp16",),
    "megatron-fp8": ("--bf16", "--fp8-format=hybrid"),
    "fp32": (),
}
"""Recipe -> arguments that keep as many bytes per parameter."""

NEAREST: Mapping[str, str] = {
    "fsdp-fp32": "megatron", "fsdp-bf16": "megatron", "pure-bf16": "zero", "fsdp-fp8": "megatron-fp8", "fp16": "zero-fp16",
    "pure-fp16": "zero-fp16",
}  # fmt: skip
"""The recipe with the same compute dtype for those that Megatron has not."""

STRATEGY = {"1": "optim", "2": "optim_grads", "3": "optim_grads_params"}
OPTIMIZERS = {"adamw": "adam", "sgd": "sgd", "lion": "lion"}
"""Megatron's adam decays weights as AdamW does."""

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("--position-embedding-type=learned_absolute", "--normalization=LayerNorm"),
    "llama": ("--swiglu", "--position-embedding-type=rope", "--normalization=RMSNorm", "--disable-bias-linear"),
    "mistral": ("--swiglu", "--position-embedding-type=rope", "--normalization=RMSNorm", "--disable-bias-linear"),
    "mixtral": ("--swiglu", "--position-embedding-type=rope", "--normalization=RMSNorm", "--disable-bias-linear"),
    "qwen2": ("--swiglu", "--position-embedding-type=rope", "--normalization=RMSNorm", "--disable-bias-linear",
              "--add-qkv-bias"),
    "qwen3": ("--swiglu", "--position-embedding-type=rope", "--normalization=RMSNorm", "--disable-bias-linear",
              "--qk-layernorm"),
}  # fmt: skip
"""model_type -> what its layers are made of."""


def _size(flag: str, name: str) -> Row:
    """An argument that is a size of a model of a known family; no reading, as a plan names its model."""

    def of(facts: Facts) -> Any:
        config = facts.plan.source.config or {}
        return sizes_of(config)[name] if config.get("model_type") in FAMILIES else None

    return Row(flag, of)


def _switch(flag: str, of: Any, says: Mapping[str, str]) -> Row:
    """An argument without a value."""
    return Row(flag, lambda f: True if of(f) else None, lambda v, d: dict(says))


def _recipe(facts: Facts) -> tuple[str, ...]:
    recipe = facts.pins["precision"]
    return PRECISION[NEAREST.get(recipe, recipe)]


def _uneven(facts: Facts) -> bool:
    return len(set(facts.cuts)) > 1


def _layout(facts: Facts) -> str:
    """Stages as Megatron spells them: E the embedding, t a layer, L the loss, | a border."""
    stages = [f"t*{n}" if n > 1 else "t" * n for n in facts.cuts]
    stages[0], stages[-1] = f"E{stages[0]}", f"{stages[-1]}L"
    return "|".join(stages)


def _chunks(text: Any, document: Document) -> dict[str, str]:
    ranks = document.get("--pipeline-model-parallel-size", 1)
    return {"vpp": str((str(text).count("|") + 1) // ranks)} if whole(ranks) else {}


ROWS = (
    number("--tensor-model-parallel-size", "tp"),
    number("--pipeline-model-parallel-size", "pp"),
    Row("--num-virtual-stages-per-pipeline-rank",
        lambda f: f.count("vpp") if f.count("vpp") > 1 and not _uneven(f) else None,
        lambda v, d: {"vpp": str(v)} if whole(v) else {}),
    Row("--pipeline-model-parallel-layout", lambda f: _layout(f) if _uneven(f) else None, _chunks),
    number("--context-parallel-size", "cp"),
    number("--expert-model-parallel-size", "ep"),
    _switch("--sequence-parallel", lambda f: f.pins.get("sequence_parallel") == "on", {"sequence_parallel": "on"}),
    number("--micro-batch-size", "micro_batch"),
    Row("--global-batch-size", lambda f: f.batch),
    Row("--seq-length", lambda f: f.plan.source.seq),
    _switch("--use-distributed-optimizer", lambda f: f.count("zero") >= 1, {"zero": "1"}),
    _switch("--use-megatron-fsdp", lambda f: f.count("zero") >= 2, {}),
    Row("--data-parallel-sharding-strategy", lambda f: STRATEGY[f.pins["zero"]] if f.count("zero") >= 2 else None,
        lambda v, d: spelled_by("zero", STRATEGY, v)),
    chosen("--recompute-granularity", "recompute", {"selective": "selective", "full": "full"}),
    Row("--recompute-method", lambda f: "uniform" if f.pins.get("recompute") == "full" else None),
    Row("--recompute-num-layers", lambda f: 1 if f.pins.get("recompute") == "full" else None),
    _switch("--optimizer-cpu-offload", lambda f: f.pins.get("offload") == "optimizer", {"offload": "optimizer"}),
    chosen("--optimizer", "optimizer", OPTIMIZERS),
    _switch("--bf16", lambda f: "--bf16" in _recipe(f), {}),
    _switch("--fp16", lambda f: "--fp16" in _recipe(f), {}),
    _switch("--grad-reduce-in-bf16", lambda f: "--grad-reduce-in-bf16" in _recipe(f), {}),
    Row("--fp8-format", lambda f: "hybrid" if "--fp8-format=hybrid" in _recipe(f) else None),
    _switch("--tp-comm-overlap", lambda f: f.pins.get("tp_overlap") == "on", {"tp_overlap": "on"}),
    Row("--attention-backend", lambda f: {"flash": "flash", "math": "unfused"}.get(f.pins.get("attention", "")),
        lambda v, d: {"attention": {"flash": "flash", "unfused": "math"}[v]} if v in ("flash", "unfused") else {}),
    _size("--num-layers", "layers"),
    _size("--hidden-size", "hidden"),
    _size("--ffn-hidden-size", "ffn"),
    _size("--num-attention-heads", "heads"),
    _switch("--group-query-attention", lambda f: _size("", "groups").of(f) is not None, {}),
    _size("--num-query-groups", "groups"),
    _size("--kv-channels", "head"),
    _size("--max-position-embeddings", "positions"),
    _size("--vocab-size", "vocab"),
    Row("--rotary-base", lambda f: int(base) if (base := _size("", "base").of(f)) is not None else None),
    _size("--norm-epsilon", "epsilon"),
    _size("--num-experts", "experts"),
    _size("--moe-router-topk", "picked"),
    _switch("--untie-embeddings-and-output-weights", lambda f: _size("", "tied").of(f) is False, {}),
)  # fmt: skip


def _write(facts: Facts, losses: tuple[str, ...]) -> str:
    family = str((facts.plan.source.config or {}).get("model_type"))
    lines = [f"# {line}" for line in (f"{facts.plan.ranks} ranks", *losses)]
    for name, value in values(ROWS, facts).items():
        lines.append(name if value is True else f"{name}={value}")
    return "\n".join([*lines, *FAMILIES.get(family, ())]) + "\n"


def read(text: str) -> Reading:
    """What an argument list says; both `--name=value` and `--name value` are read."""
    words = shlex.split(text, comments=True)
    document: Document = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        name, sign, value = word.partition("=")
        if not name.startswith("--"):
            continue
        if not sign and not following.startswith("--"):
            sign, value = "=", following
        document[name] = _plain(value) if sign else True
    if not document:
        raise UsageError("no argument starts with --")
    pins = {"sequence_parallel": "off", "vpp": "1"} | pins_in(ROWS, document)
    if pins.get("tp", "1") == "1":
        del pins["sequence_parallel"]
    given = {f"{name}={value}" if value is not True else name for name, value in document.items()}
    order = sorted(PRECISION, key=lambda recipe: -len(PRECISION[recipe]))
    pins["precision"] = next(r for r in order if given >= set(PRECISION[r]))
    if int(pins.get("pp", "1")) > 1:
        pins["schedule"] = "interleaved" if pins["vpp"] != "1" else "1f1b"
    batch, seq = document.get("--global-batch-size"), document.get("--seq-length")
    return Reading(pins, batch if whole(batch) else None, seq if whole(seq) else None)


def _plain(text: str) -> Any:
    return int(text) if text.isdigit() else text


def _notes(facts: Facts) -> tuple[str, ...]:
    family = (facts.plan.source.config or {}).get("model_type")
    said = (
        (family not in FAMILIES, f"{facts.plan.source.model} is of no family known here: its sizes are not written"),
        (facts.count("ep") > 1 and facts.count("tp") > 1, "tp splits experts too, unless --expert-tensor-parallel-size is given"),
    )  # fmt: skip
    return tuple(text for holds, text in said if holds)


TARGET = Target(
    "megatron", "Megatron-LM", _write, read,
    (
        Refused(lambda f: f.pins["precision"] not in PRECISION and f.pins["precision"] not in NEAREST,
                lambda f: f"it trains in {f.pins['precision']}", "plan with --pin dtype=fp32, bf16 or fp16"),
        Refused(lambda f: f.pins["optimizer"] not in OPTIMIZERS, lambda f: f"it has no optimizer {f.pins['optimizer']}",
                f"plan with --pin optimizer={'|'.join(OPTIMIZERS)}"),
    ),
    {
        "schedule": "Megatron runs 1f1b, or interleaved with several stages a rank",
        "precision": "Megatron keeps a half-precision copy beside float32 states; this plan's bytes differ",
        "offload": "Megatron moves optimizer states (and activations through Transformer Engine), not this",
        "update": "Megatron steps after the backward pass",
    },
    _notes,
    frozenset({"dp"}),
    {"tp": "1", "pp": "1", "cp": "1", "ep": "1", "vpp": "1", "zero": "0", "offload": "none", "recompute": "none"},
)  # fmt: skip

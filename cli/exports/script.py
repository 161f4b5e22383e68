"""A standalone PyTorch program: `program.txt` less the sections that a plan does not use, with the plan's values for constants.

In the text a line `# [name` begins what only plans with `name` need (`_sections`), `# name]` ends it.

It takes `parallelize_module`, `fully_shard`, checkpoint wrappers and `torch.distributed.pipelining`, nothing of this package.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ...planner.precision import RECIPES
from .base import Reading, Refused, Target
from .blocks import styles_of
from .facts import Facts, layer_number
from .modules import layer_list, split_of, tied

if TYPE_CHECKING:
    from ...passes.models import Loaded

MARK = "Written by `shardwright export --to script`"
SCHEDULES = ("gpipe", "1f1b", "interleaved")
OPTIMIZERS = {
    "adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "nadam": "NAdam", "radam": "RAdam", "adamax": "Adamax", "adadelta": "Adadelta",
    "rprop": "Rprop", "adagrad": "Adagrad", "rmsprop": "RMSprop", "asgd": "ASGD",
}  # fmt: skip
NEAREST: Mapping[str, str] = {
    "megatron": "fsdp-fp32", "zero": "fsdp-fp32", "megatron-fp8": "fsdp-fp32", "fsdp-fp8": "fsdp-fp32", "zero-fp16": "fp16",
}  # fmt: skip
"""Recipes with a copy beside the parameters, or products in fp8 -> the nearest that torch has by itself."""

KEYS = ("dp", "tp", "pp", "vpp", "zero", "micro_batch", "schedule", "recompute", "sequence_parallel", "optimizer")
"""Pins that stand in the program as such."""


def _layers(facts: Facts) -> dict[int, tuple[int, str]]:
    """Layer number -> (stage, recompute policy), by the plan's stages (or its regions, where it has none)."""
    entries = {e.name: e for e in facts.plan.regions}
    runs = [(s, run.use, run.first, run.count) for s, stage in enumerate(facts.plan.stages) for run in stage.runs]
    found: dict[int, tuple[int, str]] = {}
    for stage, use, first, count in runs or [(0, e.name, 0, e.repeats) for e in facts.plan.regions]:
        number = layer_number(entries[use], layer_list(facts.plan))
        if number is not None:
            found |= {number + k: (stage, entries[use].policy) for k in range(first, first + count)}
    return found


def _constants(facts: Facts, loaded: Loaded) -> dict[str, Any]:
    """The values of the program's constants."""
    plan, source = facts.plan, facts.plan.source
    recipe = RECIPES[NEAREST.get(facts.pins["precision"], facts.pins["precision"])]
    held = _layers(facts)
    pins = {key: _plain(facts.pins[key]) for key in KEYS if key in facts.pins}
    settings = {
        **pins, "zero": facts.count("zero"), "microbatches": plan.pipeline.microbatches, "batch": source.batch,
        "seq": source.seq, "seed": source.seed, "precision": recipe.name, "parameter": recipe.parameter,
        "compute": recipe.compute, "gradient": recipe.reduction or recipe.gradient,
        "optimizer": OPTIMIZERS[facts.pins["optimizer"]],
    }  # fmt: skip
    config = source.config if source.kind == "hf" else {"file": source.file, "function": source.function}
    split = split_of(plan, loaded.model)
    return {
        "PLAN": settings, "CONFIG": config, "CLASS": type(loaded.model).__name__, "INPUTS": _inputs(loaded),
        "STYLES": styles_of(facts, split, loaded.model), "TIED": [list(names) for names in tied(plan)], "LAYERS": split.layers,
        "NAMES": _names(facts, loaded), "CUTS": [sum(s == i for s, _ in held.values()) for i in range(len(plan.stages))],
        "RECOMPUTE": sorted(n for n, (_, policy) in held.items() if policy == "full"),
    }  # fmt: skip


def _plain(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _inputs(loaded: Loaded) -> dict[str, Any]:
    """Inputs by name: a shape and one more than the greatest integer (0: normal numbers), or the name of an equal input."""
    config: Any = getattr(loaded.model, "config", None)
    found: dict[str, Any] = {}
    for name, value in loaded.kwargs.items() if loaded.source.kind == "hf" else ():
        shape = [loaded.source.batch, *value.shape[1:]]
        first = next(iter(found), None)
        if first is not None and found[first][0] == shape:
            found[name] = first
        elif value.is_floating_point():
            found[name] = [shape, 0]
        else:
            found[name] = [shape, config.get_text_config().vocab_size if first is None else max(config.num_labels, 1)]
    return found


def _names(facts: Facts, loaded: Loaded) -> dict[str, str]:
    """Names of embedding, last norm and head, for stages; raises UsageError for models that do not say how they are cut."""
    if facts.count("pp") == 1:
        return {}
    fix = "plan with --pin pp=1"
    model: Any = loaded.model
    if tied(facts.plan):
        raise UsageError(
            f"{' and '.join(tied(facts.plan)[0])} are one parameter of two stages, which the program does not have; {fix}"
        )
    said = getattr(getattr(model, "config", None), "base_model_pp_plan", None) or {}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if set(said) != {"embed_tokens", "layers", "norm"} or f"{prefix}layers" != layer_list(facts.plan):
        raise UsageError(
            f"{facts.plan.source.model} does not say how it is cut into stages (base_model_pp_plan); {fix}"
        )
    heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    return {"embedding": f"{prefix}embed_tokens", "norm": f"{prefix}norm", "head": heads[0]}


def _sections(facts: Facts) -> set[str]:
    """Sections of the program that a plan needs."""
    compute = NEAREST.get(facts.pins["precision"], facts.pins["precision"])
    wanted = {
        facts.plan.source.kind: True, "recompute": any(p == "full" for _, p in _layers(facts).values()),
        "data": facts.count("dp") > 1 or RECIPES[compute].compute != RECIPES[compute].parameter, "tp": facts.count("tp") > 1,
        "positions": facts.pins.get("sequence_parallel") == "on", "pp": facts.count("pp") > 1, "one": facts.count("pp") == 1,
    }  # fmt: skip
    return {name for name, there in wanted.items() if there}


def _kept(lines: list[str], wanted: set[str]) -> Iterator[str]:
    """The lines that are in no section that is not wanted."""
    inside: list[str] = []
    for line in lines:
        if begin := re.fullmatch(r"\s*# \[(\w+)", line):
            inside.append(begin[1])
        elif re.fullmatch(r"\s*# \w+\]", line):
            inside.pop()
        elif set(inside) <= wanted:
            yield line


def _write(facts: Facts, losses: tuple[str, ...]) -> str:
    constants = _constants(facts, facts.loaded)
    lines = list(
        _kept(Path(__file__).with_name("program.txt").read_text(encoding="utf-8").splitlines(), _sections(facts))
    )
    body = "\n".join(lines)
    for name, value in constants.items():
        assigned = f"{name} = {_literal(value)}".replace("\\", r"\\")
        body = re.sub(rf"^{name}: .* = .*$", assigned, body, flags=re.MULTILINE)
    body = re.sub(r"(?m)^((?:from (?!__)|import ).*)\n\n+(?=from|import)", r"\1\n", body)
    body = re.sub(r"\n{4,}", "\n\n\n", body)
    title = re.sub(r"[^ -~]|[\"\\]", "?", facts.plan.source.model)
    head = [
        f'"""{MARK}: {title} on {facts.plan.ranks} ranks.', "",
        f"    torchrun --nproc-per-node {facts.plan.ranks} FILE --check     loss and gradients beside the original model's",
        f"    torchrun --nproc-per-node {facts.plan.ranks} FILE             train on random data",
        *(["", "Of the plan it does not have:", *(f"- {_safe(loss)}" for loss in losses)] if losses else []), '"""', "",
    ]  # fmt: skip
    return "\n".join([*head, body.strip(), ""])


def _literal(value: Any, indent: str = "") -> str:
    """A value as Python, a line for each key of a table."""
    if isinstance(value, dict) and value:
        inner = f"{indent}    "
        return (
            "{\n" + "".join(f"{inner}{_literal(k)}: {_literal(v, inner)},\n" for k, v in value.items()) + f"{indent}}}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(_literal(v, indent) for v in value) + "]"
    return json.dumps(value) if isinstance(value, str) and value.isascii() else repr(value)


def _safe(text: str) -> str:
    """What may stand in a docstring."""
    return re.sub(r"[^ -~]|[\"\\]", "?", text)


def read(text: str) -> Reading:
    """What a program's constants say; nothing of it is run."""
    found: dict[str, Any] = {}
    for node in ast.parse(text).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in ("PLAN", "CUTS")
        ):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    plan = found["PLAN"]
    pins = {key: str(plan[key]) for key in (*KEYS, "precision") if key in plan}
    pins["optimizer"] = {name: key for key, name in OPTIMIZERS.items()}[plan["optimizer"]]
    return Reading(pins, plan["batch"], plan["seq"])


def _notes(facts: Facts) -> tuple[str, ...]:
    from torch.nn.modules.batchnorm import _BatchNorm

    styles = styles_of(facts, split_of(facts.plan, facts.loaded.model), facts.loaded.model)
    coupled = any(isinstance(m, _BatchNorm) for m in facts.loaded.model.modules())
    said = (
        (any(style == "colwise, gathered" for style in styles.values()), "logits are gathered along tp before the loss"),
        (facts.count("tp") > 1 and facts.plan.source.kind == "function",
         "along tp attention sees its rank's heads: a model that names their number where it reshapes has to write -1 there"),
        (facts.count("pp") > 1 and facts.count("zero") > 1, "with stages gradients are shared out once a step"),
        (coupled and facts.count("dp") * facts.plan.pipeline.microbatches > 1,
         "batch norms take the statistics of a rank's own microbatch"),
        (facts.plan.precision.compute == "float16", "gradients are not scaled: torch.amp.GradScaler has to be added"),
        (facts.plan.source.kind == "hf", "every rank makes the whole model on its host before it is split"),
    )  # fmt: skip
    return tuple(text for holds, text in said if holds)


TARGET = Target(
    "script", "a program of PyTorch's own parts", _write, read,
    (
        Refused(lambda f: f.plan.source.kind == "module", lambda f: f"{f.plan.source.model} is a live module that no file builds",
                "plan it as file.py:function"),
        Refused(lambda f: f.count("cp") > 1, lambda f: f"there is no cp (here {f.pins['cp']})", "plan with --pin cp=1"),
        Refused(lambda f: f.count("ep") > 1, lambda f: f"there is no ep (here {f.pins['ep']})", "plan with --pin ep=1"),
        Refused(lambda f: f.count("pp") > 1 and f.pins["schedule"] not in SCHEDULES,
                lambda f: f"there is no schedule={f.pins['schedule']}",
                f"plan with --pin schedule={'|'.join(SCHEDULES)}"),
        Refused(lambda f: f.pins["optimizer"] not in OPTIMIZERS, lambda f: f"torch.optim has no {f.pins['optimizer']}",
                f"plan with --pin optimizer={'|'.join(OPTIMIZERS)}"),
    ),
    {
        "precision": "torch by itself has no copy beside parameters and no fp8: float32 parameters, half precision in products",
        "recompute": "checkpoint wrappers run whole layers again, or nothing",
        "offload": "the program keeps everything on the device",
        "update": "the optimizer steps after the backward pass",
        "sequence_parallel": "positions stay whole",
    },
    _notes,
    silent={"cp": "1", "ep": "1", "offload": "none", "recompute": "none"},
)  # fmt: skip

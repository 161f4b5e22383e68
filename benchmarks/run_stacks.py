"""What the software of a published run does where its row does not say: facts about frameworks, not about rows.

Each line is the default of a code base: bytes kept per parameter, how attention runs, whether element-wise kernels are fused,
the highest ZeRO level it has without being told so, dropout, and whether tensor parallelism splits positions too and goes
piece by piece with its products (which needs the first).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stack:
    """Defaults of a framework. `zero` is the level where it shards, "<=1" where it has none or the optimizer's."""

    pattern: str
    recipe: str
    attention: str
    kernels: str
    zero: str = ""
    dropout: float = 0.0
    loss: str = "float"
    overlap: bool = False


STACKS = (
    # cuDNN's or FlashAttention's kernels through Transformer Engine, fused norms and activations, distributed optimizer; NeMo's
    # recipes set `sequence_parallel` and `ub_tp_comm_overlap`; Megatron's own switches for them are off unless given.
    Stack(r"NeMo|Megatron-Bridge", "megatron", "flash", "fused", "<=1", loss="fused", overlap=True),
    Stack(r"Megatron-Core", "megatron", "flash", "fused", "<=1", loss="fused"),
    # Derived from Megatron: bf16 gradients (13B whole on a device beside fp32 ones would not fit), its tokenizer's 128k words,
    # the kernels that a row names and else PyTorch's.
    Stack(r"AA-Scaling", "zero", "math", "eager", "<=1", dropout=0.1),
    # Flash attention is an option of theirs (--use-flash-attn), fused softmax, bias-GELU and bias-dropout-add the default.
    Stack(r"Megatron", "megatron", "math", "fused", "<=1", dropout=0.1),
    # Its schedules replace attention by xformers' memory-efficient kernels (examples/*/schedule.py), and fuse bias and GELU; a
    # half-precision engine under Transformers of 2022, whose models do not cast logits.
    Stack(r"slapo", "zero", "flash1", "fused", loss="compute"),
    # MPT's loss is fused_crossentropy unless told otherwise.
    Stack(r"llm-foundry|Composer", "fsdp-bf16", "flash1", "eager", "3", loss="fused"),
    Stack(r"torchtune", "pure-bf16", "flash", "eager", "3"),
    Stack(r"DeepSpeed", "zero", "math", "eager"),
    Stack(r"FSDP|torchtitan|minGPT|LitGPT", "fsdp-bf16", "flash", "eager", "3"),
)
"""The first whose pattern is found in a row's framework holds."""

UNKNOWN = Stack("", "fsdp-bf16", "flash", "eager")


def stack_of(stated: Mapping[str, Any]) -> Stack:
    """The defaults of a row's framework."""
    name = str(stated.get("framework") or "")
    return next((stack for stack in STACKS if re.search(stack.pattern, name, re.IGNORECASE)), UNKNOWN)


def kernels_of(stated: Mapping[str, Any], stack: Stack) -> str:
    """`kernels=` of a row: what it says of a compiler or of a kernel for norms, else its framework's."""
    text = f"{stated.get('framework')} {stated.get('other')}"
    return "fused" if "torch.compile" in text or "RMS kernel" in text else stack.kernels


def attention_of(text: str, stack: Stack, device: str) -> str:
    """`attention=` from a row's words, else its framework's; "fused" alone is a fused softmax, which keeps the scores.

    Triton ports are of the first generation; on Hopper and later the third is what frameworks with cuDNN run.
    """
    low = text.lower()
    if low and ("unfused" in low or "flash" not in low) and "sdpa" not in low:
        return "math"
    if re.search(r"triton|flash[ _-]?(attention)?[ _-]?v?1\b", low):
        return "flash1"
    if re.search(r"v?3\b|cudnn", low):
        return "flash3"
    if low:
        return "flash"
    modern = device.startswith(("h100", "h200", "b200", "gb200")) and stack.recipe == "megatron"
    return "flash3" if stack.attention == "flash" and modern else stack.attention


def recipe_of(stated: Mapping[str, Any], device: str, stack: Stack, assumed: list[str], lost: list[str]) -> str:
    """Our precision recipe for a row: the bytes its framework keeps per parameter, at the dtype it computes in."""
    text = str(stated.get("precision") or "").lower()
    if not text:
        assumed.append("mixed precision: not stated")
    if "fp32" in text:
        return "fp32"
    if device.startswith(("v100", "t4")) and stack.recipe in ("megatron", "zero"):
        return "zero-fp16"
    if device.startswith(("v100", "t4")):
        lost.append("fp16 with a master copy: priced as the recipe fp16, which keeps parameters in fp32 alone")
        return "fp16"
    if "fp8" in text:
        return "megatron-fp8" if stack.recipe == "megatron" else "fsdp-fp8"
    if "fp16" in text:
        lost.append(f"precision {stated['precision']}: priced in bf16, which has the same sizes and rates here")
    if text.endswith("-true"):
        return "pure-bf16"
    if "PURE" in str(stated.get("fsdp")):
        lost.append("gradients reduced in bf16")
    return stack.recipe


def metric_of(row: Mapping[str, Any], lost: list[str]) -> str:
    """What a row's bytes count (run_layouts.py): "" where they cannot be compared.

    Logs of PyTorch's allocator say so. Megatron's own log is of allocated bytes; figures without a word are read off nvidia-smi,
    those of Megatron-DeepSpeed on the first node: stages that are said to hold 13 and 15 GB fail on devices of 16 and 32 at the
    same or twice the microbatch, which only the last stage with its logits explains.
    """
    stated, result = row["parallelism"], row.get("result", {})
    if "schedule" in " ".join(lost) and "not in the library" in " ".join(lost):
        return ""
    if not stated.get("recompute"):
        lost.append("what is run again is not stated: its memory is not compared")
        return ""
    text = str(result.get("memory_unit_as_stated") or "").lower()
    if "analytic" in str(row.get("kind")):
        return "states"
    if "max_ma" in text or "active" in text or "allocated" in text:
        return "allocated"
    if "reserved" in text:
        return "reserved"
    framework = str(stated.get("framework"))
    if "Megatron-DeepSpeed" in framework:
        return "first"
    return "allocated" if "Megatron-LM" in framework else "total"


def zero_of(stated: Mapping[str, Any], ranks: int, stack: Stack, lost: list[str]) -> list[str]:
    """`zero=`; what splits among one data-parallel rank is no choice."""
    fsdp = str(stated.get("fsdp") or "")
    if "HSDP" in fsdp or "replicas" in fsdp:
        lost.append(f"{fsdp}: parameters sharded inside a group of ranks; zero=3 shards over all")
    if ranks == 1:
        return []
    if stated.get("zero_stage") is not None:
        return [f"zero={2 if 'SHARD_GRAD_OP' in fsdp else int(stated['zero_stage'])}"]
    if re.search(r"full_shard|fsdp", fsdp, re.IGNORECASE) and "FSDP=0" not in fsdp:
        return ["zero=3"]
    if stack.zero == "<=1":
        return ["zero!=2", "zero!=3"]
    return [f"zero={stack.zero}"] if stack.zero else []

"""Hugging Face configs and cluster strings for published runs (published_runs.py): what a row's names and numbers stand for.

Every figure that a row does not state is one of: a rule of the family (a GPT's ffn is 4 x hidden), the public config of a
model known by name, or a default; each is written down in `assumed`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_KEYS = ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab")
NAMED: Mapping[str, tuple[int, ...]] = {
    "llama-2 7b": (32, 4096, 11008, 32, 32, 32000),
    "llama-2 13b": (40, 5120, 13824, 40, 40, 32000),
    "llama-2 34b": (48, 8192, 22016, 64, 8, 32000),
    "llama-2 70b": (80, 8192, 28672, 64, 8, 32000),
    "llama-3 8b": (32, 4096, 14336, 32, 8, 128256),
    "llama-3 70b": (80, 8192, 28672, 64, 8, 128256),
    "llama-3 405b": (126, 16384, 53248, 128, 8, 128256),
    "gpt3 5b": (24, 4096, 16384, 32, 32, 51200),
    "gpt3 20b": (44, 6144, 24576, 48, 48, 51200),
    "gpt3 175b": (96, 12288, 49152, 96, 96, 51200),
    "nemotron 8b": (32, 4096, 16384, 32, 32, 256000),
    "nemotron 22b": (40, 6144, 24576, 48, 48, 256000),
    "nemotron 340b": (96, 18432, 73728, 96, 8, 256000),
    "opt 350m": (24, 1024, 4096, 16, 16, 50272),
    "opt 1.3b": (24, 2048, 8192, 32, 32, 50272),
    "opt 13b": (40, 5120, 20480, 40, 40, 50272),
    "gpt-2 small": (12, 768, 3072, 12, 12, 50257),
    "gpt-2 medium": (24, 1024, 4096, 16, 16, 50257),
    "gpt-2 large": (36, 1280, 5120, 20, 20, 50257),
    "gpt-2 xl": (48, 1600, 6400, 25, 25, 50257),
}
"""Sizes (layers, hidden, ffn, heads, kv_heads, vocab) of models whose configs are public, for rows that give the name only
(34b: Code Llama 34B, the one released; nemo's GPT-3 and Nemotron from its recipes)."""

_SPELLINGS = (
    (r"llama[- ]?3(\.\d)?(\(\.\d\))?[- ]*", "llama-3 "), (r"llama[- ]?2[- ]*", "llama-2 "), (r"gpt-?3[- ]*", "gpt3 "),
    (r"nemotron[- ]*", "nemotron "), (r"opt[- ]+", "opt "),
)  # fmt: skip

VOCAB = {"gpt": 50257, "llama": 32000, "bert": 30522, "t5": 32128, "mixtral": 32000, "nemotron": 256000}
TOKENIZERS = {"AA-Scaling": 128000}
"""Vocabulary by framework that has one of its own (Aleph Alpha's alpha-001-128k)."""

MEGATRON_VOCAB_MULTIPLE = 1024
"""Megatron pads its vocabulary to a multiple of 128 x tp; 8 is the widest tensor parallelism inside a node."""

DEVICES: tuple[tuple[str, str, str], ...] = (
    (r"A100.*PCIe.*40", "a100-pcie-40gb", ""),
    (r"A100.*PCIe", "a100-pcie-80gb", ""),
    (r"A100\D*40 ?GB", "a100-sxm-40gb", ""),
    (r"A100\D*80 ?GB", "a100-sxm-80gb", ""),
    (r"A100\b", "a100-sxm-80gb", "memory of the A100 not stated: 80 GB"),
    (r"GB200\b", "gb200", ""),
    (r"B200\b", "b200-sxm", ""),
    (r"H200\b", "h200-sxm", ""),
    (r"H100.*PCIe", "h100-pcie", ""),
    (r"H100\b", "h100-sxm", ""),
    (r"V100\D*(SXM2)?\D*16 ?GB", "v100-sxm-16gb", ""),
    (r"V100\D*(SXM2)?\D*32 ?GB", "v100-sxm-32gb", ""),
    (r"V100\b", "v100-sxm-32gb", "memory of the V100 not stated: 32 GB"),
    (r"MI250X\b", "mi250x", ""),
    (r"MI300X\b", "mi300x", ""),
    (r"\bT4\b", "t4", ""),
    (r"\bL4\b", "l4", ""),
    (r"\bA10G\b", "a10g", ""),
    (r"RTX 3090\b", "rtx-3090", ""),
    (r"RTX 4090\b", "rtx-4090", ""),
)
"""(pattern of a row's `gpu`, our device name, what is assumed); the first match holds."""

_UNITS = {"Gb/s": "Gbps", "Gbps": "Gbps", "Tb/s": "Tbps", "Tbps": "Tbps", "GB/s": "GB/s"}


def family_of(name: str, model: Mapping[str, Any]) -> str:
    """The architecture that stands for a model: "gpt", "llama", "bert", "t5", "nemotron" or "mixtral"."""
    low = name.lower()
    if model.get("experts"):
        return "mixtral"
    if re.search(r"llama|mistral|qwen|yi\b", low):
        return "llama"
    if "bert" in low:
        return "bert"
    if "nemotron" in low:
        return "nemotron"
    return "t5" if re.match(r"t5\b", low) else "gpt"


def named_sizes(name: str) -> Mapping[str, int]:
    """Sizes of a model known by name ("LLAMA2-7B", "Llama-2 7b", "OPT-350M (...)"), or nothing."""
    low = name.lower().replace("(.1)", "")
    for pattern, spelled in _SPELLINGS:
        low = re.sub(f"^{pattern}", spelled, low)
    words = " ".join(low.split()[:2])
    return dict(zip(_KEYS, NAMED[words], strict=True)) if words in NAMED else {}


def step_flops(sizes: Mapping[str, int], family: str, batch: int, seq: int, *, recomputed: bool) -> float:
    """FLOPs of a step as papers count them: 6 per weight and token, 12 per layer, width and pair of positions, causal or not.

    With everything run again in the backward pass the layers count 4/3 of that and the vocabulary stays (Narayanan et al.
    2021, equation 3). 0 where sizes are missing.
    """
    if not sizes:
        return 0.0
    hidden, share = sizes["hidden"], sizes["kv_heads"] / sizes["heads"]
    products = 3 if family in ("llama", "mixtral") else 2
    layer = (2 + 2 * share) * hidden**2 + products * hidden * sizes["ffn"] + 2 * hidden * seq
    layers = (8.0 if recomputed else 6.0) * sizes["layers"] * layer
    return batch * seq * (layers + 6.0 * sizes["vocab"] * hidden)


def sizes_of(model: Mapping[str, Any], framework: str, assumed: list[str]) -> dict[str, int] | None:
    """layers, hidden, ffn, heads, kv_heads, vocab of a row's model, completed; None where the essential ones are missing.

    Notes what was completed in `assumed`.
    """
    name = str(model.get("family", ""))
    family = family_of(name, model)
    keys = ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab")
    sizes = {k: int(model[k]) for k in keys if model.get(k) is not None}
    known = named_sizes(name)
    if "layers" not in sizes and known:
        assumed.append(f"sizes of the public config of {name}")
        sizes = {**known, **sizes}
    if any(k not in sizes for k in ("layers", "hidden", "heads")) or sizes["hidden"] % sizes["heads"]:
        return None
    if "ffn" not in sizes:
        sizes["ffn"] = -(-8 * sizes["hidden"] // 3 // 256) * 256 if family == "llama" else 4 * sizes["hidden"]
        assumed.append(f"ffn {sizes['ffn']}")
    sizes.setdefault("kv_heads", sizes["heads"])
    if "vocab" not in sizes:
        sizes["vocab"] = next((n for name, n in TOKENIZERS.items() if name in framework), VOCAB[family])
        assumed.append(f"vocabulary of {sizes['vocab']}")
    if "megatron" in framework.lower() and sizes["vocab"] % 128:
        sizes["vocab"] += -sizes["vocab"] % MEGATRON_VOCAB_MULTIPLE
        assumed.append(f"vocabulary padded to {sizes['vocab']}, as Megatron does")
    return sizes


def config_of(model: Mapping[str, Any], sizes: Mapping[str, int], seq: int, dropout: float) -> dict[str, Any]:
    """A Hugging Face config of those sizes: GPT-2 for every GPT (MPT too), Llama for gated models with rotary positions."""
    family = family_of(str(model.get("family", "")), model)
    if family == "gpt":
        return {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu",
            "n_layer": sizes["layers"], "n_embd": sizes["hidden"], "n_inner": sizes["ffn"], "n_head": sizes["heads"],
            "n_positions": seq, "vocab_size": sizes["vocab"], "resid_pdrop": dropout, "embd_pdrop": dropout,
            "attn_pdrop": dropout, "bos_token_id": 0, "eos_token_id": 0,
        }  # fmt: skip
    if family == "t5":
        return {
            "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "num_layers": sizes["layers"],
            "num_decoder_layers": sizes["layers"], "d_model": sizes["hidden"], "d_ff": sizes["ffn"],
            "num_heads": sizes["heads"], "d_kv": sizes["hidden"] // sizes["heads"], "vocab_size": sizes["vocab"],
            "dropout_rate": dropout, "decoder_start_token_id": 0,
        }  # fmt: skip
    common = {
        "num_hidden_layers": sizes["layers"], "hidden_size": sizes["hidden"], "intermediate_size": sizes["ffn"],
        "num_attention_heads": sizes["heads"], "max_position_embeddings": seq, "vocab_size": sizes["vocab"],
    }  # fmt: skip
    if family == "bert":
        drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return {"model_type": "bert", "architectures": ["BertForMaskedLM"], **common, **drop}
    gated = {**common, "num_key_value_heads": sizes["kv_heads"], "tie_word_embeddings": False, "hidden_act": "silu"}
    if dropout:
        gated["attention_dropout"] = dropout
    if family == "nemotron":
        return {
            "model_type": "nemotron", "architectures": ["NemotronForCausalLM"], **gated, "hidden_act": "relu2",
            "head_dim": sizes["hidden"] // sizes["heads"],
        }  # fmt: skip
    if family == "mixtral":
        experts = {
            "num_local_experts": int(model["experts"]),
            "num_experts_per_tok": int(model.get("experts_per_token", 2)),
        }
        return {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **gated, **experts}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **gated}


def cluster_string(hardware: Mapping[str, Any], assumed: list[str], reasons: list[str]) -> str | None:
    """Our cluster string for a row's hardware; None, with the reason, where there is none."""
    gpu, gpus = hardware.get("gpu"), hardware.get("gpus")
    if gpu is None:
        reasons.append("GPU not stated")
    if gpus is None:
        reasons.append("number of GPUs not stated")
    if gpu is None or gpus is None:
        return None
    matching = [(device, note) for pattern, device, note in DEVICES if re.search(pattern, gpu)]
    if not matching:
        reasons.append(f"no device preset for {gpu}")
        return None
    device, note = matching[0]
    if note:
        assumed.append(note)
    per_node = min(int(hardware.get("gpus_per_node") or 8), gpus)
    if gpus % per_node:
        reasons.append(f"{gpus} GPUs are not whole nodes of {per_node}")
        return None
    nodes = gpus // per_node
    if nodes == 1:
        return f"{device}:{per_node}"
    rate = _rate(str(hardware.get("inter_node") or ""))
    if not rate:
        assumed.append(f"the usual network of {device}")
    return f"{device}:{per_node}x{nodes}{rate}"


def _rate(text: str) -> str:
    """`@RATE` of a network's description ("8x200Gbps ...", "2 Tb/s RoCE"), or "" where it states no figure for a node.

    Of a range, the upper end; a figure for one of an unknown number of links is none for the node.
    """
    found = re.search(r"(?:(\d+)x)?(?:[\d.]+-)?(\d+(?:\.\d+)?) ?(Gb/s|Gbps|Tb/s|Tbps|GB/s)", text)
    if found is None or "per link" in text:
        return ""
    return f"@{float(found[2]) * int(found[1] or 1):g}{_UNITS[found[3]]}"

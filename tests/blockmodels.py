"""Small transformers of the families that the fusing passes are tried on, without dropout, with their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import eager
import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

GROUPED = {"num_key_value_heads": 2, "vocab_size": 100, **eager.SMALL}


def _t5(**changes: Any) -> nn.Module:
    sizes = {
        "vocab_size": 100,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    return T5ForConditionalGeneration(
        T5Config(feed_forward_proj="gated-gelu", decoder_start_token_id=0, **sizes, **changes)
    )


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "llama": lambda **c: eager.family("llama", **c)[0],
    "mistral": lambda **c: MistralForCausalLM(MistralConfig(**GROUPED, **c)),
    "qwen2": lambda **c: Qwen2ForCausalLM(Qwen2Config(**GROUPED, **c)),
    "gemma": lambda **c: GemmaForCausalLM(GemmaConfig(head_dim=16, **GROUPED, **c)),
    "neox": lambda **c: GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=100, hidden_dropout=0.0, attention_dropout=0.0, **eager.SMALL, **c)
    ),
    "phi": lambda **c: PhiForCausalLM(PhiConfig(vocab_size=100, **eager.SMALL, **c)),
    "gptj": lambda **c: GPTJForCausalLM(
        GPTJConfig(vocab_size=100, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **c)
    ),
    "t5": _t5,
    "bert": lambda **c: eager.family(
        "bert-padded", **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | c
    )[0],
    "gpt2": lambda **c: eager.family("gpt2", **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | c)[0],
    "vit": lambda **c: eager.family("vit", **c)[0],
}  # fmt: skip


def model(
    name: str, dtype: torch.dtype = torch.float64, seq: int = eager.SEQ, **changes: Any
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model of a family in a dtype, and its inputs (of `seq` positions for what reads text; not bert)."""
    torch.manual_seed(0)
    made = FAMILIES[name](**changes).to(dtype)
    kwargs = (
        eager.family({"bert": "bert-padded"}.get(name, name))[1] if name in ("bert", "vit") else eager.tokens(seq=seq)
    )
    return made, {k: v.to(dtype) if v.is_floating_point() else v for k, v in kwargs.items()}

"""A model's sizes out of a Hugging Face config, for tools that build models of their own from arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .facts import config_value

SIZES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "ffn": ("intermediate_size", "n_inner"),
    "heads": ("num_attention_heads", "n_head"),
    "groups": ("num_key_value_heads",),
    "head": ("head_dim",),
    "positions": ("max_position_embeddings", "n_positions"),
    "vocab": ("vocab_size",),
    "base": ("rope_theta",),
    "epsilon": ("rms_norm_eps", "layer_norm_epsilon"),
    "experts": ("num_local_experts", "num_experts"),
    "picked": ("num_experts_per_tok",),
}
"""A size -> its names in configs."""

TIED: Mapping[str, bool] = {"gpt2": True}
"""Whether embedding and head share a weight where a config does not say."""


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a config has; what only some families write out is derived as they do it."""
    found = {name: config_value(config, names) for name, names in SIZES.items()}
    if found["ffn"] is None and found["hidden"] is not None:
        found["ffn"] = 4 * found["hidden"]
    if found["base"] is None:
        found["base"] = (config.get("rope_parameters") or {}).get("rope_theta")
    found["tied"] = config.get("tie_word_embeddings", TIED.get(str(config.get("model_type")), False))
    return found

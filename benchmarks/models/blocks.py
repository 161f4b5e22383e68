"""A stack of Llama blocks between given hidden states: no vocabulary, so that the blocks are what a step consists of.

shardwright plan benchmarks/models/blocks.py:blocks --cluster h100-sxm:8 --batch 64 --seq 1024
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel


class Blocks(nn.Module):
    """Decoder blocks and the last norm of a Llama; the loss is the mean squared distance from `target`."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        config = LlamaConfig(
            num_hidden_layers=layers, hidden_size=width, intermediate_size=8 * width // 3 // 16 * 16, vocab_size=1,
            num_attention_heads=heads, num_key_value_heads=heads, use_cache=False, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.model = LlamaModel(config)
        del self.model.embed_tokens

    def forward(self, states: Tensor, target: Tensor) -> Tensor:
        """Two tensors (batch, positions, width) -> the loss."""
        found: Tensor = self.model(inputs_embeds=states).last_hidden_state
        return nn.functional.mse_loss(found, target)


def blocks(
    batch: int, seq: int, layers: int = 8, width: int = 768, heads: int = 12
) -> tuple[nn.Module, dict[str, Any]]:
    """The stack and one batch of noise."""
    states = {name: torch.randn(batch, seq, width) for name in ("states", "target")}
    return Blocks(layers, width, heads), states

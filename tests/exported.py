"""Plans of a small Llama and a small network, made once a session, for exports."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

from shardwright.api import plan_model
from shardwright.planner.plan import Plan

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 101,
    "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NETWORK = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self, width=16, count=3, words=32):
        super().__init__()
        self.words, self.head = nn.Embedding(words, width), nn.Linear(width, words)
        self.blocks = nn.ModuleList(Block(width) for _ in range(count))

    def forward(self, ids, labels):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def network(batch, seq=8):
    ids = torch.randint(32, (batch, seq))
    return Network(), {"ids": ids, "labels": ids}
"""


@functools.cache
def folder() -> Path:
    """Where the models' files lie, for as long as the tests run."""
    made = Path(tempfile.mkdtemp(prefix="exported"))
    for name, config in (("llama", LLAMA), ("gpt2", GPT2)):
        (made / f"{name}.json").write_text(json.dumps(config))
    (made / "network.py").write_text(NETWORK)
    return made


def name_of(model: str) -> str:
    """MODEL on the command line for `llama`, `gpt2` or `network`."""
    return f"{folder()}/network.py:network" if model == "network" else f"hf:{folder()}/{model}.json"


@functools.cache
def plan(model: str, cluster: str, *pins: str, batch: int = 8, seq: int = 16) -> Plan:
    """A plan under pins."""
    return plan_model(name_of(model), cluster, batch=batch, seq=seq, pins=pins).plan

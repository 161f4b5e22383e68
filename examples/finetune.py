"""Fine-tune a Hugging Face causal language model with adapters (LoRA) under a memory limit, and save the adapters.

python examples/finetune.py                                                      a small model, one process
torchrun --standalone --nproc-per-node 2 examples/finetune.py --memory-limit 120MiB     two, with so much memory each
python examples/finetune.py --update 60MiB                                       no adapters: the parameters most worth updating

The planner sees which parameters are trained: frozen ones take neither gradients nor optimizer states, and are not kept for the
backward pass. With `--update SIZE`, `choose_update` freezes what does not fit that memory instead of adding adapters.
Adapters: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import shardwright
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

SMALL = LlamaConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, use_cache=False,
)  # fmt: skip


class Adapted(nn.Module):
    """y = W x + B A x: a frozen linear map, and a trained one of low rank beside it that begins at zero."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in features) -> (..., out features)."""
        return self.base(x) + self.lora_b(self.lora_a(x))


def add_adapters(model: nn.Module, rank: int) -> None:
    """Freeze a model and put adapters beside the linear maps of its layers, the head left out."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "head" not in name:
            home, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(home), leaf, Adapted(module, rank))


def prose(batch: int, seq: int) -> torch.Tensor:
    """Tokens (batch, seq) of what Python's help says, a byte a token."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    return torch.tensor(list(text[: batch * seq])).view(batch, seq)


def main() -> None:
    """Train for some steps and save what was trained."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", help="a folder or file with the configuration of a model")
    parser.add_argument("--memory-limit", help="of each rank, such as 120MiB")
    parser.add_argument("--update", metavar="SIZE", help="no adapters: update what fits this much memory on one device")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cluster", help="prices to plan with [default: this machine, measured]")
    parser.add_argument("--output", type=Path, default=Path("trained.safetensors"))
    options = parser.parse_args()

    torch.manual_seed(0)  # the same on all ranks, which start from equal weights
    config = AutoConfig.from_pretrained(options.config) if options.config else SMALL
    model = AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False
    tokens = prose(options.batch, options.seq)
    batch = {"input_ids": tokens, "labels": tokens}

    if options.update:
        chosen = shardwright.choose_update(model, batch, options.update)
        chosen.apply(model)
        print(f"updating {len(chosen.names)} parameters: {chosen.value / chosen.total_value:.0%} of what all are worth")
    else:
        add_adapters(model, options.rank)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model = shardwright.auto_parallelize(model, batch, cluster=options.cluster, memory_limit=options.memory_limit)

    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if first:
        peak, limit = model.plan.predicted.peak_bytes_per_device, model.plan.memory_limit_bytes
        print(f"training {len(trained)} parameters; planned peak {peak / 2**20:.0f} of {limit / 2**20:.0f} MiB")

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(options.steps):
        loss = model(**batch).loss
        loss.backward()
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if first:
            print(f"step {step:3d}  loss {loss.item():.4f}")

    whole = model.full_state_dict()  # every rank calls it
    if first:
        save_file({name: whole[name].contiguous() for name in sorted(trained)}, options.output)
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()

"""What `runtime.py` compares: the models, and each of them under torch's own ways to run it, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Sizes of the models; `vocabulary` and `positions` are GPT-2's. The batch is the global one."""

    layers: int = 12
    blocks: int = 8
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    batch: int = 4
    seq: int = 128


def gpt2(size: Size, dropout: float) -> tuple[nn.Module, Batch]:
    """GPT-2 (124M parameters by default) and one batch of random tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=size.layers, n_embd=size.width, n_head=size.heads, vocab_size=size.vocabulary, n_positions=1024,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # torch.compile breaks the graph at the warning that is given without it
    tokens = torch.randint(0, size.vocabulary, (size.batch, size.seq))
    return model, {"input_ids": tokens, "labels": tokens}


def llama(size: Size, dropout: float) -> tuple[nn.Module, Batch]:
    """A stack of Llama blocks and one batch of hidden states; Llamas drop nothing."""
    from models.blocks import blocks

    return blocks(size.batch, size.seq, size.blocks, size.width, size.heads)


MODELS: dict[str, Callable[[Size, float], tuple[nn.Module, Batch]]] = {"gpt2": gpt2, "llama": llama}


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The repeated blocks."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def part(batch: Batch, rank: int, ranks: int) -> Batch:
    """A data-parallel rank's samples."""
    return {name: value.chunk(ranks)[rank].contiguous() for name, value in batch.items()}


# -- torch's ways


def eager(model: nn.Module) -> nn.Module:
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


def ddp(model: nn.Module) -> nn.Module:
    """Gradients are views of the buckets: the faster of DDP's two ways, and the one with less memory."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def fsdp(model: nn.Module, *, reshard: bool) -> nn.Module:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


class SplitAttention(nn.Module):
    """GPT-2's attention with a projection each for queries, keys and values, as splitting by columns needs."""

    def __init__(self, old: nn.Module, width: int, heads: int) -> None:
        super().__init__()
        weights, biases = old.c_attn.weight.detach().split(width, 1), old.c_attn.bias.detach().split(width)
        self.q, self.k, self.v = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.o = _linear(old.c_proj.weight, old.c_proj.bias)
        self.head = width // heads

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head)).transpose(1, 2) for p in (self.q, self.k, self.v))
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(found.transpose(1, 2).flatten(2)), None


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A GPT-2 "Conv1D" (inputs by outputs) as a linear layer."""
    made = nn.Linear(*weight.shape, device="meta")
    made.weight, made.bias = (nn.Parameter(t.detach().clone()) for t in (weight.t().contiguous(), bias))
    return made


def split_layers(model: nn.Module) -> None:
    """GPT-2 blocks as `parallelize_module` can split them (it knows linear layers only)."""
    for layer in layers_of(model):
        if hasattr(layer, "attn"):
            layer.attn = SplitAttention(layer.attn, layer.attn.embed_dim, layer.attn.num_heads)
            for name in ("c_fc", "c_proj"):
                old = getattr(layer.mlp, name)
                setattr(layer.mlp, name, _linear(old.weight, old.bias))


COLUMNS = ("attn.q", "attn.k", "attn.v", "mlp.c_fc", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
           "mlp.gate_proj", "mlp.up_proj")  # fmt: skip
ROWS = ("attn.o", "mlp.c_proj", "self_attn.o_proj", "mlp.down_proj")
BETWEEN = {
    "input_layernorm": SequenceParallel(use_local_output=True), "post_attention_layernorm": SequenceParallel(use_local_output=True),
    "self_attn": PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()},
        use_local_output=True,
    ),
    "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True),
}  # fmt: skip
"""Llama: one gather before attention and one before the MLP, norms on the rank's own positions."""


def tensor_parallel(model: nn.Module, *, sequence: bool = False) -> nn.Module:
    """Megatron's split: columns, then rows, of attention and of the MLP. With `sequence` (Llama) the positions of what
    stands between are split too; else everything else is whole on every rank."""
    split_layers(model)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    between = Shard(1) if sequence else Replicate()
    for layer in layers_of(model):
        modules = dict(layer.named_modules())
        styles: dict[str, Any] = {name: ColwiseParallel() for name in COLUMNS if name in modules}
        styles |= {name: RowwiseParallel(output_layouts=between) for name in ROWS if name in modules}
        parallelize_module(layer, mesh, {**styles, **(BETWEEN if sequence else {})})
    if sequence:
        cut = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True)
        parallelize_module(layers_of(model)[0], mesh, cut)
        parallelize_module(model.model.norm, mesh, SequenceParallel(use_local_output=True))
        whole = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate(), use_local_output=True)
        parallelize_module(model.model.norm, mesh, whole)
    return model


Peer = Callable[[nn.Module], nn.Module]
PEERS: dict[str, Peer] = {
    "eager": eager,
    "compile": compiled,
    "ddp": ddp,
    "fsdp": lambda model: fsdp(model, reshard=True),
    "fsdp-kept": lambda model: fsdp(model, reshard=False),
    "tensor": tensor_parallel,
    "tensor-sequence": lambda model: tensor_parallel(model, sequence=True),
}

"""Small models for the parity tests: the four Hugging Face families from inline configs, and models as users write them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import captures
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from towers import TOWERS, Towers, first

SEQ = 16
FAMILIES = ("gpt2", "llama", "bert", "vit")


@dataclass(frozen=True)
class Case:
    """A model with example inputs at the global batch; `loss_fn` where the model returns no loss."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss_fn: Callable[[Any], Tensor] | None = None


def build(name: str, batch: int = 8) -> Case:
    """The named case, the same numbers on every call and every rank."""
    captures.share()
    torch.manual_seed(0)
    case = CASES[name](batch)
    case.model.__dict__[captures.TAG] = (name, batch)
    return case


def tokens(batch: int, vocab: int, seq: int = SEQ) -> dict[str, Tensor]:
    """Ids and labels; more labels of the first samples are ignored, so that ranks count differently."""
    ids = torch.randint(0, vocab, (batch, seq))
    labels = ids.clone()
    labels[0, : seq // 2] = -100
    return {"input_ids": ids, "labels": labels}


# -- Hugging Face families


def gpt2(batch: int, **changes: Any) -> Case:
    """An odd vocabulary, tied to the head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 101, "use_cache": False} | changes
    model = GPT2LMHeadModel(GPT2Config(**config))
    return Case(model.train(), kwargs=tokens(batch, 101))


def llama(batch: int, **changes: Any) -> Case:
    """Four query heads in two groups; the vocabulary divides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "use_cache": False,
    } | changes  # fmt: skip
    return Case(LlamaForCausalLM(LlamaConfig(**config)).train(), kwargs=tokens(batch, 96))


BERT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96
}  # fmt: skip


def padded(batch: int) -> Tensor:
    """An attention mask of samples of different lengths."""
    lengths = torch.tensor([[SEQ - 3 * (i % 4)] for i in range(batch)])
    return (torch.arange(SEQ) < lengths).long()


def bert(batch: int) -> Case:
    """Masked language model on padded samples."""
    from transformers import BertConfig, BertForMaskedLM

    inputs = tokens(batch, 96) | {"attention_mask": padded(batch)}
    return Case(BertForMaskedLM(BertConfig(**BERT)).train(), kwargs=inputs)


def bert_classify(batch: int) -> Case:
    """Sequence classification on padded samples."""
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=3))
    inputs = {
        "input_ids": torch.randint(0, 96, (batch, SEQ)),
        "attention_mask": padded(batch),
        "labels": torch.randint(0, 3, (batch,)),
    }
    return Case(model.train(), kwargs=inputs)


def vit(batch: int, image: int = 32, patch: int = 8) -> Case:
    """16 patches and a class token."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=image,
        patch_size=patch, num_labels=10,
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(batch, 3, image, image), "labels": torch.randint(0, 10, (batch,))}
    return Case(ViTForImageClassification(config).train(), kwargs=inputs)


def ignored(batch: int) -> Case:
    """All labels of the first half of the batch are ignored: half of the data ranks count none."""
    case = llama(batch)
    case.kwargs["labels"][: batch // 2] = -100
    return case


LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
GROUPED = {**LAYERS, "num_key_value_heads": 2, "use_cache": False}
FURTHER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", {
        "d_model": 32, "d_ff": 64, "num_layers": 3, "num_heads": 4, "d_kv": 8, "vocab_size": 96, "use_cache": False,
        "decoder_start_token_id": 0, "pad_token_id": 0,
    }),
    "bart": ("BartConfig", "BartForConditionalGeneration", {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 96, "use_cache": False, "pad_token_id": 1,
        "decoder_start_token_id": 2,
    }),
    "opt": ("OPTConfig", "OPTForCausalLM", {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32, "use_cache": False,
    }),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 6}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    # Experts that only split as a whole (odd width), ones that only split in width (with biases), and shared and routed ones.
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {
        **GROUPED, "intermediate_size": 25, "num_local_experts": 4, "num_experts_per_tok": 2,
    }),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", {
        **GROUPED, "intermediate_size": 24, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8,
        "pad_token_id": 0, "eos_token_id": 1,
    }),
    "deepseek": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {
        **LAYERS, "use_cache": False, "num_key_value_heads": 4, "intermediate_size": 64, "moe_intermediate_size": 24,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    }),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {
        **GROUPED, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
    }),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "rotary_dim": 4, "use_cache": False,
    }),
    "falcon": ("FalconConfig", "FalconForCausalLM", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "use_cache": False,
    }),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {**LAYERS, "embedding_size": 16}),
    "deberta": ("DebertaV2Config", "DebertaV2ForMaskedLM", LAYERS),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM", {
        "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96,
    }),
    "swin": ("SwinConfig", "SwinForImageClassification", {
        "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
        "num_labels": 10,
    }),
    "resnet": ("ResNetConfig", "ResNetForImageClassification", {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 10,
    }),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 96, "num_mel_bins": 8,
        "max_source_positions": 16, "max_target_positions": 16, "use_cache": False, "pad_token_id": 1,
        "decoder_start_token_id": 2, "bos_token_id": 0, "eos_token_id": 1,
    }),
    "convnext": ("ConvNextConfig", "ConvNextForImageClassification", {
        "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 10,
    }),
}  # fmt: skip
"""Further Hugging Face families: configuration class, model class, configuration."""


def further(name: str, batch: int) -> Case:
    """One of `FURTHER` on random tokens or images."""
    import transformers

    config, model, options = FURTHER[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**options)).train()
    if made.main_input_name == "pixel_values":
        return Case(
            made, kwargs={"pixel_values": torch.randn(batch, 3, 32, 32), "labels": torch.randint(0, 10, (batch,))}
        )
    if made.main_input_name == "input_features":
        features = torch.randn(batch, made.config.num_mel_bins, 2 * made.config.max_source_positions)
        return Case(made, kwargs={"input_features": features, "labels": tokens(batch, 96)["labels"]})
    return Case(made, kwargs=tokens(batch, 96))


# -- models that are nobody's library


class Perceptron(nn.Module):
    """Positional inputs and the loss as the only output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.net(x), y)


def mlp(batch: int) -> Case:
    return Case(Perceptron(), (torch.randn(batch, 12), torch.randn(batch, 4)))


def softmax(batch: int) -> Case:
    """A softmax over what a projection makes: a split of the projection must not go through it."""
    case = mlp(batch)
    case.model.net[1] = nn.Softmax(-1)
    return case


class Regressor(nn.Module):
    """Returns a tuple; the loss is the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.inner = nn.Linear(10, 20)
        self.norm = nn.LayerNorm(20)
        self.outer = nn.Linear(20, 6)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.outer(self.norm(F.silu(self.inner(x)))) * self.scale, target


def caller_loss(output: tuple[Tensor, Tensor]) -> Tensor:
    """Huber loss and a penalty on large predictions."""
    prediction, target = output
    return F.smooth_l1_loss(prediction, target) + 0.1 * prediction.pow(2).mean()


def with_loss_fn(batch: int) -> Case:
    return Case(Regressor(), (torch.randn(batch, 10), torch.randn(batch, 6)), loss_fn=caller_loss)


class Attention(nn.Module):
    """Causal attention with fused projections, and optionally an adapter on them."""

    def __init__(self, width: int, heads: int, rank: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.down = nn.Parameter(torch.randn(rank, width) * 0.1) if rank else None
        self.up = nn.Parameter(torch.randn(3 * width, rank) * 0.1) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        mixed = self.qkv(x)
        if self.down is not None and self.up is not None:
            mixed = mixed + F.linear(F.linear(x, self.down), self.up)
        q, k, v = mixed.view(b, s, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, s, w))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, rank: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, rank)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyLM(nn.Module):
    """A language model by hand, its head tied to the embedding; returns a dict."""

    def __init__(self, width: int = 24, heads: int = 4, layers: int = 2, vocab: int = 50, rank: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.position = nn.Parameter(torch.randn(SEQ, width) * 0.02)
        self.blocks = nn.ModuleList([Block(width, heads, rank) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def _language(model: nn.Module, batch: int) -> Case:
    ids = torch.randint(0, 50, (batch, SEQ))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    return Case(model, kwargs={"ids": ids, "labels": labels})


def tied(batch: int) -> Case:
    return _language(TinyLM(), batch)


def adapter(batch: int) -> Case:
    """Low-rank adapters train, everything else is frozen."""
    model = TinyLM(rank=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".down", ".up")))
    return _language(model, batch)


class Teacher(nn.Module):
    """Distillation: the teacher runs under no_grad, one layer is never used, and one output is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
        self.student = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8))
        self.spare = nn.Linear(5, 5)
        self.gate = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = self.teacher(x)
        gate = self.gate(x).sigmoid()
        y = self.student(x) * gate
        loss = F.mse_loss(y, target) + F.mse_loss(gate, y.detach())
        return loss, y


def teacher(batch: int) -> Case:
    return Case(Teacher(), (torch.randn(batch, 12),))


class Convolutions(nn.Module):
    """Two convolutions with group norms; the second is added to what came in."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, inner, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(2, inner), nn.GroupNorm(2, inner)
        self.straight = nn.Conv2d(width, inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.first(x)))
        return self.straight(x) + F.silu(self.norm2(self.second(y)))


class UNet(nn.Module):
    """Down and up again, with a skip over the middle at every size; the time of a sample enters every block."""

    def __init__(self, widths: tuple[int, ...] = (4, 8, 12, 16)) -> None:
        super().__init__()
        pairs = list(zip((3, *widths[:-1]), widths, strict=True))
        self.down = nn.ModuleList([Convolutions(a, b) for a, b in pairs])
        self.time = nn.ModuleList([nn.Linear(6, b) for _, b in pairs])
        self.up = nn.ModuleList([Convolutions(a + b, a) for a, b in itertools.pairwise(widths)])
        self.out = nn.Conv2d(widths[0], 3, 1)

    def forward(self, image: Tensor, time: Tensor, noise: Tensor) -> dict[str, Tensor]:
        x, skips = image, []
        angles = time[:, None] * torch.arange(1, 7, device=time.device)
        for down, embed in zip(self.down, self.time, strict=True):
            x = down(x) + embed(angles.sin())[:, :, None, None]
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = F.interpolate(x, scale_factor=2, mode="nearest") + skips.pop()
        for up in reversed(self.up):
            x = up(torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skips.pop()], 1))
        return {"loss": F.mse_loss(self.out(x), noise)}


def unet(batch: int, size: int = 16, widths: tuple[int, ...] = (4, 8, 12, 16)) -> Case:
    image, noise = (torch.randn(batch, 3, size, size) for _ in range(2))
    return Case(UNet(widths), kwargs={"image": image, "time": torch.rand(batch), "noise": noise})


class Dropped(nn.Module):
    """Nothing but dropout of a scaled input, so that its numbers can be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.drop(x * self.scale)
        return y.sum(), y


def dropout(batch: int) -> Case:
    return Case(Dropped(), (torch.ones(batch, 64, 32),))


class ConvNorm(nn.Module):
    """A residual block with batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.convs[0](x)).relu()
        return (x + self.norms[1](self.convs[1](y))).relu()


class BatchNorms(nn.Module):
    """Convolutions with batch norm, one of them without running statistics, and a buffer that a call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False)
        self.blocks = nn.Sequential(*[ConvNorm(8) for _ in range(3)])
        self.head, self.last = nn.Linear(8, 6), nn.BatchNorm1d(6, affine=False)
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y = self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3))
        if self.training:
            with torch.no_grad():
                self.average.lerp_(y.mean(0), 0.2)
        return F.cross_entropy(self.last(self.head(y - self.average)), target)


def batch_norms(batch: int) -> Case:
    return Case(BatchNorms().train(), (), {"x": torch.randn(batch, 3, 8, 8), "target": torch.randint(0, 6, (batch,))})


def two_towers(name: str, batch: int) -> Case:
    """A fork, branches and a join, with two losses."""
    given = (torch.randn(batch, 12), torch.randn(batch, 12), torch.randn(batch, 5))
    return Case(Towers(**TOWERS[name]), given, loss_fn=first)


CASES: dict[str, Callable[[int], Case]] = {
    "gpt2": gpt2,
    "gpt2-6heads": lambda batch: gpt2(batch, n_head=6),
    "llama": llama,
    "llama-1": lambda batch: llama(batch, num_hidden_layers=1),
    "llama-2": lambda batch: llama(batch, num_hidden_layers=2),
    "llama-3": lambda batch: llama(batch, num_hidden_layers=3),
    "llama-wide": lambda batch: llama(batch, hidden_size=512, intermediate_size=2048, num_hidden_layers=4),
    "llama-deep": lambda batch: llama(batch, num_hidden_layers=8, vocab_size=128),
    "gpt2-dropout": lambda batch: gpt2(batch, n_layer=1, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2),
    "gpt2-deep": lambda batch: gpt2(batch, n_layer=8),
    "llama-3kv": lambda batch: llama(batch, hidden_size=48, num_attention_heads=6, num_key_value_heads=3),
    "llama-ignored": ignored,
    "bert": bert,
    "bert-classify": bert_classify,
    "vit": vit,
    "vit-197": lambda batch: vit(batch, 224, 16),
    "mlp": mlp,
    "softmax": softmax,
    "loss-fn": with_loss_fn,
    "tied": tied,
    "adapter": adapter,
    "teacher": teacher,
    "unet": unet,
    "unet-deep": lambda batch: unet(batch, 64, (4, 4, 6, 6, 8, 8)),
    "dropout": dropout,
    "batch-norm": batch_norms,
    **{name: functools.partial(two_towers, name) for name in TOWERS},
    **{name: functools.partial(further, name) for name in FURTHER},
}

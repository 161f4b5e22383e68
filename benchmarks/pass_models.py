"""What `passes.py` times: real architectures with random weights, one batch, and how they are run.

Batches and lengths are such that activations are at least half of the peak memory of a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, dict[str, Any]]
GENERATOR = 0


@dataclass(frozen=True)
class Case:
    """A model and how it runs: "train", "tune" (training in eval mode: batch norm keeps its statistics) or "infer"."""

    name: str
    make: Callable[[int], Made]
    batch: int
    mode: str = "train"


def gpt2(batch: int, seq: int = 256) -> Made:
    """GPT-2, 124M parameters; drops nothing, so that losses can be compared."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    return _language(GPT2LMHeadModel(config), batch, seq, config.vocab_size)


def llama(batch: int, seq: int = 256) -> Made:
    """A Llama of 134M parameters: 12 layers 768 wide, grouped queries, 32,000 words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=2048, use_cache=False,
    )  # fmt: skip
    return _language(LlamaForCausalLM(config), batch, seq, config.vocab_size)


def vocabulary(batch: int, seq: int = 256) -> Made:
    """Two layers of a Llama 1024 wide over the 128,256 words of Llama 3, its projection tied: nearly all is head and loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return _language(LlamaForCausalLM(config), batch, seq, config.vocab_size)


def bert(batch: int, seq: int = 256) -> Made:
    """BERT-base with its masked-language head."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return _language(BertForMaskedLM(config), batch, seq, config.vocab_size)


def vit(batch: int) -> Made:
    """ViT-B/16 at 224."""
    from transformers import ViTConfig, ViTForImageClassification

    return _image(ViTForImageClassification(ViTConfig(num_labels=1000)), batch)


def resnet(batch: int) -> Made:
    """ResNet-50 at 224."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return _image(ResNetForImageClassification(ResNetConfig(num_labels=1000)), batch)


def mobilenet(batch: int) -> Made:
    """MobileNetV2 at 224; drops nothing."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(num_labels=1000, classifier_dropout_prob=0.0)
    return _image(MobileNetV2ForImageClassification(config), batch)


def unet(batch: int) -> Made:
    """A diffusion U-Net of 27M parameters on latents 64 wide."""
    from models.unet import CHANNELS, IMAGE, UNet

    image, noise = (torch.randn(batch, CHANNELS, IMAGE, IMAGE, generator=_generator()) for _ in range(2))
    step = torch.rand(batch, generator=_generator()) * 1000
    return UNet((64, 128, 192, 256)), {"image": image, "step": step, "noise": noise}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(GENERATOR)


def _language(model: Any, batch: int, seq: int, words: int) -> Made:
    model.loss_type = (
        "ForMaskedLM" if "Masked" in type(model).__name__ else "ForCausalLM"
    )  # else torch.compile breaks at a warning
    tokens = torch.randint(0, words, (batch, seq), generator=_generator())
    return model, {"input_ids": tokens, "labels": tokens}


def _image(model: nn.Module, batch: int) -> Made:
    pixels = torch.randn(batch, 3, 224, 224, generator=_generator())
    return model, {"pixel_values": pixels, "labels": torch.randint(0, 1000, (batch,), generator=_generator())}


CASES = (
    Case("gpt2", gpt2, 8), Case("llama", llama, 8), Case("bert", bert, 8), Case("vit", vit, 16), Case("unet", unet, 8),
    Case("resnet50", resnet, 16), Case("resnet50 tune", resnet, 16, "tune"), Case("resnet50 infer", resnet, 16, "infer"),
    Case("mobilenetv2", mobilenet, 16), Case("mobilenetv2 tune", mobilenet, 16, "tune"),
    Case("mobilenetv2 infer", mobilenet, 16, "infer"),
    Case("vocabulary", vocabulary, 8),
)  # fmt: skip

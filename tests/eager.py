"""Compares a captured graph with the module it came from: loss, outputs, gradients, and which tensors carry one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from shardwright.passes.capture import Captured, capture
from shardwright.passes.lift import exact, without_dropout
from torch import fx, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

BATCH, SEQ, VOCAB = 4, 16, 100
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}


def tokens(batch: int = BATCH, seq: int = SEQ) -> dict[str, torch.Tensor]:
    """Ids and labels; the first labels are ignored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (batch, seq), generator=generator)
    labels = torch.randint(0, VOCAB, (batch, seq), generator=generator)
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def family(name: str, **changes: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small model of one family with inputs: gpt2, llama, bert, bert-classify, bert-padded, vit."""
    torch.manual_seed(0)
    kwargs = tokens()
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=VOCAB, **changes)), kwargs
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **{"num_key_value_heads": 2} | SMALL | changes)), kwargs
    if name == "bert":
        return BertForMaskedLM(BertConfig(vocab_size=VOCAB, **SMALL | changes)), kwargs
    if name.startswith("bert-"):
        model = BertForSequenceClassification(BertConfig(vocab_size=VOCAB, **SMALL | changes))
        kwargs["labels"] = kwargs["input_ids"][:, 0] % 2
        if name == "bert-padded":
            kwargs["attention_mask"] = (torch.arange(SEQ) < torch.tensor([[16], [9], [3], [12]])).long()
        return model, kwargs
    config = ViTConfig(image_size=32, patch_size=8, num_labels=10, **SMALL | changes)
    pixels = torch.randn(BATCH, 3, 32, 32)
    return ViTForImageClassification(config), {"pixel_values": pixels, "labels": torch.tensor([1, 5, 0, 9])}


class Recorder(fx.Interpreter):
    """Runs a graph and notes every tensor whose `requires_grad` is not what `meta["differentiable"]` says."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.wrong: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            flags = n.meta["differentiable"]
            for value, flag in zip(
                *((result, flags) if isinstance(result, tuple | list) else ([result], [flags])), strict=True
            ):
                if isinstance(value, torch.Tensor) and value.requires_grad != flag:
                    self.wrong.append(f"{n.name}: requires_grad is {value.requires_grad}, differentiable {flag}")
        return result


def run(captured: Captured, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The graph's outputs by node name, on the model's own tensors."""
    values = captured.values(model) | captured.flatten(args, kwargs)
    recorder = Recorder(captured.graph)
    outputs = recorder.run(*[values[e.node] for e in captured.entries])
    assert not recorder.wrong, recorder.wrong
    return dict(zip(captured.outputs, outputs, strict=True))


def check(model: nn.Module, *args: Any, tolerance: float = 1e-12, loss: Any = None, **kwargs: Any) -> Captured:
    """Capture in float64 and compare with eager: loss, each parameter's gradient or its absence, and what buffers become."""
    model.double()
    args = tuple(_double(a) for a in args)
    kwargs = {k: _double(v) for k, v in kwargs.items()}
    with without_dropout():
        captured = capture(model, args, kwargs, lift_float64=True)
    before = {n: b.clone() for n, b in model.named_buffers()}
    with exact():
        expected = model(*args, **kwargs)
    expected = loss(expected) if loss is not None else expected.loss
    expected.backward()
    after = {n: b.clone() for n, b in model.named_buffers()}
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    outputs = run(captured, model, args, kwargs)
    assert abs(outputs[captured.loss].item() - expected.item()) < tolerance * max(1.0, abs(expected.item()))
    outputs[captured.loss].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            error = (parameter.grad - gradients[name]).abs().max().item()
            assert error < tolerance * max(1.0, gradients[name].abs().max().item()), name
    model.zero_grad(set_to_none=True)
    for name, buffer in after.items():
        new = outputs[captured.writes[name]] if name in captured.writes else before[name]
        assert torch.allclose(new, buffer, rtol=0, atol=tolerance), name
    return captured


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

"""Attention masks: recognised where they are causal, trivial or a window; kept, and still right, where they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager import SEQ, check, family
from shardwright.passes.capture import Captured, capture
from torch import fx, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    """One head of attention on a learned table, with the mask that `mask(q, x)` makes."""

    def __init__(self, mask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], seq: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(2, 2, seq, 4))
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.table * x[:, None, :, None]
        return F.scaled_dot_product_attention(q, q.tanh(), q.cos(), attn_mask=self.mask(q, x)).square().sum()


def attention(captured: Captured) -> tuple[Any, bool]:
    """(mask node or None, is_causal) of the one attention call."""
    (node,) = (n for n in captured.graph.graph.nodes if n.target is SDPA)
    return node.args[3], bool(node.args[5])


def recognised(mask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], seq: int = 12) -> tuple[Any, bool]:
    x = torch.rand(2, seq, generator=torch.Generator().manual_seed(2)) + 0.5
    return attention(check(Attention(mask, seq), x, loss=lambda out: out))


def positions(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    steps = torch.arange(q.shape[2])
    return steps[:, None], steps[None, :]


def compared(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    row, column = positions(q)
    return (column <= row) & (row >= 0)


def triangle(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()


def additive(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    size = q.shape[2]
    return torch.full((size, size), float("-inf"), dtype=q.dtype).triu(1)


def least(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    size = q.shape[2]
    mask = torch.zeros(2, 1, size, size, dtype=q.dtype)
    return mask.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), torch.finfo(q.dtype).min)


def chosen(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    row, column = positions(q)
    zero, low = torch.zeros((), dtype=q.dtype), torch.full((), float("-inf"), dtype=q.dtype)
    return torch.where(column > row, low, zero)[None, None]


def packed(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What transformers traces: positions, their jumps, and lookups of both."""
    steps = torch.arange(q.shape[2])[None].expand(2, -1)
    jumps = torch.diff(steps, prepend=steps[:, :1] - 1, dim=-1) != 1
    ids = jumps.cumsum(-1)
    batch, rows = torch.arange(2)[:, None, None, None], torch.arange(q.shape[2])[None, None, :, None]
    columns = rows.transpose(2, 3)
    return (ids[batch, rows] == ids[batch, columns]) & (steps[batch, columns] <= steps[batch, rows])


@pytest.mark.parametrize("mask", [compared, triangle, additive, least, chosen, packed])
def test_causal_masks(mask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    assert recognised(mask) == (None, True)


def test_all_true_masks() -> None:
    assert recognised(lambda q, x: positions(q)[0] + positions(q)[1] >= 0) == (None, False)
    assert recognised(lambda q, x: torch.zeros(1, 1, 12, 12, dtype=q.dtype)) == (None, False)
    assert recognised(lambda q, x: torch.ones(2, 1, 12, 12, dtype=torch.bool)) == (None, False)


def almost_causal(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    row, column = positions(q)
    return (column <= row) & ~((row == 7) & (column == 3))


def prefix(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    row, column = positions(q)
    return (column <= row) | (column < 4)


def strictly_below(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    row, column = positions(q)
    return (column < row) | (row == 0)


def biased(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    row, column = positions(q)
    return torch.where(column <= row, (column - row).to(q.dtype) * 0.1, torch.finfo(q.dtype).min)


@pytest.mark.parametrize("mask", [almost_causal, prefix, strictly_below, biased])
def test_other_masks_stay(mask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    kept, causal = recognised(mask)
    assert isinstance(kept, fx.Node)
    assert not causal


def test_masks_of_one_batch_entry_stay() -> None:
    def second_differs(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        row, column = positions(q)
        return (column <= row)[None, None] | (torch.arange(2) == 1)[:, None, None, None]

    kept, causal = recognised(second_differs)
    assert kept is not None
    assert not causal


def test_one_wrong_row_of_a_long_mask_is_found() -> None:
    def edge(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        row, column = positions(q)
        return (column <= row) & (row < 8191)

    with torch.device("meta"):
        model, x = Attention(edge, 8192), torch.ones(2, 8192)
    kept, causal = attention(capture(model, (x,)))
    assert kept is not None
    assert not causal


def test_sliding_window_is_one_band_for_the_batch() -> None:
    config = MistralConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
        sliding_window=5,
    )  # fmt: skip
    ids = torch.zeros(4, SEQ, dtype=torch.long)
    captured = capture(MistralForCausalLM(config), (), {"input_ids": ids, "labels": ids})
    mask, causal = attention(captured)
    assert tuple(mask.meta["val"].shape) == (SEQ, SEQ)
    assert not causal
    row, column = torch.arange(SEQ)[:, None], torch.arange(SEQ)
    assert torch.equal(captured.constants[mask.name], (column <= row) & (column > row - 5))


def test_padding_mask_has_no_rows() -> None:
    model, kwargs = family("bert-padded")
    captured = capture(model, (), kwargs)
    masks = [n.args[3] for n in captured.graph.graph.nodes if n.target is SDPA]
    assert {tuple(m.meta["val"].shape) for m in masks} == {(4, 1, 1, SEQ)}
    assert not any("index" in str(n.target) for n in captured.graph.graph.nodes)


def test_padded_causal_model_equals_eager() -> None:
    model, kwargs = family("llama")
    kwargs["attention_mask"] = (torch.arange(SEQ) < torch.tensor([[16], [9], [3], [12]])).long()
    kwargs["labels"] = kwargs["labels"].masked_fill(kwargs["attention_mask"] == 0, -100)
    check(model, **kwargs)


def llama(seq: int, batch: int) -> Captured:
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
        max_position_embeddings=seq,
    )  # fmt: skip
    with torch.device("meta"):
        model, ids = LlamaForCausalLM(config), torch.zeros(batch, seq, dtype=torch.long)
    return capture(model, (), {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize(("seq", "batch"), [(4096, 64), (131072, 1), (131072, 64)])
def test_long_causal_model_has_no_square_tensor(seq: int, batch: int) -> None:
    captured = llama(seq, batch)
    assert attention(captured) == (None, True)
    for node in captured.graph.graph.nodes:
        value = node.meta.get("val")
        assert not isinstance(value, torch.Tensor) or list(value.shape).count(seq) < 2

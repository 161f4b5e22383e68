"""A BERT-like encoder on padded batches: a step with packed rows against one with all rows.

    python benchmarks/padding.py [--batch N] [--length N] [--layers N] [--width N] [--repeats N] [--share S]

Both run eagerly in one process on the same weights, batch, dtype (float32) and threads; a step is forward and backward. Steps
come in the order A B B A; the figure is the median of the ratios of pairs. Lengths are `share` of the longest one on average,
spread evenly up to it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def encoder(width: int, layers: int, length: int) -> Any:
    """A BERT without dropout and pooling."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=1000, max_position_embeddings=length, attn_implementation="sdpa", **sizes, **still)
    return BertModel(config, add_pooling_layer=False)


def step_of(captured: Any, values: dict[str, torch.Tensor], valid: torch.Tensor) -> Callable[[], float]:
    """Seconds of one step of a captured graph."""
    leaves = [values[e.node] for e in captured.entries]
    wanted = [x for x in leaves if x.requires_grad]

    def step() -> float:
        begin = time.perf_counter()
        loss = (captured.graph(*leaves)[0] * valid.unsqueeze(-1)).square().mean()
        torch.autograd.grad(loss, wanted, allow_unused=True)
        return time.perf_counter() - begin

    return step


def main() -> None:
    from shardwright.passes.capture import capture
    from shardwright.passes.fuse.padding import PackPadding
    from shardwright.passes.rewrite import rewritten

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 8), ("length", 128), ("layers", 4), ("width", 512), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--share", type=float, default=0.5)
    given = parser.parse_args()
    low = 2 * given.share - 1
    lengths = torch.linspace(max(low, 0.0) * given.length, min(1.0, 2 * given.share) * given.length, given.batch + 1)[
        1:
    ]
    valid = torch.arange(given.length) < lengths.round().unsqueeze(1)
    model = encoder(given.width, given.layers, given.length)
    inputs = {"input_ids": torch.randint(0, 1000, valid.shape), "attention_mask": valid.long()}
    before = capture(model, (), inputs)
    after = rewritten(before, [PackPadding(share=given.share)])
    values = {**before.values(model), **before.flatten((), inputs)}
    padded, packed = (step_of(c, values, valid) for c in (before, after))
    pairs = []
    for i in range(given.repeats + 1):
        if i % 2:
            pairs.append((padded(), packed()))
        else:
            other = packed()
            pairs.append((padded(), other))
    times = pairs[1:]
    share = int(valid.sum()) / valid.numel()
    print(f"valid positions   {share:.3f}")
    print(
        f"padded, packed    {statistics.median(a for a, _ in times):.3f} s, {statistics.median(b for _, b in times):.3f} s"
    )
    print(f"packed / padded   {statistics.median(b / a for a, b in times):.3f}")


if __name__ == "__main__":
    main()

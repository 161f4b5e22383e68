"""Seconds of what planning calls most often: action lists, their live vectors, one op's rule, capture of a long sequence."""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import median
from time import perf_counter

import click
import torch
from rich.console import Console
from rich.table import Table
from shardwright.passes.capture import capture
from shardwright.planner.live import live_vectors
from shardwright.planner.rules import Operand, instantiate
from shardwright.planner.schedules import actions, stage_rank
from transformers import LlamaConfig, LlamaForCausalLM

RANKS, CHUNKS, MICROBATCHES, SEQUENCE = 16, 8, 128, 131072


def lists() -> None:
    """32,768 actions."""
    actions("interleaved", RANKS, CHUNKS, MICROBATCHES)


def vectors() -> Callable[[], None]:
    """What is alive in those lists, rank by rank."""
    found, placement = actions("interleaved", RANKS, CHUNKS, MICROBATCHES), stage_rank("interleaved", RANKS, CHUNKS)

    def run() -> None:
        live_vectors(found, placement)

    return run


def rule() -> None:
    """One linear of a large model."""
    args, shapes = (Operand(0), Operand(1)), [(8, 4096, 8192), (28672, 8192)]
    instantiate("aten.linear", args, {}, shapes, [(8, 4096, 28672)])


def long_capture() -> None:
    """A causal model of one layer, whose mask would be a square of its sequence."""
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, max_position_embeddings=SEQUENCE,
    )  # fmt: skip
    with torch.device("meta"):
        model, ids = LlamaForCausalLM(config), torch.zeros(1, SEQUENCE, dtype=torch.long)
    capture(model, (), {"input_ids": ids, "labels": ids})


def timed(call: Callable[[], None], repeats: int) -> float:
    """Median seconds of a call, after one to warm up."""
    call()
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return median(seconds)


@click.command(help=__doc__)
@click.option("--repeats", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(repeats: int, as_json: bool) -> None:
    """Print the table."""
    parts = {
        f"lists of {RANKS} ranks, {CHUNKS} chunks, {MICROBATCHES} microbatches": lists,
        "live vectors of those lists": vectors(),
        "rule of one linear": rule,
        f"capture of one layer at {SEQUENCE} tokens": long_capture,
    }
    found = {name: timed(call, repeats) for name, call in parts.items()}
    if as_json:
        print(json.dumps(found))
        return
    table = Table("part", "median seconds")
    for name, seconds in found.items():
        table.add_row(name, f"{seconds:.2g}")
    Console().print(table)


if __name__ == "__main__":
    main()

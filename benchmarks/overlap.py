"""What overlap hides: steps with and without it in turn, on links of a given latency and bandwidth.

    torchrun --nproc-per-node 2 benchmarks/overlap.py
    torchrun --nproc-per-node 2 benchmarks/overlap.py --alpha 0.01 --bandwidth 5e8 --rounds 20 --json

A collective completes no earlier than the link lets it, by sleeping (tests/links.py), so that processors are free meanwhile. The
first row of each scheme is the own network. Prints medians over the rounds of rank 0: seconds of a step, seconds of it spent
waiting, seconds of processor time, with and without, and the median of the differences with its 95 % interval. Exits with 1 where a
step over the slow link is not shorter with overlap.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from links import SlowLink
from shardwright.api import make_plan
from shardwright.planner.plan import OverlapPlan
from shardwright.runtime.apply import apply
from shardwright.runtime.collectives import observed

from runtime import interval

SCHEMES = ("zero=0", "zero=1", "zero=2", "zero=3", "tp")
FREE = SlowLink(0.0, float("inf"))


def llama(layers: int, hidden: int, batch: int, seq: int) -> tuple[Any, dict[str, Any]]:
    """A stack of Llama blocks and a batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=1024, use_cache=False,
    ))  # fmt: skip
    ids = torch.randint(0, 1024, (batch, seq))
    return model, {"input_ids": ids, "labels": ids.clone()}


def modules(scheme: str, options: argparse.Namespace) -> tuple[dict[bool, Any], dict[str, Any]]:
    """The same plan with and without overlap."""
    world = dist.get_world_size()
    pins = [f"tp={world}", "dp=1"] if scheme == "tp" else [f"dp={world}", "tp=1", scheme]
    model, batch = llama(options.layers, options.hidden, options.batch, options.seq)
    plan = make_plan(model, batch, f"h100-sxm:{world}", pins=[*pins, "pp=1", "cp=1", "dtype=fp32"])
    plans = {True: plan, False: msgspec.structs.replace(plan, overlap=OverlapPlan(0, 0))}
    return {on: apply(model, (), batch, one) for on, one in plans.items()}, batch


def step(module: Any, batch: dict[str, Any], link: SlowLink) -> tuple[float, float, float]:
    """(seconds, seconds waited, processor seconds) of one step."""
    link.blocked = 0.0
    module.zero_grad()
    dist.barrier()
    begin, used = time.monotonic(), time.process_time()
    with observed(link):
        module(**batch).loss.backward()
    return time.monotonic() - begin, link.blocked, time.process_time() - used


def compared(scheme: str, slow: SlowLink, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each link."""
    made, batch = modules(scheme, options)
    rows = []
    for name, link in (("own", FREE), ("slow", slow)):
        found: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
        for i in range(options.rounds + 1):
            for on in (True, False) if i % 2 else (False, True):
                figures = step(made[on], batch, link)
                if i:
                    found[on].append(figures)
        gain = [b[0] - a[0] for a, b in zip(found[True], found[False], strict=True)]
        middle = [[statistics.median(x) for x in zip(*found[on], strict=True)] for on in (True, False)]
        rows.append(
            {
                "scheme": scheme,
                "link": name,
                "with": middle[0],
                "without": middle[1],
                "gain": statistics.median(gain),
                "interval": interval(gain),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", action="append", choices=SCHEMES)
    parser.add_argument("--alpha", type=float, default=0.02, help="seconds of latency")
    parser.add_argument("--bandwidth", type=float, default=1e9, help="bytes a second")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    slow = SlowLink(options.alpha, options.bandwidth)
    rows = [row for scheme in options.scheme or SCHEMES for row in compared(scheme, slow, options)]
    if dist.get_rank() == 0:
        print(json.dumps(rows, indent=1) if options.json else table(rows))
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    dist.destroy_process_group()
    return int(any(row["gain"] <= 0 for row in rows if row["link"] == "slow"))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, in milliseconds."""
    lines = [
        f"{'scheme':8}{'link':6}{'with: step':>12}{'waits':>8}{'cpu':>8}{'without: step':>15}{'waits':>8}{'cpu':>8}{'gain':>9}"
    ]
    for row in rows:
        shown = [f"{1e3 * x:.0f}" for x in (*row["with"], *row["without"])]
        widths = (12, 8, 8, 15, 8, 8)
        cells = "".join(f"{x:>{w}}" for x, w in zip(shown, widths, strict=True))
        low, high = (1e3 * x for x in row["interval"])
        lines.append(f"{row['scheme']:8}{row['link']:6}{cells}{1e3 * row['gain']:9.0f}   {low:.0f} to {high:.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

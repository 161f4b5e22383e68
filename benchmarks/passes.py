"""Step time and peak memory of real models: eager, `torch.compile` with fused AdamW, and ours.

    python benchmarks/passes.py [--only TEXT]... [--repeats N] [--variants NAME,NAME] [--batch N] [--json]

Every variant lives in a process of its own, with the same weights, batch, dtype (float32), optimizer (fused AdamW) and two
threads; one runs at a time. `compile` is the baseline. Steps of baseline and ours come in the order A B B A; each pair of
neighbours gives one ratio, ours over the baseline's; the figure is the median with its 95 % interval (order statistics). Memory
is the peak of a step above parameters, gradients and optimizer states, from allocator events. Losses after the warm-up are held
against each other.

Variants: `eager`; `compile`; `pages`, the baseline in a process that keeps its pages (profiles/heap.py), which tells that effect
apart; `ours`, the plan's passes, compiled, pages kept; `small`, the same under a memory limit: parameters and states, and 0.7 of
what the baseline takes above them. Exit status 1 where a loss differs or ours is slower beyond noise.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from runtime import interval

VARIANTS = ("eager", "compile", "pages", "ours", "small")
BASELINE, OURS, SMALL = "compile", "ours", "small"
LESS = 0.7
"""What `small` may take above parameters and states, as a share of what the baseline takes."""
WARMUP, THREADS, RATE = 3, 2, 1e-5
ADAM = 4
"""Bytes of a trained parameter times this: itself, its gradient, two moments."""


@dataclass(frozen=True)
class Figures:
    """One variant of a case: median seconds of a step, bytes at the peak, of those above parameters and states, the last loss."""

    seconds: float
    peak_bytes: int
    above_bytes: int
    loss: float


@dataclass(frozen=True)
class Against:
    """A variant against the baseline: the median ratio of seconds, its interval, the ratio of bytes above parameters and states."""

    ratio: float
    low: float
    high: float
    memory: float


@dataclass(frozen=True)
class Outcome:
    """One case: figures by variant, those of ours and of small against the baseline, and the passes that the plan lists."""

    case: str
    figures: dict[str, Figures]
    against: dict[str, Against]
    passes: tuple[str, ...]

    @property
    def held(self) -> bool:
        """Whether losses agree and ours is not slower beyond noise."""
        losses = [f.loss for f in self.figures.values()]
        slower = OURS in self.against and self.against[OURS].low > 1.0
        return max(losses) - min(losses) <= 2e-3 * max(abs(v) for v in losses) and not slower


# -- in the process of a variant


def serve(variant: str, case_name: str, batch: int, above: int, link: Connection) -> None:
    """Answer "step" with (seconds, loss), "peak" with (peak, above) and "passes", until the link closes."""
    import torch
    from pass_models import CASES
    from shardwright.profiles.heap import keep_pages

    torch.set_num_threads(THREADS)
    if variant in ("pages", OURS, SMALL):
        keep_pages()
    torch.manual_seed(0)
    case = next(c for c in CASES if c.name == case_name)
    model, inputs = case.make(batch or case.batch)
    model.train(case.mode == "train")
    runner, passes = _runner(variant, model, inputs, above)
    step, held = _stepper(runner, inputs, case.mode)
    answers: dict[str, Callable[[], Any]] = {
        "step": lambda: _timed(step), "peak": lambda: _peak(step, held, case.mode), "passes": lambda: passes,
    }  # fmt: skip
    while (asked := link.recv()) is not None:
        link.send(answers[asked]())


def _runner(variant: str, model: Any, inputs: dict[str, Any], above: int) -> tuple[Any, tuple[str, ...]]:
    """What is called, and the names of its passes. `above` is what the baseline takes above parameters and states."""
    import torch

    if variant == "eager":
        return model, ()
    if variant not in (OURS, SMALL):
        return torch.compile(model, dynamic=False), ()
    from shardwright.api import apply_plan, make_plan

    states = sum(p.numel() * p.element_size() for p in model.parameters()) * ADAM
    limit = states + int(LESS * above) if variant == SMALL else None
    plan = make_plan(model, inputs, "cpu:1", pins=("passes=auto", "offload=none"), memory_limit=limit)
    return apply_plan(model, inputs, plan, compile=True), tuple(one.name for one in plan.passes)


def _stepper(model: Any, inputs: dict[str, Any], mode: str) -> tuple[Callable[[], float], tuple[Any, ...]]:
    """One step, and what is alive between steps."""
    import torch

    if mode == "infer":
        given = {k: v for k, v in inputs.items() if k != "labels"}

        def infer() -> float:
            with torch.no_grad():
                return float(model(**given).logits.double().square().mean())

        return infer, (model, given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def train() -> float:
        found = model(**inputs)
        loss = found if isinstance(found, torch.Tensor) else found.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return train, (model, optimizer, inputs)


def _timed(step: Callable[[], float]) -> tuple[float, float]:
    begin = time.perf_counter()
    loss = step()
    return time.perf_counter() - begin, loss


def _peak(step: Callable[[], float], held: tuple[Any, ...], mode: str) -> tuple[int, int]:
    from shardwright.runtime.monitor import measure_step

    found = measure_step(step, *held)
    parameters = sum(p.numel() * p.element_size() for p in held[0].parameters())
    return found.bytes, found.bytes - parameters * (1 if mode == "infer" else ADAM)


# -- from outside


class Variant:
    """A process that runs one variant of one case: `target` answers what is asked."""

    def __init__(self, name: str, case: str, batch: int, above: int = 0, target: Callable[..., None] = serve) -> None:
        self.link, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=target, args=(name, case, batch, above, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, what: str) -> Any:
        """The answer; raises RuntimeError where the process died."""
        try:
            self.link.send(what)
            return self.link.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError("the process of a variant died; its message is above") from None

    def close(self) -> None:
        """End the process."""
        if self.process.is_alive():
            self.link.send(None)
        self.process.join(30)


def measured(case: str, variants: Sequence[str], repeats: int, batch: int) -> Outcome:
    """Time one case. Raises RuntimeError where a process died."""
    running: dict[str, Variant] = {}
    warm, peaks = {}, {}
    try:
        for name in sorted(
            variants, key=lambda v: v != BASELINE
        ):  # what others may take follows from the baseline's peak
            running[name] = Variant(name, case, batch, peaks[BASELINE][1] if BASELINE in peaks else 0)
            warm[name] = [running[name].ask("step")[1] for _ in range(WARMUP)][-1]
            peaks[name] = running[name].ask("peak")
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        order = [n for n in variants if n not in (BASELINE, OURS)]
        for _ in range(repeats):
            for name in (BASELINE, OURS, OURS, BASELINE, *order):
                if name in running:
                    seconds[name].append(running[name].ask("step")[0])
        passes = running[OURS].ask("passes") if OURS in running else ()
    finally:
        for variant in running.values():
            variant.close()
    figures = {n: Figures(statistics.median(seconds[n]), *peaks[n], warm[n]) for n in variants}
    against = {n: _against(n, figures, seconds) for n in (OURS, SMALL) if BASELINE in running and n in running}
    return Outcome(case, figures, against, passes)


def _against(name: str, figures: dict[str, Figures], seconds: dict[str, list[float]]) -> Against:
    base = seconds[BASELINE][1::2] if len(seconds[name]) < len(seconds[BASELINE]) else seconds[BASELINE]  # neighbours
    ratios = [a / b for a, b in zip(seconds[name], base, strict=True)]
    return Against(
        statistics.median(ratios), *interval(ratios), figures[name].above_bytes / figures[BASELINE].above_bytes
    )


def line(o: Outcome, variants: Sequence[str]) -> str:
    """One row of the table."""
    cells = "".join(f"{o.figures[n].seconds:8.3f} {o.figures[n].above_bytes / 2**20:7.0f}" for n in variants)
    ratios = "".join(f"  {a.ratio:6.3f} [{a.low:.3f}, {a.high:.3f}] {a.memory:6.2f}" for a in o.against.values())
    return f"{o.case:18}{cells}{ratios}  {','.join(o.passes)}{'' if o.held else '  <- not held'}"


def main(arguments: Sequence[str] | None = None) -> int:
    from pass_models import CASES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], help="the case of this name, or those whose name has this in it"
    )
    parser.add_argument("--repeats", type=int, default=6, help="times A B B A: two pairs each")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which to run")
    parser.add_argument("--batch", type=int, default=0, help="another batch")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    variants = options.variants.split(",")
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    if not options.json:
        columns = "".join(f"{n + ' s':>8} {'MiB':>7}" for n in variants)
        told = "".join(f"  {n + ': time, interval, memory':30}" for n in (OURS, SMALL) if n in variants)
        print(f"{'case':18}{columns}{told}  passes", flush=True)
    outcomes, names = [], {case.name for case in CASES}
    for case in CASES:
        if options.only and not any(text == case.name if text in names else text in case.name for text in options.only):
            continue
        outcomes.append(measured(case.name, variants, options.repeats, options.batch))
        if not options.json:
            print(line(outcomes[-1], variants), flush=True)
    if options.json:
        print(json.dumps([{**asdict(o), "held": o.held} for o in outcomes], indent=1))
    else:
        for name in outcomes[0].against if outcomes else ():
            rows = [o.against[name] for o in outcomes]
            time_, memory = (_geometric([getattr(a, key) for a in rows]) for key in ("ratio", "memory"))
            print(
                f"{name}: geometric means {time_:.3f} of the time, {memory:.3f} of the memory above parameters and states"
            )
    return 0 if all(o.held for o in outcomes) else 1


def _geometric(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(max(v, 1e-9)) for v in values))


if __name__ == "__main__":
    sys.exit(main())

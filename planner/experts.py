"""Expert parallelism: experts split over (a part of) the data axis, tokens sent to them and back, priced in closed form.

    facts = expert_ops(outline)[0]
    found = expert_parallel(facts, ep=8, data=64, tokens=4096, token_bytes=2 * facts.hidden, all_to_all=lambda full: ...)

Of `data` data-parallel ranks, groups of `ep` hold each expert once: a rank has 1/ep of the experts, and their weights have
their own data-parallel degree edp = data / ep (gradients are reduced, and ZeRO shards, over edp ranks alone). Tokens of a rank
are sent to the ranks of their experts and the outputs back: two all-to-alls forward and two backward, each of

    rho * tokens * top_k * hidden * dtype bytes per rank, of which (ep - 1) / ep leave it

(DeepSpeed-MoE, Rajbhandari et al. 2022, section 5; Tutel, Hwang et al. 2023). rho >= 1 is the load of the busiest rank over
the mean (`rule_experts.imbalance`); a capacity caps it and then drops tokens, which is not exact. Copies of one token for two
experts of one rank are counted twice, as plain dispatch sends them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from . import rule_experts
from .outline import Op, Outline

DEGREES = (1, 2, 4, 8)
"""Into how many chunks tokens may be cut to overlap dispatch, experts and combine (Tutel, FSMoE)."""
COUNT_BYTES = 8
"""One number of tokens per expert, sent ahead of them."""


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """One mixture-of-experts op, unsplit. `tokens` pass `top_k` of `experts` each.

    `hidden` is the width of a token, `inner` that of an expert, `columns` what its first product makes (twice `inner` with a
    gate). `parameters` are the tensors that are split with the experts, of `parameter_elements` together.
    """

    op: str
    experts: int
    top_k: int
    hidden: int
    inner: int
    columns: int
    tokens: int
    parameters: tuple[str, ...]
    parameter_elements: int
    flops: float
    backward_flops: float


def expert_ops(outline: Outline) -> tuple[ExpertFacts, ...]:
    """Facts of every lifted mixture-of-experts op, in order. (What is not lifted is said in the outline's notes.)"""
    return tuple(_facts(op, outline) for op in outline.ops if op.kind == "experts")


def _facts(op: Op, outline: Outline) -> ExpertFacts:
    sizes = {name: math.prod(op.factors[i].size for i in rule_experts.letters(op.factors, name)) for name in "tkhecf"}
    stacks = [outline.tensors[outline.tensors[use.tensor].storage] for use in op.operands[3:]]
    held = tuple(dict.fromkeys(t.name for t in stacks if t.role == "parameter"))
    return ExpertFacts(
        op.name, sizes["e"], sizes["k"], sizes["h"], sizes["f"], sizes["c"] * sizes["f"], sizes["t"], held,
        sum(outline.tensors[name].elements for name in held), op.flops, op.backward_flops,
    )  # fmt: skip


def expert_degrees(facts: ExpertFacts, data: int) -> tuple[int, ...]:
    """Legal sizes of an expert group within `data` data-parallel ranks: they divide both the ranks and the experts."""
    return tuple(n for n in range(1, data + 1) if data % n == 0 and facts.experts % n == 0)


@dataclass(frozen=True, slots=True)
class ExpertParallel:
    """What expert parallelism costs one rank, per mixture-of-experts op and microbatch.

    `rows` are the token copies the busiest rank works on. `sent_bytes` leave a rank in one all-to-all. Seconds are of both
    exchanges of a direction, none overlapped. `saved_bytes` stay until backward (dispatched tokens and gate inputs).
    `dropped` is the share of the busiest rank's copies over capacity, 0 without one: a plan that drops tokens is not exact.
    """

    ep: int
    edp: int
    rho: float
    rows: int
    parameter_elements: int
    flops: float
    backward_flops: float
    sent_bytes: float
    forward_seconds: float
    backward_seconds: float
    saved_bytes: float
    dropped: float


def expert_parallel(
    facts: ExpertFacts, ep: int, data: int, tokens: int, token_bytes: int, all_to_all: Callable[[float], float], *,
    rho: float | None = None, capacity: float | None = None, training: bool = True,
) -> ExpertParallel:  # fmt: skip
    """Price experts split over `ep` of `data` ranks, each with `tokens` of its own of `token_bytes` bytes.

    `all_to_all(full bytes)` gives seconds over the group (full: all ranks' tensors together, as in collectives.py). `rho` is
    the imbalance (>= 1; None: the default of rule_experts); `capacity` cuts it. Raises ValueError where sizes do not divide.
    """
    if ep not in expert_degrees(facts, data):
        raise ValueError(f"{facts.experts} experts over ep={ep} of {data} data ranks: ep must divide both")
    asked = rule_experts.imbalance(facts.experts / ep, facts.experts) if rho is None else rho
    if asked < 1.0 or (capacity is not None and capacity <= 0.0):
        raise ValueError(f"imbalance {asked} must be at least 1 and capacity {capacity} positive")
    load = min(asked, capacity) if capacity is not None else asked
    rows = math.ceil(tokens * facts.top_k * load)
    width = token_bytes / facts.hidden
    local = rows * token_bytes
    exchange = all_to_all(local * ep) if ep > 1 else 0.0
    counts = all_to_all(float(COUNT_BYTES * facts.experts * ep)) if ep > 1 else 0.0
    share = rows / (facts.top_k * facts.tokens)
    kept = rows * (token_bytes * (ep > 1) + facts.columns * width) if training else 0.0
    return ExpertParallel(
        ep, data // ep, load, rows, facts.parameter_elements // ep,
        facts.flops * share, facts.backward_flops * share if training else 0.0, local * (ep - 1) / ep,
        counts + 2 * exchange, 2 * exchange if training else 0.0, kept, max(0.0, 1 - load / asked),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """One resource's part of a mixture-of-experts layer: `fixed` seconds per chunk, `work` seconds for all tokens (x beta)."""

    fixed: float
    work: float

    def chunk(self, degree: int) -> float:
        """Seconds of one of `degree` chunks."""
        return self.fixed + self.work / degree


NO_TASK = Task(0.0, 0.0)


def pipelined_seconds(
    exchange: Task, experts: Task, degree: int, *, gather: Task = NO_TASK, scatter: Task = NO_TASK, reduce: float = 0.0
) -> float:
    """Seconds of dispatch, experts and combine with tokens in `degree` chunks that overlap (F10; FSMoE, Pan et al. 2025).

    `exchange` is one all-to-all between nodes (each chunk has two), `gather` and `scatter` what tensor parallelism does inside
    the node around the experts, `reduce` seconds of gradient all-reduce that share the network between nodes. An estimate: the
    largest of what each resource needs; within -19 % to +32 % of an idealised simulation, so the simulator decides.
    """
    ends = gather.chunk(degree) + scatter.chunk(degree)
    trip = 2 * exchange.chunk(degree)
    network = 2 * degree * exchange.fixed + 2 * exchange.work
    inside = degree * (gather.fixed + scatter.fixed) + gather.work + scatter.work
    bounds = [
        network + ends,
        trip + ends + degree * experts.fixed + experts.work,
        trip + inside,
        trip + ends + experts.chunk(degree),
    ]
    if reduce > 0.0:
        bounds.append(network + reduce)
    return max(bounds)


def best_degree(
    exchange: Task, experts: Task, *, gather: Task = NO_TASK, scatter: Task = NO_TASK, reduce: float = 0.0
) -> tuple[int, float]:
    """(degree, seconds) of the fastest of `DEGREES`, the smallest where they tie."""
    timed = {r: pipelined_seconds(exchange, experts, r, gather=gather, scatter=scatter, reduce=reduce) for r in DEGREES}
    best = min(DEGREES, key=lambda r: (timed[r], r))
    return best, timed[best]

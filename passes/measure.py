"""Prices of a captured model on this machine: the ops that matter are timed at their local shapes, the rest is fitted.

Only measured CPU clusters time ops here; any other cluster is priced from its data sheet, and GPUs of this machine also from
what `shardwright profile` measured on them. Rows are kept in the profile store, so
a second plan of the same model measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..planner.cluster import Cluster
from ..planner.fit import Sample, fitted, samples
from ..planner.prices import OpRow, Prices
from ..planner.rule_types import Operand
from ..planner.work import OpKey
from ..profiles.calibrate import bare, scaled
from ..profiles.failures import KIND, failed
from ..profiles.jobs import run_ranks
from ..profiles.local import is_local_cpu, local_collectives, machine_key, threads_per_rank, versions
from ..profiles.measured import measured_collectives
from ..profiles.ops import OpRequest, argument_text, encode_request, parse_key
from ..profiles.progress import Row
from ..profiles.store import Store
from .inplace import in_place
from .localize import local_form
from .random import own_form
from .summarize import Summary, operands_of, target_name

BUDGET_SECONDS = 12.0
MOST_SAMPLES = 250
STARTUP_SECONDS = 120.0
OWN_OPS = (own_form.__module__, f"{__package__}.fuse", f"{__package__}.fuse.ops.liger", f"{__package__}.experts.op")
"""Modules that ranks import first: they make the ops that requests call."""


def measured_prices(
    summary: Summary,
    cluster: Cluster,
    compute: str,
    *,
    store: str | Path | None = None,
    budget_seconds: float = BUDGET_SECONDS,
    stages: int = 1,
) -> Prices:
    """The price list for `summary` on `cluster` at a compute dtype, for plans of so many pipeline ranks.

    `store` is the profile store's file (nothing is kept without one). On measured CPU clusters at most `budget_seconds` go
    into timing, the heaviest ops first. What was measured is multiplied by the factor of a calibrated cluster. Raises
    LaunchError when the measuring ranks fail.
    """
    if cluster.device.calibration != 1.0 and not cluster.pools:
        prices = measured_prices(
            summary, bare(cluster), compute, store=store, budget_seconds=budget_seconds, stages=stages
        )
        return replace(scaled(prices, cluster.device.calibration), cluster=cluster)
    if not is_local_cpu(cluster):
        return _profiled(summary, cluster, compute, Store(Path(store) if store is not None else None))
    arguments = {name: argument_text(*operands_of(call.node)[1:]) for name, call in summary.calls.items()}
    prices = Prices(cluster, compute, collectives=local_collectives(cluster, store=store), arguments=arguments)
    picked = samples(summary.outline, prices, stages)[:MOST_SAMPLES]
    kept = Store(Path(store) if store is not None else None)
    rows = _rows(summary, prices, picked, kept, budget_seconds)
    return in_place(fitted(prices, rows, picked, summary.outline.tensors), summary, kept)


def _profiled(summary: Summary, cluster: Cluster, compute: str, store: Store) -> Prices:
    """Prices of GPUs: from the data sheet, and on this machine's own from what a profile of them measured. Nothing is timed."""
    if not cluster.spec.startswith("local") or cluster.pools:
        return Prices(cluster, compute)
    rows = store.read(cluster.device.name, versions(), "op")
    arguments = (
        {name: argument_text(*operands_of(call.node)[1:]) for name, call in summary.calls.items()} if rows else {}
    )
    prices = Prices(
        cluster, compute, collectives=measured_collectives(cluster, store, versions()), arguments=arguments
    )  # fmt: skip
    if not rows:
        return prices
    known = {parse_key(text): OpRow(*row) for text, row in rows.items()}
    return fitted(prices, known, samples(summary.outline, prices)[:MOST_SAMPLES], summary.outline.tensors)


def _rows(
    summary: Summary, prices: Prices, picked: Sequence[Sample], store: Store, budget_seconds: float
) -> Mapping[OpKey, OpRow]:
    """Measured rows of `picked`: what the store has, and what is timed now."""
    ranks = prices.cluster.devices
    place = (machine_key(ranks), versions(), "op")
    known = {parse_key(text): OpRow(*row) for text, row in store.read(*place).items()}
    wanted = [request_of(summary, sample, prices) for sample in picked]
    hopeless = {parse_key(text) for text in failed(store.read(*place[:2], KIND), "op")}
    missing = [encode_request(r) for r in wanted if r is not None and r.key not in known and r.key not in hopeless]
    if missing:

        def heard(told: list[Row]) -> None:
            store.write(*place[:2], KIND, {key: value for kind, key, value in told if kind == KIND})

        found = run_ranks(
            ranks, threads_per_rank(ranks), ["ops"], timeout=STARTUP_SECONDS + 2 * budget_seconds, heard=heard,
            requests=[r for r in missing if r is not None], budget=budget_seconds, imports=OWN_OPS,
        )["ops"]  # fmt: skip
        store.write(*place, found)
        known |= {parse_key(text): OpRow(*row) for text, row in found.items()}
    return known


def request_of(summary: Summary, sample: Sample, prices: Prices) -> OpRequest | None:
    """The sample as a call on local shapes; None for an op whose arguments cannot be made local."""
    call = summary.calls[sample.op.name]
    key = prices.op_key(sample.op, sample.sizes, summary.outline.tensors)
    try:
        target, args, kwargs = local_form(sample.op, call, sample.sizes)
    except (ValueError, TypeError, KeyError, ZeroDivisionError):
        return None
    name = target_name(target)
    own = own_form((target, tuple(args), dict(kwargs)), Operand(len(key.operands)))
    if own is None:
        return OpRequest(name, key.operands, tuple(args), dict(kwargs), key.arguments)
    return OpRequest(name, key.operands, own[1], own[2], key.arguments, called=target_name(own[0]))

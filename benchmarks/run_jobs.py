"""Planning jobs for published runs in one process: each model is captured once, then moved between clusters and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from published_runs import Run
from shardwright.api import cluster_of
from shardwright.job import Clock, Job
from shardwright.passes.models import rebuild
from shardwright.planner.cluster import Cluster, default_limit_bytes
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan, Source
from shardwright.planner.precision import choose_precision
from shardwright.planner.prices import Prices
from shardwright.planner.rebatch import rebatch

UNBOUNDED = 1 << 50
"""A memory limit that nothing exceeds."""

CAPTURE_BATCH = 2
"""The batch of captures: the smallest with a batch dim to scale."""


@dataclass
class Jobs:
    """Jobs by question. Captures are kept for the model asked last, so ask in an order that keeps models together.

    `clock` adds up the seconds of all phases; `captures` counts.
    """

    memory_limit: int | str | None = None
    clock: Clock = field(default_factory=Clock)
    captures: int = 0
    _key: tuple[str, str] = ("", "")
    _base: Job | None = None

    def job(self, run: Run) -> Job:
        """The job of a run's model, cluster, batch and precision, without pins. Raises ShardwrightError."""
        cluster = whole_nodes(cluster_of(run.cluster, self.memory_limit), run.node_ranks)
        precision = choose_precision(cluster.device, recipe=run.precision)
        key = (run.model, precision.compute)
        if self._base is None or key != self._key:
            self._base, self._key = None, key  # an old capture may be large: let it go first
            self._base = self._captured(run)
        base = self._base
        source = Source("hf", run.id, run.batch, run.seq, config=dict(run.config))
        request = replace(
            base.request, source=source, precision=precision, memory_limit_bytes=default_limit_bytes(cluster)
        )
        prices = Prices(cluster, precision.compute)
        return replace(base, outline=rebatch(base.outline, run.batch), cluster=cluster, prices=prices, request=request)

    def _captured(self, run: Run) -> Job:
        self.captures += 1
        source = Source("hf", run.id, CAPTURE_BATCH, run.seq, config=dict(run.config))
        cluster = cluster_of(run.cluster)
        with self.clock.phase("load"):
            loaded = rebuild(source, device="meta")
        return Job.create(
            loaded.model, loaded.args, loaded.kwargs, cluster, parse_pins(()),
            choose_precision(cluster.device, recipe=run.precision), source, optimizer="adamw", objective="throughput",
            loss_fn=None, store=None, clock=self.clock,
        )  # fmt: skip


def whole_nodes(cluster: Cluster, node_ranks: int) -> Cluster:
    """A run on fewer devices than its node has, alone there: memory and disk are all its own; cores are bound in equal shares."""
    host = cluster.host
    if host is None or node_ranks <= cluster.per_node or cluster.devices > cluster.per_node:
        return cluster
    return replace(cluster, host=replace(host.scaled(node_ranks), ranks=cluster.per_node))


def solve(job: Job, pins: Sequence[str], limit_bytes: int | None = None) -> Plan:
    """The plan of a job under pins, with another memory limit if given; raises ShardwrightError (PinError, Infeasible, ...)."""
    limit = job.request.memory_limit_bytes if limit_bytes is None else limit_bytes
    return replace(job, request=replace(job.request, pins=parse_pins(pins), memory_limit_bytes=limit)).solve()


def one_thread() -> None:
    """Captures run small ops only; threads of torch would only get in the solver's way."""
    torch.set_num_threads(1)

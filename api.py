"""The road, and the public calls: `make_plan`, `apply_plan`, `auto_parallelize` (docs/road.md)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .planner.cluster import Cluster, default_limit_bytes
from .planner.outline import Outline
from .planner.pins import parse_pins
from .planner.plan import Plan, Source
from .planner.prices import Prices
from .planner.solve import Request, solve

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .passes.models import Loaded
    from .passes.summarize import Summary
    from .runtime.module import ParallelModule

Progress = Callable[[str], None]


@dataclass(frozen=True)
class PlanResult:
    """A plan, the seconds each phase of making it took, and the estimate shown before the search."""

    plan: Plan
    seconds: Mapping[str, float]
    estimate: Mapping[str, float]


@dataclass
class _Clock:
    """Seconds by phase; `phase` reports progress as it enters one."""

    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def make_plan(
    model: nn.Module, example_inputs: Any, cluster: Cluster | str, *, optimizer: str = "adamw",
    memory_limit: int | str | None = None, pins: Sequence[str] = (), objective: str = "throughput",
    loss_fn: Callable[..., Any] | None = None, seed: int = 0, progress: Progress | None = None,
) -> Plan:  # fmt: skip
    """Plan a live module (its parameters may be on meta) for a cluster; no device and no process group are needed.

    `example_inputs`: a dict of keyword inputs, a tuple of positional ones, or one tensor, at the global batch. Raises
    CaptureError, PinError, ClusterError, Infeasible (which carries the nearest settings that fit).
    """
    args, kwargs = split_inputs(example_inputs)
    clock = _Clock(progress)
    source = Source("module", type(model).__name__, _leading(args, kwargs), seed=seed)
    summary, precision = _outline(model, args, kwargs, cluster_of(cluster), pins, loss_fn, clock, own_dtype=True)
    job = _Job(summary, cluster_of(cluster), optimizer, memory_limit, pins, objective, source, precision)
    return job.solve(clock)


def plan_model(
    spec: str, cluster: Cluster | str, *, batch: int | str | None = None, seq: int | None = None, optimizer: str = "adamw",
    memory_limit: int | str | None = None, pins: Sequence[str] = (), objective: str = "throughput", seed: int = 0,
    progress: Progress | None = None, show: Callable[[Mapping[str, float]], None] | None = None,
) -> PlanResult:  # fmt: skip
    """Plan a model named on the command line (`hf:NAME`, `hf:config.json`, `file.py:function`).

    `batch` "auto" searches the batch with the best throughput that fits. `show` receives the estimate before the search.
    """
    from .passes.models import load

    clock, cluster = _Clock(progress), cluster_of(cluster)
    if batch == "auto":
        batch = _best_batch(spec, cluster, seq, optimizer, memory_limit, pins, objective, seed, clock)
    with clock.phase("load"):
        loaded = load(spec, batch=_batch(batch, cluster, pins), seq=seq, seed=seed, device="meta")
    job = _job(loaded, cluster, optimizer, memory_limit, pins, objective, clock)
    estimate = job.estimate()
    if show is not None:
        show(estimate)
    plan = job.solve(clock)
    return PlanResult(plan, clock.seconds, estimate)


def apply_plan(
    model: nn.Module, example_inputs: Any, plan: Plan, *, compile: bool = False, loss_fn: Callable[..., Any] | None = None,
    device: torch.device | str | None = None, data: str = "global",
) -> ParallelModule:  # fmt: skip
    """Rewrite `model` to `plan` on this rank; every rank calls it with the same model and plan.

    `data`: "global" when every rank passes the whole batch, "local" when each data-parallel rank passes its own part.
    Raises PlanMismatch when plan and model differ, LaunchError when the world size does.
    """
    from .runtime.apply import apply

    args, kwargs = split_inputs(example_inputs)
    return apply(model, args, kwargs, plan, compile=compile, loss_fn=loss_fn, device=device, data=data)


def auto_parallelize(
    model: nn.Module, example_inputs: Any, *, cluster: Cluster | str | None = None, loss_fn: Callable[..., Any] | None = None,
    plan: Plan | str | Path | None = None, optimizer: str = "adamw", memory_limit: int | str | None = None,
    pins: Sequence[str] = (), compile: bool = False, data: str = "global",
) -> ParallelModule:  # fmt: skip
    """Plan and apply in one call: `model = auto_parallelize(model, batch)`; the training loop stays as it is.

    Started by torchrun it uses all ranks, alone one device. Rank 0 plans (or loads `plan`) and broadcasts. Without `cluster`
    the plan is for this machine's devices, as many as there are ranks.
    """
    from .runtime.apply import agree, default_device
    from .runtime.mesh import ensure_process_group, world_size

    ensure_process_group(default_device())

    def decide() -> Plan:
        from .planner.planfile import load_plan

        if isinstance(plan, Plan):
            return plan
        if plan is not None:
            return load_plan(Path(plan))
        where = cluster if cluster is not None else f"local:{world_size()}"
        return make_plan(
            model, example_inputs, where, optimizer=optimizer, memory_limit=memory_limit, pins=pins, loss_fn=loss_fn
        )

    return apply_plan(model, example_inputs, agree(decide), compile=compile, loss_fn=loss_fn, data=data)


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of example inputs given as a mapping, a tuple or list, or one tensor."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def cluster_of(cluster: Cluster | str) -> Cluster:
    """A cluster given as such, as a preset (`h100-sxm:8x4`), a TOML file, or `local:N`."""
    if isinstance(cluster, Cluster):
        return cluster
    from .profiles.devices import parse_cluster

    return parse_cluster(cluster)

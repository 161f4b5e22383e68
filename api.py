"""The road, and the public calls: `make_plan`, `apply_plan`, `auto_parallelize` (docs/road.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PinError, UsageError
from .job import Clock, Job, Say
from .planner.capability import check_pins
from .planner.cluster import Cluster
from .planner.goal import Aim
from .planner.pins import Pins, parse_pins
from .planner.plan import Plan, Precision, Source
from .planner.precision import choose_precision, inference_precision, model_precision
from .planner.pursue import settled
from .planner.sparse import UpdateSet

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .runtime.module import ParallelModule


@dataclass(frozen=True)
class PlanResult:
    """A plan, the seconds each phase of making it took, and the estimate shown before the search."""

    plan: Plan
    seconds: Mapping[str, float]
    estimate: Mapping[str, float]


def make_plan(
    model: nn.Module, example_inputs: Any, cluster: Cluster | str, *, optimizer: str = "adamw",
    memory_limit: int | str | None = None, pins: Sequence[str] = (), objective: str = "throughput",
    loss_fn: Callable[..., Any] | None = None, seed: int = 0, store: Path | None = None, say: Say | None = None,
    runnable: bool = True, aim: Aim | None = None,
) -> Plan:  # fmt: skip
    """Plan a live module (its parameters may be on meta) for a cluster; no device and no process group are needed.

    With `runnable` (the default) the plan is one that `apply_plan` executes; without, the whole space is searched: pipelines,
    recompute, offload, context and expert parallelism too. `objective` is "throughput", or with `runnable` off one of
    "latency", "memory", "devices" and "cost"; `aim` (planner/goal.py) holds what comes with it: a phase of inference, a target,
    a price, and whether a frontier is wanted.

    `example_inputs`: a dict of keyword inputs, a tuple of positional ones, or one tensor, at the global batch. `store` is
    the profile store that measurements of this machine are kept in. Raises CaptureError, PinError, ClusterError, or
    Infeasible, which carries the nearest settings that fit.
    """
    aim = settled(objective, aim or Aim(), runnable=runnable)
    args, kwargs = split_inputs(example_inputs)
    parsed, where = parse_pins(pins), cluster_of(cluster, memory_limit, store)
    precision = _precision(model, parsed, where)
    source = Source("module", type(model).__name__, _leading(args, kwargs), seed=seed)
    job = Job.create(
        model, args, kwargs, where, parsed, precision, source, optimizer=optimizer, objective=objective, loss_fn=loss_fn,
        store=store, clock=Clock(say), runnable=runnable, aim=aim,
    )  # fmt: skip
    return job.solve()


def plan_model(
    spec: str, cluster: Cluster | str, *, batch: int | str | None = None, seq: int | None = None,
    optimizer: str = "adamw", memory_limit: int | str | None = None, pins: Sequence[str] = (),
    objective: str = "throughput", seed: int = 0, store: Path | None = None, say: Say | None = None,
    show: Callable[[Mapping[str, float]], None] | None = None, aim: Aim | None = None,
) -> PlanResult:  # fmt: skip
    """Plan a model named on the command line (`hf:NAME`, `hf:config.json`, `file.py:function`).

    For this machine (`local`, `local-cpu`) the plan is one that it can run; for any other cluster the whole space is searched.
    `batch` "auto" takes the batch with the best throughput that fits. `show` receives the estimate before the search. `objective`
    and `aim` are those of `make_plan`; inference is planned in the compute dtype alone unless a precision is pinned.
    """
    from .passes.models import load_model

    clock, parsed = Clock(say), parse_pins(pins)
    runnable = (cluster if isinstance(cluster, str) else cluster.spec).startswith("local")
    aim = settled(objective, aim or Aim(), runnable=runnable)
    if batch == "auto" and objective != "throughput":
        raise UsageError(f"batch=auto seeks throughput; give a batch for objective={objective}")
    if runnable:
        check_pins(parsed)
    where = cluster_of(cluster, memory_limit, store)
    precision = choose_precision(where.device, recipe=parsed.precision, dtype=parsed.dtype)
    if aim.phase:
        precision = inference_precision(precision, parsed.precision)

    def job_at(size: int) -> Job:
        with clock.phase("load"):
            loaded = load_model(spec, batch=size, seq=seq, seed=seed, device="meta")
        return Job.create(
            loaded.model, loaded.args, loaded.kwargs, where, parsed, precision, loaded.source, optimizer=optimizer,
            objective=objective, loss_fn=None, store=store, clock=clock, runnable=runnable, aim=aim,
        )  # fmt: skip

    default = data_ranks(parsed, where)
    if batch == "auto":
        trial = job_at(2 * default)  # a batch of one has no batch dim to scale
        with clock.phase("batch"):
            batch = trial.best_batch(default)
    job = job_at(default if batch is None else int(batch))
    estimate = job.estimate()
    if show is not None:
        show(estimate)
    plan = job.solve()
    return PlanResult(plan, clock.seconds, estimate)


def choose_update(
    model: nn.Module, example_inputs: Any, budget_bytes: int | str, *, contribution: Mapping[str, float] | None = None,
    optimizer: str = "adamw", loss_fn: Callable[..., Any] | None = None, cluster: Cluster | str = "local-cpu:1",
    pins: Sequence[str] = ("recompute=none",), store: Path | None = None, say: Say | None = None,
) -> UpdateSet:  # fmt: skip
    """Which parameters to fine-tune where memory does not allow for all: those worth most whose step fits `budget_bytes`.

    `contribution` says what updating each parameter is worth, by name; what is not named stays frozen. Without it, that is how
    much a small step along its gradient lowers the loss of `example_inputs`, which takes a whole backward pass here.
    `chosen.apply(model)` freezes the others; plan the model after that. Peaks are those of plans for `cluster` under `pins`. The
    source is Lin et al. 2022 (planner/sparse.py). Raises Infeasible where no update fits, and what `make_plan` raises.
    """
    from .passes.sparse_update import choose_parameters, squared_gradients
    from .profiles.devices import parse_bytes
    from .runtime.losses import loss_of

    args, kwargs = split_inputs(example_inputs)
    where = cluster_of(cluster, store=store)

    def plan() -> Plan:
        return make_plan(
            model, example_inputs, where, optimizer=optimizer, pins=pins, loss_fn=loss_fn, store=store, say=say
        )

    worth = squared_gradients(model, args, kwargs, loss_fn or loss_of) if contribution is None else contribution
    return choose_parameters(model, args, kwargs, parse_bytes(budget_bytes), plan, worth, loss_fn)


def data_ranks(pins: Pins, cluster: Cluster) -> int:
    """Number of data-parallel ranks the pins leave: the default batch."""
    if pins.dp is not None:
        return pins.dp
    inner = (pins.tp or 1) * (pins.pp or 1) * (pins.cp or 1)
    if cluster.devices % inner:
        told = " ".join(f"{k}={getattr(pins, k)}" for k in ("tp", "pp", "cp") if getattr(pins, k) is not None)
        raise PinError(f"{told} does not divide the {cluster.devices} devices")
    return cluster.devices // inner


def apply_plan(
    model: nn.Module, example_inputs: Any, plan: Plan, *, compile: bool = False, loss_fn: Callable[..., Any] | None = None,
    device: torch.device | str | None = None, data: str = "global", offload_folder: Path | None = None,
) -> ParallelModule:  # fmt: skip
    """Rewrite `model` to `plan` on this rank; every rank calls it with the same model and plan.

    `data`: "global" when every rank passes the whole batch, "local" when each data-parallel rank passes its own part.
    `offload_folder`: where states go that the plan keeps on disk (default: the system's temporary folder).
    Raises PlanMismatch when plan and model differ, LaunchError when the world size does.
    """
    from .runtime.apply import apply

    args, kwargs = split_inputs(example_inputs)
    return apply(
        model, args, kwargs, plan, compile=compile, loss_fn=loss_fn, device=device, data=data,
        offload_folder=offload_folder,
    )  # fmt: skip


def auto_parallelize(
    model: nn.Module, example_inputs: Any, *, cluster: Cluster | str | None = None, loss_fn: Callable[..., Any] | None = None,
    plan: Plan | str | Path | None = None, optimizer: str = "adamw", memory_limit: int | str | None = None,
    pins: Sequence[str] = (), compile: bool = False, data: str = "global", elastic: bool = False, timeout: float = 600.0,
) -> ParallelModule:  # fmt: skip
    """Plan and apply in one call: `model = auto_parallelize(model, batch)`; the training loop stays as it is.

    Started by torchrun it uses all ranks, alone one device. Rank 0 plans (or loads `plan`) and broadcasts. Without `cluster`
    the plan is for this machine's devices, as many as there are ranks. With `elastic` a `plan` for another number of ranks is made
    again for those that run. A rank that is lost for `timeout` seconds is named by RankFailure (docs/running.md).
    """
    from .runtime.apply import agree, default_device
    from .runtime.mesh import ensure_process_group, world_size

    ensure_process_group(default_device(), timeout)

    def decide() -> Plan:
        from .planner.planfile import load_plan
        from .runtime.elastic import plan_for_world

        if plan is not None:
            given = plan if isinstance(plan, Plan) else load_plan(Path(plan))
            if not elastic or given.ranks == world_size():
                return given
            return plan_for_world(given, world_size(), model, *split_inputs(example_inputs), loss_fn)
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


def cluster_of(cluster: Cluster | str, memory_limit: int | str | None = None, store: Path | None = None) -> Cluster:
    """A cluster given as such, as a preset (`h100-sxm:8x4`), a TOML file, or `local:N`; with a memory limit per device."""
    from .profiles.devices import parse_bytes, parse_cluster

    if isinstance(cluster, Cluster):
        return cluster if memory_limit is None else replace(cluster, limit_bytes=parse_bytes(memory_limit))
    return parse_cluster(cluster, memory_limit, cache=store)


def _precision(model: nn.Module, pins: Pins, cluster: Cluster) -> Precision:
    """What is pinned, or that of the model's parameters."""
    if pins.dtype is None and pins.precision is None:
        dtype = next((p.dtype for p in model.parameters()), "torch.float32")
        return model_precision(str(dtype).removeprefix("torch."))
    return choose_precision(cluster.device, recipe=pins.precision, dtype=pins.dtype)


def _leading(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The batch of example inputs: dim 0 of the first tensor that has one."""
    for value in (*args, *kwargs.values()):
        shape = getattr(value, "shape", ())
        if len(shape):
            return int(shape[0])
    raise UsageError("the example inputs hold no tensor with a batch dim")

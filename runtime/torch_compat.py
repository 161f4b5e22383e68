"""Private torch interfaces the runtime relies on, each with its reason; tried with torch 2.13."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch._functorch.config
from torch import Tensor
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch.autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard
from torch.multiprocessing.reductions import StorageWeakRef as StorageRef

from ..errors import UsageError

__all__ = [
    "Event",
    "StageGradient",
    "StorageRef",
    "allocation_events",
    "compiled",
    "is_strided",
    "like_dtensor",
    "make_dtensor",
    "profile_of_threads",
    "store_of_group",
    "strided_split",
    "uses",
    "when_backward_ends",
]
T = TypeVar("T")

# StorageRef: weak reference to a storage; it keeps the address (`cdata`) from being reused, which a data pointer does not.


@dataclass(frozen=True)
class Event:
    """`kind` is "begin" of the op `name`, "end" of the same `op`, or "memory": `bytes` were allocated (negative: freed).

    The end of what gloo's thread began can be reported on the calling thread, so that ends do not nest.
    """

    kind: str
    op: int
    name: str
    microseconds: float
    bytes: int


def profile_of_threads() -> torch.profiler.profile:
    """A profile of all threads: copies behind the device run on one that began before it, which no public option includes."""
    return torch.profiler.profile(experimental_config=_ExperimentalConfig(profile_all_threads=True))


def uses(x: Tensor) -> int:
    """Owners of a tensor, in Python or not; no public call counts them. 0 where torch does not tell (tried: 2.13 does)."""
    count = getattr(x, "_use_count", None)
    return count() if count is not None else 0


def when_backward_ends(callback: Callable[[], None]) -> bool:
    """Call `callback` when the running backward pass ends; False outside a backward pass.

    The engine's callback queue is the only signal that a backward pass, whoever started it, has ended.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    torch.autograd.Variable._execution_engine.queue_callback(callback)
    return True


def store_of_group() -> Any:
    """A connection of its own to the store of the default process group: one connection serves one call at a time.

    A group does not hand its store out; under torchrun it is the agent's, which outlives the ranks.
    """
    return _get_default_store().clone()


def compiled(body: torch.fx.GraphModule, *, tagged: bool, made_by: str = "") -> Callable[..., Any]:
    """`body` through torch.compile; `tagged` where its nodes carry recompute tags, `made_by` tells apart who defines its ops.

    The cache of AOTAutograd leaves the meta of nodes out of its keys, so that a graph with tags would be answered with one
    that was compiled without, and so would one whose composite ops do something else by now: their names are in the key, what
    they are made of is not (tried: 2.13). With tags it is off while a graph runs, the first run of which compiles; without them
    the key carries `made_by`.
    """
    made: Callable[..., Any] = torch.compile(body, fullgraph=True, dynamic=False)
    config = torch.compiler.config

    def run(*args: Any) -> Any:
        if tagged:
            with torch._functorch.config.patch(enable_autograd_cache=False):
                return made(*args)
        with config.patch(cache_key_tag=f"{config.cache_key_tag}{made_by}"):
            return made(*args)

    return run


def make_dtensor(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: torch.Size) -> DTensor:
    """A DTensor of global `shape` from this rank's slice, its placements read left to right over the mesh.

    `DTensor.from_local` reads a strided split followed by a split of the same dim as the order of two plain splits ("shard
    order"); full_tensor() then raises, or kills gloo for uneven chunks. The spec's flag turns that reading off.
    """
    stride = torch.empty(shape, device="meta").stride()
    meta = TensorMeta(shape, stride, local.dtype)
    spec = DTensorSpec(mesh, tuple(placements), meta, use_strided_shard_as_shard_order=False)
    return Stored(local, spec, requires_grad=local.requires_grad)


def like_dtensor(local: Tensor, other: DTensor) -> DTensor:
    """A DTensor with the spec of `other` (its flags included, unlike the gradient that `DTensor.to_local` makes)."""
    return Stored(local, other._spec, requires_grad=local.requires_grad)


class Stored(DTensor):
    """A DTensor whose element-wise ops with others placed alike go straight to this rank's slices, and so do fused optimizers.

    An optimizer's step is a dozen such ops for each parameter, and fitting placements to each of them takes several times as
    long as the op does on a small slice (tried: 2.13, AdamW 180 us a parameter, 100 us like this, 40 us on plain tensors). Never
    holds partial sums, over which not every such op is right.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing, as in DTensor, whose own passes the compiler's guard against being traced."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in FUSED_STEPS and (lists := _step_slices(args)) is not None:
            _step(func, lists, kwargs or {})
            torch.autograd.graph.increment_version(
                [*args[0], *lists[0]]
            )  # the kernels do not count a change (tried: 2.13)
            return None
        kind = _kind(func)
        local = _slices(args, kwargs) if kind else None
        if local is None:
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        result = func(*local, **kwargs) if kwargs else func(*local)
        if kind == "in place":
            return args[0]
        if (kind == "copy" and _layout(result) != _layout(local[0])) or result.dtype != local[0].dtype:
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        return Stored(result, args[0]._spec, requires_grad=False)


_COPIES = frozenset({torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.zeros_like.default})


@functools.cache
def _kind(func: Any) -> str:
    """ "in place" or "new" for ops that compute each element from the same element of their operands, and draw nothing; "copy";
    else nothing."""
    if func in _COPIES:
        return "copy"
    results = func._schema.returns
    if torch.Tag.pointwise not in func.tags or torch.Tag.nondeterministic_seeded in func.tags or len(results) != 1:
        return ""
    return "in place" if func._schema.is_mutable else "new"


def _slices(args: Sequence[Any], kwargs: Any) -> list[Any] | None:
    """The operands with slices for DTensors; None where one is a plain tensor or placed otherwise than the first."""
    spec = args[0]._spec if isinstance(args[0], DTensor) else None
    found = []
    for x in args:
        if isinstance(x, DTensor):
            if x._spec is not spec and x._spec != spec:
                return None
            found.append(x._local_tensor)
        elif isinstance(x, Tensor | list | tuple):
            return None
        else:
            found.append(x)
    return None if kwargs and any(isinstance(v, Tensor) for v in kwargs.values()) else found


FUSED_STEPS = frozenset(f"aten::_fused_{name}_" for name in ("adam", "adamw", "sgd", "adagrad"))
"""Optimizer steps as one kernel; DTensor itself has no rule for the last two (tried: 2.13)."""


def _step_slices(lists: Sequence[Sequence[Tensor]]) -> list[list[Tensor]] | None:
    """Slices of the lists an optimizer's kernel takes, parameters first; None where a state is placed otherwise than its
    parameter. Step counts are plain 0-dim tensors."""
    found = []
    for each in lists:
        for x, parameter in zip(each, lists[0], strict=False):
            if not x.dim() and not isinstance(x, DTensor):
                continue
            if isinstance(x, DTensor) != isinstance(parameter, DTensor):
                return None
            if isinstance(x, DTensor) and (x.device_mesh, x.placements) != (
                parameter.device_mesh,
                parameter.placements,
            ):
                return None
        found.append([x._local_tensor if isinstance(x, DTensor) else x for x in each])
    return found


def _step(func: Any, lists: list[list[Tensor]], kwargs: Any) -> None:
    """Run an optimizer's kernel. It goes through memory without looking at strides: what lies otherwise than its parameter is
    copied for it, one parameter at a time."""
    odd = [
        i
        for i, p in enumerate(lists[0])
        if any(each and each[i].dim() and each[i].stride() != p.stride() for each in lists)
    ]
    even = [i for i in range(len(lists[0])) if i not in odd] if odd else range(len(lists[0]))
    if even:
        func(*([each[i] for i in even] if each else [] for each in lists), **kwargs)
    for i in odd:
        own = [each[i] for each in lists if each]
        like = [torch.empty_like(own[0]).copy_(x) if x.dim() and x.stride() != own[0].stride() else x for x in own]
        left = iter(like)
        func(*([next(left)] if each else [] for each in lists), **kwargs)
        for x, copy in zip(own, like, strict=True):
            if x is not copy:
                x.copy_(copy)


def _layout(x: Tensor) -> tuple[Any, ...]:
    """What a spec says of a tensor besides its placements, and where it lies."""
    return x.shape, x.stride(), x.dtype, x.device


class StageGradient(Stored):
    """A gradient of a run with a pipeline, where other ranks have other parameters: torch's clipping would see its own only.

    torch.nn.utils.clip_grad_norm_ has no hook, but computes norms by these two functions, which nothing here calls on DTensors.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.linalg.vector_norm, torch._foreach_norm):
            raise UsageError(
                "this rank holds a part of the model's gradients (the plan has pipeline stages), so their norm is not the global "
                "one: clip with pm.clip_grad_norm_(max_norm) of the module"
            )
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def mark(cls, parameter: Tensor) -> None:
        """Make the gradient of a parameter one of these, as soon as it has come (autograd keeps plain DTensors)."""

        def wrap(p: Tensor) -> None:
            if isinstance(p.grad, DTensor) and not isinstance(p.grad, cls):
                p.grad = cls(p.grad.to_local(), p.grad._spec, requires_grad=False)

        if isinstance(parameter, DTensor) and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(wrap)


def strided_split(dim: int, outer: int) -> Placement:
    """The split of a dim's minor factor: the dim viewed as (outer, ranks, inner), split in the middle."""
    return _StridedShard(dim, split_factor=outer)


def is_strided(placement: Placement) -> bool:
    """Whether a placement is a `strided_split`."""
    return isinstance(placement, _StridedShard)


def allocation_events(function: Callable[[], T]) -> tuple[T, list[list[Event]]]:
    """Run `function`; returns its result and what the CPU allocator and the ops did meanwhile, in order, by thread.

    The legacy profiler reports every allocation of the CPU allocator, compiled code's included, also those of gloo's threads
    (which inherit it), and prints nothing, unlike the kineto one. Memory that was allocated before any profiling is not
    reported when it is freed.
    """
    config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    _enable_profiler_legacy(config)
    try:
        with torch.autograd.profiler.record_function("start"):
            result = function()
    finally:
        threads = _disable_profiler_legacy()
    start = next(e for thread in threads for e in thread if e.kind() == "push")
    return result, [[_event(start, e) for e in thread if e.kind() in KINDS] for thread in threads]


KINDS = {"push": "begin", "pop": "end", "memory_alloc": "memory"}


def _event(start: Any, e: Any) -> Event:
    return Event(KINDS[e.kind()], e.handle(), e.name(), start.cpu_elapsed_us(e), e.cpu_memory_usage())

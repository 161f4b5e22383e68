"""Measured memory: the peak of a call from allocator events, bytes alive at rest, and an enforced byte budget.

The peak is exact for eager and compiled code alike. On a CPU it is summed up from the allocator's own events, on CUDA it is the
caching allocator's high-water mark.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ShardwrightError
from .allocations import LAUNCHED, WAITED, changes
from .collectives import Pending, observed
from .offload.memory import is_host, marked
from .torch_compat import StorageRef, allocation_events

T = TypeVar("T")


class MemoryExceeded(ShardwrightError):
    """A byte budget was exceeded while running."""

    exit_status = 1


@dataclass(frozen=True)
class Peak(Generic[T]):
    """Memory of one call, in bytes above what was alive when it began.

    `retained` is what is still alive when it ends (negative if it freed more than it kept); `timeline` has (seconds since the
    beginning, bytes) after every allocation and release (CPU only). `result` is what the call returned.
    """

    bytes: int
    retained: int
    result: T
    timeline: tuple[tuple[float, int], ...] = ()


def measure_peak(
    function: Callable[[], T], device: torch.device | None = None, *, steps_on_host: bool = False
) -> Peak[T]:  # fmt: skip
    """Call `function` and measure its peak memory on `device` (default CPU).

    Host memory behind a device that is itself a CPU never passes torch's allocator (runtime/offload/memory.py), so it is not seen.
    `steps_on_host`: what optimizers allocate while they step is the host's too.

    On a CPU, the release of a tensor that was allocated before any measured call is not seen: it counts as alive. Measure
    a steady state by measuring the call before it as well.
    """
    if device is not None and device.type == "cuda":
        return _measure_cuda(function, device)
    with observed(_Marks()):
        result, threads = allocation_events(function)
    timeline, alive, top = [], 0, 0
    for moment, size in changes(threads, "Optimizer.step#" if steps_on_host else None):
        alive += size
        top = max(top, alive)
        timeline.append((moment * 1e-6, alive))
    return Peak(top, alive, result, tuple(timeline))


class _Marks:
    """Ranges that tell collectives apart among the events of a profile."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[Pending, int] = weakref.WeakKeyDictionary()
        self._launched = 0

    def launching(self, pending: Pending) -> contextlib.AbstractContextManager[Any]:
        """Around a launch."""
        self._launched += 1
        self._numbers[pending] = self._launched
        return record_function(f"{LAUNCHED}{self._launched}")

    def waiting(self, pending: Pending) -> contextlib.AbstractContextManager[Any]:
        """Around the waits for all results of one; of one that was launched before, they are nobody's."""
        return record_function(f"{WAITED}{self._numbers.get(pending, 0)}")


def measure_step(step: Callable[[], T], *objects: Any, device: torch.device | None = None) -> Peak[T]:
    """Total peak of a training step: what `objects` (module, optimizer, batch) hold before it, and what it adds.

    Runs the step twice and reports the second run: the first one makes gradients and states whose release the second can see.
    """
    on_host = any(offloading is not None and offloading.steps_on_host for offloading in map(_offload_of, objects))
    measure_peak(step, device, steps_on_host=on_host)
    baseline = live_bytes(*objects)
    peak = measure_peak(step, device, steps_on_host=on_host)
    timeline = tuple((moment, baseline + size) for moment, size in peak.timeline)
    return Peak(baseline + peak.bytes, baseline + peak.retained, peak.result, timeline)


def _measure_cuda(function: Callable[[], T], device: torch.device) -> Peak[T]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    torch.cuda.synchronize(device)
    top, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    return Peak(top - before, after - before, result)


def storages(x: Tensor) -> list[torch.UntypedStorage]:
    """The memory behind a tensor; that of its parts for wrappers such as DTensor."""
    if hasattr(x, "__tensor_flatten__"):
        names, _ = x.__tensor_flatten__()
        parts = [getattr(x, name) for name in names]
        return [s for part in parts if isinstance(part, Tensor) for s in storages(part)]
    return [x.untyped_storage()] if x.layout == torch.strided else []


def live_bytes(*objects: Any) -> int:
    """Bytes on the device of all distinct storages in tensors, containers, modules (with gradients) and optimizers.

    What lies in host memory or on disk is left out; copies of it that a planned module keeps on the device are counted, and its
    graphs' constants.
    """
    sizes = {s._cdata: s.nbytes() for x in _tensors(objects) if not is_host(x) for s in storages(x)}
    return sum(sizes.values())


def _offload_of(item: Any) -> Any:
    """The offload of a planned module, None for anything else."""
    return item.offload if _planned(item) else None


def _planned(item: Any) -> bool:
    return isinstance(item, nn.Module) and hasattr(item, "plan")


def _tensors(objects: Iterable[Any]) -> Iterable[Tensor]:
    for item in tree_leaves(list(objects)):
        if isinstance(item, Tensor):
            yield item
            if item.is_leaf and item.grad is not None:
                yield item.grad
        elif isinstance(item, nn.Module):
            yield from _tensors([*item.parameters(), *item.buffers()])
            offload = _offload_of(item)
            yield from offload.copies() if offload is not None else ()
            yield from item.constants if _planned(item) else ()
        elif isinstance(item, torch.optim.Optimizer):
            yield from _tensors([g["params"] for g in item.param_groups])
            yield from _tensors([s for p, s in item.state.items() if not is_host(p)])


@dataclass
class Budget:
    """Raises MemoryExceeded as soon as tensors made inside the block hold more than `limit_bytes` with `baseline`.

    Counts the storages of every op's results until they are freed. An op on tensors in host memory runs in the host, and so lie
    its results. Eager only: a compiled function called inside the block runs eagerly. What kernels allocate and free inside one
    op is not seen.
    """

    limit_bytes: int
    baseline: int = 0
    peak: int = 0
    alive: int = 0
    _mode: _Count | None = field(default=None, repr=False)

    def __enter__(self) -> Budget:
        self._mode = _Count(self)
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._mode is not None
        self._mode.__exit__(kind, error, trace)
        self._mode = None


class _Count(TorchDispatchMode):
    """Weak references to the storages of all results; a recount after each one that is new."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget
        self.known: dict[int, tuple[StorageRef, int]] = {}
        self.total = budget.baseline

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = list(_tensors([args, kwargs]))
        before = {s._cdata for x in operands for s in storages(x)}
        result = func(*args, **(kwargs or {}))
        if any(x.dim() and is_host(x) for x in operands):
            for x in tree_leaves(result):
                if isinstance(x, Tensor) and not any(s._cdata in before for s in storages(x)):
                    marked(x)
            return result
        for x in tree_leaves(result):
            for storage in storages(x) if isinstance(x, Tensor) else ():
                if storage._cdata not in before and storage.device.type != "meta":  # a capture inside has no memory
                    self._note(storage, str(func))
        return result

    def _note(self, storage: torch.UntypedStorage, cause: str) -> None:
        entry = self.known.get(storage._cdata)
        if entry is not None and not entry[0].expired():
            return
        self.known[storage._cdata] = StorageRef(storage), storage.nbytes()
        self._recount()
        budget = self.budget
        budget.alive = self.total
        budget.peak = max(budget.peak, self.total)
        if self.total > budget.limit_bytes:
            raise MemoryExceeded(
                f"{self.total:,} bytes are alive (of them {budget.baseline:,} before this call); the budget is "
                f"{budget.limit_bytes:,} bytes, exceeded by the {storage.nbytes():,} bytes that {cause} made"
            )

    def _recount(self) -> None:
        self.known = {key: entry for key, entry in self.known.items() if not entry[0].expired()}
        self.total = self.budget.baseline + sum(size for _, size in self.known.values())

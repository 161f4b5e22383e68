"""Functional collectives as the runtime calls them, and the ledger that counts them.

Every collective is launched through `torch.ops._c10d_functional` and waited for at once: the ops return new tensors, are
visible to compilers, and run on gloo and NCCL alike. A `CommLedger` records the calls made while it is active. The code of
a compiled graph runs without these functions, so a ledger counts eager execution only (tracing is not recorded).
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from ..passes.torch_compat import is_tracing
from .torch_compat import uses
from .watch import active_watch, is_lost

c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Record:
    """One collective: its kind, the axis (or group) it ran on, bytes of the full tensor, "forward" or "backward"."""

    collective: str
    axis: str
    bytes: int
    phase: str


@dataclass
class CommLedger:
    """Counts the collectives run inside its `with` block, and in the backward of what ran forward inside it.

    `axes` maps group names to axis names for the records (`Mesh.axis_of_group()`). Eager execution only.
    """

    axes: Mapping[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    _tokens: list[contextvars.Token[CommLedger | None]] = field(default_factory=list, repr=False)

    def __enter__(self) -> CommLedger:
        self._tokens.append(_ledger.set(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _ledger.reset(self._tokens.pop())

    def counts(self, phase: str | None = None) -> dict[str, int]:
        """Number of calls by collective, of one phase or of both."""
        return dict(Counter(r.collective for r in self.records if phase in (None, r.phase)))

    def bytes(self, phase: str | None = None) -> dict[str, int]:
        """Full-tensor bytes by collective, of one phase or of both."""
        total: Counter[str] = Counter()
        for r in self.records:
            if phase in (None, r.phase):
                total[r.collective] += r.bytes
        return dict(total)

    def clear(self) -> None:
        self.records.clear()


_ledger: contextvars.ContextVar[CommLedger | None] = contextvars.ContextVar("shardwright_ledger", default=None)
_phase: contextvars.ContextVar[str] = contextvars.ContextVar("shardwright_phase", default="forward")


def active_ledger() -> CommLedger | None:
    """The ledger of the running `with` block; autograd functions keep it for their backward (it may run in a thread)."""
    return None if is_tracing() else _ledger.get()


@contextlib.contextmanager
def backward_phase(ledger: CommLedger | None) -> Iterator[None]:
    """Inside, collectives are recorded as backward, in `ledger` or else in the active one."""
    phase = _phase.set("backward")
    token = _ledger.set(ledger) if ledger is not None else None
    try:
        yield
    finally:
        if token is not None:
            _ledger.reset(token)
        _phase.reset(phase)


def record(collective: str, full: int, group: str) -> None:
    """Note one call with `full` bytes of full tensor in the active ledger, if any, and that this rank begins it."""
    if is_tracing():
        return
    watch = active_watch()
    if watch is not None:
        watch.enter(collective, group)
    ledger = active_ledger()
    if ledger is not None:
        ledger.records.append(Record(collective, ledger.axes.get(group, group), full, _phase.get()))


def release(x: Tensor) -> None:
    """Give a buffer's memory back now; nothing may read it any more.

    Autograd may hold it as an operand a while longer. Elsewhere than on a CPU the allocator frees in stream order, and
    tracing has nothing to free.
    """
    if x.device.type == "cpu" and not is_tracing():
        x.untyped_storage().resize_(0)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def finished(launch: Callable[[list[Tensor]], Sequence[Tensor]], operands: list[Tensor]) -> list[Tensor]:
    """Results of one collective, when nobody but the caller holds them or the operands.

    gloo's worker threads wake the waiting thread first and let go of operands and results after. An operand whose Python
    object has died by then needs the interpreter lock to be freed, and under load the worker then holds it and everything
    else the collective had for many ops. So the operands live until the workers have let go of them.
    """
    watched = [] if is_tracing() else [x for x in operands if x.device.type == "cpu"]
    before = [uses(x) for x in watched]
    results = _waited(launch, operands)
    for x, count in zip(watched, before, strict=True):
        for _ in range(_PATIENCE):
            if uses(x) <= count:
                break
            time.sleep(1e-5)
    return results


def _waited(launch: Callable[[list[Tensor]], Sequence[Tensor]], operands: list[Tensor]) -> list[Tensor]:
    """Launch a collective and wait for it; raises RankFailure where it fails for want of a rank."""
    watch = None if is_tracing() else active_watch()
    try:
        results = [c10d.wait_tensor(x) for x in launch(operands)]
    except RuntimeError as error:
        if watch is not None and is_lost(error):
            raise watch.failure(error) from error
        raise
    if watch is not None:
        watch.leave()
    return results


_PATIENCE = 1000
"""Looks at an operand that a worker thread still holds, some 60 us each."""


def all_reduce(x: Tensor, group: str, op: str = "sum") -> Tensor:
    """Reduction of x over the group, on every rank; a bool sum is "any"."""
    record("all_reduce", _bytes(x), group)
    return _numeric(lambda t: [c10d.all_reduce(t[0], op, group)], x)


def all_gather(x: Tensor, n: int, group: str) -> Tensor:
    """(n, *x.shape): x of every rank of the group, by rank."""
    record("all_gather", n * _bytes(x), group)
    flat = x.contiguous().reshape(1, *x.shape)
    return finished(lambda t: [c10d.all_gather_into_tensor(t[0], n, group)], [flat])[0]


def all_gather_each(shards: Sequence[Tensor], n: int, group: str) -> list[Tensor]:
    """For each shard the shards of all ranks joined on dim 0, by rank; one collective, each result in memory of its own."""
    record("all_gather", n * sum(_bytes(s) for s in shards), group)
    operands = [s.contiguous() for s in shards]
    return finished(lambda t: c10d.all_gather_into_tensor_coalesced(t, n, group), operands)


def reduce_scatter(x: Tensor, n: int, group: str) -> Tensor:
    """Sum over the group of x[i] on rank i, for x of shape (n, ...); a bool sum is "any"."""
    record("reduce_scatter", _bytes(x), group)
    return _numeric(lambda t: [c10d.reduce_scatter_tensor(t[0], "sum", n, group)], x)[0]


def _numeric(launch: Callable[[list[Tensor]], Sequence[Tensor]], x: Tensor) -> Tensor:
    """A reduction, of a bool tensor by way of counts."""
    if x.dtype == torch.bool:
        return finished(launch, [x.to(torch.int32)])[0].to(torch.bool)
    return finished(launch, [x.contiguous()])[0]


def all_to_all(x: Tensor, n: int, group: str) -> Tensor:
    """(n, ...): piece `own index` of x from every rank, by rank, for x of shape (n, ...)."""
    record("all_to_all", n * _bytes(x), group)
    ones = [1] * n
    return finished(lambda t: [c10d.all_to_all_single(t[0], ones, ones, group)], [x.contiguous()])[0]

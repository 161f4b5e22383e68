"""Functional collectives as the runtime calls them, and the ledger that counts them.

Every collective is launched through `torch.ops._c10d_functional`: the ops return new tensors, are visible to compilers, and run
on gloo and NCCL alike. `start_x` launches and returns a `Pending`, whose `wait()` has the results; `x` waits at once. Collectives
of one group complete in any order, but are launched in the same order on all its ranks. A `CommLedger` records the launches made
while it is active. The code of a compiled graph runs without these functions, so a ledger counts eager execution only (tracing
is not recorded).
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, Protocol

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


def phase() -> str:
    """What collectives are recorded as now: "forward" or "backward"."""
    return _phase.get()


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


def record(collective: str, full: int, group: str) -> int:
    """Note one call with `full` bytes of full tensor in the active ledger, if any, and that this rank begins it.

    Returns its number, which is the same on all ranks that make the same calls (0 where nobody watches).
    """
    if is_tracing():
        return 0
    watch, ledger = active_watch(), active_ledger()
    number = watch.enter(collective, group) if watch is not None else 0
    if ledger is not None:
        ledger.records.append(Record(collective, ledger.axes.get(group, group), full, _phase.get()))
    return number


def release(x: Tensor) -> None:
    """Give a buffer's memory back now; nothing may read it any more.

    Autograd may hold it as an operand a while longer. Elsewhere than on a CPU the allocator frees in stream order, and
    tracing has nothing to free.
    """
    if x.device.type == "cpu" and not is_tracing():
        x.untyped_storage().resize_(0)


Launch = Callable[[list[Tensor]], Sequence[Tensor]]
"""Operands -> results that are to be waited for (`_c10d_functional` ops)."""


class Pending:
    """A collective that was launched; nobody reads its results before `wait()`.

    gloo's worker threads wake the waiting thread first and let go of operands and results after. An operand whose Python
    object has died by then needs the interpreter lock to be freed, and under load the worker then holds it and everything
    else the collective had for many ops. So the operands live until the workers have let go of them. What a launch copied and
    nobody else holds is let go of at once.
    """

    def __init__(
        self, collective: str, full: int, group: str, launch: Launch, operands: list[Tensor], part_of: int | None = None
    ) -> None:  # fmt: skip
        """Launch it; raises RankFailure where that fails for want of a rank. `part_of`: the number of what was recorded as one."""
        self.collective, self.bytes, self.group = collective, full, group
        self._number = record(collective, full, group) if part_of is None else part_of
        traced = is_tracing()
        self._watch = None if traced else active_watch()
        if self._watch is not None and part_of is not None:
            self._watch.resume(part_of, collective, group)
        self._observer = None if traced else _observer.get()
        operands = operands if traced else [x.detach() for x in operands]  # views that others make of them do not count
        held = [] if traced else [(x, uses(x)) for x in operands if x.device.type == "cpu"]
        with self._observer.launching(self) if self._observer is not None else _NOTHING:
            try:
                self._results = list(launch(operands))
            except RuntimeError as error:
                self._failed(error)
        self._held = [(x, count) for x, count in held if uses(x) > count]
        self._elsewhere = [x for x in operands if x.device.type != "cpu"]
        if self._watch is not None:
            self._watch.leave()

    def wait(self) -> list[Tensor]:
        """The results, complete (on CUDA: in stream order); raises RankFailure where they do not come for want of a rank."""
        if self._watch is not None:
            self._watch.resume(self._number, self.collective, self.group)
        with self._observer.waiting(self) if self._observer is not None else _NOTHING:
            try:
                results = [c10d.wait_tensor(x) for x in self._results]
            except RuntimeError as error:
                self._failed(error)
        if self._watch is not None:
            self._watch.leave()
        if self._observer is not None:  # so that nothing is freed out of its sight
            self._held += [(x, 1) for x in results if x.device.type == "cpu"]
        if self._held:  # never while tracing: Dynamo knows no clock
            self._await_workers()
        self._held, self._elsewhere, self._results = [], [], []
        return results

    def _await_workers(self) -> None:
        until = time.monotonic() + (_PATIENCE_SECONDS if self._observer is None else _OBSERVED_PATIENCE_SECONDS)
        for x, count in self._held:
            while uses(x) > count and time.monotonic() < until:
                time.sleep(1e-5)

    def _failed(self, error: RuntimeError) -> NoReturn:
        if self._watch is not None and is_lost(error):
            raise self._watch.failure(error) from error
        raise error


_PATIENCE_SECONDS, _OBSERVED_PATIENCE_SECONDS = 0.06, 10.0
"""How long a wait looks after operands that a worker thread still holds: on a busy machine, where memory is measured, until it
has run again, since it would free them out of the measurement's sight."""


class Observer(Protocol):
    """Sees the collectives that are launched while it is the observer (`observed`)."""

    def launching(self, pending: Pending) -> contextlib.AbstractContextManager[Any]:
        """Around the launch."""

    def waiting(self, pending: Pending) -> contextlib.AbstractContextManager[Any]:
        """Around the wait for its results."""


_NOTHING = contextlib.nullcontext()
_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("shardwright_observer", default=None)


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, `observer` sees every collective."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


Arriving = Callable[[], Tensor]
"""Waits for a collective that was launched; returns its result."""


def all_reduce(x: Tensor, group: str, op: str = "sum") -> Tensor:
    """Reduction of x over the group, on every rank; a bool sum is "any"."""
    return start_all_reduce(x, group, op)()


def start_all_reduce(x: Tensor, group: str, op: str = "sum", *, own: bool = False) -> Arriving:
    """`all_reduce`, launched. `own`: nobody else reads x, and the result may take its place."""
    operand = _counted(x)
    own = (own or operand is not x) and not is_tracing()
    call = c10d.all_reduce_ if own else c10d.all_reduce
    pending = Pending("all_reduce", x.nbytes, group, lambda t: [call(t[0], op, group)], [operand])
    return _as(x.dtype, lambda: pending.wait()[0])


def all_gather(x: Tensor, n: int, group: str) -> Tensor:
    """(n, *x.shape): x of every rank of the group, by rank."""
    return start_all_gather(x, n, group)()


def start_all_gather(x: Tensor, n: int, group: str) -> Arriving:
    """`all_gather`, launched."""
    operands = [x.contiguous().reshape(1, *x.shape)]
    pending = Pending(
        "all_gather", n * x.nbytes, group, lambda t: [c10d.all_gather_into_tensor(t[0], n, group)], operands
    )
    return lambda: pending.wait()[0]


def start_all_gather_each(shards: Sequence[Tensor], n: int, group: str) -> Callable[[], list[Tensor]]:
    """For each shard the shards of all ranks joined on dim 0, by rank; one collective, each result in memory of its own."""
    full, operands = n * sum(s.nbytes for s in shards), [s.contiguous() for s in shards]
    return Pending(
        "all_gather", full, group, lambda t: c10d.all_gather_into_tensor_coalesced(t, n, group), operands
    ).wait


def reduce_scatter(x: Tensor, n: int, group: str) -> Tensor:
    """Sum over the group of x[i] on rank i, for x of shape (n, ...); a bool sum is "any"."""
    return start_reduce_scatter(x, n, group)()


def start_reduce_scatter(x: Tensor, n: int, group: str) -> Arriving:
    """`reduce_scatter`, launched."""
    operands = [_counted(x)]
    pending = Pending(
        "reduce_scatter", x.nbytes, group, lambda t: [c10d.reduce_scatter_tensor(t[0], "sum", n, group)], operands
    )
    return _as(x.dtype, lambda: pending.wait()[0][0])


def all_to_all(x: Tensor, n: int, group: str) -> Tensor:
    """(n, ...): piece `own index` of x from every rank, by rank, for x of shape (n, ...)."""
    return start_all_to_all(x, n, group)()


def start_all_to_all(x: Tensor, n: int, group: str) -> Arriving:
    """`all_to_all`, launched."""
    return start_exchange(x, [1] * n, [1] * n, n * x.nbytes, group)


def start_exchange(
    x: Tensor, sent: Sequence[int], received: Sequence[int], full: int, group: str, part_of: tuple[str, int] | None = None
) -> Arriving:  # fmt: skip
    """Rows of x to the ranks of the group, `sent[r]` to rank r, for `received[r]` rows of every rank r, by rank: launched.

    Recorded as an all-to-all of `full` bytes; one that is `part_of` a collective, its name and number, was recorded as that.
    """
    there, here, operands = list(received), list(sent), [x.contiguous()]
    name, number = part_of or ("all_to_all", None)
    pending = Pending(
        name, full, group, lambda t: [c10d.all_to_all_single(t[0], there, here, group)], operands, number
    )  # fmt: skip
    return lambda: pending.wait()[0]


def _counted(x: Tensor) -> Tensor:
    """What a reduction sums: a bool tensor by way of counts."""
    return x.to(torch.int32) if x.dtype == torch.bool else x.contiguous()


def _as(dtype: torch.dtype, arriving: Arriving) -> Arriving:
    return (lambda: arriving().to(torch.bool)) if dtype == torch.bool else arriving

"""Copies between the device and what lies behind it, beside compute: one lane in and one out.

On CUDA a lane is a side stream, on a CPU a worker thread. What a copy reads and writes is allocated and freed by the thread that
asks for it, so that memory is accounted where compute runs. Every byte is counted by class (docs/offload.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ...planner.away import PENDING
from ...planner.offload import Traffic

T = TypeVar("T")


@dataclass
class Copy:
    """A copy on its way; `wait` returns the target, ready for whoever reads it next on this thread.

    `ends` are source and target as the worker reaches them, emptied here: a tensor that the worker let go of last would be
    freed out of sight of what watches this thread's memory.
    """

    target: Tensor
    ends: list[Tensor]
    done: Future[object] | torch.cuda.Event

    def wait(self) -> Tensor:
        """Let compute wait for it (a GPU's queue, without stopping this thread)."""
        if isinstance(self.done, Future):
            self.done.result()
        else:
            torch.cuda.current_stream().wait_event(self.done)
        self.ends.clear()
        return self.target

    def ended(self) -> None:
        """Wait on this thread, whichever it is: host memory that was written may then be read here."""
        if isinstance(self.done, Future):
            self.done.result()
        else:
            self.done.synchronize()

    def arrived(self) -> Tensor:
        """The same on the thread that asked for the copy, which then lets go of both ends."""
        self.ended()
        self.ends.clear()
        return self.target


@dataclass
class Lanes:
    """The lanes of one rank. `moved` are bytes by class since the beginning."""

    device: torch.device
    moved: dict[str, Traffic] = field(default_factory=dict)
    _workers: dict[str, ThreadPoolExecutor] = field(default_factory=dict)
    _streams: dict[str, torch.cuda.Stream] = field(default_factory=dict)
    _leaving: deque[Copy] = field(default_factory=deque)

    def into(self, source: Tensor, target: Tensor, what: str) -> Copy:
        """Host memory to the device."""
        self.count(what, Traffic(in_bytes=target.nbytes, copies=1))
        return self._start("in", source, target)

    def out(self, source: Tensor, target: Tensor, what: str, *, bounded: bool = True) -> Copy:
        """The device to host memory. Of those that are `bounded` at most `PENDING` sources wait for their copy to end."""
        self.count(what, Traffic(out_bytes=target.nbytes, copies=1))
        made = self._start("out", source, target)
        if not bounded:
            return made
        self._leaving.append(made)
        while len(self._leaving) > PENDING:
            self._leaving.popleft().arrived()
        return made

    def settle(self) -> None:
        """Wait until all that leaves has left."""
        while self._leaving:
            self._leaving.popleft().arrived()

    def count(self, what: str, traffic: Traffic) -> None:
        """Note bytes of a class."""
        self.moved[what] = self.moved.get(what, Traffic()) + traffic

    def run(self, lane: str, action: Callable[[], T]) -> Future[T]:
        """Something for the worker of a lane."""
        if lane not in self._workers:
            self._workers[lane] = ThreadPoolExecutor(1, thread_name_prefix=f"offload-{lane}")
        return self._workers[lane].submit(action)

    def close(self) -> None:
        """End the workers."""
        self.settle()
        for worker in self._workers.values():
            worker.shutdown()
        self._workers.clear()

    def _start(self, lane: str, source: Tensor, target: Tensor) -> Copy:
        source, target = source.detach(), target.detach()
        ends = [source, target]
        if self.device.type != "cuda":
            return Copy(target, ends, self.run(lane, lambda: _copy(lane, ends)))
        stream = self._streams.setdefault(lane, torch.cuda.Stream(self.device))
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        (source if source.is_cuda else target).record_stream(stream)
        return Copy(target, ends, event)


def _copy(lane: str, ends: list[Tensor]) -> None:
    with torch.profiler.record_function(f"offload {lane}"):
        ends[1].copy_(ends[0])

"""Where a measurement runs: ranks started on this machine, or the ranks of the torchrun that this process is one of."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..errors import ClusterError
from .devices import LOCAL
from .jobs import run_ranks
from .local import cores, device_name, machine_key, threads_per_rank
from .progress import Row, untold
from .tasks import run_tasks

Heard = Callable[[list[Row]], None]
JOIN_SECONDS = 600.0


class Place(Protocol):
    """Ranks that measure. `key` is what their figures are filed under, `unusable` the tasks that mean nothing there.

    `leads`: this process decides what is measured; others `serve` until it dismisses them.
    """

    key: str
    ranks: int
    unusable: frozenset[str]
    leads: bool

    def run(self, tasks: Sequence[str], *, heard: Heard, timeout: float, **details: Any) -> dict[str, Any]: ...

    def serve(self) -> None: ...

    def dismiss(self) -> None: ...


def place_of(spec: str) -> Place:
    """The place a cluster string means here. Raises ClusterError for a cluster that is not this machine, without torchrun."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" in os.environ and world > 1:
        return Torchrun.join()
    found = LOCAL.fullmatch(spec)
    if found is None:
        raise ClusterError(
            f"cluster {spec!r} is not here: profile local[:N] or local-cpu:N, or start one process a device by torchrun"
        )
    count = int(found[2]) if found[2] else None
    gpu = found[1] == "local" and torch.cuda.is_available()
    present = torch.cuda.device_count() if gpu else min(8, cores())
    ranks = count or present
    if gpu and ranks > present:
        raise ClusterError(f"cluster {spec!r}: torch sees {present} GPUs; use local:{present} or local-cpu:{ranks}")
    return Started(ranks, gpu)


@dataclass
class Started:
    """Fresh processes on this machine for every job."""

    ranks: int
    gpu: bool = False
    leads: bool = True
    key: str = field(init=False)
    unusable: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.key = device_name(torch.device("cuda", 0), self.ranks) if self.gpu else machine_key(self.ranks)
        self.unusable = useless(self.gpu, self.ranks)

    def run(self, tasks: Sequence[str], *, heard: Heard, timeout: float, **details: Any) -> dict[str, Any]:
        """Results by task. Raises LaunchError when a rank fails."""
        threads = threads_per_rank(self.ranks)
        return run_ranks(self.ranks, threads, tasks, timeout=timeout, heard=heard, gpu=self.gpu, **details)

    def serve(self) -> None:
        """Nobody else is there."""

    def dismiss(self) -> None:
        """Nobody else is there."""


@dataclass
class Torchrun:
    """All ranks of a torchrun, this process among them; rank 0 leads."""

    ranks: int
    leads: bool
    gpu: bool
    made: bool
    key: str = field(init=False)
    unusable: frozenset[str] = field(init=False)

    @classmethod
    def join(cls) -> Torchrun:
        """Join the process group that torchrun describes, unless the process has one."""
        gpu, made = torch.cuda.is_available(), False
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if not dist.is_initialized():
            made = True
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=JOIN_SECONDS))
        return cls(dist.get_world_size(), dist.get_rank() == 0, gpu, made)

    def __post_init__(self) -> None:
        on = torch.device("cuda", torch.cuda.current_device()) if self.gpu else torch.device("cpu")
        self.key = device_name(on, self.ranks)
        self.unusable = useless(self.gpu, self.ranks)

    def run(self, tasks: Sequence[str], *, heard: Heard, timeout: float, **details: Any) -> dict[str, Any]:
        """Results by task, on the leading rank. A rank that hangs is ended by the process group's own timeout."""
        job = {"tasks": list(tasks), **details}
        dist.broadcast_object_list([job], 0)
        return run_tasks(job, lambda kind, key, value: heard([(kind, key, value)]))

    def serve(self) -> None:
        """Take part in what rank 0 measures, until it is done."""
        while True:
            box: list[Any] = [None]
            dist.broadcast_object_list(box, 0)
            if box[0] is None:
                break
            run_tasks(box[0], untold)
        self._leave()

    def dismiss(self) -> None:
        """Let the others go."""
        dist.broadcast_object_list([None], 0)
        self._leave()

    def _leave(self) -> None:
        if self.made:
            dist.destroy_process_group()


def useless(gpu: bool, ranks: int) -> frozenset[str]:
    """Tasks that mean nothing: a CPU's own figures on GPUs, links of one rank."""
    alone = {"collectives", "sends", "overlap"} if ranks == 1 else set()
    return frozenset(({"machine"} if gpu else set()) | alone)

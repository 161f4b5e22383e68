"""Messages between pipeline ranks: what crosses between two stages, tensor by tensor, between ranks of equal inner coordinate.

Sends are started and not waited for; the few in flight keep their tensors. All ranks follow one order of sends and receives
(planner/exchanges.py), so that nothing depends on tags, which NCCL has not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..passes.stages import Border
from . import collectives
from .mesh import Mesh
from .watch import waiting

IN_FLIGHT = 8
"""Sends that may be under way; their tensors live as long."""


@dataclass(frozen=True)
class Arriving:
    """Tensors that are being received."""

    tensors: tuple[Tensor, ...]
    works: tuple[dist.Work, ...]
    group: str = ""

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, once they are here."""
        with waiting("receive", self.group):
            for work in self.works:
                work.wait()
        return self.tensors


class Link:
    """This rank's connection to the other pipeline ranks of its coordinate."""

    def __init__(self, mesh: Mesh) -> None:
        assert mesh.pipeline_mesh is not None
        self.device = mesh.device
        self.group = mesh.pipeline_mesh.get_group("pp")
        self.peers = [int(r) for r in mesh.ranks[(slice(None), *mesh.coordinate)].reshape(-1)]
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, tensors: Sequence[Tensor], to: int) -> None:
        """Start sending to pipeline rank `to`."""
        for x in tensors:
            if x.numel() == 0:
                continue
            self._sent(IN_FLIGHT - 1)
            x = x.detach().contiguous()
            collectives.record("send", x.nbytes, self.group.group_name)
            work = dist.isend(x, self.peers[to], group=self.group)
            assert work is not None
            self._sending.append((work, x))

    def receive(self, borders: Sequence[Border], source: int) -> Arriving:
        """Start receiving tensors like `borders` from pipeline rank `source`."""
        tensors = tuple(torch.empty(b.shape, dtype=b.dtype, device=self.device) for b in borders)
        works = [dist.irecv(x, self.peers[source], group=self.group) for x in tensors if x.numel()]
        return Arriving(tensors, tuple(w for w in works if w is not None), self.group.group_name)

    def finish(self) -> None:
        """Wait for everything that is still being sent."""
        self._sent(0)

    def _sent(self, left: int) -> None:
        """Wait until at most so many sends are under way."""
        with waiting("send", self.group.group_name):
            while len(self._sending) > left:
                self._sending.popleft()[0].wait()

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """x of pipeline rank `source`, on all of them (in place)."""
        collectives.record("broadcast", x.nbytes, self.group.group_name)
        with waiting("broadcast", self.group.group_name):
            dist.broadcast(x, self.peers[source], group=self.group)
        return x

"""Branches of an inference graph at once in threads of the host, where that is quicker than all threads inside every op.

Small ops do not get faster by the number of threads inside them: between two of them all threads wait for each other. A branch in a
thread of its own has nobody to wait for. Measured on two cores, two towers at batch 1, forward, against two threads in every op:
transformers of 16 to 77 positions 17 to 56 % quicker, convolutions of 56 x 56 8 %, and 19 % slower for an image tower beside a
text tower of a third of its work. So `EFFICIENCY` is what threads inside ops are taken to reach, and branches have to be even.

Threads are those of one process without other ranks, so no branch has collectives. Under gradients the branches run in turn, as the
backward pass of a CPU runs in one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx

from ..passes.beside import run_beside
from ..planner.branchcosts import Branch, loads, place
from ..planner.branches import ForkJoin, fork_joins
from ..planner.cluster import Cluster
from ..planner.outline import Outline
from ..planner.plan import Plan
from ..planner.prices import Prices
from .mesh import Mesh

EFFICIENCY = 0.8
"""Speed-up that threads inside ops reach, over their number: 0.42 to 0.81 in the runs above."""

OVERHEAD = 1e-4
"""Seconds of handing a branch to a thread and waiting for it."""


class Threads:
    """Threads that each run ops in one thread. `count` are the intra-op threads of the process, which they take the place of."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pool = ThreadPoolExecutor(count - 1, "branches", initializer=torch.set_num_threads, initargs=(1,))

    def all(self, lists: Sequence[Sequence[Any]]) -> None:
        """Call the functions of each list in turn, all lists at once; the first in this thread."""
        before, others = torch.get_num_threads(), [self.pool.submit(_each, mine) for mine in lists[1:]]
        torch.set_num_threads(1)
        try:
            _each(lists[0])
        finally:
            torch.set_num_threads(before)
            for other in others:
                other.exception()
        for other in others:
            other.result()


def _each(functions: Sequence[Any]) -> None:
    with torch.no_grad():
        for function in functions:
            function()


def host_threads(plan: Plan, mesh: Mesh) -> Threads | None:
    """The threads of a process that runs a plan for CPUs without other ranks; None of any other, or where there is one."""
    count = torch.get_num_threads()
    alone = plan.ranks == 1 and mesh.device.type == "cpu" and Cluster.from_dict(plan.cluster).device.kind == "cpu"
    return Threads(count) if alone and count > 1 else None


class Beside:
    """Branches in place of their nodes: `workers` has their indices by thread."""

    def __init__(
        self, bodies: Sequence[fx.GraphModule], counts: Sequence[int], workers: Sequence[Sequence[int]], threads: Threads
    ) -> None:  # fmt: skip
        self.bodies, self.workers, self.threads = bodies, [mine for mine in workers if mine], threads
        self.spans = list(pairwise(accumulate(counts, initial=0)))
        self.__name__ = f"beside_{len(bodies)}_branches"
        self.__module__ = "shardwright"

    def __call__(self, *operands: Any) -> list[Any]:
        """The results of all branches, in order."""
        found: list[Any] = [None] * len(self.bodies)

        def run(i: int) -> None:
            found[i] = self.bodies[i](*operands[slice(*self.spans[i])])

        if torch.is_grad_enabled():
            for i in range(len(self.bodies)):
                run(i)
        else:
            self.threads.all([[lambda i=i: run(i) for i in mine] for mine in self.workers])
        return [x for results in found for x in results]


def beside(body: fx.GraphModule, outline: Outline, prices: Prices, threads: Threads) -> int:
    """Let branches of a lowered graph of one process run at once where that is priced to be quicker; returns of how many regions.

    `prices` are of all threads inside every op. A thread has one branch at a time, so there must be as many branches as threads.
    """
    rewritten = 0
    for region, workers in paying(outline, prices, threads.count):
        rewritten += run_beside(body, region.branches, lambda b, c, w=workers: Beside(b, c, w, threads))
    return rewritten


def paying(outline: Outline, prices: Prices, threads: int) -> Iterator[tuple[ForkJoin, tuple[tuple[int, ...], ...]]]:
    """Regions worth running at once, none inside another, with the branches that each thread takes."""
    names = [op.name for op in outline.ops]
    known = dict(zip(names, (load.seconds for load in loads(outline, prices, [[name] for name in names])), strict=True))
    queue = list(fork_joins(outline))
    while queue:
        region = queue.pop(0)
        seconds = [sum(known[name] for name in branch) for branch in region.branches]
        alone = [Branch(s * threads * EFFICIENCY) for s in seconds]
        placed = place(alone, threads, overhead=OVERHEAD)
        if len(region.branches) >= threads and placed.seconds < sum(seconds):
            yield region, placed.workers
        else:
            queue += region.inner

"""Planning on a cluster of several pools of unlike devices: every pipeline rank, and so every stage, lies in one pool.

A bench per pool prices units and options as on a cluster of that pool alone; what crosses between pools takes the link that joins
them. Which layers a stage holds is the stage solve's (planner/stages.py), which pool comes first is the shape's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..errors import ClusterError
from .cluster import Cluster, default_limit_bytes
from .costs import PriceBook
from .options import Option
from .placing import axis_strides, join_seconds, send_seconds
from .pooled import PooledBound, shared_seconds
from .prices import Prices
from .progress import Progress
from .schedules import SCHEDULES
from .shapes import Arrangement
from .stageproblem import Pipeline, Pool, StageProblem
from .workbench import Task, Workbench, schedule_of


def pool_limits(cluster: Cluster, limit_bytes: int) -> tuple[int, ...]:
    """Bytes a plan may use on a device of each pool: its own default, or the limit where another one is asked for."""
    if limit_bytes != default_limit_bytes(cluster) or cluster.limit_bytes is not None:
        return (limit_bytes,) * len(cluster.pools)
    return tuple(default_limit_bytes(cluster.sub(pool)) for pool in cluster.pools)


def pool_prices(prices: PriceBook, cluster: Cluster) -> PriceBook:
    """The price list of one pool, from data sheets."""
    if not isinstance(prices, Prices):
        raise ClusterError(f"{cluster.name}: pools of unlike devices are priced from data sheets only")
    return replace(prices, cluster=cluster)


class UnlikeBench(Workbench):
    """A workbench over benches of its pools, one for each."""

    def __init__(self, task: Task, pools: Sequence[Task], tell: Progress, *, tiers: bool = False) -> None:
        kinds = {mine.device.kind for mine in pools}
        if len(kinds) > 1:
            raise ClusterError(
                f"{task.cluster.name}: pools of {' and '.join(sorted(kinds))} devices make no common plan"
            )
        super().__init__(task, tell, tiers=tiers)
        self.benches = tuple(Workbench(mine, tell, tiers=tiers) for mine in pools)
        self.counts = Counter(self.regions)

    def offering(self, tiers: bool) -> Workbench:
        made = super().offering(tiers)
        if made is not self:
            assert isinstance(made, UnlikeBench)
            made.benches = tuple(bench.offering(tiers) for bench in self.benches)
        return made

    def on(self, shape: Arrangement, rank: int) -> Workbench:
        return self.benches[shape.pools[rank]]

    # -- bounds

    def bound(self, shape: Arrangement) -> float:
        """No plan of this shape takes less: compute of every unit by its fastest strategies, shared out over the pools."""
        regions = range(len(self.chain.parts))
        return self._shared(shape, [[bench.least(r, shape) for r in regions] for bench in self.benches])

    def talk_bound(self, shape: Arrangement) -> float:
        """A higher bound: designs with their communication."""
        times: list[list[tuple[float, float]]] = []
        for bench in self.benches:
            found = [bench.fronts.least(r, shape.tp, shape.pieces, shape.cp) for r in range(len(self.chain.parts))]
            times.append([t for t in found if t is not None])
            if len(times[-1]) < len(found):
                return 0.0  # the solve says why
        return self._shared(shape, times)

    def _shared(self, shape: Arrangement, times: Sequence[Sequence[tuple[float, float]]]) -> float:
        splits = SCHEDULES[schedule_of(shape)].splits_backward
        alone = sum(n * min(t[r][0] if splits else sum(t[r]) for t in times) for r, n in self.counts.items())
        seconds = [{r: shape.microbatches * sum(mine[r]) for r in self.counts} for mine in times]
        ranks = [shape.pools.count(p) for p in range(len(self.benches))]
        return max(alone, shared_seconds(self.counts, seconds, ranks))

    def screened(self, shape: Arrangement, low: float, most: float) -> float:
        """A bound with memory and what passes before a rank can begin, between `low` and `most`; raises PinError."""
        problem, p = self.problem(shape), shape
        name, training = schedule_of(shape), self.task.outline.training
        held = self.screen.held_by(name, p.pp, p.chunks, p.microbatches) if training else None
        if len(self.screen.pooled) > MOST_TABLES:
            self.screen.pooled.clear()
        key = (shape.tp, shape.cp, shape.pieces, self.data(shape))
        bounded = PooledBound(problem, held, training and SCHEDULES[name].splits_backward, self.screen.pooled, key)
        return bounded.seconds(low, most)

    def roomy(self, shape: Arrangement, low: float, most: float) -> float:
        return low

    # -- options

    def problem(self, shape: Arrangement) -> StageProblem:
        """The stage solve of a shape; the regions of pool p are numbered from p x regions on."""
        mine = [bench.problem(shape) for bench in self.benches]
        size = len(self.chain.parts)
        lines = [replace(found.line, regions=tuple(p * size + r for r in self.regions)) for p, found in enumerate(mine)]
        options: list[Sequence[Option]] = [group for found in mine for group in found.options]
        pools = tuple(Pool(line, found.change, found.memory) for line, found in zip(lines, mine, strict=True))
        return StageProblem(
            mine[0].line, options, {}, Pipeline(shape.pp, shape.chunks, schedule_of(shape), shape.microbatches),
            mine[0].memory, mine[0].send, self.task.outline.training, pools=pools, at=shape.pools,
            hand=lambda stage, at, layout: self._hand(shape, stage, at, layout),
        )  # fmt: skip

    def hand(self, shape: Arrangement, stage: int, cuts: Sequence[int], layout: str) -> tuple[float, float]:
        return self._hand(shape, stage, cuts[stage], layout)

    def _hand(self, shape: Arrangement, stage: int, at: int, layout: str) -> tuple[float, float]:
        """Seconds of handing on what crosses before unit `at` into a stage, forward and back."""
        placement = self.ready(shape).placement
        ranks = placement[stage - 1], placement[stage]
        if ranks[0] == ranks[1]:
            return 0.0, 0.0
        size, one, two = self.crossing_bytes(shape, at, layout), *(shape.pools[r] for r in ranks)
        if one == two:
            stride = axis_strides(shape.order, shape.sizes())["pp"]
            within = self.benches[one].task.cluster
            seconds = send_seconds(within, size, stride, size=shape.pools.count(one))
        else:
            seconds = join_seconds(self.task.cluster, size)
        return seconds, seconds if self.task.outline.training else 0.0


MOST_TABLES = 256
"""Tables of bounds that are kept."""

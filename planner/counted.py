"""What a plan's step really is on every pipeline rank, counted op by op over the whole graph: its collectives and its bytes.

The joint search adds up units, each priced apart from its neighbours. What runs is the graph that the plan's choices make of the
model, cut into the plan's stages: tensors cross at borders in one placement, masks and counts are made again in every stage that
reads them, parameters that several ranks hold are summed between them, and the loss becomes known everywhere. That is what is
followed here, stage by stage (planner/evaluate.py), and it is what a plan predicts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import msgspec

from ..errors import PlanError
from .assign import Assignment, assign
from .behind import lying
from .beside import beside, closely, most_overlap
from .cluster import Cluster
from .costs import Costs, PriceBook, Shape
from .dispatch import expert_stacks, spread_experts
from .evaluate import Evaluator, option
from .exchanges import with_messages
from .front import crossing_placement
from .memory import CAUSES, Setting, facts, local_bytes
from .outline import Op, Outline, Region, Tensor
from .placement import Placement
from .placing import axis_strides, join_seconds, send_seconds
from .plan import OverlapPlan, Plan, Traffic
from .precision import state_bytes, sum_ratio
from .rankmemory import RankMemory, StageMemory, endings
from .remake import Again, Values, standing
from .ring import repeated
from .schedules import SCHEDULES, actions
from .space import stored_elements
from .staging import StagePart, Staging, cut, stages_by_runs
from .template import batch_cut, cut_outline, tie
from .uses import Borders


@dataclass(frozen=True)
class Ground:
    """The equal devices that pipeline ranks stand on, with their prices and what they keep of a parameter."""

    cluster: Cluster
    prices: PriceBook
    setting: Setting


@dataclass(frozen=True)
class Counted:
    """Collectives of one step, and bytes by cause at its fullest moment, of every pipeline rank, first to last.

    `memory` is empty where bytes are not counted.
    """

    traffic: tuple[tuple[Traffic, ...], ...]
    memory: tuple[Mapping[str, int], ...]

    @property
    def peaks(self) -> tuple[int, ...]:
        """Bytes at the fullest moment of every rank."""
        return tuple(sum(causes.values()) for causes in self.memory)

    @property
    def peak_bytes(self) -> int:
        """Bytes at the fullest moment of the fullest rank; 0 where they are not counted."""
        return max(self.peaks, default=0)


def one_graph(plan: Plan) -> bool:
    """Whether a plan's step is one graph on every rank, without what a graph alone does not show."""
    apart = any(axis.role == "context" for axis in plan.mesh) or plan.pipeline.experts > 1
    return plan.pipeline.stages == 1 and not apart


def counts_bytes(plan: Plan, cluster: Cluster) -> bool:
    """Whether a plan's bytes are counted: on devices whose kernels are the outline's own (CPUs), where runs confirmed them."""
    return not plan.pools and cluster.device.kind == "cpu"


def with_counts(
    plan: Plan, outline: Outline, cluster: Cluster, grounds: Sequence[Ground], *, edited: bool = False
) -> Plan:  # fmt: skip
    """A plan that predicts what is counted; itself for inference. `outline` is its graph at the compute dtype.

    `grounds` are those of the plan's pools, in the order of the pipeline, one where all devices are equal. Where bytes are
    counted, as much runs beside computing as fits, or what an edited plan says. Raises PlanError where a choice is not possible.
    """
    if not outline.training:
        return plan

    def counted(way: OverlapPlan) -> Counted:
        return count(msgspec.structs.replace(plan, overlap=way), outline, cluster, grounds)

    try:
        if edited or not counts_bytes(plan, cluster):
            overlap, found = plan.overlap, counted(plan.overlap)
        else:
            overlap, found = most_overlap(plan.memory_limit_bytes, plan.objective, counted)
    except ValueError as error:
        raise PlanError(f"the plan is not legal: {error}") from None
    return _predicting(msgspec.structs.replace(plan, overlap=overlap), found)


def _predicting(plan: Plan, found: Counted) -> Plan:
    """The plan with what was counted in its prediction."""
    rank = max(range(len(found.traffic)), key=lambda r: (sum(row.seconds for row in found.traffic[r]), -r))
    ranks = found.traffic if len(found.traffic) > 1 else ()
    predicted = msgspec.structs.replace(plan.predicted, traffic=found.traffic[rank], rank_traffic=ranks)
    if not found.memory:
        return msgspec.structs.replace(plan, predicted=predicted)
    fullest = max(range(len(found.peaks)), key=lambda r: (found.peaks[r], -r))
    predicted = msgspec.structs.replace(
        predicted, memory=dict(found.memory[fullest]), peak_bytes_per_device=found.peaks[fullest]
    )
    stages = tuple(msgspec.structs.replace(stage, peak_bytes=found.peaks[stage.rank]) for stage in plan.stages)
    return msgspec.structs.replace(plan, predicted=predicted, stages=stages)


def count(plan: Plan, outline: Outline, cluster: Cluster, grounds: Sequence[Ground]) -> Counted:
    """Count a plan, as `with_counts` says. Raises PlanError or ValueError where a choice is not possible."""
    plan = spread_experts(plan, expert_stacks(outline))
    return _Counter(plan, outline, cluster, grounds).count()


class _Counter:
    def __init__(self, plan: Plan, outline: Outline, cluster: Cluster, grounds: Sequence[Ground]) -> None:
        self.plan, self.outline, self.cluster = plan, outline, cluster
        self.grounds = [replace(ground, setting=beside(ground.setting, plan.overlap)) for ground in grounds]
        self.own, self.axes = assign(plan, outline), plan.mesh
        self.bytes = counts_bytes(plan, cluster)
        self.lies = lying(plan, outline) if any(entry.offload for entry in plan.regions) else None
        grouped = repeated(outline) if any(axis.role == "context" for axis in plan.mesh) else {}
        self.costs = [
            Costs(g.prices, Shape(plan.mesh), outline.training, repeated=grouped, summed=sum_ratio(plan.precision))
            for g in self.grounds
        ]
        self.sizes = tuple(axis.size for axis in plan.mesh)
        self.m = plan.pipeline.microbatches
        self.batch = batch_cut(outline) if self.m > 1 else None
        self.rank_of = [stage.rank for stage in plan.stages]
        self.at = [i for i, pool in enumerate(plan.pools) for _ in range(pool.ranks)] or [0] * plan.pipeline.ranks
        self.small = cut_outline(outline, self.m, self.batch).outline.tensors

    def count(self) -> Counted:
        if self.plan.pipeline.ranks == 1:
            return self._one()
        outline = self.outline
        staging = cut(outline, stages_by_runs(self.plan, outline), len(self.rank_of), outline.whole)
        crossing = self._crossing(staging)
        rows: list[list[Traffic]] = [[] for _ in range(self.plan.pipeline.ranks)]
        lines: list[dict[int, StageMemory]] = [{} for _ in rows]
        for s, part in enumerate(staging.parts):
            traffic, line = self._stage(part, crossing, self.at[self.rank_of[s]])
            rows[self.rank_of[s]] += traffic
            if line is not None:
                lines[self.rank_of[s]][s] = line
        for r, found in enumerate(rows):
            found += self._sends(staging, crossing, r) + self._between(staging, r)
        memory = self._memory(staging, crossing, lines) if self.bytes else ()
        return Counted(tuple(added(found) for found in rows), memory)

    def _one(self) -> Counted:
        """Of a plan without pipeline ranks."""
        evaluator = self._evaluator(self.outline, Borders(), 0)
        if not self.bytes:
            return Counted((evaluator.ledger(self.own, self.lies).traffic(),), ())
        whole = evaluator.evaluate(self.own, self.lies)
        return Counted((whole.traffic,), (whole.memory,))

    def _stage(
        self, part: StagePart, crossing: Mapping[str, Placement], pool: int
    ) -> tuple[tuple[Traffic, ...], StageMemory | None]:
        """Collectives of one stage inside itself, and its bytes."""
        takes = {c.tensor: crossing[c.tensor] for c in part.takes}
        gives = {c.tensor: crossing[c.tensor] for c in part.gives}
        outline, mine = part_outline(self.outline, part), frozenset(part.parameters)
        groups = tuple(g for group in self.own.groups if (g := tuple(n for n in group if n in mine)))
        storage = {name: self.own.storage[name] for group in groups for name in group}
        own = replace(self.own, groups=groups, storage=storage, again=again_in(outline, self.own, takes))
        evaluator = self._evaluator(outline, Borders(takes, gives), pool)
        ledger = evaluator.ledger(own, self.lies)
        if not self.bytes:
            return ledger.traffic(), None
        took = sum(self._size(name, at) for name, at in takes.items())
        begins = evaluator.timeline(own, ledger, self.lies, first=True)
        line = evaluator.timeline(own, ledger, self.lies)
        divided = SCHEDULES[self.plan.pipeline.schedule].splits_backward
        halved = evaluator.halved(own, ledger) if divided else None
        return ledger.traffic(), StageMemory.of(begins, line, took, halved)

    def _evaluator(self, outline: Outline, borders: Borders, pool: int) -> Evaluator:
        template = tie(cut_outline(outline, self.m, self.batch))
        staged = borders if self.plan.pipeline.ranks > 1 else None
        setting = closely(self.grounds[pool].setting)
        return Evaluator(template, facts(outline), self.costs[pool], setting, staged)

    def _size(self, name: str, placement: Placement) -> float:
        """Bytes of a tensor that crosses, of one microbatch on one rank."""
        return local_bytes(self.small[name], placement, self.sizes)

    def _memory(
        self, staging: Staging, crossing: Mapping[str, Placement], lines: Sequence[Mapping[int, StageMemory]]
    ) -> tuple[Mapping[str, int], ...]:  # fmt: skip
        """Bytes by cause at the fullest moment of every rank."""
        p, setting = self.plan.pipeline, self.grounds[0].setting
        edges: dict[tuple[int, int], tuple[str, ...]] = {}
        for c in staging.crossings:
            edges[c.source, c.target] = (*edges.get((c.source, c.target), ()), c.tensor)
        training = self.outline.training
        returning = {
            edge: tuple(n for n in names if training and self.small[n].differentiable) for edge, names in edges.items()
        }
        back = {edge: names for edge, names in returning.items() if names}
        lists = actions(p.schedule if training else "forward", p.ranks, p.chunks, self.m)
        steps = with_messages(lists, self.rank_of, {edge: edge in back for edge in edges})
        sizes = {name: self._size(name, at) for name, at in crossing.items()}
        given = float(sum(facts(self.outline).given.values()))
        found: list[Mapping[str, int]] = []
        for r, mine in enumerate(lines):
            moments = RankMemory(mine, steps[r], self.rank_of, edges, back, sizes).play()
            if training:
                tied = max((self._tied_bytes(name) for name in self._ties(staging, r)), default=0)
                moments += endings(mine.values(), tied, foreach=setting.foreach)
            held = {name: h for stage in mine.values() for name, h in stage.held.items()}
            base = {
                "parameters": sum(h.stored for h in held.values()), "optimizer": sum(h.moments for h in held.values()),
                "buffers": given, "reserve": setting.reserve,
            }  # fmt: skip
            most = max(moments, key=lambda m: sum(m.values()))
            found.append({c: round(base.get(c, 0.0) + most.get(c, 0.0)) for c in CAUSES})
        return tuple(found)

    def _crossing(self, staging: Staging) -> Mapping[str, Placement]:
        """The placement in which each tensor crosses between stages."""
        makers = {use.tensor: op for op in self.outline.ops for use in op.results}
        exits = {entry.name: entry.exit for entry in self.plan.regions}
        layouts = [exits[stage.runs[-1].use] if stage.runs else "R" for stage in self.plan.stages]
        return {
            c.tensor: crossing_placement(
                makers[c.tensor], c.tensor, self.outline.tensors, self.own.choices[makers[c.tensor].name], self.axes,
                layouts[c.source],
            )
            for c in staging.crossings
        }  # fmt: skip

    def _sends(self, staging: Staging, crossing: Mapping[str, Placement], rank: int) -> list[Traffic]:
        """What a rank sends to the ranks of other stages, forward and backward."""
        found = []
        for c in staging.crossings:
            ends = self.rank_of[c.source], self.rank_of[c.target]
            back = self.outline.training and self.small[c.tensor].differentiable
            times = self.m * ((ends[0] == rank) + (back and ends[1] == rank)) if ends[0] != ends[1] else 0
            if times:
                size = round(self._size(c.tensor, crossing[c.tensor]))
                found.append(Traffic("send", "pp", times, times * size, times * self._send_seconds(size, *ends)))
        return found

    def _send_seconds(self, size: int, source: int, target: int) -> float:
        """Seconds of a message between pipeline ranks, inside a pool or over the link that joins two."""
        pool = self.at[source]
        if pool != self.at[target]:
            return join_seconds(self.cluster, size)
        return send_seconds(self.grounds[pool].cluster, size, self.stride, size=self.at.count(pool))

    @cached_property
    def stride(self) -> int:
        """Distance of neighbouring pipeline ranks."""
        sizes = {"pp": self.plan.pipeline.ranks} | {axis.name: axis.size for axis in self.axes}
        order = [name for name in self.plan.pipeline.order if name in sizes]
        return axis_strides((*order, *(name for name in sizes if name not in order)), sizes)["pp"]

    def _between(self, staging: Staging, rank: int) -> list[Traffic]:
        """The sums over pipeline ranks: the loss, and gradients of parameters that several of them hold."""
        if not self.outline.training:
            return []
        loss = self.outline.tensors[self.outline.loss]
        return [
            self._sum(round(loss.bytes)),
            *(self._sum(self._tied_bytes(name)) for name in self._ties(staging, rank)),
        ]

    @cached_property
    def holders(self) -> Mapping[str, frozenset[int]]:
        """Pipeline ranks that hold each parameter, in any program of the module."""
        everything = [name for name in (self.outline.loss, *self.outline.outputs) if name]
        staging = cut(self.outline, stages_by_runs(self.plan, self.outline), len(self.rank_of), everything)
        return {name: frozenset(self.rank_of[s] for s in stages) for name, stages in staging.holders.items()}

    def _ties(self, staging: Staging, rank: int) -> list[str]:
        """Trained parameters that a rank holds and others do, too."""
        found = []
        for p in self.outline.parameters:
            held = self.holders.get(p.tensor, frozenset())
            trains = p.trainable and self.outline.tensors[p.tensor].differentiable
            if trains and p.tensor in staging.holders and len(held) > 1 and rank in held:
                found.append(p.tensor)
        return found

    def _tied_bytes(self, name: str) -> int:
        """Bytes of the gradient of such a parameter on one rank."""
        setting = self.grounds[0].setting
        return state_bytes(setting.precision, setting.optimizer).parameter * self._stored(name)

    def _sum(self, size: int) -> Traffic:
        """One all-reduce between pipeline ranks, priced as if all of them took part.

        Over several pools a ring, as fast as the link that joins them (2 (n-1)/n of the bytes pass every rank).
        """
        ranks = self.plan.pipeline.ranks
        if len(self.grounds) > 1:
            seconds = join_seconds(self.cluster, 2 * (ranks - 1) / ranks * size)
        else:
            seconds = self.grounds[0].prices.collective("all_reduce", size, self.stride, ranks).seconds
        return Traffic("all_reduce", "pp", 1, size, seconds)

    def _stored(self, name: str) -> int:
        storage, sizes = self.own.storage[name], self.sizes
        return stored_elements(self.outline.tensors[name], option(storage, sizes), sizes)


def part_outline(outline: Outline, part: StagePart) -> Outline:
    """The outline of one stage: its ops, their tensors and its parameters, in regions of instances that are cut alike."""
    ops, held = frozenset(part.ops), frozenset(part.parameters)
    regions: dict[tuple[object, ...], list[tuple[tuple[str, ...], tuple[str, ...]]]] = {}
    for region in outline.regions:
        members = region.parameters or ((),) * len(region.instances)
        for names, parameters in zip(region.instances, members, strict=True):
            mine = tuple(n for n in names if n in ops)
            own = tuple(n for n in parameters if n in held)
            if mine or own:
                cut_ = (region.name, *(n in ops for n in names), *(n in held for n in parameters))
                regions.setdefault(cut_, []).append((mine, own))
    kept = tuple(op for op in outline.ops if op.name in ops)
    return replace(
        outline, ops=kept, tensors=_part_tensors(outline, kept, held),
        regions=tuple(
            Region(str(key[0]), tuple(i for i, _ in found), tuple(p for _, p in found)) for key, found in regions.items()
        ),
        parameters=tuple(p for p in outline.parameters if p.tensor in held),
        loss=outline.loss if outline.loss in part.results else "",
        outputs=tuple(n for n in outline.outputs if n in part.results), trains=outline.training,
        writes=tuple(n for n in outline.writes if n in part.results),
    )  # fmt: skip


def _part_tensors(outline: Outline, ops: Sequence[Op], held: frozenset[str]) -> dict[str, Tensor]:
    """The tensors of one stage. What it takes lies in memory of its own there, also where it is a view in the whole model."""
    used = {use.tensor for op in ops for use in (*op.operands, *op.results)} | held
    used |= {outline.tensors[name].storage for name in used}
    found = {name: t for name, t in outline.tensors.items() if name in used}
    made = {use.tensor for op in ops for use in op.results}
    found |= {
        name: replace(t, storage=name) for name, t in found.items() if t.role == "activation" and name not in made
    }
    for op in ops:
        for name in (use.tensor for use in op.results):
            root = outline.tensors[name].storage
            base = next((u.tensor for u in op.operands if outline.tensors[u.tensor].storage == root), None)
            if root != name and base is not None:
                found[name] = replace(found[name], storage=found[base].storage)
    return found


def again_in(part: Outline, own: Assignment, takes: Mapping[str, Placement]) -> Again:
    """What of a plan's recompute one stage runs."""
    if not own.again:
        return own.again
    ops = own.again.ops & part.by_name.keys()
    wanted, produced = standing(part, own.choices)
    used = {use.tensor for op in part.ops for use in op.operands}
    copies = frozenset(copy for copy in own.again.copies if copy[0] in used)
    return Values(part, facts(part), wanted, {**produced, **takes}, own.choices).needed(Again(ops, copies))


def added(rows: Iterable[Traffic]) -> tuple[Traffic, ...]:
    """One row per collective and axis."""
    total: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in rows:
        entry = total[row.collective, row.axis]
        entry[0] += row.count
        entry[1] += row.bytes
        entry[2] += row.seconds
    return tuple(
        Traffic(name, axis, int(times), round(size), seconds)
        for (name, axis), (times, size, seconds) in sorted(total.items())
    )

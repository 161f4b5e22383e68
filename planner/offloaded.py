"""What a plan copies between a device and the tiers behind it in one step, by class: the prediction that a run is held against.

    optimizer     parameters coming back to the device that the host has updated, once a step
    gradients     leaving, every microbatch where the plan says `gradients`, else once a step; one of a parameter that several
                  pipeline ranks hold comes back and leaves once more, since devices sum it
    params        coming in (read from disk where they lie there) for every pass of every microbatch; the backward pass brings in
                  those that it needs, all of a group that is gathered from chunks or of which ops run again
    activations   leaving and coming back, every microbatch
    states        read from and written to disk around an update; of those that the device updates, coming in (with their gradient)
                  and leaving again

Bytes are of the mean rank of a pipeline rank: chunks of ZeRO may be uneven.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .assign import Assignment, assign, entries_of
from .away import Away, read_offload, updated_on_device
from .cluster import Cluster, has_host
from .costs import PriceBook
from .memory import Facts, facts
from .offload import Traffic, offloaded_state_bytes, resident_parameter_bytes
from .outline import Outline
from .pins import parse_pins
from .placement import local_elements
from .plan import Plan
from .precision import StateBytes, state_bytes
from .progress import silent
from .solve import Request, make_task, workbench
from .spell import shape_in, units_in
from .staging import cut, stages_by_runs


@dataclass(frozen=True, slots=True)
class _Rank:
    """What one pipeline rank holds: ops and parameters of its stages, and parameters that other ranks hold too."""

    stages: tuple[tuple[frozenset[str], frozenset[str]], ...]
    shared: frozenset[str]

    @property
    def parameters(self) -> frozenset[str]:
        return frozenset(name for _, names in self.stages for name in names)


def copied(
    plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook, pipeline_rank: int = 0
) -> Mapping[str, Traffic]:
    """Bytes by class of one step of the mean rank of a pipeline rank; classes without any are left out, `copies` not counted."""
    found: dict[str, Traffic] = {}
    stepped: dict[str, tuple[Away, float, float]] = {}
    state, own, known = state_bytes(plan.precision, plan.optimizer), assign(plan, outline), facts(outline)
    here, trains = _rank(plan, outline, pipeline_rank), {p.tensor: p.trainable for p in outline.parameters}
    for entries, region in zip(entries_of(plan, outline), outline.regions, strict=True):
        for entry, members in zip(entries, region.parameters, strict=True):
            lies = read_offload(entry.offload, f"region {entry.name}")
            sizes = {name: _elements(plan, outline, own, name) for name in members if name in here.parameters}
            for ops, held in here.stages:
                needed = _needed(outline, known, ops)
                for trained in (True, False):
                    mine = {n: size for n, size in sizes.items() if n in held and trains[n] == trained}
                    again = {n: size for n, size in mine.items() if n in needed} if outline.training else {}
                    if again and (entry.recompute or any(own.storage[n].zero for n in again)):
                        again = mine  # ops that run again may need any; wholes are made of all chunks of a group
                    elements = sum(mine.values()), sum(again.values())
                    _add(found, _of_group(lies[0], *elements, state, plan.pipeline.microbatches, trained))
            if lies[0].optimizer:
                updated = {name: size for name, size in sizes.items() if trains[name]}
                _add(found, _of_gradients(lies[0], updated, state, here.shared))
                stepped |= {name: (*lies, size) for name, size in updated.items()}
    _add(found, _of_updates([stepped[p.tensor] for p in outline.parameters if p.tensor in stepped], state))
    left = _activations(plan, outline, cluster, prices, pipeline_rank)
    _add(found, {"activations": Traffic(in_bytes=left, out_bytes=left)})
    return {name: t for name, t in found.items() if t != Traffic()}


def _rank(plan: Plan, outline: Outline, rank: int) -> _Rank:
    if plan.pipeline.ranks == 1:
        everything = frozenset(op.name for op in outline.ops), frozenset(p.tensor for p in outline.parameters)
        return _Rank((everything,), frozenset())
    results = [name for name in (outline.loss,) if name] or list(outline.outputs)
    staging = cut(outline, stages_by_runs(plan, outline), len(plan.stages), results)
    mine = tuple(
        (frozenset(part.ops), frozenset(part.parameters))
        for stage, part in zip(plan.stages, staging.parts, strict=True) if stage.rank == rank
    )  # fmt: skip
    shared = (name for name, held in staging.holders.items() if len({plan.stages[s].rank for s in held}) > 1)
    return _Rank(mine, frozenset(shared))


def _needed(outline: Outline, known: Facts, ops: frozenset[str]) -> frozenset[str]:
    """Parameters that the backward pass of some ops needs."""
    return frozenset(
        known.aliases[op.operands[item.index].tensor].root
        for op in outline.ops if op.name in ops for item in op.saved if item.source == "operand"
    )  # fmt: skip


def _of_group(
    away: Away, elements: float, again: float, state: StateBytes, microbatches: int, trained: bool
) -> Mapping[str, Traffic]:
    """What a stage moves of one parameter group of so many local elements every microbatch; backward needs `again` of them."""
    found: dict[str, Traffic] = {}
    if away.parameters:
        coming = microbatches * (elements + again)
        read = coming * state.parameter if away.tier(trained=trained) == "disk" else 0.0
        size = coming * (state.copy or state.parameter)
        found["params"] = Traffic(in_bytes=size, read_bytes=read)
    if trained and away.gradients:
        found["gradients"] = Traffic(out_bytes=elements * state.gradient * microbatches)
    return found


def _of_gradients(
    away: Away, updated: Mapping[str, float], state: StateBytes, shared: frozenset[str]
) -> Mapping[str, Traffic]:
    """Gradients at the end of a step: those that the device has added up leave; of those that have left, shared ones are summed."""
    back = sum(size for name, size in updated.items() if name in shared) * state.gradient
    if away.gradients:
        return {"gradients": Traffic(in_bytes=back, out_bytes=back)}
    return {"gradients": Traffic(out_bytes=sum(updated.values()) * state.gradient)}


def _of_updates(stepped: Sequence[tuple[Away, float, float]], state: StateBytes) -> Mapping[str, Traffic]:
    """The updates of parameters whose states are away: (classes, stride, local elements) in the optimizer's order."""
    found: dict[str, Traffic] = {}
    on_device = updated_on_device([n for _, _, n in stepped], [stride for _, stride, _ in stepped])
    for (away, _, elements), here in zip(stepped, on_device, strict=True):
        moved = elements * offloaded_state_bytes(state)
        if here:
            _add(found, {"states": Traffic(in_bytes=moved + elements * state.gradient, out_bytes=moved)})
        elif not away.parameters:
            _add(found, {"optimizer": Traffic(in_bytes=elements * resident_parameter_bytes(state))})
        if away.optimizer == "disk":
            _add(found, {"states": Traffic(read_bytes=moved, write_bytes=moved)})
    return found


def _add(found: dict[str, Traffic], more: Mapping[str, Traffic]) -> None:
    for name, traffic in more.items():
        found[name] = found.get(name, Traffic()) + traffic


def _elements(plan: Plan, outline: Outline, own: Assignment, name: str) -> float:
    """Elements of a parameter on the mean rank."""
    stored, sizes = own.storage[name], tuple(axis.size for axis in plan.mesh)
    return local_elements(outline.tensors[name].dims, stored.home, sizes) / math.prod(
        sizes[a] for a in stored.zero_axes
    )


def _activations(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook, rank: int) -> float:
    """Bytes of activations that leave a pipeline rank in a step."""
    if not any("activations" in entry.offload for entry in plan.regions):
        return 0.0
    request = Request(plan.source, plan.optimizer, plan.precision, plan.memory_limit_bytes, parse_pins(plan.pins))
    bench = workbench(make_task(outline, cluster, prices, request), silent, tiers=has_host(cluster))
    cuts, options = units_in(bench, plan)
    mine = (options[cuts[s] : cuts[s + 1]] for s, stage in enumerate(plan.stages) if stage.rank == rank)
    return shape_in(plan).microbatches * math.fsum(o.host_saved for held in mine for o in held)

"""What a plan copies between a device and the tiers behind it in one step, by class: the prediction that a run is held against.

    optimizer     parameters coming back to the device that the host has updated, once a step
    gradients     leaving, every microbatch where the plan says `gradients`, else once a step
    params        coming in for every pass of every microbatch; the backward pass brings in groups whose weights it needs
    activations   leaving and coming back, every microbatch
    states        read from and written to disk around an update; of those that the device updates, coming in (with their gradient)
                  and leaving again

Bytes are of the mean rank: chunks of ZeRO may be uneven.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .assign import Assignment, assign, entries_of
from .away import Away, read_offload, updated_on_device
from .cluster import Cluster, has_host
from .costs import PriceBook
from .memory import facts
from .offload import Traffic, offloaded_state_bytes, resident_parameter_bytes
from .outline import Outline
from .pins import parse_pins
from .placement import local_elements
from .plan import Plan
from .precision import StateBytes, state_bytes
from .progress import silent
from .solve import Request, make_task, workbench
from .spell import shape_in, units_in


def copied(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook) -> Mapping[str, Traffic]:
    """Bytes by class of one step of the mean rank; classes without any are left out. `copies` are not counted."""
    found: dict[str, Traffic] = {}
    stepped: dict[str, tuple[Away, float, float]] = {}
    state, own = state_bytes(plan.precision, plan.optimizer), assign(plan, outline)
    needed, trains = set(facts(outline).saved_parameters), {p.tensor: p.trainable for p in outline.parameters}
    for entries, region in zip(entries_of(plan, outline), outline.regions, strict=True):
        for entry, members in zip(entries, region.parameters, strict=True):
            lies = read_offload(entry.offload, f"region {entry.name}")
            for trained in (True, False):
                mine = [name for name in members if trains[name] == trained]
                elements = sum(_elements(plan, outline, own, name) for name in mine)
                again = outline.training and any(name in needed for name in mine)
                _add(found, _of_group(lies[0], elements, state, plan.pipeline.microbatches, trained, again))
                stepped |= {n: (*lies, _elements(plan, outline, own, n)) for n in mine if trained and lies[0].optimizer}
    _add(found, _of_updates([stepped[p.tensor] for p in outline.parameters if p.tensor in stepped], state))
    left = _activations(plan, outline, cluster, prices)
    _add(found, {"activations": Traffic(in_bytes=left, out_bytes=left)})
    return {name: t for name, t in found.items() if t != Traffic()}


def _of_group(
    away: Away, elements: float, state: StateBytes, microbatches: int, trained: bool, again: bool
) -> Mapping[str, Traffic]:
    """One parameter group of so many local elements. `again`: its backward pass needs its weights."""
    found: dict[str, Traffic] = {}
    if away.parameters:
        found["params"] = Traffic(in_bytes=elements * (state.copy or state.parameter) * microbatches * (1 + again))
    if trained and away.optimizer:
        times = microbatches if away.gradients else 1
        found["gradients"] = Traffic(out_bytes=elements * state.gradient * times)
    return found


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


def _activations(plan: Plan, outline: Outline, cluster: Cluster, prices: PriceBook) -> float:
    """Bytes of activations that leave in a step."""
    if not any("activations" in entry.offload for entry in plan.regions):
        return 0.0
    request = Request(plan.source, plan.optimizer, plan.precision, plan.memory_limit_bytes, parse_pins(plan.pins))
    bench = workbench(make_task(outline, cluster, prices, request), silent, tiers=has_host(cluster))
    _, options = units_in(bench, plan)
    return shape_in(plan).microbatches * math.fsum(option.host_saved for option in options)

"""What a plan is, as pins, and what of it no pin says: the common ground of all exports."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ...planner.away import offload_classes
from ...planner.pins import parse_pins, spelled
from ...planner.plan import Plan, RegionPlan

if TYPE_CHECKING:
    from ...passes.models import Loaded

STACK_PINS = ("attention", "kernels", "loss", "tp_overlap", "passes", "lowering")
"""Pins about kernels, not about division: a plan does not repeat them outside `pins`."""

OFFLOADS = ("optimizer", "params", "activations")
"""Values of the `offload` pin; where several lie off the device, the pin names the first and leaves the others free."""


@dataclass(frozen=True)
class Facts:
    """A plan as pins (`K` -> spelling), and sentences on what of it no pin says; `layers` are those that repeat most.

    `cuts` are layers per virtual stage, in order; `away` are the classes that lie off the device somewhere.
    """

    plan: Plan
    pins: Mapping[str, str]
    beyond: tuple[str, ...]
    layers: int
    cuts: tuple[int, ...]
    away: frozenset[str] = frozenset()

    def count(self, key: str) -> int:
        """A pin that is a number; 1 where it was not said (0 for `zero`)."""
        return int(self.pins.get(key, "0" if key == "zero" else "1"))

    @cached_property
    def loaded(self) -> Loaded:
        """The plan's model on meta."""
        from ...passes.models import rebuild

        return rebuild(self.plan.source, device="meta")

    @property
    def batch(self) -> int:
        """Samples of a step, over all ranks."""
        return self.plan.source.batch


LEANEST: Mapping[str, Callable[[Iterable[str]], str]] = {
    "zero": max, "recompute": lambda words: "full" if "full" in words else "selective",
}  # fmt: skip
"""What stands for several values of a pin in a tool that has one: what fits in the memory that the plan fits in."""


def facts_of(plan: Plan) -> Facts:
    """The facts of a training plan; raises UsageError for plans that no other tool has words for."""
    for fault, fix in (
        (f"is one of inference ({plan.phase})" if plan.phase else "", "plan training (without --phase)"),
        ("is for several kinds of devices" if len(plan.pools) > 1 else "", "plan for one kind of device"),
        ("has stages beside each other (schedule=branches)" if plan.pipeline.schedule == "branches" else "",
         "plan with --pin schedule!=branches"),
    ):  # fmt: skip
        if fault:
            raise UsageError(f"the plan {fault}, which other tools have no words for; {fix}")
    layers = _layer_regions(plan)
    pins: dict[str, str] = {}
    beyond: list[str] = []
    sizes = {axis.name: axis.size for axis in plan.mesh}
    pins |= {key: str(sizes.get(key, 1)) for key in ("dp", "tp", "cp")}
    pipeline = plan.pipeline
    pins |= {"pp": str(pipeline.ranks), "ep": str(pipeline.experts), "vpp": str(pipeline.chunks)}
    pins["micro_batch"] = str(pipeline.micro_batch)
    if pipeline.ranks > 1:
        pins["schedule"] = pipeline.schedule
    pins |= {"precision": plan.precision.recipe, "optimizer": plan.optimizer}
    for key, found in _by_region(plan, layers, sizes):
        pins |= {key: next(iter(found))} if len(found) == 1 else {}
        if len(found) > 1 and not (key == "recompute" and "searched" in found):
            told = f"{key} is not the same everywhere: " + ", ".join(f"{w} in {found[w]}" for w in found)
            if key in LEANEST:
                pins[key] = LEANEST[key](found)
                told += f"; exported as {pins[key]}, which keeps less and takes more time"
            beyond.append(told)
    if pins.get("recompute") == "searched":
        del pins["recompute"]
    beyond += _searched(layers)
    away = frozenset(offload_classes("+".join(word for entry in plan.regions for word in entry.offload)))
    pins["offload"] = next((word for word in OFFLOADS if word in away), "none")
    if plan.passes:
        names = ", ".join(one.name for one in plan.passes)
        beyond.append(f"predicted seconds count on graph passes ({names}); kernels of another tool are its own")
    if plan.update == "backward":
        pins["update"] = "backward"
    asked = parse_pins(plan.pins)
    pins |= {key: spelled(value) for key in STACK_PINS if (value := getattr(asked, key)) is not None}
    cuts = tuple(_cuts(plan, {r.name for r in layers}))
    return Facts(plan, pins, tuple(beyond), sum(r.repeats for r in layers), cuts, away)


def _layer_regions(plan: Plan) -> list[RegionPlan]:
    """Entries of the region with the most instances that owns parameters."""
    count: dict[str, int] = {}
    for entry in plan.regions:
        name = entry.region or entry.name
        count[name] = count.get(name, 0) + entry.repeats * bool(entry.parameters)
    most = max(count, key=lambda name: count[name], default="")
    return [entry for entry in plan.regions if (entry.region or entry.name) == most]


def _by_region(plan: Plan, layers: list[RegionPlan], sizes: Mapping[str, int]) -> Iterator[tuple[str, dict[str, str]]]:
    """(pin, {its spelling: regions of which it holds}) for what a plan says region by region."""
    everywhere, shared = plan.regions, sizes.get("dp", 1) * sizes.get("cp", 1) > 1
    trained = [e for e in everywhere if any(p.trainable for p in e.parameters)]
    readers: tuple[tuple[str, list[RegionPlan], Callable[[RegionPlan], set[str]]], ...] = (
        ("zero", trained if shared else [], lambda e: {str(p.zero) for p in e.parameters if p.trainable}),
        ("sequence_parallel", layers if sizes.get("tp", 1) > 1 else [], lambda e: {_positions_split(plan, e)}),
        ("recompute", layers, lambda e: {_policy(e)}),
        ("offload", list(everywhere), lambda e: {_left(e)}),
    )
    for key, entries, read in readers:
        found: dict[str, list[str]] = {}
        for entry in entries:
            for word in read(entry):
                found.setdefault(word, []).append(entry.name)
        yield key, {word: " ".join(names) for word, names in found.items()}


def _policy(entry: RegionPlan) -> str:
    """none, selective, full, or searched (ops chosen one by one)."""
    return entry.policy or ("searched" if entry.recompute else "none")


def _left(entry: RegionPlan) -> str:
    """What of an entry lies off the device, classes joined by "+"."""
    return "+".join(sorted(offload_classes("+".join(entry.offload)))) or "none"


def _positions_split(plan: Plan, entry: RegionPlan) -> str:
    """on where the stream between layers is split by positions along tp: by the style, else by what its norms do."""
    if entry.style:
        return "on" if entry.entry == "S" else "off"
    axis = next(i for i, a in enumerate(plan.mesh) if a.name == "tp")
    norms = [op for op in entry.ops if "norm" in op.target]
    return "on" if norms and all(op.choice[axis].startswith("b1") for op in norms) else "off"


def _searched(layers: list[RegionPlan]) -> list[str]:
    return [
        f"recompute in {e.repeats} layers is chosen op by op ({', '.join(e.recompute[:4])}{', ...' * (len(e.recompute) > 4)}): "
        "not exported, so these layers keep more; plan with --pin recompute=none|selective|full for a policy with a name"
        for e in layers
        if _policy(e) == "searched"
    ]  # fmt: skip


def _cuts(plan: Plan, layers: set[str]) -> Iterator[int]:
    for stage in plan.stages:
        yield sum(run.count for run in stage.runs if run.use in layers)


def layer_number(entry: RegionPlan, layers: str) -> int | None:
    """The number of the first layer of a region's first instance; None where it owns no parameter of `layers`."""
    names = [n for p in entry.parameters for n in p.names[:1] if layers and starred(n).startswith(f"{layers}.*.")]
    return int(names[0].removeprefix(f"{layers}.").partition(".")[0]) if names else None


def numbered(name: str, instance: int) -> str:
    """The name of what `name` is in the first layer, in layer `instance`: its first number counts on."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    return name if match is None else f"{name[: match.start()]}{int(match[0]) + instance}{name[match.end() :]}"


def starred(name: str) -> str:
    """A parameter or module of a layer with `*` for the layer's number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name, count=1)


def config_value(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of several spellings that a Hugging Face config has; None without any."""
    return next((config[n] for n in names if config.get(n) is not None), None)

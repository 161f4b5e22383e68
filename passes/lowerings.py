"""Lowerings of composite ops: which there are, what may be chosen here, and how a plan's choice gets into a lowered graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..errors import PinError, PlanError
from ..planner.lowerings import PLAIN, cheapest, key_of, under
from ..planner.pins import Pins
from ..planner.plan import Plan
from ..planner.prices import Prices
from ..profiles.ops import OpRequest
from .fuse.ops import liger
from .lowered import Lowered
from .summarize import Call, Summary, target_name

LIGER = "liger"
NEEDS = {LIGER: ("liger_kernel", "triton")}
"""Modules by lowering; the extra `kernels` installs them."""


@dataclass(frozen=True)
class Lowering:
    """Another way to run an op: `op` in its place, for calls that it `takes` (a call's arguments, tensors as values)."""

    op: Callable[..., Any]
    takes: Callable[..., Any]


LOWERINGS: Mapping[str, Mapping[str, Lowering]] = {
    "shardwright.rms_norm": {LIGER: Lowering(torch.ops.shardwright.rms_norm.liger, liger.rms_mode)},
    "shardwright.gated": {LIGER: Lowering(torch.ops.shardwright.gated.liger, liger.gate_kernels)},
}
"""By target and name; `torch`, the op itself, is one of every op."""


def installed() -> tuple[str, ...]:
    """The lowerings whose modules are here; none is imported."""
    return (PLAIN, *(name for name, needs in NEEDS.items() if all(map(importlib.util.find_spec, needs))))


def offered(calls: Mapping[str, Call], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By op what of `names` it may run as, plain torch ops aside."""
    found = {}
    for op, call in calls.items():
        table = LOWERINGS.get(target_name(call.node.target), {})
        fitting = tuple(name for name in table if name in names and _takes(table[name], call.node))
        if fitting:
            found[op] = fitting
    return found


def _takes(lowering: Lowering, node: fx.Node) -> bool:
    def value(arg: fx.Node) -> Any:
        return arg.meta.get("val")

    return bool(lowering.takes(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value)))


def choose(summary: Summary, prices: Prices, pins: Pins) -> dict[str, str]:
    """Lowerings by target for the plan: the pinned one wherever it fits, else of those installed what is measured to take less.

    Raises PinError for a pinned one that no op of the model can have.
    """
    if pins.lowering == PLAIN:
        return {}
    if pins.lowering is not None:
        fitting = offered(summary.calls, [pins.lowering])
        if not fitting:
            raise PinError(f"lowering={pins.lowering}: no op of this model can run so; leave the pin out")
        return dict.fromkeys(sorted({target_name(summary.calls[op].node.target) for op in fitting}), pins.lowering)
    names = [name for name in installed() if not pins.forbids("lowering", name)]
    return cheapest(summary.outline, prices, offered(summary.calls, names))


def priced(summary: Summary, prices: Prices, pins: Pins) -> tuple[Prices, dict[str, str]]:
    """The choice, and the prices under it."""
    chosen = choose(summary, prices, pins)
    return under(prices, chosen), chosen


def requests_of(request: OpRequest, call: Call) -> tuple[OpRequest, ...]:
    """What to time of the other lowerings of an op, given the request of the op itself."""
    name = target_name(call.node.target)
    names = offered({name: call}, installed()).get(name, ()) if torch.cuda.is_available() else ()
    return tuple(replace(request, target=key_of(request.key, one).target) for one in names)


def check(plan: Plan, device: torch.device) -> None:
    """Raise PlanError for a lowering of a plan that there is not, that is not installed or that does not run on `device`."""
    for target, name in plan.lowerings.items():
        where = f"lowerings[{target!r}]"
        if name not in LOWERINGS.get(target, {}):
            raise PlanError(f"{where}: there is no lowering {name!r} of it; known: {_known(target)}")
        missing = [module for module in NEEDS[name] if importlib.util.find_spec(module) is None]
        if missing:
            raise PlanError(
                f"{where}: {name!r} needs {' and '.join(missing)}, not installed here: pip install 'shardwright[kernels]', or "
                f"plan again with --pin lowering={PLAIN}"
            )
        if device.type != "cuda" and not _interpreted():
            raise PlanError(
                f"{where}: {name!r} runs on CUDA devices, this is {device.type}: plan with --pin lowering={PLAIN}"
            )


def _known(target: str) -> str:
    return ", ".join((PLAIN, *LOWERINGS[target])) if target in LOWERINGS else f"none of {target}"


def _interpreted() -> bool:
    """Whether Triton interprets its kernels, on any device."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def install(lowered: Lowered, lowerings: Mapping[str, str]) -> None:
    """Put the chosen lowerings into the body of a lowered graph."""
    if not lowerings:
        return
    for node in lowered.body.graph.nodes:
        name = lowerings.get(target_name(node.target)) if node.op == "call_function" else None
        if name is not None:
            node.target = LOWERINGS[target_name(node.target)][name].op
    lowered.body.recompile()

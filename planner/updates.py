"""Optimizer updates inside the backward pass (`update=backward`): each parameter as soon as its gradient is complete.

The gradient is then freed, so that gradients never all live (LOMO, Lv et al. 2023; On-Device Training Under 256KB, Lin et al.
2022). What needs all gradients at once, or a second look at one, is refused: accumulation over microbatches, a gradient that
leaves the device, reductions that hand gradients out after the backward pass, loss scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import PinError
from .pins import Pins
from .plan import OverlapPlan, Plan

BACKWARD = "backward"
STEP = "step"

ALONE = OverlapPlan(0, 0)
"""Reductions that are waited for at once: others hand their gradients out when the backward pass is over."""

UNSUPPORTED: tuple[tuple[str, Callable[[Plan], bool]], ...] = (
    ("inference, which updates nothing", lambda plan: bool(plan.phase)),
    ("pipeline stages", lambda plan: plan.pipeline.stages > 1),
    ("several microbatches, over which gradients add up", lambda plan: plan.pipeline.microbatches > 1),
    ("ZeRO (zero=0 is)", lambda plan: any(p.zero for region in plan.regions for p in region.parameters)),
    ("offload", lambda plan: any(region.offload for region in plan.regions)),
    ("recompute", lambda plan: any(region.recompute for region in plan.regions)),
    ("float16, whose loss has to be scaled", lambda plan: plan.precision.compute == "float16"),
)
"""What a plan may not have whose parameters are updated in the backward pass."""


def why_not_in_backward(plan: Plan) -> str:
    """The first thing for which parameters cannot be updated in the plan's backward pass; "" where they can."""
    return next((f"it is not supported with {text}" for text, holds in UNSUPPORTED if holds(plan)), "")


_PINNED: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("pp", (1,)), ("vpp", (1,)), ("cp", (1,)), ("ep", (1,)), ("zero", (0,)), ("offload", ("none",)), ("recompute", ("none",)),
    ("schedule", ("none",)),
)  # fmt: skip
"""Pins that go with it; each key's first value is what is then planned."""


def pins_in_backward(pins: Pins, compute: str, *, training: bool, runnable: bool) -> Pins:
    """The pins of a search under `update=backward`; raises PinError naming what stands against it."""
    what = f"update={BACKWARD}"
    if not training:
        raise PinError(f"{what}: inference updates no parameters; drop the pin")
    if not runnable:
        raise PinError(f"{what} is planned where the plan is to run: use --cluster local[:N]")
    if compute == "float16":
        raise PinError(f"{what} is not supported in float16, whose loss has to be scaled; use dtype=bf16 or fp32")
    for key, values in _PINNED:
        if getattr(pins, key) not in (None, *values) or pins.forbids(key, values[0]):  # type: ignore[arg-type]
            raise PinError(f"{what} goes with {key}={values[0]} only: {_why(key)}")
    return replace(pins, zero=0, offload="none")


def _why(key: str) -> str:
    return {
        "zero": "sharded gradients are not updated in the backward pass yet", "offload": "the gradient would leave the device",
        "recompute": "what runs again would read parameters that are already updated",
    }.get(key, "it takes one stage and one microbatch")  # fmt: skip

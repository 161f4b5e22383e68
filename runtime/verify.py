"""`--verify`: the planned module against the user's original eager module, in float64 and in the plan's own dtype.

The reference is always the eager module, never the captured graph. Both sides run with dropout off and with the float32 casts
inside models lifted to float64, by the same mode: active in the reference, and in the capture. Rank 0 runs the reference; every
parameter is compared whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..passes.experts.interface import own_loops
from ..passes.lift import Lift
from ..planner.plan import Plan
from ..planner.updates import BACKWARD
from .losses import loss_of
from .mesh import rank
from .module import ParallelModule
from .optimizers import make_optimizer

LIMITS = {"float64": {"loss": 1e-10, "gradient": 1e-10, "parameter": 1e-9}, "float32": {"loss": 2e-5, "gradient": 2e-5}}
"""Largest difference allowed: absolute in float64 (relative where entries exceed one), relative in float32."""
NOISE = 1e-3
"""In float32 an entry is held against the largest of its tensor, but no less than this share of the largest of all:
gradients that are zero in exact arithmetic (key biases) are rounding noise."""
STEPS = 3

Apply = Callable[[nn.Module, Any, Any, Plan, str], ParallelModule]
"""(module, args, kwargs, plan, dtype of comparison) -> the planned module, computing in that dtype."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of one kind of value, where it is, and whether it is within its limit."""

    dtype: str
    kind: str
    worst: float
    at: str
    limit: float

    @property
    def ok(self) -> bool:
        return self.worst <= self.limit  # False for nan

    def to_dict(self) -> dict[str, Any]:
        """Plain fields and `ok`, for JSON."""
        return {**asdict(self), "ok": self.ok}


def verify(model: nn.Module, args: Any, kwargs: Any, plan: Plan, apply: Apply, loss_fn: Any = None) -> list[Difference]:
    """Loss and every gradient of one step, and parameters after 3 optimizer steps; all ranks take part.

    `apply` makes a ParallelModule of a module under a plan, exact. float32 is compared for plans that compute in it.
    """
    found = []
    for dtype in ("float64", "float32"):
        if dtype == "float32" and plan.precision.compute != "float32":
            continue
        found += _compare(model, args, kwargs, plan, apply, dtype, loss_fn)
    return found


def _compare(
    model: nn.Module, args: Any, kwargs: Any, plan: Plan, apply: Apply, name: str, loss_fn: Any
) -> list[Difference]:
    dtype = getattr(torch, name)
    planned = apply(model, args, kwargs, plan, name)
    reference = copy.deepcopy(model).to(dtype)
    args, kwargs = tree_map(lambda v: v.to(dtype) if _floating(v) else v, (args, kwargs))
    device = planned.device_of_run
    if rank() != 0:
        reference = reference.to("meta")
    steps = STEPS if name == "float64" else 1
    pair = _Pair(reference.to(device) if rank() == 0 else reference, planned, args, kwargs, plan.optimizer, loss_fn)
    limits = LIMITS[name]
    found = []
    for step in range(steps):
        loss = pair.step()
        if step == 0:
            found.append(Difference(name, "loss", loss, "loss", limits["loss"]))
            found.append(Difference(name, "gradient", *pair.gradients(), limits["gradient"]))
        pair.update()
        if plan.update == BACKWARD:
            planned.update_in_backward(pair.of_planned)  # the first step's gradients were compared
    if steps > 1:
        found.append(Difference(name, f"parameter after {steps} steps", *pair.parameters(), limits["parameter"]))
    return found


class _Pair:
    """The reference (on rank 0) and the planned module, stepped together."""

    def __init__(
        self, reference: nn.Module, planned: ParallelModule, args: Any, kwargs: Any, optimizer: str, loss_fn: Any
    ) -> None:
        self.reference, self.planned, self.loss_fn = reference, planned, loss_fn
        self.exact = next(reference.parameters()).dtype == torch.float64
        device = planned.device_of_run
        self.args, self.kwargs = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, (args, kwargs))
        self.leads = rank() == 0
        self.of_planned = make_optimizer(optimizer, planned.parameters())
        self.of_reference = make_optimizer(optimizer, reference.parameters()) if self.leads else None

    def step(self) -> float:
        """Forward and backward on both sides; the relative difference of the losses."""
        self.of_planned.zero_grad()
        mine = loss_of(self.planned(*self.args, **self.kwargs))
        mine.backward()
        theirs = torch.zeros_like(mine)
        if self.leads and self.of_reference is not None:
            self.of_reference.zero_grad()
            with Lift(casts=self.exact, dropout=False), own_loops(self.reference):
                output = self.reference(*self.args, **self.kwargs)
                loss = self.loss_fn(output) if self.loss_fn is not None else loss_of(output)
            loss.backward()
            theirs = loss.detach()
        theirs = _from_first(theirs.detach().clone())
        return _distance(mine.detach(), theirs, self.floor())

    def update(self) -> None:
        """One optimizer step on both sides."""
        self.of_planned.step()
        if self.of_reference is not None:
            self.of_reference.step()

    def gradients(self) -> tuple[float, str]:
        """Worst difference of a gradient and the parameter's name; one side without gradient counts as zeros."""
        return self._worst(lambda p: p.grad)

    def parameters(self) -> tuple[float, str]:
        """Worst difference of a parameter and its name."""
        return self._worst(lambda p: p)

    def floor(self, values: Iterable[Tensor] = ()) -> float:
        """The least size an entry is held against."""
        if self.exact:
            return 1.0
        largest = max([float(v.detach().abs().max()) for v in values if v.numel()], default=0.0)
        return NOISE * float(_from_first(torch.tensor(largest)))

    def _worst(self, pick: Callable[[Tensor], Tensor | None]) -> tuple[float, str]:
        worst, at = 0.0, ""
        theirs: Mapping[str, Tensor] = dict(self.reference.named_parameters())
        floor = self.floor(v for p in theirs.values() if self.leads and (v := pick(p)) is not None)
        for name, mine in self.planned.wholes(pick):
            whole = torch.zeros_like(theirs[name], device=self.planned.device_of_run)
            mine = mine if mine is not None else whole
            if self.leads:
                value = pick(theirs[name])
                whole = value.detach().clone() if value is not None else whole
            difference = _distance(mine, _from_first(whole), floor)
            if not difference <= worst:
                worst, at = difference, name
        return worst, at


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _distance(a: Tensor, b: Tensor, floor: float) -> float:
    """Largest absolute difference, divided by the largest entry of the reference, but by no less than `floor`."""
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    return float((a - b).abs().max() / max(float(b.abs().max()), floor, torch.finfo(a.dtype).tiny))


def _from_first(value: Tensor) -> Tensor:
    """Rank 0's value on every rank."""
    if dist.is_initialized():
        value = value.contiguous()
        dist.broadcast(value, 0)
    return value

"""Updates inside the backward pass: every parameter as soon as its gradient is complete, which is then freed.

The optimizer is the user's own; its step runs over one parameter at a time, with the options of its group. The loop around it
stays as it is: `optimizer.step()` finds no gradients and says that the step is over, `zero_grad()` finds nothing to clear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..errors import UsageError
from ..planner.precision import OPTIMIZERS
from .offload.rounds import like, local, step_apart
from .parameters import local as slice_of


class InBackward:
    """Updates `parameters` (by name) with `optimizer` while a backward pass runs."""

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Raises UsageError for an optimizer that looks at more than one element at a time, or does not have every parameter."""
        self.optimizer = optimizer
        if type(optimizer).__name__.lower() not in OPTIMIZERS:
            raise UsageError(
                f"{type(optimizer).__name__} cannot update parameters one by one; optimizers that can: {', '.join(OPTIMIZERS)}"
            )
        self._group = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        lost = next((name for name, p in trained.items() if id(p) not in self._group), None)
        if lost is not None:
            raise UsageError(
                f"the optimizer does not have {lost}, whose gradient would add up: freeze it or give it to the optimizer"
            )
        self._stepped = True
        plain = (p for p in trained.values() if not isinstance(p, DTensor))
        self._hooks = [p.register_post_accumulate_grad_hook(self._update) for p in plain]
        self._hooks.append(optimizer.register_step_post_hook(self._after))

    def close(self) -> None:
        """Leave updates to the optimizer's own step again."""
        for hook in self._hooks:
            hook.remove()

    def leaf(self, parameter: Tensor) -> Tensor:
        """What a call computes with in place of this rank's slice of a DTensor: a leaf of its own.

        Slices are taken before the first op, so autograd would come back to them after the last: a leaf is reached at once.
        """
        if not isinstance(parameter, DTensor) or not parameter.requires_grad:
            return slice_of(parameter)
        made = local(parameter).detach().requires_grad_()

        def take(leaf: Tensor) -> None:
            assert leaf.grad is not None
            parameter.grad, leaf.grad = like(leaf.grad, parameter), None
            self._update(parameter)

        made.register_post_accumulate_grad_hook(take)
        return made

    def begins(self, gradient: Tensor) -> None:
        """A backward pass begins with the loss's gradient; raises UsageError where it is no whole step of its own."""
        if not self._stepped:
            raise UsageError(
                "a second backward pass before optimizer.step(): gradients do not add up where parameters are updated in the "
                "backward pass; call optimizer.step() after each, or plan with update=step"
            )
        if bool((gradient != 1).any()):
            raise UsageError(
                "the loss was scaled or divided before backward(): parameters are updated in the backward pass, with the gradients "
                "as they come; plan with update=step for loss scaling and accumulation"
            )
        self._stepped = False

    def _update(self, parameter: Tensor) -> None:
        group = self.optimizer.param_groups[self._group[id(parameter)]]
        with torch.no_grad():
            step_apart(self.optimizer, [(group, parameter)], self.optimizer.state)
        parameter.grad = None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True

"""The optimizer's step over states behind the device, under the user's own torch optimizer.

Parameters whose states are in host memory are host tensors, so torch's optimizer updates them where they lie; nothing of it is
changed. What is added hangs on torch's step hooks: states go to memory of the offload's own after the first step, and new
parameters set out for the device as soon as the step ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..torch_compat import like_dtensor
from .memory import is_host
from .places import Keeper, Place


class HostStep:
    """Follows the steps of whatever optimizers have parameters of `places`."""

    def __init__(self, places: Mapping[str, Place], keeper: Keeper, folder: Path | None) -> None:
        self.places, self.keeper = places, keeper
        self._hooks = [register_optimizer_step_post_hook(self._after)]

    @property
    def covers(self) -> bool:
        return True

    def close(self) -> None:
        """Take the hooks back."""
        for hook in self._hooks:
            hook.remove()

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        known = {id(p.parameter): p for p in self.places.values()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                place = known.get(id(parameter))
                if place is None:
                    continue
                state = optimizer.state.get(parameter, {})
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape and not is_host(value):
                        state[name] = self._hosted(value)
                self.keeper.refresh(place)

    def _hosted(self, value: Tensor) -> Tensor:
        if isinstance(value, DTensor):
            return like_dtensor(self.keeper.memory.holding(value._local_tensor), value)
        return self.keeper.memory.holding(value)

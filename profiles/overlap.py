"""How much slower compute and a collective run at the same time than alone.

The factor is the one of planner/overlap.py: a collective that fits under the compute beside it adds (slowdown - 1) times its own
seconds. Where the processors that compute also move the bytes (gloo on a CPU without a core to spare) it is 2 or more: nothing
is won.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from .comms import functional, own_group
from .timing import device, finish, time_call

SIDE = 1024
FULL_BYTES = 16 << 20
SECONDS = 0.3
MORE = 1.5
"""How much longer than the collective the compute is made."""


def time_overlap() -> dict[str, dict[str, float]]:
    """By group ("all ranks"): seconds of `compute`, of a `collective` and of `both` at once, and `slowdown`. Empty for one rank."""
    world = dist.get_world_size()
    if world == 1:
        return {}
    group, x = own_group(world), torch.ones(FULL_BYTES // 4, device=device())
    a = torch.rand(SIDE, SIDE, device=device())

    def talk() -> object:
        return functional.wait_tensor(functional.all_reduce(x, "sum", group))

    talking = _seconds(talk)
    times = max(1, round(MORE * talking / max(_seconds(lambda: a @ a), 1e-7)))

    def compute() -> None:
        for _ in range(times):
            a @ a

    def both() -> object:
        launched = functional.all_reduce(x, "sum", group)
        compute()
        return functional.wait_tensor(launched)

    computing, together = _seconds(compute), _seconds(both)
    slowdown = max(1.0, 1.0 + (together - computing) / talking)
    return {
        "all ranks": {"compute": computing, "collective": talking, "both": together, "slowdown": round(slowdown, 3)}
    }


def _seconds(call: Callable[[], object]) -> float:
    call()
    finish()
    return time_call(call, SECONDS, together=True).seconds

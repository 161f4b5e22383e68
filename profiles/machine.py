"""Figures of one CPU process while its neighbours are as busy: matmul, memory, launch cost, optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..planner.prices import FUSED_STEP
from .timing import spread_mean, time_call

MATMUL_SIDE = 1024
STREAM_ELEMENTS = 8 << 20
ACTIVATION_ELEMENTS = 1 << 20
"""A usual activation; larger new tensors are given fresh pages by the system each time, which training steps avoid."""
PARAMETER_ELEMENTS = 2 << 20
SECONDS = 0.15


def time_machine() -> dict[str, float]:
    """Figures of this process, means over the ranks.

    FLOP/s: "matmul.float32", "matmul.float64", "matmul.bfloat16". Bytes per second: "memory" (streaming into a standing
    tensor), "elementwise" and "copy" (into new memory, as eager ops do), "optimizer" and "fused_optimizer" (AdamW op by op, and as
    one kernel). Seconds: "overhead" (a tiny op under autograd).
    """
    figures = {f"matmul.{name}": _matmul(name) for name in ("float32", "float64", "bfloat16")}
    x, y = torch.rand(STREAM_ELEMENTS), torch.rand(STREAM_ELEMENTS)
    z = torch.empty_like(x)
    moved = x.nbytes
    figures["memory"] = 3 * moved / _seconds(lambda: torch.add(x, y, out=z))
    a, b = torch.rand(ACTIVATION_ELEMENTS), torch.rand(ACTIVATION_ELEMENTS)
    figures["elementwise"] = 12 * ACTIVATION_ELEMENTS / _seconds(lambda: a + b)
    figures["copy"] = 8 * ACTIVATION_ELEMENTS / _seconds(lambda: a.clone())
    figures["optimizer"], figures[FUSED_STEP] = _optimizer(), _fused_optimizer()
    small = torch.rand(16, requires_grad=True)
    figures["overhead"] = _seconds(lambda: [small + 1.0 for _ in range(100)]) / 100
    return {key: spread_mean(value) for key, value in figures.items()}


def _matmul(name: str) -> float:
    """FLOP/s of a large square product."""
    x = torch.rand(MATMUL_SIDE, MATMUL_SIDE).to(getattr(torch, name))
    return 2.0 * MATMUL_SIDE**3 / _seconds(lambda: x @ x)


def _optimizer() -> float:
    """Bytes per second of an AdamW step: parameter, gradient and two moments read, all but the gradient written.

    The passes over memory are those of torch.optim's per-parameter loop; its first step would import a compiler, seconds.
    """
    parameter, gradient, first, second = (torch.rand(PARAMETER_ELEMENTS) for _ in range(4))

    def step() -> None:
        parameter.mul_(0.999)
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        parameter.addcdiv_(first, (second.sqrt() / 0.5).add_(1e-8), value=-1e-3)

    return 7.0 * 4 * PARAMETER_ELEMENTS / _seconds(step)


def _fused_optimizer() -> float:
    """The same of the kernel behind `fused=True`."""
    lists = [[torch.rand(PARAMETER_ELEMENTS)] for _ in range(4)]
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}
    steps = [torch.ones(())]

    def step() -> None:
        torch.ops.aten._fused_adamw_.default(*lists, [], steps, **options, amsgrad=False, maximize=False)

    return 7.0 * 4 * PARAMETER_ELEMENTS / _seconds(step)


def _seconds(call: Callable[[], object]) -> float:
    call()
    return time_call(call, SECONDS).seconds

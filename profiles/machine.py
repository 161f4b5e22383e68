"""Figures of one CPU process while its neighbours are as busy: matmul, memory, launch cost, optimizer step."""

from __future__ import annotations

import torch

from .timing import spread_mean, time_call

MATMUL_SIDE = 1024
STREAM_ELEMENTS = 8 << 20
ACTIVATION_ELEMENTS = 1 << 20
"""A usual activation; larger new tensors are given fresh pages by the system each time, which training steps avoid."""
SECONDS = 0.15


def time_machine() -> dict[str, float]:
    """Figures of this process, means over the ranks.

    FLOP/s: "matmul.float32", "matmul.float64", "matmul.bfloat16". Bytes per second: "memory" (streaming into a standing
    tensor), "elementwise" and "copy" (into new memory, as eager ops do), "optimizer" (AdamW). Seconds: "overhead" (a tiny
    op under autograd).
    """
    figures = {f"matmul.{name}": _matmul(name) for name in ("float32", "float64", "bfloat16")}
    x, y = torch.rand(STREAM_ELEMENTS), torch.rand(STREAM_ELEMENTS)
    z = torch.empty_like(x)
    moved = x.numel() * x.element_size()
    figures["memory"] = 3 * moved / _seconds(lambda: torch.add(x, y, out=z))
    a, b = torch.rand(ACTIVATION_ELEMENTS), torch.rand(ACTIVATION_ELEMENTS)
    figures["elementwise"] = 12 * ACTIVATION_ELEMENTS / _seconds(lambda: a + b)
    figures["copy"] = 8 * ACTIVATION_ELEMENTS / _seconds(lambda: a.clone())
    figures["optimizer"] = _optimizer()
    small = torch.rand(16, requires_grad=True)
    figures["overhead"] = _seconds(lambda: [small + 1.0 for _ in range(100)]) / 100
    return {key: spread_mean(value) for key, value in figures.items()}


def _matmul(name: str) -> float:
    """FLOP/s of a large square product."""
    x = torch.rand(MATMUL_SIDE, MATMUL_SIDE).to(getattr(torch, name))
    return 2.0 * MATMUL_SIDE**3 / _seconds(lambda: x @ x)


def _optimizer() -> float:
    """Bytes per second of an AdamW step: parameter, gradient and two moments read, all but the gradient written."""
    parameter = torch.rand(STREAM_ELEMENTS // 2, requires_grad=True)
    parameter.grad = torch.rand_like(parameter)
    optimizer = torch.optim.AdamW([parameter])
    return 7.0 * parameter.numel() * parameter.element_size() / _seconds(lambda: optimizer.step())


def _seconds(call: object) -> float:
    return time_call(call, SECONDS).seconds  # type: ignore[arg-type]

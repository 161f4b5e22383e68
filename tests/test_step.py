"""Gradients that enter the graph of a step's parameters."""

from __future__ import annotations

from typing import Any

import torch
from shardwright.runtime.step import Door
from shardwright.runtime.torch_compat import StorageRef
from torch import Tensor


class _Look(torch.autograd.Function):
    """Identity; backward notes whether what `watched` refers to is gone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, watched: list[StorageRef], seen: list[bool]) -> Tensor:
        ctx.home = watched, seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        watched, seen = ctx.home
        seen.append(watched[0].expired())
        return grad, None, None


def test_nothing_but_the_backward_pass_holds_what_enters() -> None:
    parameter, watched, seen = torch.ones(4, requires_grad=True), [], []
    door = Door([_Look.apply(parameter, watched, seen) * 3.0])
    for _ in range(2):  # the graph stays for the next microbatch
        gradients: list[Tensor | None] = [torch.full((4,), 2.0)]
        watched[:] = [StorageRef(gradients[0].untyped_storage())]
        door.enter(gradients)
        assert gradients == []
    assert seen == [True, True]
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [12.0] * 4


def test_what_has_no_gradient_is_left_alone() -> None:
    parameters = [torch.ones(2, requires_grad=True) for _ in range(3)]
    door = Door([p * 2.0 for p in parameters])
    door.enter([None, None, None])
    assert all(p.grad is None for p in parameters)
    door.enter([torch.ones(2), None, torch.ones(2)])
    assert [None if p.grad is None else p.grad.tolist() for p in parameters] == [[2.0, 2.0], None, [2.0, 2.0]]

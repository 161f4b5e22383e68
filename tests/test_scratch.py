"""Bytes inside one op, against torch's own kernels on a CPU."""

from __future__ import annotations

import pytest
import torch
from shardwright.passes.prepare import prepare
from shardwright.planner.outline import Op, Outline
from shardwright.planner.scratch import column_bytes
from shardwright.runtime.monitor import measure_peak
from torch import Tensor, nn

CASES = {
    "3x3": (nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 8, 8)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, bias=False), (2, 4, 9, 9)),
    "patches": (nn.Conv2d(3, 6, 4, stride=4, bias=False), (2, 3, 8, 8)),
    "1x1": (nn.Conv2d(4, 6, 1, bias=False), (2, 4, 8, 8)),
    "1x1 strided": (nn.Conv2d(4, 6, 1, stride=2, bias=False), (2, 4, 8, 8)),
    "one dim": (nn.Conv1d(4, 6, 3, padding=1, bias=False), (2, 4, 16)),
    "three dims": (nn.Conv3d(2, 3, 3, padding=1, bias=False), (2, 2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), (2, 4, 4, 4)),
}


def convolution(module: nn.Module, x: Tensor, dtype: str) -> tuple[Op, Outline]:
    """The op, and its outline."""
    own = getattr(torch, dtype)
    outline = prepare(module.to(own), (x.detach().to(own),), {}, dtype, loss_fn=lambda y: y.sum()).outline
    return next(op for op in outline.ops if op.kind == "conv"), outline


@pytest.mark.parametrize("case", CASES)
def test_columns_are_those_of_the_backward_pass(case: str) -> None:
    module, shape = CASES[case]
    x, weight = torch.randn(shape, dtype=torch.float64, requires_grad=True), module.double().weight
    y = module(x)
    gradient = torch.randn_like(y)
    peak = measure_peak(lambda: torch.autograd.grad(y, [x, weight], gradient)).bytes
    op, outline = convolution(module, x, "float64")
    assert column_bytes(op, outline.tensors, ("R",), (1,)) == peak - x.nbytes - weight.nbytes


def test_columns_are_of_the_local_samples_and_not_of_what_onednn_computes() -> None:
    module, shape = CASES["3x3"]
    op, outline = convolution(module, torch.randn(shape), "float64")
    whole = column_bytes(op, outline.tensors, ("R",), (2,))
    assert whole == 8 * 2 * 4 * 9 * 64
    assert column_bytes(op, outline.tensors, ("z",), (2,)) == whole / 2
    op, outline = convolution(module, torch.randn(shape), "float32")
    assert column_bytes(op, outline.tensors, ("R",), (2,)) == 0

"""What ops that run again leave in memory: nothing that they can make."""

from __future__ import annotations

import torch
from shardwright.passes.shard import AGAIN
from shardwright.runtime.again import with_recipes
from shardwright.runtime.monitor import measure_peak
from shardwright.runtime.regather import Regather
from torch import fx

ROWS, HEADS, WIDTH = 64, 4, 16
ops = torch.ops.aten


def two_products(marked: bool) -> fx.GraphModule:
    """(x, w) -> ((x w) with its heads put last, made one dimension: a copy) w, both products marked to run again or not."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    first = graph.call_function(ops.mm.default, (x, w))
    heads = graph.call_function(ops.view.default, (first, [HEADS, ROWS, WIDTH]))
    turned = graph.call_function(ops.transpose.int, (heads, 0, 1))
    flat = graph.call_function(ops.reshape.default, (turned, [ROWS * HEADS, WIDTH]))
    last = graph.call_function(ops.mm.default, (flat, w))
    for node in (first, last):
        node.meta[AGAIN] = marked
    graph.output(last)
    return with_recipes(fx.GraphModule(torch.nn.Module(), graph))


def loss_and_gradients(marked: bool) -> tuple[int, list[torch.Tensor]]:
    """Bytes that are held when the forward pass is over, and (loss, d_x, d_w)."""
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(HEADS * ROWS, WIDTH, dtype=torch.float64, generator=dice).requires_grad_()
    w = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=dice).requires_grad_()
    body = two_products(marked)

    def forward() -> torch.Tensor:
        with Regather():
            return body(x, w).sum()

    held = measure_peak(forward)
    loss = held.result
    loss.backward()
    return held.retained, [loss.detach(), *(t.grad for t in (x, w) if t.grad is not None)]


def test_a_view_that_copies_runs_again_with_what_it_is_a_view_of() -> None:
    one = HEADS * ROWS * WIDTH * 8
    kept, wanted = loss_and_gradients(False)
    held, found = loss_and_gradients(True)
    assert kept >= one > held
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)

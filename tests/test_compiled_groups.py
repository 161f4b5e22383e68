"""Group collectives inside compiled graphs: right gradients, and regathering by recompute tags."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from pool import Pool
from shardwright.runtime import groups
from test_groups import SHAPES, chunks, flat_mesh, loss_of, wholes
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy

WIDTH, LAYERS = 8, 3


def compiled() -> None:
    mesh = flat_mesh()
    n, position, group = mesh.size("dp"), mesh.position("dp"), mesh.group_name("dp")
    rank = dist.get_rank()
    shards = [s.requires_grad_() for s in chunks(wholes(), n, position)]

    def forward(*own: Tensor) -> Tensor:
        full = groups.gather(list(own), [s[0] for s in SHAPES], mesh.members("dp"), group)
        return loss_of(groups.reduce(full, group), rank)

    expected = torch.autograd.grad(forward(*shards), shards)
    loss = torch.compile(forward, backend="aot_eager")(*shards)
    assert torch.allclose(loss, forward(*shards))
    for a, b in zip(torch.autograd.grad(loss, shards), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_compiled_equals_eager(ranks2: Pool) -> None:
    ranks2.run(compiled)


def layered(tagged: bool) -> fx.GraphModule:
    """x through layers of tanh(linear), every weight gathered before its use; gather and getitem tagged for recompute."""
    mesh = flat_mesh()
    graph = fx.Graph()
    hidden = graph.placeholder("x")
    shards = [graph.placeholder(f"shard{i}") for i in range(LAYERS)]
    for i, shard in enumerate(shards):
        whole = graph.call_function(groups.gather, ([shard], [WIDTH], list(mesh.members("dp")), mesh.group_name("dp")))
        weight = graph.call_function(operator.getitem, (whole, 0))
        for node in (whole, weight) if tagged else ():
            node.meta.update(recompute=CheckpointPolicy.MUST_RECOMPUTE, ac_graph_id=i + 1)
        hidden = graph.call_function(torch.ops.aten.linear.default, (hidden, weight))
        hidden = graph.call_function(torch.ops.aten.tanh.default, (hidden,))
    graph.output((graph.call_function(torch.ops.aten.sum.default, (hidden,)),))
    return fx.GraphModule(torch.nn.Module(), graph)


def partitioned(tagged: bool) -> tuple[dict[str, Counter[str]], float]:
    """Collectives in the compiled forward and backward graphs, and the largest deviation of a gradient."""
    mesh = flat_mesh()
    found: dict[str, Counter[str]] = {}

    def inspect(name: str) -> Any:
        def compile_(module: fx.GraphModule, _: Any) -> Any:
            targets = [str(node.target) for node in module.graph.nodes]
            kinds = ("all_gather", "reduce_scatter")
            found[name] = Counter({kind: sum(kind in target for target in targets) for kind in kinds})
            return module.forward

        return compile_

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)
    whole = [torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(LAYERS)]
    shards = [s.requires_grad_() for s in chunks(whole, mesh.size("dp"), mesh.position("dp"))]
    wanted = torch.autograd.grad(layered(False)(x, *shards)[0], shards)
    backend = aot_autograd(
        fw_compiler=inspect("forward"),
        bw_compiler=inspect("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    grads = torch.autograd.grad(torch.compile(layered(tagged), backend=backend)(x, *shards)[0], shards)
    return found, max(float((a - b).abs().max()) for a, b in zip(grads, wanted, strict=True))


def test_recompute_tags_gather_again_in_backward(ranks2: Pool) -> None:
    for tagged, again in ((False, 0), (True, LAYERS - 1)):
        for found, deviation in ranks2.run(partitioned, tagged):
            assert found["forward"] == {"all_gather": LAYERS, "reduce_scatter": 0}
            # The first layer's input needs no gradient, so its weight is not needed in backward.
            assert found["backward"] == {"all_gather": again, "reduce_scatter": LAYERS}
            assert deviation < 1e-12

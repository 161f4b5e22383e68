"""What a compiler gets of a projection with its loss: one call, of the same values, whose chunks it cannot run side by side."""

from __future__ import annotations

import itertools

import pytest
import torch
from shardwright.passes.heads.op import whole_head
from shardwright.passes.pattern import target_of
from test_fuse_head_loss import eager, op, operands
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx


@pytest.mark.parametrize("flags", [f for f in itertools.product((True, False), repeat=3) if any(f)])
def test_a_graph_has_one_call_and_the_same_gradients(flags: tuple[bool, ...]) -> None:
    *values, target = operands()

    def gradients(*given: Tensor) -> tuple[Tensor, ...]:
        *parts, target = given
        leaves = [x.detach().requires_grad_(flag) for x, flag in zip(parts, flags, strict=True)]
        loss = op(*leaves, target, smoothing=0.1, chunk=3)
        return (loss.detach(), *torch.autograd.grad(loss * 3, [x for x in leaves if x.requires_grad]))

    graph = make_fx(gradients, tracing_mode="fake")(*values, target)
    calls = [target_of(n) for n in graph.graph.nodes if n.op == "call_function"]
    assert calls.count("shardwright.whole_head") == 1
    assert not any(name in calls for name in ("aten.mm", "aten.addmm", "aten._log_softmax"))
    assert all(torch.equal(a, b) for a, b in zip(graph(*values, target), gradients(*values, target), strict=True))
    leaves = [x for x, flag in zip(values, flags, strict=True) if flag]
    wanted = torch.autograd.grad(eager(*values, target, smoothing=0.1) * 3, leaves)
    assert all(
        torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(graph(*values, target)[1:], wanted, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", ["bias;to float32", "mul 0.5;bias;tanh", "to bfloat16"])
def test_shapes_and_dtypes_are_known_without_running(steps: str, dtype: torch.dtype) -> None:
    x, weight, bias, target = (t.detach() for t in operands(dtype=dtype))
    has = "bias" in steps
    for wanted in itertools.product([True, False], [True, False], [has, False]):
        arguments = (x, weight, bias if has else None, target, steps, -100, 0.0, 4, list(wanted))
        torch.library.opcheck(whole_head, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.nightly
def test_compiled_chunks_take_the_memory_of_one() -> None:
    from shardwright.runtime.monitor import measure_peak

    rows, k, classes = 2048, 64, 8192
    x, weight = torch.randn(rows, k, requires_grad=True), torch.randn(classes, k, requires_grad=True)
    target = torch.randint(0, classes, (rows,))

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.shardwright.linear_cross_entropy(x, weight, target, None, "", -100, 0.0, 128)

    peaks = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        function(x, weight).backward()
        peaks.append(measure_peak(lambda f=function: f(x, weight).backward()).bytes)
    assert peaks[1] < 1.05 * peaks[0]

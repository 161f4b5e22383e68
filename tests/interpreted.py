"""Run by test_lowerings.py: lowerings in Triton against the composite ops in plain torch; interpreted on a CPU, or on a GPU."""

from __future__ import annotations

import random

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import numpy as np
import shardwright
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from shardwright.passes.fuse.ops import liger
from test_lowerings import Block

FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}
FLOAT16 = {"rtol": 4e-3, "atol": 4e-3}
ops = torch.ops.shardwright


@triton.jit
def rsqrt(x):  # type: ignore[no-untyped-def]
    return 1.0 / tl.sqrt(x)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


def complete_interpreter() -> None:
    """What the compiler has and the interpreter lacks: numbers are float32 scalars, and functions of libdevice."""
    convert = interpreter._implicit_cvt

    def converted(arg: object) -> object:
        if not isinstance(arg, float):
            return convert(arg)
        return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = converted
    liger_kernel.ops.rms_norm.rsqrt = rsqrt
    liger_kernel.ops.geglu.tanh = tanh


def compare(plain, other, tensors, rest, tolerance) -> None:  # type: ignore[no-untyped-def]
    """Values and gradients of both, operands unchanged."""
    found = []
    for op in (plain, other):
        own = [t.detach().clone().requires_grad_(t.requires_grad) if t is not None else None for t in tensors]
        y = op(*own, *rest)
        incoming = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
        wanted = [t for t in own if t is not None and t.requires_grad]
        grads = torch.autograd.grad(y, wanted, incoming)
        found.append((y, *grads))
        for before, after in zip(tensors, own, strict=True):
            assert before is None or torch.equal(before, after)
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, **tolerance)


def shapes(rng: random.Random) -> tuple[int, ...]:
    return (*(rng.randint(1, 5) for _ in range(rng.randint(0, 2))), rng.randint(1, 70))


def norms(rng: random.Random) -> None:
    for dtype, tolerance in ((torch.float32, FLOAT32), (torch.float16, FLOAT16)):
        for _ in range(12):
            shape = shapes(rng)
            x = torch.randn(shape, dtype=dtype).requires_grad_(rng.random() < 0.8)
            weight = torch.randn(shape[-1], dtype=dtype).requires_grad_(rng.random() < 0.8 or not x.requires_grad)
            offset, casts = rng.choice([(0.0, ("llama", dtype, None)), (1.0, ("gemma", None, dtype))])
            if dtype == torch.float32:
                casts = ("gemma", *casts[1:])
            rest = (1e-5, offset, torch.float32, *casts[1:])
            assert liger.rms_mode(x, weight, *rest) == casts[0]
            bare = x.requires_grad and rng.random() < 0.2
            compare(ops.rms_norm.default, ops.rms_norm.liger, [x, None if bare else weight], rest, tolerance)


def gates(rng: random.Random) -> None:
    for act in ("silu", "gelu_tanh"):
        for dtype, tolerance in ((torch.float32, FLOAT32), (torch.float16, FLOAT16)):
            for _ in range(6):
                shape = shapes(rng)
                gate, up = (torch.randn(shape, dtype=dtype) for _ in range(2))
                gate.requires_grad_(rng.random() < 0.8)
                up.requires_grad_(rng.random() < 0.8 or not gate.requires_grad)
                compare(ops.gated.default, ops.gated.liger, [gate, up], (act,), tolerance)


def not_taken() -> None:
    """What the kernels do otherwise runs as the op itself, bit by bit."""
    x, w = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.equal(ops.rms_norm.liger(x, w, 1e-6), ops.rms_norm.default(x, w, 1e-6))
    half = torch.randn(3, 5).half()
    assert torch.equal(ops.rms_norm.liger(half, None, 1e-6), ops.rms_norm.default(half, None, 1e-6))
    assert torch.equal(ops.gated.liger(half, half, "relu"), ops.gated.default(half, half, "relu"))
    assert ops.rms_norm.liger(torch.zeros(0, 5), torch.ones(5), 1e-6).shape == (0, 5)


def traced() -> None:
    """Forward and backward as a compiler's graphs: the kernels are opaque ops in them."""

    def f(x, w):  # type: ignore[no-untyped-def]
        return ops.gated.liger(ops.rms_norm.liger(x, w, 1e-6), x, "silu").sum()

    x, w = torch.randn(4, 9, requires_grad=True), torch.randn(9, requires_grad=True)
    plain = torch.autograd.grad(f(x, w), (x, w))
    compiled = torch.autograd.grad(torch.compile(f, backend="aot_eager", fullgraph=True)(x, w), (x, w))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, **FLOAT32)


def planned() -> None:
    """A plan with the pin runs with the kernels, at parity with the module."""
    torch.manual_seed(1)
    model, x = Block(), torch.randn(2, 6, 12)
    loss = model(x)
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plan = shardwright.make_plan(model, (x,), "cpu:1", pins=("lowering=liger", "passes=rms_norm,gated"))
    assert plan.lowerings == {"shardwright.gated": "liger", "shardwright.rms_norm": "liger"}
    pm = shardwright.apply_plan(model, (x,), plan)
    found = pm(x)
    found.backward()
    torch.testing.assert_close(found.detach(), loss.detach(), **FLOAT32)
    for name, parameter in pm.named_parameters():
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        torch.testing.assert_close(grad, wanted[name], **FLOAT32)
    (program,) = pm._core.programs._known.values()
    targets = {node.target for node in program.lowered.body.graph.nodes}
    assert {ops.rms_norm.liger, ops.gated.liger} <= targets


if __name__ == "__main__":
    INTERPRETED = triton.knobs.runtime.interpret
    torch.set_default_device("cpu" if INTERPRETED else "cuda")
    torch.manual_seed(0)
    if INTERPRETED:
        complete_interpreter()
    norms(random.Random(0))
    gates(random.Random(1))
    not_taken()
    traced()
    if INTERPRETED:
        planned()
    print("equal")

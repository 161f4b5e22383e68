"""Vocabulary-parallel projection and cross-entropy in one, against torch's own, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from pool import Pool
from shardwright.passes.heads.op import linear_cross_entropy
from shardwright.runtime.collectives import CommLedger, all_reduce
from shardwright.runtime.kernels import vocab_head
from test_vocab import formed, mesh_of, mine
from torch import Tensor

ROWS, WIDE, CLASSES = 7, 3, 8
STEPS = "mul 0.5;bias;div 3.0;tanh;mul 3.0"


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, target."""
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, WIDE), (CLASSES, WIDE), (CLASSES,)
    x, weight, bias = ((3 * torch.randn(s, dtype=torch.float64, generator=generator)).to(dtype) for s in shapes)
    target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    target[1] = -100
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), target


def eager(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, smoothing: float, steps: str) -> Tensor:
    logits = F.linear(x, weight)
    if steps:
        logits = 3.0 * torch.tanh((logits * 0.5 + bias) / 3.0)
    return F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)


def head(sizes: tuple[int, ...]) -> None:
    mesh = mesh_of(sizes)
    for smoothing, chunk, steps in itertools.product((0.0, 0.1), (0, 3), ("", STEPS)):
        x, weight, bias, target = operands()
        whole = eager(x, weight, bias, target, smoothing, steps)
        wanted = torch.autograd.grad(whole * 3, [x, weight, *([bias] if steps else [])])
        own = [x.detach().clone().requires_grad_(), mine(weight, 0, mesh), mine(bias, 0, mesh)]
        given: dict[str, Any] = {"bias": own[2], "steps": steps} if steps else {}
        form = linear_cross_entropy, (own[0], own[1], target), {**given, "label_smoothing": smoothing, "chunk": chunk}
        with CommLedger() as ledger:
            part = formed(vocab_head.head_form, form, mesh)
        assert ledger.counts() == {"all_reduce": (3 if chunk else 1) * 2 * len(sizes)}
        with CommLedger() as ledger:
            (part * 3).backward()
        assert ledger.records == []
        assert torch.allclose(part, whole, rtol=0, atol=1e-12)
        d_x = own[0].grad
        for axis in mesh.names:
            d_x = all_reduce(d_x, mesh.group_name(axis))
        assert torch.allclose(d_x, wanted[0], rtol=0, atol=1e-12)
        for a, b in zip(own[1 : len(wanted)], wanted[1:], strict=True):
            assert torch.allclose(a.grad, mine(b, 0, mesh), rtol=0, atol=1e-12)


def half_precision_and_nothing_wanted() -> None:
    mesh = mesh_of((2,))
    x, weight, _, target = operands(torch.bfloat16)
    whole = F.cross_entropy(F.linear(x, weight).float(), target, reduction="sum")
    form = linear_cross_entropy, (x.detach(), mine(weight, 0, mesh).detach(), target), {}
    loss = formed(vocab_head.head_form, form, mesh)
    assert loss.dtype == torch.float32
    assert not loss.requires_grad
    assert torch.allclose(loss, whole, rtol=1e-5)


def compiled() -> None:
    mesh = mesh_of((2,))
    x, weight, _, target = operands()
    own = mine(weight, 0, mesh)

    def step(x: Tensor, weight: Tensor) -> Tensor:
        return formed(vocab_head.head_form, (linear_cross_entropy, (x, weight, target), {"chunk": 3}), mesh) * 2

    expected = torch.autograd.grad(step(x, own), (x, own))
    found = torch.autograd.grad(torch.compile(step, backend="aot_eager")(x, own), (x, own))
    assert all(torch.allclose(a, b) for a, b in zip(expected, found, strict=True))


def test_head(ranks2: Pool, ranks4: Pool) -> None:
    ranks2.run(head, (2,))
    ranks4.run(head, (4,))
    ranks4.run(head, (2, 2))


def test_half_precision_and_no_gradient(ranks2: Pool) -> None:
    ranks2.run(half_precision_and_nothing_wanted)


def test_compiled(ranks2: Pool) -> None:
    ranks2.run(compiled)

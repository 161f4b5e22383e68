"""Vocabulary-parallel embedding and cross-entropy against torch's own, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from pool import Pool
from shardwright.errors import UnsupportedOp
from shardwright.planner.plan import MeshAxis
from shardwright.runtime.collectives import CommLedger, all_reduce
from shardwright.runtime.kernels import vocab
from shardwright.runtime.mesh import Mesh
from torch import Tensor

aten = torch.ops.aten


def mesh_of(sizes: tuple[int, ...]) -> Mesh:
    return Mesh.create([MeshAxis(f"a{i}", n, "model", "") for i, n in enumerate(sizes)], torch.device("cpu"))


def formed(make, form: vocab.CallForm, mesh: Mesh) -> Tensor:
    for axis, i, n in zip(mesh.names, mesh.coordinate, mesh.sizes, strict=True):
        form = make(form, mesh.group_name(axis), i, n)
    target, args, kwargs = form
    return target(*args, **kwargs)


def mine(x: Tensor, dim: int, mesh: Mesh) -> Tensor:
    for i, n in zip(mesh.coordinate, mesh.sizes, strict=True):
        x = x.chunk(n, dim)[i]
    return x.detach().clone().requires_grad_()


def embedding(sizes: tuple[int, ...]) -> None:
    mesh = mesh_of(sizes)
    table = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.tensor([[0, 7, 3, 3], [5, 5, 5, 1]])
    weights = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for padding, by_frequency in itertools.product((-1, 5), (False, True)):
        whole = aten.embedding(table, ids, padding, by_frequency)
        (wanted,) = torch.autograd.grad((whole * weights).sum(), table)
        own = mine(table, 0, mesh)
        with CommLedger() as ledger:
            part = formed(vocab.embedding_form, (aten.embedding.default, (own, ids, padding, by_frequency), {}), mesh)
            (part * weights).sum().backward()
        assert ledger.records == []
        total = part.detach()
        for axis in mesh.names:
            total = all_reduce(total, mesh.group_name(axis))
        assert torch.equal(total, whole)
        assert torch.allclose(own.grad, mine(wanted, 0, mesh).detach(), atol=1e-12)


def cross_entropy(sizes: tuple[int, ...]) -> None:
    mesh = mesh_of(sizes)
    generator = torch.Generator().manual_seed(0)
    for shape, smoothing, reduction in itertools.product([(6, 8), (8,), (2, 8, 3)], (0.0, 0.1), (0, 1, 2)):
        dim = 1 if len(shape) > 1 else 0
        logits = (torch.randn(shape, dtype=torch.float64, generator=generator) * 30).requires_grad_()
        labels = torch.randint(0, 8, [*shape[:dim], *shape[dim + 1 :]], generator=generator)
        if labels.dim():
            labels.view(-1)[1] = -100
        whole = aten.cross_entropy_loss(logits, labels, None, reduction, -100, smoothing)
        (wanted,) = torch.autograd.grad(whole.sum() * 3, logits)
        own = mine(logits, dim, mesh)
        form = aten.cross_entropy_loss.default, (own, labels, None, reduction), {"label_smoothing": smoothing}
        with CommLedger() as ledger:
            part = formed(vocab.loss_form, form, mesh)
        assert ledger.counts() == {"all_reduce": 2 * len(sizes)}
        with CommLedger() as ledger:
            (part.sum() * 3).backward()
        assert ledger.records == []
        assert torch.allclose(part, whole, rtol=0, atol=1e-12), (shape, smoothing, reduction)
        assert torch.allclose(own.grad, mine(wanted, dim, mesh).detach(), rtol=0, atol=1e-12)


def all_labels_ignored_and_low_precision() -> None:
    mesh = mesh_of((2,))
    labels = torch.full((4,), -100)
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    own = mine(logits, 1, mesh)
    loss = formed(vocab.loss_form, (aten.cross_entropy_loss.default, (own, labels, None, 2), {}), mesh)
    loss.backward()
    assert loss.item() == 0
    assert (own.grad == 0).all()
    labels = torch.tensor([1, 7, 0, 4])
    low = logits.bfloat16()
    own = mine(low, 1, mesh)
    form = aten.cross_entropy_loss.default, (own, labels, None, 2), {}
    loss = formed(vocab.loss_form, form, mesh)
    loss.backward()
    assert loss.dtype == own.grad.dtype == torch.bfloat16
    assert torch.allclose(loss.float(), F.cross_entropy(low.float(), labels, reduction="sum"), rtol=1e-2)


def compiled() -> None:
    mesh = mesh_of((2,))
    generator = torch.Generator().manual_seed(0)
    table = mine(torch.randn(8, 4, dtype=torch.float64, generator=generator), 0, mesh)
    ids = torch.randint(0, 8, (5,), generator=generator)

    def step(weight: Tensor) -> Tensor:
        form = aten.embedding.default, (weight, ids), {}
        hidden = all_reduce(formed(vocab.embedding_form, form, mesh).detach(), mesh.group_name("a0"))
        form = aten.cross_entropy_loss.default, (hidden @ weight.T, ids, None, 2), {}
        return formed(vocab.loss_form, form, mesh)

    loss = step(table)
    (grad,) = torch.autograd.grad(loss, table)
    again = torch.compile(step, backend="aot_eager")(table)
    assert torch.allclose(again, loss)
    assert torch.allclose(torch.autograd.grad(again, table)[0], grad)


def test_embedding(ranks2: Pool, ranks4: Pool) -> None:
    ranks2.run(embedding, (2,))
    ranks4.run(embedding, (4,))
    ranks4.run(embedding, (2, 2))


def test_cross_entropy(ranks2: Pool, ranks4: Pool) -> None:
    ranks2.run(cross_entropy, (2,))
    ranks4.run(cross_entropy, (4,))
    ranks4.run(cross_entropy, (2, 2))


def test_ignored_labels_and_low_precision(ranks2: Pool) -> None:
    ranks2.run(all_labels_ignored_and_low_precision)


def test_compiled(ranks2: Pool) -> None:
    ranks2.run(compiled)


def test_class_weights_are_refused() -> None:
    with pytest.raises(UnsupportedOp, match="class weights"):
        vocab.loss_form((aten.cross_entropy_loss.default, ("logits", "labels", "weight"), {}), "0", 0, 2)

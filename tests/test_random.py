"""Seeded random ops: reproducible, independent across salts, right on average, eager and compiled alike."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shardwright.passes import random
from torch import Tensor

aten = torch.ops.aten
SEED = torch.tensor(7)


def test_dropout_is_a_function_of_seed_and_salt() -> None:
    x = torch.ones(64, 64, dtype=torch.float64)
    before = torch.get_rng_state()
    first = random.dropout(x, 0.25, SEED, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, random.dropout(x, 0.25, SEED, 3))
    others = [random.dropout(x, 0.25, SEED, 4), random.dropout(x, 0.25, SEED + 1, 3), random.dropout(x, 0.25, -SEED, 3)]
    for other in others:
        # Independent masks agree with probability 0.75^2 + 0.25^2.
        assert abs(float((first == other).double().mean()) - 0.625) < 0.03
    assert abs(float(first.mean()) - 1) < 0.02
    assert set(first.unique().tolist()) == {0.0, 1 / 0.75}


def test_dropout_gradient_uses_the_same_mask() -> None:
    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    y = random.dropout(x, 0.5, SEED, 0)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0).double() * 2)
    assert torch.equal(random.dropout(x, 1.0, SEED, 0), torch.zeros_like(x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.float64])
def test_attention_without_drops_is_attention(causal: bool, masked: torch.dtype | None) -> None:
    if causal and masked is not None:
        pytest.skip("torch refuses both")
    q = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 6, 8, dtype=torch.float64)
    mask = None if masked is None else torch.ones(6, 6).tril().to(masked)
    wanted = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.3, enable_gqa=True)
    found = random.attention(q, k, v, mask, 1e-12, causal, 0.3, True, SEED, 0)
    assert torch.allclose(found, wanted, atol=1e-10)


def test_attention_dropout_is_right_on_average() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8, dtype=torch.float64)
    wanted = F.scaled_dot_product_attention(q, k, v)
    runs = torch.stack(
        [random.attention(q, k, v, None, 0.2, False, None, False, torch.tensor(i), 5) for i in range(400)]
    )
    assert float((runs.mean(0) - wanted).abs().max()) < 6 * float(runs.std(0).max()) / 20
    assert float(runs.std(0).min()) > 0


def test_compiled_draws_the_same_numbers() -> None:
    x, q = torch.randn(4, 8, requires_grad=True), torch.randn(1, 2, 4, 8)

    def forward(x: Tensor, q: Tensor, seed: Tensor) -> Tensor:
        y = random.attention(q, q, q, None, 0.3, True, None, False, seed, 9)
        return (random.dropout(x, 0.5, seed, 1) * y).sum()

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for seed in (torch.tensor(1), torch.tensor(2)):
        eager, again = forward(x, q, seed), compiled(x, q, seed)
        assert torch.allclose(eager, again)
        grads = [torch.autograd.grad(loss, x)[0] for loss in (eager, again)]
        assert torch.allclose(*grads)


def test_forms() -> None:
    x = torch.randn(3, 3)
    assert random.seeded_call((aten.add.Tensor, (x, x), {}), 0) is None
    assert random.seeded_call((aten.dropout.default, (x, 0.5, False), {}), 0) is None
    assert random.seeded_call((aten.dropout.default, (x, 0.0, True), {}), 0) is None
    assert random.seeded_call((aten.scaled_dot_product_attention.default, (x, x, x), {}), 0) is None
    forms = [
        (aten.dropout.default, (x, 0.5, True), {}),
        (aten.feature_dropout.default, (x, 0.5, True), {}),
        (aten.rand_like.default, (x,), {}),
        (aten.bernoulli.default, (x.sigmoid(),), {}),
        (aten.scaled_dot_product_attention.default, (x, x, x), {"dropout_p": 0.5}),
    ]
    for form in forms:
        make = random.seeded_call(form, 11)
        assert make is not None
        results = []
        for _ in range(2):
            target, args, kwargs = make(SEED)
            before = torch.get_rng_state()
            results.append(target(*args, **kwargs))
            assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(*results)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    x = torch.ones(64, 64, device="cuda")
    assert torch.equal(random.dropout(x, 0.5, SEED, 1), random.dropout(x, 0.5, SEED, 1))
    q = torch.randn(2, 4, 64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    runs = [random.attention(q, q, q, None, 0.5, True, None, False, SEED, 1) for _ in range(2)]
    assert torch.equal(*runs)
    runs[0].sum().backward()

"""Backward passes in two halves: the gradients of an undivided one, each in its half, by the same products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counting import Products
from shardwright.passes.experts.gates import trace_gate
from shardwright.passes.experts.op import experts
from shardwright.runtime.again import Again
from shardwright.runtime.halves import Cut, Half, Halves
from shardwright.runtime.regather import Regather
from torch import Tensor
from torch.nn.functional import conv2d, embedding, layer_norm, linear, silu

CLOSE = {"atol": 1e-12, "rtol": 1e-12}
GATE = trace_gate(silu, 8, torch.float64)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Random leaves."""
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def twice(x: Tensor, w: Tensor) -> Tensor:
    """A parameter that enters an op's graph at two nodes, one behind the other."""
    return torch.tanh(x @ w) @ w


def routed(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    index = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 1]])
    return experts(x, index, torch.rand(4, 2, dtype=x.dtype), up, down, None, None, GATE, False)


def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return layer_norm(x, (4,), w, b)


CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], bool, bool]] = {
    "linear": (linear, [(2, 3, 4), (5, 4)], True, True),
    "linear with bias": (linear, [(2, 3, 4), (5, 4), (5,)], True, True),
    "batched": (torch.bmm, [(2, 3, 4), (2, 4, 5)], True, True),
    "convolution": (conv2d, [(2, 3, 8, 8), (4, 3, 3, 3), (4,)], True, True),
    "experts": (routed, [(4, 6), (3, 8, 6), (3, 6, 8)], True, True),
    "entered twice": (twice, [(3, 4), (4, 4)], True, False),
    "norm": (norm, [(2, 3, 4), (4,), (4,)], False, False),
}
"""op, shapes of its operands, whether it is a product, whether its products divide between the halves."""


def divided(op: Callable[..., Tensor], product: bool, divides: bool, leaves: list[Tensor]) -> list[Products]:
    """Two halves over one op whose first operand is an activation; the products of each."""
    x, *weights = leaves
    torch.manual_seed(1)
    with Halves() as halves:
        y = Half(op, product)(x.sin(), *[Cut(i)(w) for i, w in enumerate(weights)])
    with Products() as first:
        y.square().sum().backward()
    assert x.grad is not None
    assert [w.grad is None for w in weights] == [divides] * len(weights)
    with Products() as second:
        halves.finish()
    return [first, second]


@pytest.mark.parametrize("name", CASES)
def test_the_backward_pass_asks_once_for_what_was_saved(name: str) -> None:
    op, shapes, _, _ = CASES[name]
    leaves, asked = tensors(*shapes), Counter[int]()

    def kept(x: Tensor) -> tuple[int, Tensor]:
        asked[len(asked)] = 0
        return len(asked) - 1, x

    def wanted(entry: tuple[int, Tensor]) -> Tensor:
        asked[entry[0]] += 1
        return entry[1]

    with torch.autograd.graph.saved_tensors_hooks(kept, wanted):
        y = op(*leaves)
    y.backward(torch.ones_like(y))
    assert set(asked.values()) == {1}


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_products_are_those_of_an_undivided_pass(name: str) -> None:
    op, shapes, product, divides = CASES[name]
    whole, parted = tensors(*shapes), tensors(*shapes)
    torch.manual_seed(1)
    y = op(whole[0].sin(), *whole[1:])
    with Products() as wanted:
        y.square().sum().backward()
    first, second = divided(op, product, divides, parted)
    for mine, theirs in zip(parted, whole, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
    assert first.seen + second.seen == wanted.seen
    assert bool(second.seen) == divides


def model(x: Tensor, ids: Tensor, table: Tensor, w: Tensor, v: Tensor, step: Any, cut: Any) -> Tensor:
    """A table that is also the last projection, a derived parameter, one used twice, one that is frozen."""
    table, turned, v = cut(table, 0), cut(w.t() * 2, 1), cut(v, 2)
    h = step(embedding, False)(ids, table) + x
    h = step(torch.matmul, True)(h, turned).tanh()
    h = step(torch.add, False)(step(torch.matmul, True)(h, turned), step(linear, True)(h, v))
    return step(linear, True)(h, table).logsumexp(-1).sum()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_used_several_times(frozen: bool, whole: bool) -> None:
    ids = torch.tensor([[1, 2, 3], [0, 2, 2]])
    found = []
    for parted in (False, True):
        x, table, w, v = tensors((2, 3, 4), (7, 4), (4, 4), (4, 4))
        v.requires_grad_(not frozen)
        calls: list[int] = []
        table.register_post_accumulate_grad_hook(lambda _, calls=calls: calls.append(1))
        with Halves() as halves, Products() as products:
            halves.whole = whole
            if parted:
                model(x, ids, table, w, v, Half, lambda t, part: Cut(part)(t)).backward()
            else:
                model(x, ids, table, w, v, lambda op, _: op, lambda t, _: t).backward()
            early = [p.grad is not None for p in (table, w)]
            halves.finish()
        assert not parted or early == [whole, whole]
        assert calls == [1]
        found.append((products.seen, [x.grad, table.grad, w.grad, v.grad]))
    (wanted_seen, wanted), (seen, grads) = found
    assert seen == wanted_seen
    assert (wanted[3] is None) == frozen
    torch.testing.assert_close(grads, wanted, **CLOSE)


def test_what_runs_again_is_not_kept_for_later() -> None:
    """The gradient of a parameter whose other operand is made again is made with it, and by the same products."""
    seen = []
    for parted in (False, True):
        x, w, v = tensors((3, 4), (4, 4), (5, 4))
        with Regather(), Halves() as halves:
            h = Again(torch.tanh)(x @ w)
            y = Half(linear, True)(h, Cut(0)(v)) if parted else linear(h, v)
        with Products() as products:
            y.sum().backward()
        assert v.grad is not None
        assert not halves.owed
        seen.append(products.seen)
    assert seen[0] == seen[1]


def test_without_a_block_ops_run_as_ever() -> None:
    x, w = tensors((3, 4), (5, 4))
    Half(linear, True)(x, Cut(0)(w)).sum().backward()
    assert w.grad is not None


def test_a_result_that_nothing_reads_owes_nothing() -> None:
    x, w, v = tensors((3, 4), (5, 4), (5, 4))
    with Halves() as halves:
        y, _ = Half(linear, True)(x, Cut(0)(w)), Half(linear, True)(x, Cut(1)(v))
    y.sum().backward()
    halves.finish()
    assert w.grad is not None
    assert v.grad is None

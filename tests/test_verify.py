"""The oracle itself: wrong rules are reported, and local arguments are those of the pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import rule_samples
import torch
from shardwright.passes.experiment import flat, strip
from shardwright.passes.localize import localize, split_mean
from shardwright.passes.verify import verify_rule
from shardwright.planner.rules import Operand, instantiate
from torch import fx

A = torch.ops.aten


def sample(line: str):
    """(target, args, kwargs, rule) of one call written as in rule_samples.txt."""
    target, args, kwargs = rule_samples.parse(line)(rule_samples.Draw(0))
    found: list[torch.Tensor] = []
    bare, named = strip(tuple(args), found), strip(dict(kwargs), found)
    shapes = [x.shape for x in found], [r.shape for r in flat(target(*args, **kwargs))]
    return target, args, kwargs, instantiate(str(target), bare, named, *shapes)


BROKEN = {
    "softmax over a split dim": ("softmax.int(x(b, s), 1)", {"never": frozenset()}),
    "a causal query split": (
        "scaled_dot_product_attention.default(x(2, 2, 4, 2), x(2, 2, 4, 2), x(2, 2, 4, 2), is_causal=True)",
        {"never": frozenset({"t", "k"})},
    ),
    "a bias added on every rank": ("linear.default(x(b, h), x(k, h), x(k))", {"never": frozenset()}),
    "add linear in one operand": ("add.Tensor(x(b, s), x(b, s))", {"linear": ((0,),)}),
    "mul jointly linear": ("mul.Tensor(x(b, s), x(b, s))", {"linear": ((0, 1),)}),
    "relu linear": ("relu.default(x(b, s))", {"linear": ((0,),)}),
    "a number added to a partial sum": ("add.Tensor(x(b, s), 1.0)", {"linear": ((0,),)}),
    "a cast to integers linear": ("to.dtype(x(b, s), torch.int64)", {"linear": ((0,),)}),
    "masking with a number": ("masked_fill.Scalar(x(b, s), mask(b, s), 2.0)", {"linear": ((0,),)}),
    "letters swapped": ("t.default(x(4, 2))", {"results": ((("a",), ("b",)),)}),
    "a result in the wrong dim": ("neg.default(x(4, 4))", {"results": ((("b1",), ("b0",)),)}),
    "a maximum as a sum": ("amax.default(x(b, s), [1])", {"never": frozenset()}),
    "positions": ("triu.default(x(4, 4))", {"never": frozenset()}),
    "a window": ("slice.Tensor(x(4, 6), 1, 2)", {"never": frozenset()}),
    "flip": ("flip.default(x(4, 4), [1])", {"never": frozenset()}),
    "a missing operand": ("add.Tensor(x(b, s), x(b, s))", {"operands": ((("b0",), ("b1",)),)}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_reported(name):
    line, change = BROKEN[name]
    target, args, kwargs, rule = sample(line)
    assert verify_rule(target, args, kwargs, rule) == []
    assert verify_rule(target, args, kwargs, replace(rule, **change)) != []


def test_a_wrong_gradient_is_reported():
    """Right values do not excuse a gradient that is not a function of the piece."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, g):
            return g * g.numel()

    x = torch.randn(4, 6)
    rule = instantiate("aten.neg", (Operand(0),), {}, [(4, 6)], [(4, 6)])
    problems = verify_rule(Scaled.apply, (x,), {}, replace(rule, linear=()))
    assert problems
    assert all("gradient of operand 0" in p for p in problems)


def test_problems_name_the_letter_and_the_deviation():
    target, args, kwargs, rule = sample("softmax.int(x(4, 6), 1)")
    problems = verify_rule(target, args, kwargs, replace(rule, never=frozenset()))
    assert any(p.startswith("splitting d 2 ways") and "result 0 differs by" in p for p in problems)


def test_an_op_that_fails_is_reported():
    rule = instantiate("aten.neg", (Operand(0),), {}, [(4, 6)], [(4, 6)])
    assert verify_rule(A.view.default, (torch.randn(4, 6), [7]), {}, rule)[0].startswith("the op itself fails")


def test_more_ways_than_two():
    target, args, kwargs, rule = sample("linear.default(x(4, 8), x(12, 8))")
    assert verify_rule(target, args, kwargs, rule, ways=4) == []


# What a split leaves of the arguments: (call, local sizes, arguments after the tensors).
LOCAL = [
    ("view.default(x(4, 6, 8), [24, -1])", {"a": 2}, ([12, 8],)),
    ("view.default(x(4, 6, 8), [24, -1])", {"b": 3}, ([12, 8],)),
    ("reshape.default(x(4, 48), [4, 6, 8])", {"b": 2}, None),
    ("expand.default(x(4, 1), [4, 6])", {"b": 3}, ([4, 3],)),
    ("expand.default(x(4, 1), [-1, 6])", {"a": 2}, ([2, 6],)),
    ("split.Tensor(x(4, 6), 2, 1)", {"c": 1}, (1, 1)),
    ("split.sizes(x(4, 12), [8, 4], 1)", {"c": 2}, ([4, 2], 1)),
    ("slice.Tensor(x(4, 12), 1, 4, 8)", {"c": 2}, (1, 2, 4)),
    ("slice.Tensor(x(4, 12), 1, 6)", {"c": 2}, (1, 2)),
    ("slice.Tensor(x(4, 12), 1, 0, 5)", {"a": 2}, (1, 0, 5)),
    ("repeat.default(x(2, 4), [6, 2])", {"c": 2}, ([2, 2],)),
    ("squeeze.default(x(2, 1))", {"a": 1}, ([1],)),
    ("squeeze.dim(x(2, 4), 0)", {"a": 1}, ([],)),
    ("group_norm.default(x(2, 12, 4), 4)", {"g": 2}, (2,)),
    ("mean.dim(x(4, 6), [1])", {"b0": 2}, ([1],)),
]


@pytest.mark.parametrize(("line", "sizes", "wanted"), LOCAL)
def test_local_arguments(line, sizes, wanted):
    target, args, kwargs, rule = sample(line)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    _, local, _ = localize(target, args, kwargs, rule, sizes)
    assert all(a is b for a, b in zip(local, tensors, strict=False)), "tensors pass through"
    if wanted is not None:
        assert tuple(local[len(tensors) :]) == wanted


def test_factories_and_means():
    target, args, kwargs, rule = sample("zeros.default([4, 6])")
    assert localize(target, args, kwargs, rule, {"b": 3})[1] == ([4, 3],)
    target, args, kwargs, rule = sample("mean.dim(x(4, 6), [1], True)")
    found = localize(target, args, kwargs, rule, {"d": 3})
    assert found[0] is split_mean
    assert found[1][1:] == ([1], True, 6)


def test_arguments_may_be_anything():
    """Graph nodes and markers stand where tensors do."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    rule = instantiate("aten.view", (Operand(0), [24, 8]), {}, [(4, 6, 8)], [(24, 8)])
    assert localize(A.view.default, (node, [24, 8]), {}, rule, {"a": 2}) == (A.view.default, (node, [12, 8]), {})
    assert localize("aten.view", (Operand(0), [24, 8]), {}, rule, {"a": 2})[1] == (Operand(0), [12, 8])


def test_nothing_split_changes_nothing():
    target, args, kwargs, rule = sample("view.default(x(4, 6, 8), [24, -1])")
    assert localize(target, args, kwargs, rule, {}) == (target, args, kwargs)

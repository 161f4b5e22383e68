"""Every line of the rule table verified against the op itself, what particular rules say, and what a wrong rule does."""

from __future__ import annotations

import random

import pytest
import rule_samples
import torch
from shardwright.passes.experiment import flat, strip
from shardwright.passes.verify import verify_rule
from shardwright.planner.rule_pattern import parse
from shardwright.planner.rules import RULES, VIEWS, Operand, instantiate

OPS = sorted(op for op in {*RULES, *VIEWS} if op.startswith("aten."))  # ops of this package have tests of their own
SAMPLES = rule_samples.read()
A = torch.ops.aten


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def instance(target, args, kwargs):
    found: list[torch.Tensor] = []
    bare, named = strip(tuple(args), found), strip(dict(kwargs), found)
    results = flat(target(*args, **kwargs))
    return instantiate(str(target), bare, named, [x.shape for x in found], [r.shape for r in results])


def rule(line: str, seed: int = 0):
    """The rule of one call written as in rule_samples.txt."""
    return instance(*rule_samples.parse(line)(rule_samples.Draw(seed)))


@pytest.mark.parametrize("op", OPS)
def test_every_line_is_true_of_its_op(op):
    name = op.removeprefix("aten.")
    if name in rule_samples.RANDOM:
        return
    samples = SAMPLES.get(name) or rule_samples.elementwise(name)
    assert samples, f"no sample call of {op}: add a line to rule_samples.txt"
    for seed, sample in enumerate(samples * 2):
        target, args, kwargs = sample(rule_samples.Draw(seed))
        found = instance(target, args, kwargs)
        assert found is not None, f"{target} has no rule for {[getattr(a, 'shape', a) for a in args]}"
        assert verify_rule(target, args, kwargs, found, seed=seed) == [], f"{target}: {found}"


def test_every_sample_is_of_an_op_with_a_rule():
    assert {f"aten.{name}" for name in SAMPLES} <= set(OPS)


@pytest.mark.parametrize("op", sorted(RULES))
def test_every_line_parses(op):
    line = parse(RULES[op].line)
    assert line.operands
    assert line.results
    assert all(max(group) < len(line.operands) or line.repeats for group in RULES[op].linear if group)


# What the table says of calls that matter: b=4 s=4 h=2 k=4 v=6 in the draw with seed 0.
SAID = {
    "linear.default(x(b, s, h), x(k, h))": ("b0 b1 k, n k -> b0 b1 n", ((0,), (1,))),
    "linear.default(x(b, h), x(k, h), x(k))": ("b0 k!, n k, n -> b0 n", ((0, 2), (1, 2))),
    "layer_norm.default(x(b, s, h), [h], x(h), x(h))": ("b0 b1 n!, n, n -> b0 b1 n", ()),
    "embedding.default(x(v, h), ids(v, b, s))": ("v h, b0 b1 -> b0 b1 h", ((0,),)),
    "cross_entropy_loss.default(x(b, v), labels(v, b), None, 2)": ("b0 v, b0 -> ", ()),
    "cross_entropy_loss.default(x(b, v), labels(v, b), unit(v), 2)": ("b0 v!, b0, v -> ", ()),
    "add.Tensor(x(b, s), x(s))": ("b0 b1, b1 -> b0 b1", ((0, 1),)),
    "add.Tensor(x(b, s), 1.0)": ("b0 b1 -> b0 b1", ()),
    "mul.Tensor(x(b, s), x(1, s))": ("b0 b1, 1 b1 -> b0 b1", ((0,), (1,))),
    "div.Tensor(x(b, s), x(s))": ("b0 b1, b1 -> b0 b1", ((0,),)),
    "split.Tensor(x(b, 3 * h), h, 1)": ("a (b! c) -> a c, a c, a c", ((0,),)),
    "slice.Tensor(x(b, 2 * s), 1, s)": ("a (b! c) -> a c", ((0,),)),
    "slice.Tensor(x(b, s), 1, 1)": ("a b! -> a c!", ((0,),)),
    "cat.default([x(b, s), x(b, s)], 1)": ("a b, a b -> a (c! b)", ((0, 1),)),
    "view.default(x(b, s, h), [b * s, h])": ("a b c -> (a b) c", ((0,),)),
    "view.default(x(6, 4), [8, 3])": ("a! b! -> c! d!", ((0,),)),
    "view.default(x(4, 12), [2, 24])": ("(a b) c -> a (b c)", ((0,),)),
    "expand.default(x(b, 1), [b, s])": ("a 1 -> a b", ((0,),)),
    "sum.dim_IntList(x(b, s), [1], True)": ("b0 d -> b0 1", ((0,),)),
    "softmax.int(x(b, s), -1)": ("b0 d! -> b0 d", ()),
    "to.dtype(x(b, s), torch.int64)": ("b0 b1 -> b0 b1", ()),
    "conv2d.default(x(b, 3, 4, 4), x(k, 3, 2, 2))": ("z i s0! s1!, o i k0! k1! -> z o t0! t1!", ((0,), (1,))),
    "masked_fill.Scalar(x(b, s), mask(b, s), -1e9)": ("b0 b1, b0 b1 -> b0 b1", ()),
}


@pytest.mark.parametrize("line", SAID)
def test_what_the_table_says(line):
    found = rule(line)
    assert (str(found), found.linear) == SAID[line]


def test_attention():
    causal = rule("scaled_dot_product_attention.default(x(2, 4, 8, 2), x(2, 4, 8, 2), x(2, 4, 8, 6), is_causal=True)")
    # Not the width of values: no fused kernel takes one other than that of queries.
    assert causal.free() == ("b0", "b1")
    assert causal.linear == ((2,),)
    plain = rule("scaled_dot_product_attention.default(x(2, 4, 8, 2), x(2, 4, 8, 2), x(2, 4, 8, 6))")
    assert "s" in plain.free()
    assert plain.flops == 2 * causal.flops == 2 * 2 * 4 * 8 * 8 * (2 + 6)
    assert plain.backward_flops == 2.5 * plain.flops
    grouped = rule("scaled_dot_product_attention.default(x(2, 8, 6, 2), x(2, 4, 6, 2), x(2, 4, 6, 6), enable_gqa=True)")
    assert grouped.operands[0][1] == ("u", "g")
    assert grouped.operands[1][1] == ("u",)
    assert (grouped.sizes["u"], grouped.sizes["g"]) == (4, 2)


def test_implementations():
    assert rule("embedding.default(x(v, h), ids(v, b))").implementation == {"v": "vocab_embedding"}
    plain = rule("cross_entropy_loss.default(x(b, v), labels(v, b), None, 2)")
    assert plain.implementation == {"v": "vocab_loss"}
    assert "v" not in plain.free()
    for other in ("None, 0", "None, 2, -100, 0.1", "unit(v), 2", "None, 1"):
        assert rule(f"cross_entropy_loss.default(x(b, v), labels(v, b), {other})").implementation == {}
    mean = rule("cross_entropy_loss.default(x(b, v), labels(v, b))")
    assert mean.free() == ()


def test_flops():
    assert rule("linear.default(x(2, 4, 6), x(8, 6))").flops == 2 * 2 * 4 * 6 * 8
    assert rule("conv2d.default(x(2, 4, 6, 6), x(8, 2, 3, 3), groups=2)").flops == 2 * 2 * 8 * 4 * 4 * 2 * 9
    assert rule("view.default(x(2, 4), [8])").flops == 0
    assert rule("relu.default(x(2, 4))").flops == 8


def test_forms_without_a_rule():
    assert instantiate("aten.no_such_op", (Operand(0),), {}, [(4,)], [(4,)]) is None
    assert instantiate("aten.where.default", (Operand(0),), {}, [(4,)], [(3, 1)]) is None
    mask = (Operand(0), [Operand(1)])
    assert instantiate("aten.index.Tensor", mask, {}, [(4, 6), (4, 6)], [(7,)]) is None


@pytest.mark.parametrize("seed", range(60))
def test_reshapes_of_random_factors(seed):
    """Any two groupings of the same factors refine to those factors: no dim of either side is lost."""
    draw = random.Random(seed)
    factors = [draw.choice((1, 2, 3, 4, 6)) for _ in range(5)]

    def grouped():
        shape, left = [], list(factors)
        while left:
            take = draw.randint(1, len(left))
            product = 1
            for n in left[:take]:
                product *= n
            shape.append(product)
            left = left[take:]
        return shape

    before, after = grouped(), grouped()
    x = torch.randn(before, dtype=torch.float64)
    found = instance(A.view.default, (x, after), {})
    assert not found.never
    assert verify_rule(A.view.default, (x, after), {}, found) == []

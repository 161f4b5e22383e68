"""Every line of the rule table, verified against the op itself, and the shapes of particular rules."""

from __future__ import annotations

import pytest
import rule_samples
import torch

from shardwright.passes.experiment import flat, strip
from shardwright.passes.verify import verify_rule
from shardwright.planner.rules import RULES, VIEWS, Operand, instantiate

OPS = sorted({*RULES, *VIEWS})


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def instance(target, args, kwargs):
    found: list[torch.Tensor] = []
    bare, bare_kwargs = strip(tuple(args), found), strip(dict(kwargs), found)
    results = flat(target(*args, **kwargs))
    return instantiate(str(target), bare, bare_kwargs, [x.shape for x in found], [r.shape for r in results])


@pytest.mark.parametrize("op", OPS)
def test_every_line(op):
    name = op.removeprefix("aten.")
    if name in rule_samples.RANDOM:
        return  # nothing to compare: test_random_ops_only_have_shapes
    samples = rule_samples.SAMPLES.get(name) or rule_samples.elementwise(name)
    assert samples, f"no sample call for {op}"
    for seed, make in enumerate(samples * 2):
        target, args, kwargs = make(rule_samples.Draw(seed))
        rule = instance(target, args, kwargs)
        assert rule is not None, (target, [getattr(a, "shape", a) for a in args])
        assert verify_rule(target, args, kwargs, rule) == [], f"{target} {rule}"

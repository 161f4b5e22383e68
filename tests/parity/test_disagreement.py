"""What does not agree with the plan is refused or found; one process needs nobody to agree with."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from running import TIGHT, differences, eager, parallel, plan_of, same, whole_gradients
from shardwright.errors import LaunchError, PlanMismatch
from shardwright.planner import rules
from shardwright.planner.placement import R, split
from shardwright.planner.plan import Plan
from shardwright.runtime.programs import same_split


@contextlib.contextmanager
def broken_rule() -> Iterator[None]:
    """Softmax as if each element along its dim stood alone."""
    known = rules.RULES
    wrong = replace(known["aten.softmax"], line="*b @d -> *b @d")
    with unittest.mock.patch.object(rules, "RULES", {**known, "aten.softmax": wrong}):
        yield


def verified_with_a_broken_rule(plan: Plan) -> list[dict[str, Any]]:
    with broken_rule():
        return differences("softmax", plan)


def test_a_broken_rule_fails_verification(ranks2: Pool) -> None:
    right = plan_of("softmax", "tp=2", 2)
    assert all(d["ok"] for d in ranks2.run(differences, "softmax", right)[0])
    with broken_rule():
        wrong = plan_of.__wrapped__("softmax", "tp=2", 2)
    assert wrong.regions != right.regions
    found = ranks2.run(verified_with_a_broken_rule, wrong)
    assert found[0] == found[1]
    assert [d["kind"] for d in found[0] if not d["ok"]] == ["loss", "gradient", "parameter after 3 steps"]


def different_models(plan: Plan) -> None:
    name = "tied" if dist.get_rank() == 0 else "adapter"
    with pytest.raises(PlanMismatch, match="the model has" if name == "adapter" else "rank 1 could not apply the plan"):
        parallel(name, plan)


def test_ranks_with_different_models_are_refused(ranks2: Pool) -> None:
    ranks2.run(different_models, plan_of("tied", "dp=2", 2))


def another_batch(plan: Plan) -> None:
    with pytest.raises(PlanMismatch, match="a batch of 8, the inputs have 16"):
        parallel("mlp", plan, batch=16)


def test_a_plan_for_another_batch_says_which(ranks2: Pool) -> None:
    ranks2.run(another_batch, plan_of("mlp", "dp=2", 2))


def wrong_world(plan: Plan) -> None:
    with pytest.raises(LaunchError, match=r"4 ranks .* 2 are running"):
        parallel("mlp", plan)


def test_a_plan_for_another_number_of_ranks_is_refused(ranks2: Pool) -> None:
    ranks2.run(wrong_world, plan_of("mlp", "dp=4", 4))


def test_one_process_without_a_process_group() -> None:
    assert not dist.is_initialized()
    model, _, batch = eager("tied")
    _, pm = parallel("tied", plan_of("tied", "", 1))
    for module in (model, pm):
        module(**batch)["loss"].backward()
    same(whole_gradients(pm), {n: p.grad for n, p in model.named_parameters()})
    same(pm.full_state_dict(), model.state_dict())
    torch.testing.assert_close(
        torch.nn.utils.clip_grad_norm_(pm.parameters(), 1.0),
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        **TIGHT,
    )


def test_one_process_with_microbatches() -> None:
    model, _, batch = eager("tied")
    _, pm = parallel("tied", plan_of("tied", "micro_batch=2", 1))
    for module in (model, pm):
        module(**batch)["loss"].backward()
    same(whole_gradients(pm), {n: p.grad for n, p in model.named_parameters()})


def unused_in_eval(plan: Plan) -> None:
    model, args, _ = eager("teacher")
    _, pm = parallel("teacher", plan)
    with torch.no_grad():
        torch.testing.assert_close(pm.eval()(*args), model.eval()(*args), **TIGHT)


def test_parameters_no_graph_uses_do_not_stand_in_the_way(ranks2: Pool) -> None:
    ranks2.run(unused_in_eval, plan_of("teacher", "dp=2 zero=3", 2))


def test_a_home_split_is_found_again_among_other_factors() -> None:
    minor = (split(0, 1),)
    assert same_split(minor, ((3, 24),), ((3, 4, 6),), (2,)) == minor
    assert same_split(minor, ((3, 24),), ((72,),), (2,)) is None
    assert same_split(minor, ((3, 24),), ((3, 3, 8),), (2,)) is None
    assert same_split((split(0), R), ((8, 3),), ((24,),), (2, 4)) == (split(0), R)

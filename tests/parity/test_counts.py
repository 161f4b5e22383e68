"""What communicates: the textbook counts of known schemes, and the plan's prediction against what ran."""

from __future__ import annotations

from collections import Counter

import pytest
from models import build
from pool import Pool
from running import plan_of, records, traffic
from shardwright.passes.choose import listed
from shardwright.passes.prepare import prepare
from shardwright.planner.assign import assign
from shardwright.planner.plan import Plan

LAYERS = 2


def counted(found: list[tuple[str, str, int, str]]) -> Counter[tuple[str, str, str]]:
    """Calls by (collective, axis, phase)."""
    return Counter((collective, axis, phase) for collective, axis, _, phase in found)


def per_layer(name: str, pins: str, pool: Pool, layers: tuple[int, int] = (2, 3)) -> Counter[tuple[str, str, str]]:
    """What one more layer adds to a step, from two depths."""
    runs = []
    for depth in layers:
        plan = plan_of(f"{name}-{depth}", pins, pool.world_size)
        runs.append(counted(pool.run(records, f"{name}-{depth}", plan)[0]))
    more = Counter({key: runs[1][key] - runs[0][key] for key in runs[0] | runs[1]})
    assert all(value % (layers[1] - layers[0]) == 0 for value in more.values())
    return Counter({key: value // (layers[1] - layers[0]) for key, value in more.items() if value})


def test_tensor_parallel_is_four_all_reduces_a_layer(ranks2: Pool) -> None:
    assert per_layer("llama", "tp=2", ranks2) == {
        ("all_reduce", "tp", "forward"): 2,
        ("all_reduce", "tp", "backward"): 2,
    }


def test_sequence_parallel_is_four_gathers_and_four_scatters_a_layer(ranks2: Pool) -> None:
    found = per_layer("llama", "tp=2 sequence_parallel=on", ranks2)
    norms = found.pop(("all_reduce", "tp", "backward"), 0)  # the norms' weights see a part of the tokens: one bucket
    assert norms <= 1
    total: Counter[str] = Counter()
    for (collective, axis, _), count in found.items():
        assert axis == "tp"
        total[collective] += count
    assert total == {"all_gather": 4, "reduce_scatter": 4}


def groups_of(name: str, plan: Plan) -> int:
    """Parameter groups of a plan's model that train."""
    case = build(name)
    given = case.model, case.args, dict(case.kwargs), plan.precision.compute
    outline = prepare(*given, loss_fn=case.loss_fn, choice=listed(plan)).outline
    trained = {p.tensor for p in outline.parameters if p.trainable}
    return sum(group[0] in trained for group in assign(plan, outline).groups)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_zero_3_gathers_twice_and_scatters_once_per_group_and_microbatch(ranks2: Pool, microbatches: int) -> None:
    plan = plan_of("llama", f"dp=2 zero=3 micro_batch={4 // microbatches}", 2)
    groups, found = groups_of("llama", plan), counted(ranks2.run(records, "llama", plan)[0])
    assert plan.pipeline.microbatches == microbatches
    assert groups == LAYERS + 2
    # The backward of the embedding does not read its table: that group is not gathered again.
    assert found == {
        ("all_gather", "dp", "forward"): groups * microbatches,
        ("all_gather", "dp", "backward"): (groups - 1) * microbatches,
        ("reduce_scatter", "dp", "backward"): groups * microbatches,
        ("all_reduce", "dp", "forward"): found["all_reduce", "dp", "forward"],  # label count and loss
    }
    assert found["all_reduce", "dp", "forward"] <= 2


@pytest.mark.parametrize("microbatches", [1, 4])
def test_zero_0_reduces_once_per_group_and_step(ranks2: Pool, microbatches: int) -> None:
    plan = plan_of("llama", f"dp=2 zero=0 micro_batch={4 // microbatches}", 2)
    found = counted(ranks2.run(records, "llama", plan)[0])
    assert plan.pipeline.microbatches == microbatches
    assert found["all_reduce", "dp", "backward"] == groups_of("llama", plan)
    assert {collective for collective, _, _ in found} == {"all_reduce"}


@pytest.mark.parametrize(("level", "gathers", "scatters"), [(1, 1, 1), (2, 1, 4)])
def test_zero_1_and_2_gather_once_a_step(ranks2: Pool, level: int, gathers: int, scatters: int) -> None:
    plan = plan_of("llama", f"dp=2 zero={level} micro_batch=1", 2)
    groups, found = groups_of("llama", plan), counted(ranks2.run(records, "llama", plan)[0])
    assert found["all_gather", "dp", "forward"] == groups * gathers
    assert found["all_gather", "dp", "backward"] == 0
    assert found["reduce_scatter", "dp", "backward"] == groups * scatters


PREDICTED = [
    ("llama", "tp=2 sequence_parallel=on", 2), ("gpt2", "dp=2 tp=2 sequence_parallel=on zero=2 micro_batch=2", 4),
    ("adapter", "dp=2 zero=3 micro_batch=2", 2), ("llama", "", 2), ("llama-3kv", "tp=2", 2),
]  # fmt: skip
AT_NIGHT = [
    ("llama", "dp=2 zero=0 micro_batch=1", 2), ("gpt2", "dp=2 zero=1", 2), ("gpt2", "tp=2 micro_batch=2", 2),
    ("llama", "dp=2 tp=2 zero=3 micro_batch=1", 4), ("vit", "dp=4 zero=3", 4),
    ("llama", "tp=2", 2), ("llama", "dp=2 zero=3 micro_batch=1", 2), ("gpt2", "dp=2 zero=2 micro_batch=2", 2),
    ("bert", "dp=2 tp=2", 4), ("tied", "dp=2 tp=2 zero=1", 4), ("bert-classify", "tp=4", 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "pins", "world"), [*PREDICTED, *(pytest.param(*case, marks=pytest.mark.nightly) for case in AT_NIGHT)]
)
def test_prediction_is_what_ran(name: str, pins: str, world: int, ranks2: Pool, ranks4: Pool) -> None:
    plan = plan_of(name, pins, world)
    for found in {2: ranks2, 4: ranks4}[world].run(records, name, plan):
        predicted = {(t.collective, t.axis): (t.count, t.bytes) for t in plan.predicted.traffic}
        assert traffic(found) == predicted

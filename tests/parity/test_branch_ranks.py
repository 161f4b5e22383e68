"""Two branches on two ranks: parity with the eager module, what crosses, who waits for whom, and what the planner makes of it."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import msgspec
import pytest
import torch
from models import build
from pool import Pool
from running import differences, parallel, plan_of, records, traffic
from shardwright.errors import PinError, PlanError
from shardwright.passes.choose import listed
from shardwright.passes.prepare import prepare
from shardwright.planner.cluster import Cluster
from shardwright.planner.exchanges import Send
from shardwright.planner.forked import Forked
from shardwright.planner.part import chain
from shardwright.planner.plan import Plan, RunPlan
from shardwright.planner.prices import Prices
from shardwright.planner.repricing import reprice
from shardwright.planner.schedules import Action

CLUSTER = "a100-sxm-80gb"
WHOLE = "pp=2 micro_batch=8"
PINS = "pp=2 schedule=branches recompute=none offload=none"


def branched(name: str, pins: str = "micro_batch=8", world: int = 2) -> Plan:
    return plan_of(name, f"{PINS} {pins}", world, device=CLUSTER, runnable=False)


@pytest.mark.parametrize(
    ("name", "pins"),
    [
        ("towers", "micro_batch=8"),
        ("towers-tied", "micro_batch=2"),
        ("towers-apart", "micro_batch=4"),
        ("towers", "micro_batch=1"),
    ],
)
def test_two_ranks_compute_what_the_module_does(name: str, pins: str, ranks2: Pool) -> None:
    plan = branched(name, pins)
    assert (plan.pipeline.schedule, [stage.rank for stage in plan.stages]) == ("branches", [0, 0, 1, 1])
    found = ranks2.run(differences, name, plan)
    assert all(answer == found[0] for answer in found)
    assert not [d for d in found[0] if not d["ok"]]
    assert {d["kind"] for d in found[0]} >= {"loss", "gradient", "parameter after 3 steps"}
    seen = ranks2.run(records, name, plan)
    for rank, told in enumerate(plan.predicted.rank_traffic):
        wanted = [(row.count, row.bytes) for row in told if row.collective == "send"]
        assert [value for key, value in traffic(seen[rank]).items() if key[0] == "send"] == wanted


def steps(name: str, plan: Plan) -> list[str]:
    """Rank function: what a rank does in a step of training, in order."""
    case, pm = parallel(name, plan)
    staged = pm.program(*case.args).staged
    assert staged is not None
    return [str(s) if isinstance(s, Action) else "to" if isinstance(s, Send) else "from" for s in staged.steps]


def test_neither_branch_waits_for_the_other(ranks2: Pool) -> None:
    """Rank 1 runs its branch before it receives what the first branch made, and sends its gradient before it runs its own back."""
    first, second = ranks2.run(steps, "towers", branched("towers"))
    assert first == ["0F0", "to", "1F0", "to", "from", "1B0", "from", "0B0"]
    assert second == ["from", "2F0", "from", "3F0", "3B0", "to", "2B0", "to"]


def evaluated(name: str, plan: Plan) -> list[Any]:
    """Rank function: the outputs of evaluation, and those of the eager module."""
    case, pm = parallel(name, plan)
    pm.eval()
    with torch.no_grad():
        return [
            pm(*case.args, outputs=True)[1].double(),
            build(name).model.double().eval()(*[x.double() for x in case.args])[1],
        ]


@pytest.mark.parametrize("schedule", ["branches", "zbv"])
def test_evaluation_where_stages_do_not_go_round(schedule: str, ranks2: Pool) -> None:
    pins = f"pp=2 schedule={schedule} micro_batch=2 recompute=none offload=none"
    plan = plan_of("towers", pins, 2, device=CLUSTER, runnable=False)
    for ours, eager in ranks2.run(evaluated, "towers", plan):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


def test_the_planner_takes_branches_where_they_are_quicker() -> None:
    """With the whole batch at once no other schedule keeps two ranks busy."""
    free = plan_of("towers", f"{WHOLE} recompute=none offload=none", 2, device=CLUSTER, runnable=False)
    chain = plan_of("towers", f"{WHOLE} schedule=1f1b recompute=none offload=none", 2, device=CLUSTER, runnable=False)
    assert free.pipeline.schedule == "branches"
    assert free.predicted.step_seconds < chain.predicted.step_seconds
    assert free.search.bound_seconds <= free.predicted.step_seconds
    tried = {record.schedule: record for record in free.search.shapes}
    assert tried["branches"].step_seconds == free.predicted.step_seconds


def test_a_model_without_branches_and_more_ranks_are_refused() -> None:
    with pytest.raises(PinError, match="no two branches"):
        branched("gpt2-deep")
    with pytest.raises(PinError, match="on 2 ranks, not 4"):
        plan_of("towers", "pp=4 schedule=branches micro_batch=8", 4, device=CLUSTER, runnable=False)


def test_an_edit_may_not_let_one_branch_read_the_other() -> None:
    plan, case = branched("towers"), build("towers")
    outline = prepare(case.model, case.args, {}, "float64", loss_fn=case.loss_fn, choice=listed(plan)).outline
    forked = Forked(chain(outline))
    cuts = [0, *accumulate(sum(run.count for run in stage.runs) for stage in plan.stages)]
    assert forked.wrong(cuts) == ""
    assert forked.sent(cuts, 0)
    assert forked.sent(cuts, 1)
    moved = [*cuts[:2], cuts[2] - 1, *cuts[3:]]
    assert "which stage 1 makes" in forked.wrong(moved)
    runs = [
        [RunPlan(run.use, k, 1) for run in stage.runs for k in range(run.first, run.first + run.count)]
        for stage in plan.stages
    ]
    where = Cluster.from_dict(plan.cluster)
    runs[2].insert(0, runs[1].pop())
    edited = msgspec.structs.replace(
        plan,
        stages=tuple(
            msgspec.structs.replace(stage, runs=tuple(own)) for stage, own in zip(plan.stages, runs, strict=True)
        ),
    )
    with pytest.raises(PlanError, match=r"stage 2 reads .*, which stage 1 makes"):
        reprice(edited, outline, where, Prices(where, "float64"))
    assert reprice(plan, outline, where, Prices(where, "float64")).predicted.step_seconds == plan.predicted.step_seconds

"""A plan's expert groups written as an axis of the mesh."""

from __future__ import annotations

import msgspec
import plans
import pytest
from shardwright.errors import PlanError
from shardwright.planner.dispatch import DISPATCH, spread_experts
from shardwright.planner.plan import MeshAxis, OpPlan, ParameterPlan, Plan, RegionPlan
from shardwright.planner.rule_experts import TARGET

MESH = (
    MeshAxis("dp", 4, "data", "network"),
    MeshAxis("cp", 2, "context", "nvlink"),
    MeshAxis("tp", 2, "model", "nvlink"),
)


def plan(experts: int, choice: str = "t.0", mesh: tuple[MeshAxis, ...] = MESH) -> Plan:
    """One region: a linear and experts, ZeRO-3 over the data and context axes."""
    ops = (
        OpPlan("linear", "aten.linear", ("b", "s", "n"), ("S(0)", "S(1)", "S(2)")),
        OpPlan("experts", TARGET, (choice, "t.1", "e"), ("S(0)", "S(0.1)", "P")),
    )
    parameters = (
        ParameterPlan(("gate.weight",), ("R", "R", "R"), 3, ("dp", "cp")),
        ParameterPlan(("experts.up",), ("R", "R", "S(0)"), 3, ("dp", "cp")),
    )
    made = plans.plan(mesh=mesh, regions=(RegionPlan("h", 1, ops, parameters),))
    return msgspec.structs.replace(made, pipeline=msgspec.structs.replace(made.pipeline, experts=experts))


def test_one_data_axis_becomes_two() -> None:
    found = spread_experts(plan(2), frozenset({"experts.up"}))
    assert [(a.name, a.size, a.role) for a in found.mesh] == [
        ("dp", 2, "data"), ("ep", 2, "data"), ("cp", 2, "context"), ("tp", 2, "model"),
    ]  # fmt: skip
    (region,) = found.regions
    assert [op.choice for op in region.ops] == [("b", "b", "s", "n"), ("t.0", DISPATCH, "t.1", "e")]
    gate, up = region.parameters
    assert (gate.home, gate.zero_axes) == (("R", "R", "R", "R"), ("dp", "ep", "cp"))
    assert (up.home, up.zero_axes) == (("R", "S(0)", "R", "S(0)"), ("dp", "cp"))
    assert spread_experts(found, frozenset()) is found


def test_all_data_ranks_share_the_experts() -> None:
    alone = (MeshAxis("dp", 4, "data", "network"),)
    made = plan(4, mesh=alone)
    region = made.regions[0]
    ops = tuple(msgspec.structs.replace(op, choice=op.choice[:1], result=op.result[:1]) for op in region.ops)
    kept = tuple(msgspec.structs.replace(p, home=("R",), zero_axes=("dp",)) for p in region.parameters)
    made = msgspec.structs.replace(made, regions=(msgspec.structs.replace(region, ops=ops, parameters=kept),))
    found = spread_experts(made, frozenset({"experts.up"}))
    assert [(a.name, a.size) for a in found.mesh] == [("ep", 4)]
    gate, up = found.regions[0].parameters
    assert (gate.zero, gate.zero_axes) == (3, ("ep",))
    assert (up.zero, up.zero_axes, up.home) == (0, (), ("S(0)",))  # one rank holds each: nothing is left to chunk


def test_plans_without_experts_stay() -> None:
    made = plan(1)
    assert spread_experts(made, frozenset()) is made


@pytest.mark.parametrize(
    ("experts", "choice", "says"), [(3, "t.0", "does not divide the 4"), (2, "R", "expected the samples")]
)
def test_what_cannot_be_spread_is_named(experts: int, choice: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        spread_experts(plan(experts, choice), frozenset())

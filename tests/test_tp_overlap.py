"""`tp_overlap=on`: what tensor parallelism gathers and scatters goes piece by piece with its products."""

from __future__ import annotations

import pytest
from shardwright.planner.costs import Costs, Shape
from shardwright.planner.overlap import NONE, Overlap
from shardwright.planner.placement import P, R, State, V, split
from shardwright.planner.plan import MeshAxis
from solver_outlines import FakePrices, transformer


def seconds(source: State, target: State, *, pieces: bool, role: str = "model", overlap: Overlap = NONE):
    axis = Shape((MeshAxis("tp", 4, role, ""),))
    found = Costs(FakePrices(pieces=pieces), axis, overlap=overlap).chain(
        transformer().tensors["x0"], (source,), (target,)
    )
    assert found is not None
    return found.forward, found.backward


@pytest.mark.parametrize(
    ("source", "target", "role", "share"),
    [
        (split(0), V, "model", 0.25), (P, split(0), "model", 0.25), (split(0), V, "context", 1.0),
        (P, R, "model", 1.0), (R, V, "model", 1.0),
    ],
)  # fmt: skip
def test_one_part_of_a_gather_or_scatter_is_waited_for(source: State, target: State, role: str, share: float) -> None:
    """An all-reduce cannot be cut so, nor what a ring of another axis sends."""
    plain = seconds(source, target, pieces=False, role=role)
    assert seconds(source, target, pieces=True, role=role) == pytest.approx([share * s for s in plain])


def test_the_other_parts_slow_the_product_down() -> None:
    plain = seconds(split(0), V, pieces=False)
    slowed = seconds(split(0), V, pieces=True, overlap=Overlap(1.0, 1.2))
    assert slowed == pytest.approx([s * (0.25 + 0.2 * 0.75) for s in plain])

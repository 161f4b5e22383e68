"""Which stage an op belongs to, and what crosses: on captured graphs, cut at chosen places."""

from __future__ import annotations

import functools

import pytest
from models import build
from shardwright.errors import PlanError, UsageError
from shardwright.passes.prepare import prepare
from shardwright.planner.outline import Outline
from shardwright.planner.staging import Staging, cut, holders_of, stages_by_parameters


@functools.cache
def outline_of(name: str) -> Outline:
    case = build(name)
    return prepare(case.model, case.args, dict(case.kwargs), "float32").outline


def thirds(outline: Outline, count: int = 3) -> dict[str, int]:
    """Ops in order, in equal shares."""
    return {op.name: i * count // len(outline.ops) for i, op in enumerate(outline.ops)}


def cut_of(name: str, count: int = 3) -> tuple[Outline, Staging]:
    outline = outline_of(name)
    return outline, cut(outline, thirds(outline, count), count, [outline.loss])


@pytest.mark.parametrize("name", ["tied", "unet", "teacher", "bert", "llama"])
def test_every_stage_has_what_its_ops_read(name: str) -> None:
    outline, staging = cut_of(name)
    where = thirds(outline)
    by_name = outline.by_name
    made_again = 0
    for s, part in enumerate(staging.parts):
        here = {c.tensor for c in part.takes} | {
            t.name for t in outline.tensors.values() if t.role in ("input", "buffer", "constant")
        }
        here |= set(part.parameters)
        for op in part.ops:
            assert {u.tensor for u in by_name[op].operands} <= here, op
            here |= {r.tensor for r in by_name[op].results}
            if where[op] != s:
                made_again += 1
                assert not any(outline.tensors[r.tensor].differentiable for r in by_name[op].results)
        assert {c.tensor for c in part.gives} <= here
        assert all(c.source < s for c in part.takes)
        assert all(s in staging.holders[p] for p in part.parameters)
    assert set(staging.crossings) == {c for part in staging.parts for c in part.takes}
    assert outline.loss in staging.parts[staging.home(outline.loss)].results
    assert name not in ("bert", "llama") or made_again  # masks, tables of positions, label counts


def test_a_skip_crosses_stages_between() -> None:
    _, staging = cut_of("unet")
    assert any(c.target - c.source == 2 for c in staging.crossings)


def test_what_a_parameter_or_an_activation_makes_without_gradient_crosses() -> None:
    outline, staging = cut_of("teacher", 4)
    crossing = {c.tensor for c in staging.crossings}
    assert any(not outline.tensors[t].differentiable for t in crossing)


def test_a_tied_parameter_is_held_by_every_stage_that_uses_it() -> None:
    outline, staging = cut_of("tied")
    held = holders_of(outline, staging)
    assert held["embed.weight"] == held["head.weight"] == (0, 2)


@pytest.mark.parametrize("name", ["tied", "unet", "llama", "t5"])
def test_another_graph_follows_the_parameters(name: str) -> None:
    outline, staging = cut_of(name)
    again = cut(outline, stages_by_parameters(outline, holders_of(outline, staging)), 3, [outline.loss])
    for parameter, stages in again.holders.items():
        assert set(stages) <= set(staging.holders[parameter])


def test_a_stage_that_reads_what_a_later_one_makes_is_refused() -> None:
    outline = outline_of("tied")
    turned = {name: 2 - s for name, s in thirds(outline).items()}
    with pytest.raises(PlanError, match=r"stage \d reads"):
        cut(outline, turned, 3, [outline.loss])
    _, staging = cut_of("tied")
    held = {name: (2 - max(stages),) for name, stages in holders_of(outline, staging).items()}
    with pytest.raises(UsageError, match="plan for these inputs"):
        stages_by_parameters(outline, held)

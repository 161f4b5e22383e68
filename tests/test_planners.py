"""benchmarks/planners.py: what peers' planners choose is what they are said to choose, and never beats our bound."""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

import planners  # noqa: E402
from knapsack import Item, quickest  # noqa: E402
from peer_desk import Desk, Planned, away, divide  # noqa: E402
from peers import PEERS  # noqa: E402
from shardwright.api import cluster_of  # noqa: E402
from shardwright.job import Job  # noqa: E402

TINY = planners._sizes("GPT", 4, 512, 2048, 8, 1024, 256)
CASE = planners.Case("tiny", TINY, "rtx-3090:4", 8, 256, "1200MiB")
NAMES = [p.name for p in PEERS]


@cache
def job() -> Job:
    return planners.job_of(CASE)


@cache
def made() -> dict[str, tuple[Desk, Planned | None]]:
    return {p.name: (d, p.plan(d)) for p, d in zip(PEERS, planners.desks(job(), PEERS), strict=True)}


def plan(name: str) -> tuple[Desk, Planned]:
    desk, found = made()[name]
    assert found is not None
    return desk, found


@cache
def answers() -> dict[str, planners.Answer]:
    ours = job().solve()
    return {p.name: planners._answer(CASE.name, p, ours, made()[p.name][1], 0.0) for p in PEERS}


@pytest.mark.parametrize("name", NAMES)
def test_no_peer_beats_our_bound(name: str) -> None:
    found = answers()[name]
    assert found.seconds > 0
    assert found.ratio >= 1 - 0.01
    assert not found.violates


@pytest.mark.parametrize("name", NAMES)
def test_plans_are_members_of_our_space(name: str) -> None:
    """One of our options of the same unit is no worse in seconds and bytes than each option of the plan, on a shape of ours."""
    desk, found = plan(name)
    shape = found.plan.shape
    assert shape in desk.shapes
    assert found.plan.cuts[0] == 0
    assert found.plan.cuts[-1] == len(desk.units)
    assert found.peak_bytes <= desk.bench.task.limit_bytes
    for region, option in dict(zip(desk.units, found.plan.options, strict=True)).items():
        names = (
            "forward",
            "backward",
            "finish",
            "static",
            "gradient",
            "saved",
            "work",
            "step",
            "host",
            "host_saved",
            "disk",
        )
        assert any(
            all(getattr(o, n) <= getattr(option, n) * (1 + 1e-9) + 1e-15 for n in names)
            for o in desk.bench.options(region, shape)
        )


def test_megatron_has_equal_stages_and_a_distributed_optimizer() -> None:
    desk, found = plan("megatron")
    layers = [sum(desk.layer[i:j]) for i, j in pairwise(found.plan.cuts)]
    assert len(set(layers)) == 1
    assert {o.zero for o in found.plan.options} <= {0, 1}
    assert {o.style for o in found.plan.options} <= {"single", "tensor+sequence"}
    assert len({o.policy for o, layer in zip(found.plan.options, desk.layer, strict=True) if layer}) == 1


def test_fsdp_is_data_parallel_with_everything_run_again() -> None:
    desk, found = plan("fsdp")
    assert found.plan.shape.dp == found.plan.shape.devices
    assert {o.zero for o in found.plan.options} == {3}
    assert {o.policy for o, layer in zip(found.plan.options, desk.layer, strict=True) if layer} == {"full"}


def test_alpa_recomputes_all_or_nothing() -> None:
    desk, found = plan("alpa")
    assert len({o.policy for o, layer in zip(found.plan.options, desk.layer, strict=True) if layer}) == 1
    assert not any(o.offload for o in found.plan.options)


def test_galvatron_has_even_stages() -> None:
    desk, found = plan("galvatron")
    assert found.plan.cuts == desk.even_cuts(found.plan.shape.pp)
    assert {o.policy for o in found.plan.options} <= {"none", "full"}


def test_mist_has_one_zero_level_and_offload_per_stage() -> None:
    desk, found = plan("mist")
    for i, j in pairwise(found.plan.cuts):
        mine = [o for o, layer in zip(found.plan.options[i:j], desk.layer[i:j], strict=True) if layer]
        assert len({o.zero for o in mine}) == 1
        assert len({away(o) - {"activations"} for o in mine}) == 1
        policies = [o.policy for o in mine]
        assert policies == sorted(policies)  # "full" before "none"


def test_what_does_not_fit_has_no_plan() -> None:
    tight = replace(job(), request=replace(job().request, memory_limit_bytes=job().request.memory_limit_bytes // 4))
    fsdp = [p for p in PEERS if p.name == "fsdp"]
    (desk,) = planners.desks(tight, fsdp)
    assert fsdp[0].plan(desk) is None


def test_the_knapsack_is_exact() -> None:
    rng = random.Random(3)
    change = {("R", "S"): 0.3, ("S", "R"): 0.2}
    for _ in range(60):
        layers = [
            [Item(rng.random(), rng.randint(0, 6), side, side) for side in rng.choices("RS", k=rng.randint(1, 3))]
            for _ in range(rng.randint(1, 4))
        ]
        capacity = rng.randint(2, 14)
        values = [
            sum(i.seconds for i in way) + sum(change.get((a.exit, b.entry), 0.0) for a, b in pairwise(way))
            for way in itertools.product(*layers)
            if sum(i.size for i in way) <= capacity
        ]
        found = quickest(layers, capacity, change)
        assert (found is None) == (not values)
        if found is not None:
            picked = [items[k] for items, k in zip(layers, found[1], strict=True)]
            assert found[0] == pytest.approx(min(values))
            assert sum(i.size for i in picked) <= capacity


def test_the_division_is_exact() -> None:
    rng = np.random.default_rng(5)
    for _ in range(40):
        units, stages, m = int(rng.integers(3, 8)), int(rng.integers(1, 4)), int(rng.integers(1, 9))
        tables = []
        for _ in range(stages):
            table = np.full((units + 1, units + 1), np.inf)
            for i, j in itertools.combinations(range(units + 1), 2):
                table[i, j] = rng.random() + (j - i) if rng.random() < 0.8 else np.inf
            tables.append(table)
        values = []
        for inner in itertools.combinations(range(1, units), stages - 1):
            times = [tables[s][i, j] for s, (i, j) in enumerate(pairwise((0, *inner, units)))]
            if max(times) < np.inf:
                values.append(sum(times) + (m - 1) * max(times))
        found = divide(tables, m, np.inf)
        best = min(values, default=np.inf)
        assert (found[0] if found is not None else np.inf) == pytest.approx(best)


def test_cases_are_of_different_kinds() -> None:
    assert len(planners.CASES) == 10
    assert {cluster_of(c.cluster).devices for c in planners.CASES} >= {8, 16, 64, 512}


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(answers().values())
    planners.show([*found, planners.Answer("other", "fsdp")])
    text = capsys.readouterr().out
    assert "1/2" in text
    assert "VIOLATION" not in text
    assert planners.summary(found)["mist"]["violations"] == 0

"""Clusters of unlike devices: divisions against exhaustive search, and whole plans over two pools."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from oracles.brute import live_counts, moments
from oracles.instances import option
from shardwright.cli.main import main
from shardwright.errors import ClusterError, Infeasible, PinError, PlanError
from shardwright.planner.arcs import Line
from shardwright.planner.cluster import Cluster, default_limit_bytes, pool_names
from shardwright.planner.options import Option
from shardwright.planner.outline import Outline
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan, Precision, Source
from shardwright.planner.plancheck import first_problem, problems
from shardwright.planner.planfile import dump_plan, parse_plan
from shardwright.planner.pooled import neighbours, shared_seconds
from shardwright.planner.prices import Prices
from shardwright.planner.repricing import reprice
from shardwright.planner.schedules import Action, Lists, actions, fault, stage_rank
from shardwright.planner.simulate import simulate
from shardwright.planner.solve import Request, solve
from shardwright.planner.stagecosts import Links, StageCost
from shardwright.planner.stageproblem import Pool
from shardwright.planner.stages import Memory, Pipeline, StageProblem, StageSolve
from shardwright.profiles.devices import parse_cluster
from solver_outlines import transformer

BF16 = Precision("bf16-mixed", "bfloat16", "float32", "float32", "float32")
PAIR = "a100-sxm-80gb:4+h100-sxm:4"
KINDS = (("1f1b", 1), ("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("interleaved", 2), ("zbv", 2))

# -- divisions against exhaustive search


def instance(seed: int) -> StageProblem:
    """4 or 5 units on 2 or 3 ranks of two pools that differ in speed and memory."""
    rng = random.Random(seed)
    while True:
        name, chunks = rng.choice(KINDS)
        ranks, m = rng.choice((2, 2, 3)) if chunks == 1 else 2, rng.randint(1, 4)
        if not fault(name, ranks, chunks, m):
            break
    kinds = rng.randint(1, 2)
    regions = [rng.randrange(kinds) for _ in range(rng.randint(max(4, ranks * chunks), 5))]
    at = tuple(sorted(rng.randrange(2) for _ in range(ranks))) if ranks == 3 else (0, 1)
    at = at if len(set(at)) == 2 else (0, *at[1:-1], 1)
    at = at if rng.random() < 0.5 else tuple(reversed(at))
    options, pools = [], []
    for p in range(2):
        slower = rng.choice((1.0, 1.0, 2.0, 3.0))
        mine = [[_drawn(rng, p * kinds + r, slower) for _ in range(rng.randint(1, 2))] for r in range(kinds)]
        seconds = [[(o.forward, o.backward) for o in group] for group in mine]
        line = Line.of([p * kinds + r for r in regions], [[(0.0, 0.0)]] * (p * kinds) + seconds)
        least = sum(min(o.static + o.gradient + o.saved for o in mine[r]) for r in regions) / ranks
        cap = float(round(least * rng.choice((0.9, 1.3, 2.0, 4.0)) + 15))
        pools.append(Pool(line, {}, Memory(cap)))
        options += mine
    sends = {(a, b): rng.choice((0.0, 0.2)) for a in range(ranks) for b in range(ranks)}
    placement = stage_rank(name, ranks, chunks)

    def hand(stage: int, position: int, layout: str) -> tuple[float, float]:
        one = sends[placement[stage - 1], placement[stage]]
        return one, one

    first = replace(pools[0].line, regions=tuple(regions))
    return StageProblem(
        first, options, {}, Pipeline(ranks, chunks, name, m), pools[0].memory, lambda at, layout: (0.0, 0.0), pools=tuple(pools),
        at=at, hand=hand,
    )  # fmt: skip


def _drawn(rng: random.Random, region: int, slower: float) -> Option:
    seconds, whole = slower * rng.uniform(0.5, 1.5), rng.randint
    back = seconds * rng.uniform(1.0, 2.5)
    return option(
        region, seconds, back, weight=back * rng.choice((0.0, 0.4)), finish=rng.choice((0.0, 0.3)), static=float(whole(1, 12)),
        gradient=float(whole(0, 4)), saved=float(whole(0, 10)), work=float(whole(0, 10)), step=float(whole(0, 5)),
    )  # fmt: skip


def plans(mine: StageProblem, only: Sequence[int] | None = None) -> Iterator[float]:
    """The simulated step of every plan that fits, over all divisions (or `only` one) and options."""
    p = mine.pipeline
    placement, lists = stage_rank(p.schedule, p.ranks, p.chunks), actions(p.schedule, p.ranks, p.chunks, p.microbatches)
    size = len(mine.options) // 2
    for inner in itertools.combinations(range(1, len(mine.line)), p.stages - 1):
        cuts = (0, *inner, len(mine.line))
        if only is not None and cuts != tuple(only):
            continue
        stage_of = [s for s in range(p.stages) for _ in range(cuts[s], cuts[s + 1])]
        groups = [
            mine.options[mine.at[placement[s]] * size + r] for s, r in zip(stage_of, mine.line.regions, strict=True)
        ]
        for picked in itertools.product(*groups):
            stages = [picked[i:j] for i, j in itertools.pairwise(cuts)]
            if all(_holds(mine, lists[r], r, stages, placement) for r in range(p.ranks)):
                yield _step(mine, lists, stages, placement)


def _holds(
    mine: StageProblem,
    actions_of: Sequence[Action],
    rank: int,
    stages: Sequence[Sequence[Option]],
    placement: Sequence[int],
) -> bool:
    cap = mine.pools[mine.at[rank]].memory.cap_bytes
    held = {s: units for s, units in enumerate(stages) if placement[s] == rank}
    units = [o for group in held.values() for o in group]
    fixed, work = sum(o.static + o.gradient for o in units), max(o.work for o in units)
    assert live_counts(actions_of, True)
    alive = [sum(n * o.saved for s, n in counts.items() for o in held[s]) for counts in moments(actions_of, True)]
    return fixed + max(alive) + work <= cap and fixed + sum(o.step for o in units) <= cap


def _step(mine: StageProblem, lists: Lists, stages: Sequence[Sequence[Option]], placement: Sequence[int]) -> float:
    costs = [
        StageCost(
            sum(o.forward for o in units), sum(o.backward for o in units), sum(o.weight for o in units),
            finish=(("compute", sum(o.finish for o in units)),),
        )
        for units in stages
    ]  # fmt: skip
    ends = range(len(stages))
    assert mine.hand is not None
    ahead = [mine.hand(s + 1, 0, "R")[0] if s + 1 < len(stages) else 0.0 for s in ends]
    back = [mine.hand(s, 0, "R")[1] if s else 0.0 for s in ends]
    return simulate(lists, placement, costs, Links(tuple(ahead), tuple(back))).step_seconds


def best_of(mine: StageProblem, cuts: Sequence[int] | None = None) -> float | None:
    """The best of all plans, of one division where a rank holds several chunks."""
    return min(plans(mine, cuts), default=None)


def check(seed: int) -> None:
    mine = instance(seed)
    solve = StageSolve(mine, gap=1e-6)
    found, told = solve.run(), f"instance {seed}: {mine.pipeline}"
    best = best_of(mine)
    if mine.pipeline.chunks == 1:
        assert (best is None) == (found.stages is None), told
        if best is not None:
            assert found.step_seconds == pytest.approx(best, rel=1e-6), told
            assert best * (1 - 2e-6) <= found.bound_seconds <= best * (1 + 1e-9), told
        return
    if found.stages is None:
        assert best is None, told
        return
    # One division is bounded, and it and some neighbours are solved.
    first = next(iter(solve.tried))
    mine_alone = best_of(mine, first)
    assert best is not None
    assert found.step_seconds >= best * (1 - 1e-9), told
    assert found.bound_seconds <= min(mine_alone or found.step_seconds, found.step_seconds) * (1 + 1e-9), told


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_divisions_are_the_best_of_all(first: int) -> None:
    for seed in range(first, first + 20):
        check(seed)


def test_instances_that_were_once_wrong() -> None:
    for seed in (110, 175, 320, 447, 544, 1117, 1543, 1618):
        check(seed)


def test_shares_of_the_units_bound_every_plan() -> None:
    """10 units of a kind that one pool runs in 1 s and one in 3: three quarters of them where they are quick."""
    assert shared_seconds({0: 8}, [{0: 1.0}, {0: 3.0}], [1, 1]) == pytest.approx(6.0)
    assert shared_seconds({0: 8}, [{0: 1.0}, {0: 3.0}], [1, 3]) == pytest.approx(4.0)
    assert shared_seconds({0: 2, 1: 2}, [{0: 1.0, 1: 9.0}, {0: 9.0, 1: 1.0}], [1, 1]) == pytest.approx(2.0)


def test_neighbours_keep_a_unit_in_every_stage() -> None:
    found = list(neighbours([0, 1, 3, 4]))
    assert [0, 2, 3, 4] in found
    assert [0, 1, 2, 4] in found
    assert all(a < b for cuts in found for a, b in itertools.pairwise(cuts))


# -- whole plans


@cache
def cluster(spec: str) -> Cluster:
    return parse_cluster(spec)


@cache
def model() -> Outline:
    return transformer(layers=6, batch=16, seq=512, hidden=512, heads=8, vocab=1024)


@cache
def heavy() -> Outline:
    return transformer(layers=8, batch=32, seq=1024, hidden=2048, heads=16, vocab=2048)


def plan_with(outline: Outline, *pins: str, where: Cluster, limit: int | None = None) -> Plan:
    request = Request(
        Source("module", "test", outline.batch), "adamw", BF16, limit or default_limit_bytes(where), parse_pins(pins)
    )
    return solve(outline, where, Prices(where, "bfloat16"), request)


@cache
def paired(*pins: str, spec: str = PAIR) -> Plan:
    return plan_with(model(), *pins, where=cluster(spec))


def layers(plan: Plan) -> dict[str, int]:
    """Layers by pool."""
    found: dict[str, int] = {}
    for stage in plan.stages:
        held = sum(run.count for run in stage.runs if run.use.partition(".")[0] == "r1")
        found[stage.pool] = found.get(stage.pool, 0) + held
    return found


def with_memory(where: Cluster, pool: int, memory_bytes: int) -> Cluster:
    pools = list(where.pools)
    pools[pool] = replace(pools[pool], device=replace(pools[pool].device, memory_bytes=memory_bytes))
    return replace(where, pools=tuple(pools), device=pools[0].device)


def test_a_plan_keeps_every_pool_s_limit_and_says_its_pools() -> None:
    plan = paired()
    assert list(problems(plan)) == []
    limits = {pool.name: pool.memory_limit_bytes for pool in plan.pools}
    assert set(limits) == set(pool_names(cluster(PAIR))) == {stage.pool for stage in plan.stages}
    assert all(0 < stage.peak_bytes <= limits[stage.pool] for stage in plan.stages)
    assert plan.search.bound_seconds <= plan.predicted.step_seconds
    assert any("unlike devices" in text for text in plan.search.given_up)
    orders = {r.pools for r in plan.search.shapes}
    assert orders == {(0, 1), (1, 0)}


def test_a_faster_pool_has_more_layers() -> None:
    plan = plan_with(heavy(), "pp=2", "schedule=1f1b", "tp=1", "cp=1", where=cluster(PAIR))
    held = layers(plan)
    assert held["h100-sxm:4"] > held["a100-sxm-80gb:4"] > 0, held
    assert plan.search.gap < 0.05


def test_a_pool_short_of_memory_has_fewer_layers_or_runs_more_again() -> None:
    where = cluster("h100-sxm:4+h100-sxm:4")
    pins = ("pp=2", "schedule=1f1b", "tp=1", "cp=1", "offload=none", "zero=0", "micro_batch=1", "recompute=none")
    even = plan_with(heavy(), *pins, where=where)
    peak = {stage.pool: stage.peak_bytes for stage in even.stages}
    names = pool_names(where)
    short = with_memory(where, 1, int(0.8 * min(peak.values()) / (1 - where.device.reserve_fraction)))
    plan = plan_with(heavy(), *pins, where=short)
    assert list(problems(plan)) == []
    assert layers(plan)[names[1]] < layers(even)[names[1]] or plan.pools != even.pools
    limits = {pool.name: pool.memory_limit_bytes for pool in plan.pools}
    assert limits[names[1]] < limits[names[0]]
    assert all(stage.peak_bytes <= limits[stage.pool] for stage in plan.stages)
    assert layers(plan)[names[1]] < layers(plan)[names[0]]
    again = plan_with(heavy(), *pins[:-1], where=short)
    assert again.predicted.step_seconds <= plan.predicted.step_seconds * (1 + 1e-3)


def test_two_equal_pools_take_what_the_plain_cluster_takes() -> None:
    """The same division, pinned, over the same links: the pipeline outermost, as between pools."""
    pins = ("pp=2", "schedule=1f1b", "micro_batch=1", "tp=8")
    split, plain = paired(*pins, spec="h100-sxm:8+h100-sxm:8"), paired(*pins, spec="h100-sxm:8x2")
    assert split.predicted.step_seconds == pytest.approx(plain.predicted.step_seconds, rel=1e-9)
    assert {r.pools for r in split.search.shapes} == {(0, 1)}  # the other order is the same


def test_the_same_question_has_the_same_plan() -> None:
    again = plan_with(model(), where=parse_cluster(PAIR))
    assert dump_plan(again) == dump_plan(paired())


def test_a_plan_goes_to_a_file_and_back_and_is_priced_the_same() -> None:
    plan, where = paired("micro_batch=1"), cluster(PAIR)
    read = parse_plan(dump_plan(plan))
    assert dump_plan(read) == dump_plan(plan)
    priced = reprice(read, model(), where, Prices(where, "bfloat16"))
    assert priced.predicted == plan.predicted
    assert priced.stages == plan.stages


def test_an_edited_plan_that_puts_a_stage_elsewhere_is_refused() -> None:
    plan, where = paired("micro_batch=1"), cluster(PAIR)
    names = [pool.name for pool in plan.pools]
    stage = msgspec.structs.replace(plan.stages[0], pool=next(n for n in names if n != plan.stages[0].pool))
    wrong = msgspec.structs.replace(plan, stages=(stage, *plan.stages[1:]))
    assert "stages[0].pool" in (first_problem(wrong) or "")
    bare = msgspec.structs.replace(plan, pools=())
    assert "pools: none" in (first_problem(bare) or "")
    tight = [msgspec.structs.replace(pool, memory_limit_bytes=2**28) for pool in plan.pools]
    with pytest.raises(Infeasible, match="its limit is"):
        reprice(msgspec.structs.replace(plan, pools=tuple(tight)), model(), where, Prices(where, "bfloat16"))
    with pytest.raises(PlanError, match="stages"):
        reprice(wrong, model(), where, Prices(where, "bfloat16"))


def test_pools_swapped_by_hand_are_priced_on_the_other_devices() -> None:
    plan, where = paired("micro_batch=1", "pp=2"), cluster(PAIR)
    turned = {a.name: b.name for a, b in zip(plan.pools, plan.pools[::-1], strict=True)}
    stages = tuple(msgspec.structs.replace(s, pool=turned[s.pool]) for s in plan.stages)
    edited = msgspec.structs.replace(plan, pools=plan.pools[::-1], stages=stages)
    priced = reprice(edited, model(), where, Prices(where, "bfloat16"))
    assert priced.edited
    assert priced.predicted.step_seconds >= plan.predicted.step_seconds * (1 - plan.search.gap) - 1e-12


def test_sizes_that_share_no_mesh_are_named() -> None:
    where = cluster("h100-sxm:8+a100-sxm-80gb:4")
    with pytest.raises(PinError, match="pools of 8 and 4 devices"):
        plan_with(model(), "pp=2", where=where)
    plan = plan_with(model(), "pp=3", where=where)
    assert [pool.ranks for pool in sorted(plan.pools, key=lambda p: p.ranks)] == [1, 2]
    request = Request(Source("module", "test", 16), "adamw", BF16, default_limit_bytes(where), runnable=True)
    with pytest.raises(ClusterError, match="are not executed yet"):
        solve(model(), where, Prices(where, "bfloat16"), request)


def test_what_does_not_fit_is_explained() -> None:
    with pytest.raises(Infeasible, match="nothing fits"):
        plan_with(model(), "dp=4", "cp=1", where=cluster(PAIR), limit=2**28)


def test_the_command_line_plans_for_pools(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 256,
        "n_positions": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = ["plan", f"hf:{tmp_path / 'config.json'}", "--cluster", "a100-sxm-80gb:2+h100-sxm:2", "--batch", "8"]
    out = tmp_path / "plan.json"
    found = CliRunner().invoke(main, [*args, "-o", str(out), "--report", str(tmp_path / "report.html")])
    assert found.exit_code == 0, found.output
    assert "h100-sxm:2" in found.output
    assert parse_plan(out.read_text()).pools
    assert '<th scope="col">Devices</th>' in (tmp_path / "report.html").read_text()

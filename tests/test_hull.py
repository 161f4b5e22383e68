"""The bound by whole ranks against exhaustive search: the price of every rank, and the bound of random divisions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from oracles.brute import Oracle, all_plans
from oracles.instances import random_problem
from shardwright.planner import rankprices
from shardwright.planner.fixedmodel import Divided
from shardwright.planner.hull import Hull
from shardwright.planner.labels import unit_bytes
from shardwright.planner.paths import rank_paths
from shardwright.planner.program import INFINITE
from shardwright.planner.rankprices import RankPrices
from shardwright.planner.trial import Trial

CLOSE = 1e-9


def division(seed: int) -> Divided:
    """A random division of a random problem, among those that plans may have."""
    problem = random_problem(seed)
    cuts = random.Random(seed).choice(list(Oracle(problem).divisions()))
    return Divided(Trial(problem), [[span] for span in itertools.pairwise(cuts)])


def least(mine: Divided, stages: Sequence[int], weights: np.ndarray) -> float:
    """The least weighted seconds of a rank, every combination of options looked at."""
    trial, problem = mine.trial, mine.trial.problem
    rows, found = trial.rows[stages[0]], INFINITE
    units = [(k, i) for k, s in enumerate(stages) for i in range(*mine.arcs[s][0])]
    for chosen in itertools.product(*(problem.options[problem.line.regions[i]] for _, i in units)):
        held = np.sum([unit_bytes(o, trial.rows[stages[k]]) for (k, _), o in zip(units, chosen, strict=True)], axis=0)
        held[: rows.activations] += max(o.work for o in chosen)
        if (held > np.array(rows.caps) * (1 + 1e-9)).any():
            continue
        value = 0.0
        for k, s in enumerate(stages):
            own = [o for (at, _), o in zip(units, chosen, strict=True) if at == k]
            times = np.sum([[o.forward, o.backward, o.weight, o.finish] for o in own], axis=0)
            for a, b in itertools.pairwise(own):
                if a.exit != b.entry:
                    change = problem.change.get((a.exit, b.entry), (INFINITE, INFINITE))
                    times[:2] += change
            sends = trial.sends(s, *mine.arcs[s][0], (own[0].entry, own[-1].exit))
            value += float(weights[k] @ np.array([*times, *sends]))
        found = min(found, value)
    return found


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_ranks_are_priced_as_by_exhaustive_search(first: int) -> None:
    priced = 0
    for seed in range(first, first + 20):
        mine, rng = division(seed), np.random.default_rng(seed)
        prices = RankPrices(mine)
        for stages in mine.trial.local:
            weights = rng.uniform(0.0, 2.0, (len(stages), 6)) + 0.01
            found, wanted = prices.least(stages, weights, INFINITE), least(mine, stages, weights)
            if found is None:
                assert wanted == INFINITE, seed
                continue
            value, combination = found
            assert value == pytest.approx(wanted, rel=CLOSE, abs=0), seed
            assert float((combination.seconds * weights).sum()) == pytest.approx(value, rel=CLOSE, abs=0), seed
            assert prices.least(stages, weights, value)[0] == pytest.approx(value, rel=CLOSE, abs=0), seed
            priced += 1
    assert priced > 10


def test_the_bound_is_true_and_close() -> None:
    """Never above the best plan of its division, and nearly it in most."""
    closed = 0
    for seed in range(160):
        mine = division(seed)
        cuts = (0, *(end for ((_, end),) in mine.arcs))
        best = min((p.step_seconds for p in all_plans(mine.trial.problem) if p.cuts == cuts), default=INFINITE)
        times = np.array([[1.0, 2.0, 1.0, 0.0, 0.0, 0.0]] * len(mine.arcs)).T.tolist()
        paths = [path for _, path in rank_paths(mine.trial.compiled, mine.trial.placement, *times)]
        low = Hull(RankPrices(mine), paths).bound(INFINITE, np.ones(len(paths)))
        assert low <= best * (1 + CLOSE), seed
        closed += low >= 0.98 * best
    assert closed > 80


def test_it_ends_where_combinations_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankprices, "PAIRS", 0)
    mine = division(3)
    paths = [path for _, path in rank_paths(mine.trial.compiled, mine.trial.placement, *([[1.0] * len(mine.arcs)] * 6))]
    assert Hull(RankPrices(mine), paths).bound(INFINITE, np.ones(len(paths))) == 0.0

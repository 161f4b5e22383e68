"""The solver against exhaustive search on random small graphs: same prices, same memory accounting, all points of the space."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable

import pytest
from shardwright.planner.costs import Shape
from shardwright.planner.memory import facts
from shardwright.planner.outline import Outline, Parameter, Region, Saved
from shardwright.planner.pins import Pins
from shardwright.planner.plan import MeshAxis
from shardwright.planner.region import Choice
from shardwright.planner.search import Candidate, Problem, Setting
from solver_outlines import FP32, Builder, FakePrices

POINTS = 800
"""Graphs with more points than this are drawn again: exhaustive search must stay quick."""


def random_outline(seed: int) -> Outline:
    """A chain of 2 to 5 ops over [a, b]-shaped tensors with skips, weights (one may be frozen or tied) and a summed loss."""
    rng = random.Random(seed)
    make = Builder()
    a, b = rng.choice((4, 8)), rng.choice((2, 3, 4, 8))
    sample = {"size": a, "batch": True, "token": True}
    rows = rng.choice((sample, {"size": a, "token": True}))
    make.tensor("in", [[a], [b]], "input", rng.random() < 0.2)
    made, weights = ["in"], []
    for i in range(rng.randint(2, 4)):
        name, source = f"t{i}", rng.choice(made[-2:])
        grad = make.tensors[source].differentiable
        kind = rng.choice(("matmul", "add", "mul", "gelu", "norm", "scale"))
        if kind == "matmul":
            weight = rng.choice(weights) if weights and rng.random() < 0.3 else f"w{i}"
            if weight not in make.tensors:
                make.tensor(weight, [[b], [b]], "parameter", rng.random() < 0.85)
                weights.append(weight)
            make.tensor(name, [[a], [b]], grad=grad or make.tensors[weight].differentiable)
            make.op(name, "matmul", [(source, ["r", "k"]), (weight, ["n", "k"])], [(name, ["r", "n"])],
                    {"r": rows, "k": b, "n": b}, linear=((0,), (1,)), projection=True,
                    saved=_some(rng, Saved("operand", 0), Saved("operand", 1)))  # fmt: skip
        elif kind in ("add", "mul"):
            other = rng.choice(made)
            make.tensor(name, [[a], [b]], grad=grad or make.tensors[other].differentiable)
            linear = ((0, 1),) if kind == "add" else ((0,), (1,))
            make.op(name, "elementwise", [(source, ["r", "c"]), (other, ["r", "c"])], [(name, ["r", "c"])],
                    {"r": rows, "c": b}, linear=linear, target=f"aten.{kind}",
                    saved=() if kind == "add" else (Saved("operand", 0), Saved("operand", 1)))  # fmt: skip
        else:
            make.tensor(name, [[a], [b]], grad=grad)
            split = {"size": b, "split": "never"} if kind == "norm" else b
            fresh = Saved("new", 0, (0,), a * 4)
            make.op(name, "elementwise", [(source, ["r", "c"])], [(name, ["r", "c"])], {"r": rows, "c": split},
                    linear=((0,),) if kind == "scale" else (), target=f"aten.{kind}",
                    saved=_some(rng, Saved("operand", 0), Saved("result", 0), fresh))  # fmt: skip
        made.append(name)
    grad = make.tensors[made[-1]].differentiable
    make.tensor("loss", [], grad=grad)
    make.op("loss", "reduction", [(made[-1], ["r", "c"])], [("loss", [])], {"r": rows, "c": b}, linear=((0,),))
    names = [n for n, t in make.tensors.items() if t.role == "parameter"]
    found = tuple(Parameter((n,), n, make.tensors[n].differentiable) for n in names)
    regions = (Region("r0", (tuple(op.name for op in make.ops),), (tuple(names),)),)
    return Outline(make.tensors, tuple(make.ops), regions, found, ("in",), "loss", (), a, a, f"random{seed}")


def layered_outline(seed: int) -> Outline:
    """A stem, two equal layers of one or two ops tied into one region, and a summed loss over the batch."""
    rng = random.Random(seed)
    make = Builder()
    a, b = rng.choice((4, 8)), rng.choice((2, 4))
    rows = {"size": a, "batch": True, "token": True}
    make.tensor("in", [[a], [b]], "input", False)
    make.tensor("ws", [[b], [b]], "parameter")

    def matmul(name: str, source: str, weight: str) -> None:
        make.tensor(name, [[a], [b]])
        make.op(name, "matmul", [(source, ["r", "k"]), (weight, ["n", "k"])], [(name, ["r", "n"])], {"r": rows, "k": b, "n": b},
                linear=((0,), (1,)), projection=True, saved=(Saved("operand", 0), Saved("operand", 1)))  # fmt: skip

    matmul("x", "in", "ws")
    kinds = [rng.choice(("matmul", "gelu", "add")) for _ in range(rng.randint(1, 2))]
    source, instances, weights = "x", [], []
    for k in range(2):
        start, first, mine = len(make.ops), source, []
        for i, kind in enumerate(kinds):
            name = f"l{k}o{i}"
            if kind == "matmul":
                mine.append(make.tensor(f"w{k}{i}", [[b], [b]], "parameter"))
                matmul(name, source, mine[-1])
            else:
                make.tensor(name, [[a], [b]])
                uses = [(source, ["r", "c"])] if kind == "gelu" else [(source, ["r", "c"]), (first, ["r", "c"])]
                linear = () if kind == "gelu" else ((0, 1),)
                kept = (Saved("operand", 0),) if kind == "gelu" else ()
                make.op(name, "elementwise", uses, [(name, ["r", "c"])], {"r": rows, "c": b}, linear=linear, saved=kept,
                        target=f"aten.{kind}")  # fmt: skip
            source = name
        instances.append(tuple(op.name for op in make.ops[start:]))
        weights.append(tuple(mine))
    make.tensor("loss", [])
    make.op("loss", "reduction", [(source, ["r", "c"])], [("loss", [])], {"r": rows, "c": b}, linear=((0,),))
    names = [n for n, t in make.tensors.items() if t.role == "parameter"]
    layers = Region("r1", tuple(instances), tuple(weights))
    regions = (Region("r0", (("x",),), (("ws",),)), layers, Region("r2", (("loss",),), ((),)))
    found = tuple(Parameter((n,), n, True) for n in names)
    return Outline(make.tensors, tuple(make.ops), regions, found, ("in",), "loss", (), a, a, f"layers{seed}")


def _some(rng: random.Random, *saved: Saved) -> tuple[Saved, ...]:
    return tuple(s for s in saved if rng.random() < 0.6)


def shapes_for(seed: int) -> Shape:
    rng = random.Random(seed * 7 + 1)
    data, model = MeshAxis("dp", 2, "data", "link"), MeshAxis("tp", 2, "model", "link")
    return Shape(rng.choice(((model,), (data,), (data, model), (MeshAxis("tp", 4, "model", "link"),))))


def problem_for(seed: int, limit: int | None, outline: Outline | None = None) -> Problem:
    outline = outline if outline is not None else random_outline(seed)
    prices = FakePrices(seed, byte=1e-7, latency=random.Random(seed).choice((1e-9, 1e-6)))
    setting = Setting(FP32, "adamw", reserve=7)
    return Problem(outline, facts(outline), prices, Pins(), setting, limit, gap=1e-9)


def every_point(candidate: Candidate) -> list[tuple[float, int]]:
    """(seconds, peak bytes) of every point of a candidate's space that has legal transitions."""
    space = candidate.space
    sides = [range(len(s)) for s in space.strategies] + [range(len(o)) for o in space.options]
    found = []
    for point in itertools.product(*sides):
        at = len(space.strategies)
        try:
            result = candidate.evaluator.evaluate(candidate.assignment(Choice(point[:at], point[at:])))
        except ValueError:
            continue
        found.append((result.step_seconds, result.peak_bytes))
    return found


def best_of(candidate: Candidate) -> None:
    """Add rows until the answer is final."""
    while not candidate.advance():
        pass


def size_of(candidate: Candidate) -> int:
    return math.prod(len(s) for s in candidate.space.strategies) * math.prod(len(o) for o in candidate.space.options)


@functools.cache
def instances(count: int, make: Callable[[int], Outline]) -> list[int]:
    """Seeds whose spaces are small enough for exhaustive search."""
    found: list[int] = []
    seed = 0
    while len(found) < count:
        candidate = Candidate(problem_for(seed, None, make(seed)), shapes_for(seed), 1)
        if 4 <= size_of(candidate) <= POINTS:
            found.append(seed)
        seed += 1
    return found


def check(seed: int, make: Callable[[int], Outline] = random_outline, microbatches: int = 1) -> int:
    """Compare solver and exhaustive search without a limit and under several; returns how many limits were infeasible."""

    def candidate_for(limit: int | None) -> Candidate:
        return Candidate(problem_for(seed, limit, make(seed)), shapes_for(seed), microbatches)

    points = every_point(candidate_for(None))
    peaks = sorted({peak for _, peak in points})
    rng = random.Random(seed)
    limits = [None, peaks[0] - 1, peaks[0], rng.choice(peaks), rng.choice(peaks)]
    last = None
    infeasible = 0
    for limit in sorted(limits, key=lambda x: -x if x is not None else -math.inf):
        fitting = [seconds for seconds, peak in points if limit is None or peak <= limit]
        candidate = candidate_for(limit)
        best_of(candidate)
        assert candidate.solution is not None
        if not fitting:
            assert candidate.solution.choice is None, (
                f"seed {seed}, limit {limit}: a plan where exhaustive search has none"
            )
            infeasible += 1
            continue
        assert candidate.solution.choice is not None, f"seed {seed}, limit {limit}: no plan"
        assert candidate.evaluation is not None
        assert candidate.evaluation.step_seconds == pytest.approx(min(fitting), rel=1e-6), f"seed {seed}, limit {limit}"
        assert candidate.solution.seconds == pytest.approx(candidate.evaluation.step_seconds, rel=1e-6)
        if last is not None:
            assert candidate.evaluation.step_seconds >= last * (1 - 1e-7)
        last = candidate.evaluation.step_seconds
    return infeasible


@pytest.mark.parametrize("part", range(3))
def test_equals_exhaustive_search(part: int) -> None:
    """90 random graphs, each without a limit and under four; one of them is below what any plan needs."""
    assert sum(check(seed) for seed in instances(90, random_outline)[part::3]) >= 30


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(7))
def test_equals_exhaustive_search_at_night(part: int) -> None:
    """210 more."""
    assert sum(check(seed) for seed in instances(300, random_outline)[90 + part :: 7]) >= 30


@pytest.mark.parametrize("microbatches", [1, 2])
def test_tied_layers_equal_exhaustive_search(microbatches: int) -> None:
    """Two equal layers tied into one template cost what the two concrete layers cost, with and without microbatches."""
    seeds = instances(25, layered_outline)
    assert sum(check(seed, layered_outline, microbatches) for seed in seeds) >= len(seeds)

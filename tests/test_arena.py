"""Arenas: no two live buffers overlap, no larger than an exact solver's where that can be asked, near the bound on real models."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from eager import family
from ortools.sat.python import cp_model
from shardwright.passes.capture import capture
from shardwright.passes.steps import in_place, steps_of
from shardwright.planner.arena import most_alive, place
from shardwright.planner.liveness import Interval, Step, curve, lifetimes, peak
from torch import nn


def check(intervals, arena, alignment=64, inside=None):
    """Buffers that meet do not overlap (but where one takes the place of the other), and all lie in the arena."""
    inside = inside or {}
    for n, one in enumerate(intervals):
        begin = arena.offsets[one.name]
        assert begin % alignment == 0
        assert begin + one.bytes <= arena.bytes or not one.bytes
        for other in intervals[n + 1 :]:
            there = arena.offsets[other.name]
            taken = inside.get(other.name) == one.name and one.last == other.first
            if one.meets(other) and not taken and one.bytes and other.bytes:
                assert begin + one.bytes <= there or there + other.bytes <= begin, (one, other)


def optimum(intervals) -> int:
    """The smallest arena by CP-SAT: rectangles of time and memory that do not overlap."""
    model = cp_model.CpModel()
    most = sum(i.bytes for i in intervals)
    top = model.new_int_var(0, most, "top")
    times, spaces = [], []
    for i in intervals:
        begin = model.new_int_var(0, most, i.name)
        times.append(model.new_fixed_size_interval_var(i.first, i.last - i.first + 1, f"{i.name} lives"))
        spaces.append(model.new_interval_var(begin, i.bytes, begin + i.bytes, f"{i.name} lies"))
        model.add(begin + i.bytes <= top)
    model.add_no_overlap_2d(times, spaces)
    model.minimize(top)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    assert solver.solve(model) == cp_model.OPTIMAL
    return int(solver.objective_value)


def drawn(seed: int, count: int, steps: int = 8):
    draw = random.Random(seed)
    found = []
    for i in range(count):
        first = draw.randrange(steps)
        found.append(Interval(f"b{i}", first, draw.randrange(first, steps), draw.randint(1, 12)))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_small_plans_are_optimal(seed):
    intervals = drawn(seed, random.Random(seed).randint(2, 10))
    arena = place(intervals, alignment=1)
    check(intervals, arena, 1)
    assert arena.optimal
    assert arena.bytes == optimum(intervals)
    assert arena.bound == most_alive(intervals) <= arena.bytes


GAPS = (
    ((0, 4, 1), (0, 3, 3), (5, 6, 3), (4, 5, 2), (0, 0, 2), (1, 5, 1), (6, 6, 3), (1, 4, 1)),
    ((1, 2, 2), (1, 1, 2), (4, 6, 4), (6, 6, 1), (0, 3, 2), (2, 4, 1), (3, 4, 1), (2, 3, 1), (3, 3, 1), (0, 0, 4)),
    ((5, 6, 4), (4, 6, 1), (6, 6, 1), (2, 5, 1), (1, 1, 3), (0, 0, 4), (1, 2, 2), (2, 4, 2), (0, 4, 1), (3, 4, 1)),
)
"""Buffers (first, last, bytes) for which no arena is as small as the most bytes alive at once."""


@pytest.mark.parametrize("gap", GAPS)
def test_the_bound_is_not_always_met(gap):
    intervals = [Interval(f"b{i}", *b) for i, b in enumerate(gap)]
    arena = place(intervals, alignment=1)
    assert (arena.bound, arena.bytes, arena.optimal) == (6, 7, True)
    assert optimum(intervals) == 7
    assert not place(intervals, alignment=1, effort=100).optimal


@pytest.mark.parametrize("seed", range(10))
def test_large_plans_are_near_the_bound(seed):
    draw = random.Random(seed)
    intervals = []
    for i in range(300):
        first = draw.randrange(200)
        intervals.append(
            Interval(
                f"b{i}", first, min(199, first + int(draw.expovariate(0.1))), draw.choice((3, 64, 1000, 4096, 70000))
            )
        )
    arena = place(intervals)
    check(intervals, arena)
    assert arena.bytes <= 1.1 * arena.bound
    assert arena.bytes % 64 == 0


def test_alignment_and_nothing_to_place():
    intervals = [Interval("a", 0, 1, 65), Interval("b", 1, 2, 1), Interval("none", 1, 1, 0)]
    assert place(intervals).bytes == 192
    assert place(intervals, alignment=1).bytes == 66
    assert place([]).bytes == 0
    assert place([Interval("none", 0, 0, 0)]).offsets == {"none": 0}


def test_in_place():
    chain = [Interval("a", 0, 1, 640), Interval("b", 1, 2, 640), Interval("c", 2, 3, 320), Interval("d", 3, 4, 640)]
    inside = {"b": "a", "c": "b", "d": "c"}
    arena = place(chain, inside=inside)
    assert arena.offsets["a"] == arena.offsets["b"] == arena.offsets["c"]
    assert arena.bytes == 960 + 320  # d is larger than c, which lies in 640 bytes; it fits there
    assert place(chain).bytes == 1280
    late = [replace(chain[0], last=2), *chain[1:]]
    assert place(late, inside=inside).offsets["b"] != place(late, inside=inside).offsets["a"]


def test_liveness():
    steps = [
        Step("a", ("x",), (("a", 4),)),
        Step("b", ("a",), (("b", 8),), 100),
        Step("c", ("b", "a"), (("c", 2),)),
        Step("d", ("c",), ()),
    ]
    assert lifetimes(steps) == (Interval("a", 0, 2, 4), Interval("b", 1, 2, 8), Interval("c", 2, 3, 2))
    assert curve(steps) == [4, 112, 14, 2]
    assert curve(steps, {"b"}) == [4, 112, 14, 10]
    assert peak(steps) == 112


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-padded", "vit"])
@pytest.mark.parametrize("training", [True, False])
def test_real_models(name, training):
    model, kwargs = family(name)
    graph = capture(model.eval(), (), kwargs, train=training).graph.graph
    steps = steps_of(graph, training=training)
    intervals = lifetimes(steps.steps, steps.kept)
    arena = place(intervals)
    check(intervals, arena)
    assert most_alive(intervals) == max(curve([replace(s, inside=0) for s in steps.steps], steps.kept))
    assert arena.bound <= arena.bytes <= 1.1 * arena.bound
    if not training:
        inside = in_place(graph)
        smaller = place(intervals, inside=inside)
        check(intervals, smaller, inside=inside)
        assert smaller.bytes <= arena.bytes


def test_a_convolutional_network():
    layers = [
        nn.Conv2d(3, 8, 3, 2),
        nn.ReLU(),
        nn.Conv2d(8, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, 8, 3, 2),
        nn.SiLU(),
        nn.Flatten(),
    ]
    graph = capture(nn.Sequential(*layers), (torch.randn(1, 3, 64, 64),), train=False).graph.graph
    steps = steps_of(graph)
    intervals = lifetimes(steps.steps, steps.kept)
    arena, inside = place(intervals), in_place(graph)
    assert arena.bytes <= 1.1 * arena.bound
    assert place(intervals, inside=inside).bytes < arena.bytes
    assert set(inside) == {"relu", "relu_1", "silu"}

"""Memory: rows of the program against the concrete count at every time point, aliases, parameters by ZeRO level."""

from __future__ import annotations

import random

import pytest
from shardwright.planner.costs import Shape
from shardwright.planner.memory import Setting, buffer, facts, held, new_bytes
from shardwright.planner.outline import Factor, Op, Outline, Parameter, Region, Saved, Tensor, Use
from shardwright.planner.placement import P, R, V, split
from shardwright.planner.plan import MeshAxis
from shardwright.planner.precision import state_bytes
from shardwright.planner.region import Choice, Form, Key
from shardwright.planner.search import Candidate
from solver_outlines import FP32, transformer
from test_solver_brute_force import problem_for, random_outline, shapes_for


def value(candidate: Candidate, choice: Choice, key: Key) -> float:
    """The value of a key at a point."""
    space = candidate.space
    if key[0] == "x":
        return float(choice.strategies[key[1]] == key[2])
    if key[0] == "z":
        return float(choice.options[key[1]] == key[2])
    if key[0] == "any":
        return max(sum(value(candidate, choice, k) for k in group) for group in key[1])
    if key[0] == "more":
        return max(sum(value(candidate, choice, ("e", key[1], key[2], want)) for want in key[3]) - 1.0, 0.0)
    if key[0] == "y":
        (made, i), v, j = key[1]
        return float(
            space.strategies[made][choice.strategies[made]].results[i] == key[2]
            and space.strategies[v][choice.strategies[v]].operands[j] == key[3]
        )
    users = [c for t in candidate.template.classes if t.parameter == key[1] for c in t.consumers]
    wanted = {space.strategies[v][choice.strategies[v]].operands[i] for v, i in users}
    return float(choice.options[key[1]] == key[2] and key[3] in wanted)


def total(candidate: Candidate, choice: Choice, form: Form) -> float:
    return form.constant + sum(b * value(candidate, choice, key) for key, b in form.terms.items())


def check(candidate: Candidate, seed: int, tries: int = 6) -> int:
    """Compare every time point of some random points of the space; returns how many were compared."""
    rng, compared = random.Random(seed), 0
    space = candidate.space
    for _ in range(tries):
        choice = Choice(
            tuple(rng.randrange(len(s)) for s in space.strategies), tuple(rng.randrange(len(o)) for o in space.options)
        )
        assignment = candidate.assignment(choice)
        try:
            evaluation = candidate.evaluator.evaluate(assignment)
        except ValueError:
            continue
        for point, amount in evaluation.points.items():
            named, group = candidate._named(point, assignment)
            assert total(candidate, choice, candidate.form(named, group)) == pytest.approx(amount), (point, named)
            compared += 1
        assert sum(evaluation.memory.values()) == pytest.approx(evaluation.peak_bytes, abs=8)
    return compared


def test_rows_equal_the_concrete_count_on_random_graphs() -> None:
    assert sum(check(Candidate(problem_for(seed, None), shapes_for(seed), 1), seed) for seed in range(40)) > 500


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("loss", [True, False])
def test_rows_equal_the_concrete_count_on_layers(microbatches: int, loss: bool) -> None:
    outline = transformer(3)
    if not loss:
        outline = Outline(
            **{f: getattr(outline, f) for f in outline.__dataclass_fields__} | {"loss": "", "outputs": ("logits",)}
        )
    axes = (MeshAxis("dp", 2, "data", "link"), MeshAxis("tp", 2, "model", "link"))
    candidate = Candidate(problem_for(0, None, outline), Shape(axes), microbatches if loss else 1)
    assert check(candidate, 1, 4) > 100


def test_views_share_their_storage() -> None:
    """A split of a view is the same buffer as that split of its base; V and R are one buffer, P is another."""
    tensors = {
        "i": Tensor("i", ((6,), (2, 4)), "float32", "input", False, "i"),
        "x": Tensor("x", ((6,), (2, 4)), "float32", "activation", True, "x"),
        "v": Tensor("v", ((2,), (6,), (4,)), "float32", "activation", True, "x"),
    }
    factors = (Factor("a", 6), Factor("b", 2), Factor("c", 4))
    ops = (
        Op("make", "aten.gelu", "elementwise", (Use("i", ((0,), (1, 2))),), (Use("x", ((0,), (1, 2))),), factors),
        Op("view", "aten.view", "view", (Use("x", ((0,), (1, 2))),), (Use("v", ((1,), (0,), (2,))),), factors),
    )
    outline = Outline(tensors, ops, (Region("r0", (("make", "view"),), ((),)),), (), ("i",), "", ("v",), 6, 6, "views")
    found = facts(outline)
    assert buffer(found, "v", (split(0),)) == buffer(found, "x", (split(1),)) == ("x", (split(1),))
    assert buffer(found, "v", (V,)) == buffer(found, "x", (R,))
    assert buffer(found, "v", (P,)) != buffer(found, "x", (R,))


@pytest.mark.parametrize(
    ("zero", "stored", "expected"),
    [
        (0, 100, {"stored": 400, "moments": 800, "copy": 0, "gathered": 0, "arrival": 0, "whole": 400, "final": 400}),
        (1, 25, {"stored": 100, "moments": 200, "copy": 400, "gathered": 0, "arrival": 0, "whole": 400, "final": 100}),
        (2, 25, {"stored": 100, "moments": 200, "copy": 400, "gathered": 0, "arrival": 0, "whole": 400, "final": 100}),
        (
            3,
            25,
            {"stored": 100, "moments": 200, "copy": 0, "gathered": 400, "arrival": 100, "whole": 400, "final": 100},
        ),
    ],
)
def test_bytes_of_a_parameter_by_level(zero: int, stored: int, expected: dict[str, int]) -> None:
    tensor = Tensor("w", ((100,),), "float32", "parameter", True, "w")
    found = held(tensor, True, stored, 100.0, zero, 0, state_bytes(FP32, "adamw"), Setting(FP32, "adamw"))
    assert {name: getattr(found, name) for name in expected} == expected


def test_a_frozen_parameter_has_no_gradient_and_no_state() -> None:
    tensor = Tensor("w", ((100,),), "float32", "parameter", False, "w")
    found = held(tensor, False, 100, 100.0, 0, 0, state_bytes(FP32, "adamw"), Setting(FP32, "adamw"))
    assert (found.moments, found.whole, found.final, found.bucket, found.step) == (0, 0, 0, 0, 0)


def test_frozen_parameters_are_never_reduced_or_updated() -> None:
    for seed in range(30):
        outline = random_outline(seed)
        frozen: list[Parameter] = [p for p in outline.parameters if not p.trainable]
        if not frozen or len(frozen) != len(outline.parameters):
            continue
        candidate = Candidate(problem_for(seed, None), shapes_for(seed), 1)
        candidate.advance()
        assert candidate.evaluation is not None
        assert candidate.evaluation.seconds["optimizer"] == 0
        assert candidate.evaluation.memory["optimizer"] == 0


def test_saved_new_tensors_scale_with_their_factors() -> None:
    op = Op("o", "aten.norm", "norm", (), (), (Factor("a", 8), Factor("b", 4)), saved=(Saved("new", 0, (0,), 32),))
    assert new_bytes(op, op.saved[0], ("a", "R"), (2, 2)) == 16
    assert new_bytes(op, op.saved[0], ("a", "a"), (2, 2)) == 8
    assert new_bytes(op, op.saved[0], ("b", "R"), (2, 2)) == 32

"""GELU written out: random forms of it, what is left alone, and real models."""

from __future__ import annotations

import math
import random

import pytest
import torch
from eager import family
from fusing import drawn_seeds
from shardwright.passes.capture import Captured, capture
from shardwright.passes.checked import difference, inputs_of, outcome
from shardwright.passes.fuse import PASSES
from shardwright.passes.rewrite import rewritten
from test_patterns import captured


def calls(one: Captured, name: str) -> int:
    return sum(str(n.target).startswith(f"aten.{name}.") for n in one.graph.graph.nodes)


def same(one: Captured) -> Captured:
    """The graph after the pass; outputs and gradients are those before."""
    after = rewritten(one, [PASSES["gelu"]])
    values = one.constants | inputs_of(one.graph.graph, 3)
    assert difference(outcome(one.graph.graph, values), outcome(after.graph.graph, values)) == ""
    return after


def form(dice: random.Random):  # type: ignore[no-untyped-def]
    """One way to write GELU, with factors in any order and constants to 6 or 17 digits."""

    def product(*factors):  # type: ignore[no-untyped-def]
        order = list(factors)
        dice_order = dice.sample(range(len(order)), len(order))
        found = order[dice_order[0]]
        for i in dice_order[1:]:
            found = found * order[i]
        return found

    exact = dice.random() < 0.4
    root = dice.choice([math.sqrt(2 / math.pi), 0.7978845608])
    cube = dice.choice([lambda h: h.pow(3), lambda h: h * h * h, lambda h: torch.pow(h, 3.0)])
    divided, ahead = dice.random() < 0.5, dice.random() < 0.5

    def function(h: torch.Tensor) -> torch.Tensor:
        if exact:
            inner = torch.erf(h / math.sqrt(2.0) if divided else h * math.sqrt(0.5))
        else:
            inner = torch.tanh(product(root, h + product(0.044715, cube(h))))
        more = 1 + inner if ahead else inner + 1.0
        return dice.choice(
            [lambda: 0.5 * h * more, lambda: h * 0.5 * more, lambda: h * (0.5 * more), lambda: 0.5 * (h * more)]
        )()

    return function, exact


@pytest.mark.parametrize("seed", drawn_seeds(24))
def test_random_forms(seed: int) -> None:
    dice = random.Random(seed)
    function, exact = form(dice)
    shape = (*tuple(dice.choice([1, 2, 3, 5]) for _ in range(dice.randint(1, 3))), 6)
    after = same(captured(function, shape))
    assert calls(after, "gelu") == 1, function
    assert calls(after, "tanh") == calls(after, "erf") == 0
    gelu = next(n for n in after.graph.graph.nodes if str(n.target).startswith("aten.gelu."))
    assert gelu.kwargs == ({} if exact else {"approximate": "tanh"})


def _with(
    inner: float = 0.044715,
    root: float = math.sqrt(2 / math.pi),
    half: float = 0.5,
    power: float = 3.0,
    shared: bool = False,
):  # type: ignore[no-untyped-def]
    def function(h: torch.Tensor) -> torch.Tensor:
        tanh = torch.tanh(root * (h + inner * h.pow(power)))
        return half * h * (1 + tanh) + (tanh if shared else 0.0)

    return function


@pytest.mark.parametrize(
    "changes", [{"inner": 0.045}, {"root": 0.797885}, {"half": 0.4}, {"power": 2.0}, {"shared": True}]
)
def test_what_is_not_quite_gelu_is_left_alone(changes: dict[str, float]) -> None:
    one = captured(_with(**changes))  # type: ignore[arg-type]
    after = rewritten(one, [PASSES["gelu"]])
    assert [n.format_node() for n in after.graph.graph.nodes] == [n.format_node() for n in one.graph.graph.nodes]


def test_gpt2() -> None:
    model, kwargs = family("gpt2")
    one = capture(model.double(), (), kwargs, lift_float64=True)
    after = same(one)
    assert calls(after, "gelu") == 2
    assert calls(after, "tanh") == 0
    assert len(one.graph.graph.nodes) - len(after.graph.graph.nodes) == 2 * 7

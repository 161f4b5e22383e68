"""Branches in threads: random fork-join graphs in float64, what is left as it was, and an inference program end to end."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from shardwright.api import apply_plan, make_plan
from shardwright.passes.beside import run_beside
from shardwright.passes.prepare import prepare
from shardwright.passes.summarize import Summary
from shardwright.planner.branches import fork_joins
from shardwright.planner.prices import Prices
from shardwright.profiles.devices import parse_cluster
from shardwright.runtime.beside import Beside, Threads, paying
from torch import Tensor, fx, nn

WIDTH = 6


class Tree(nn.Module):
    """Forks in forks, drawn at random: branches of one op or several, weights shared between them, results read outside."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.dice = seed
        self.weights = nn.ParameterList([torch.randn(WIDTH, WIDTH) / 2 for _ in range(4)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.made: list[Tensor] = []
        dice = random.Random(self.dice)
        last = self.fork(dice, self.op(dice, x @ self.weights[0]), 2)
        return (last * dice.choice(self.made), dice.choice(self.made), self.made[0].sum())

    def op(self, dice: random.Random, x: Tensor) -> Tensor:
        kind = dice.randrange(5)
        w = self.weights[dice.randrange(4)]
        made = (x @ w, torch.tanh(x), torch.relu(x) + x, torch.softmax(x, -1), torch.nn.functional.linear(x, w))[kind]
        self.made.append(made)
        return made

    def fork(self, dice: random.Random, x: Tensor, depth: int) -> Tensor:
        ends = []
        for _ in range(dice.randint(2, 4)):
            end = self.op(dice, x)
            for _ in range(dice.randint(0, 2)):
                end = self.fork(dice, end, depth - 1) if depth and dice.random() < 0.4 else self.op(dice, end)
            ends.append(end)
        return (
            torch.stack(ends).sum(0)
            if dice.random() < 0.5
            else torch.cat(ends, -1) @ torch.ones(WIDTH * len(ends), WIDTH, dtype=x.dtype)
        )


def captured(model: nn.Module, *args: Tensor) -> tuple[Summary, fx.GraphModule]:
    """The summary of a model, and its graph with the names of ops as lowering notes them."""
    summary = prepare(model, args, {}, "float64")
    module = summary.captured.graph
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.meta["op"] = node.name
    return summary, module


def run(summary: Summary, module: fx.GraphModule, model: nn.Module, x: Tensor) -> list[Tensor]:
    """All outputs and all gradients."""
    values = []
    for entry in summary.captured.entries:
        value = x if entry.role == "input" else summary.captured.constants.get(entry.node)
        values.append(dict(model.named_parameters())[entry.fqn] if entry.role == "parameter" else value)
    outputs = list(module(*values))
    ways = [o for o in outputs if o.requires_grad]
    grads = torch.autograd.grad([o.sum() for o in ways], list(model.parameters()), allow_unused=True) if ways else ()
    return [*(o.detach() for o in outputs), *(g for g in grads if g is not None)]


@pytest.fixture(scope="module")
def threads() -> Threads:
    return Threads(2)


@pytest.mark.parametrize("seed", range(24))
def test_random_forks_compute_what_they_did(seed: int, threads: Threads) -> None:
    torch.manual_seed(seed)
    model, x = Tree(seed).double(), torch.randn(5, WIDTH, dtype=torch.float64)
    summary, module = captured(model, x)
    with torch.no_grad():
        values = run(summary, module, model, x)
    trained = run(summary, module, model, x)
    regions = fork_joins(summary.outline)
    assert regions

    def make(bodies: Any, counts: Any) -> Beside:
        return Beside(bodies, counts, (range(0, len(bodies), 2), range(1, len(bodies), 2)), threads)

    assert sum(run_beside(module, region.branches, make) for region in regions)
    module.graph.lint()
    assert any(isinstance(node.target, Beside) for node in module.graph.nodes)
    before = torch.get_num_threads()
    with torch.no_grad():
        beside = run(summary, module, model, x)
    assert torch.get_num_threads() == before
    for found, wanted in zip([*beside, *run(summary, module, model, x)], [*values, *trained], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_an_error_in_a_branch_is_raised_and_threads_are_as_before(threads: Threads) -> None:
    def fail() -> None:
        raise ValueError("in a branch")

    before = torch.get_num_threads()
    for lists in ([[fail], [int]], [[int], [fail]]):
        with pytest.raises(ValueError, match="in a branch"):
            threads.all(lists)
        assert torch.get_num_threads() == before


def test_branches_that_read_each_other_stay() -> None:
    class Talking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, right = torch.tanh(x), torch.relu(x)
            return torch.exp(left + right) * torch.sigmoid(right)

    _, module = captured(Talking(), torch.randn(4, 4, dtype=torch.float64))
    names = [node.name for node in module.graph.nodes if node.op == "call_function"]
    text = module.code
    assert not run_beside(module, (("tanh", "add"), ("relu",)), lambda b, c: pytest.fail("made"))
    assert {"tanh", "relu"} <= set(names)
    assert module.code == text


class Two(nn.Module):
    """Two towers of products; `parts` are their numbers of layers."""

    def __init__(self, width: int, parts: tuple[int, int]) -> None:
        super().__init__()
        self.towers = nn.ModuleList([nn.Sequential(*(nn.Linear(width, width) for _ in range(n))) for n in parts])

    def forward(self, x: Tensor) -> Tensor:
        left, right = (tower(x) for tower in self.towers)
        return left * right


def priced(width: int, parts: tuple[int, int], threads: int) -> list[Any]:
    summary = prepare(Two(width, parts), (torch.randn(8, width),), {}, "float32")
    return list(paying(summary.outline, Prices(parse_cluster("cpu:1"), "float32"), threads))


def test_even_branches_that_take_longer_than_handing_them_over_pay() -> None:
    ((region, workers),) = priced(1024, (8, 8), 2)
    assert sorted(map(len, workers)) == [1, 1]
    assert len(region.branches) == 2
    assert priced(16, (3, 3), 2) == []  # shorter than handing a branch over
    assert priced(1024, (13, 3), 2) == []  # one branch is nearly all there is
    assert priced(1024, (8, 8), 4) == []  # threads without a branch


def test_an_inference_program_runs_branches_at_once() -> None:
    torch.manual_seed(0)
    model, x = Two(1024, (8, 8)).eval(), torch.randn(8, 1024)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        plan = make_plan(model, (x,), parse_cluster("cpu:1"), pins=["dtype=fp32", "passes=none"])
        pm = apply_plan(model, (x,), plan)
        with torch.no_grad():
            found, wanted = pm(x), model(x)
        program = pm._core.programs.get((x,), {}, train=False, grad=False, outputs=False)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert [n.target for n in program.lowered.body.graph.nodes if isinstance(n.target, Beside)]

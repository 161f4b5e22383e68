"""Calls in the order that needs the least memory: the same function and random numbers, and the peak that is told."""

from __future__ import annotations

import random

import pytest
import torch
from eager import family
from shardwright.passes.capture import capture
from shardwright.passes.checked import Verifying, difference, inputs_of, outcome
from shardwright.passes.fuse.reorder import Reorder, reordering
from shardwright.passes.rewrite import rewritten
from shardwright.passes.steps import steps_of, trains
from shardwright.planner.liveness import Step, peak
from shardwright.planner.ordering import Ordering
from shardwright.runtime.monitor import Budget
from torch import fx, nn


def least(steps, after, kept) -> int:
    """The lowest peak of any order: dynamic programming over sets of steps that have run."""
    place = {s.name: i for i, s in enumerate(steps)}
    needs = [sum(1 << place[n] for n in after[s.name]) for s in steps]
    size = {n: b for s in steps for n, b in s.makes}
    users = {n: sum(1 << i for i, s in enumerate(steps) if n in s.reads or n in dict(s.makes)) for n in size}

    def alive(done: int) -> int:
        return sum(b for n, b in size.items() if users[n] & done and (n in kept or users[n] & ~done) and made(n) & done)

    def made(name: str) -> int:
        return sum(1 << i for i, s in enumerate(steps) if name in dict(s.makes))

    best = {0: 0}
    for done in range(1 << len(steps)):
        if done not in best:
            continue
        for i, step in enumerate(steps):
            if not done >> i & 1 and needs[i] & ~done == 0:
                during = alive(done) + sum(b for _, b in step.makes) + step.inside
                after_ = done | 1 << i
                best[after_] = min(best.get(after_, 1 << 60), max(best[done], during))
    return best[(1 << len(steps)) - 1]


def drawn(seed: int):
    draw = random.Random(seed)
    steps, after = [], {}
    for i in range(draw.randint(3, 10)):
        reads = [f"s{j}" for j in range(i) if draw.random() < 0.4]
        steps.append(Step(f"s{i}", tuple(reads), ((f"s{i}", draw.randint(1, 20)),), draw.choice((0, 0, 5))))
        after[f"s{i}"] = reads
    return steps, after, {steps[-1].name}


@pytest.mark.parametrize("seed", range(60))
def test_small_graphs_are_ordered_as_well_as_they_go(seed):
    steps, after, kept = drawn(seed)
    names, found = Ordering(steps, after, kept).best()
    by_name = {s.name: s for s in steps}
    assert sorted(names) == sorted(by_name)
    assert all(names.index(a) < names.index(n) for n in names for a in after[n])
    assert peak([by_name[n] for n in names], kept) == found == least(steps, after, kept)


class Branches(nn.Module):
    """Wide branches that are summed up at the end, written so that all are alive at once."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.wide = nn.ModuleList(nn.Linear(4, draw.choice((16, 32, 64))) for _ in range(draw.randint(3, 5)))
        self.narrow = nn.ModuleList(nn.Linear(layer.out_features, draw.choice((2, 4))) for layer in self.wide)
        self.act = [draw.choice((torch.tanh, torch.relu, nn.functional.gelu)) for _ in self.wide]
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        wide = [act(layer(x)) for act, layer in zip(self.act, self.wide, strict=True)]
        wide = [self.drop(w) for w in wide]
        narrow = [layer(w) for layer, w in zip(self.narrow, wide, strict=True)]
        return torch.cat(narrow, 1).square().sum()


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed):
    """Lower peaks as told and as measured; values, gradients and random numbers as before."""
    model, x = Branches(seed).double().train(), torch.randn(8, 4).double()
    captured = capture(model, (x,), loss_fn=lambda y: y)
    other = rewritten(captured, [Reorder()], weigh=Verifying(captured.constants))
    assert trains(other.graph.graph)
    assert all(r.verdict is None or r.verdict.stays for r in other.records)
    values = captured.values(model) | captured.flatten((x,), {})
    losses = []
    for graph in (captured, other):
        torch.manual_seed(1)
        losses.append(fx.Interpreter(graph.graph).run(*(values[e.node] for e in graph.entries))[0].item())
    assert losses[0] == losses[1]
    free = capture(model.eval(), (x,), train=False)
    found = reordering(free.graph.graph)
    assert found.after < found.before
    better = rewritten(free, [Reorder()])
    for graph, told in ((free, found.before), (better, found.after)):
        with torch.no_grad(), Budget(10**12) as budget:
            named = graph.values(model) | graph.flatten((x,), {})
            fx.Interpreter(graph.graph).run(*(named[e.node].detach() for e in graph.entries))
        assert budget.peak + x.nbytes == told == steps_of(graph.graph.graph).peak
    same = inputs_of(free.graph.graph, seed)
    assert difference(outcome(free.graph.graph, same), outcome(better.graph.graph, same)) == ""


def test_random_calls_stay_in_their_order():
    captured = capture(Branches(3).train(), (torch.randn(8, 4),), loss_fn=lambda y: y)
    free = [n for n in captured.graph.graph.nodes]
    other = rewritten(captured, [Reorder()])
    drops = [[n.name for n in g if "dropout" in n.name] for g in (free, other.graph.graph.nodes)]
    assert drops[0] == drops[1]
    assert len(drops[0]) > 1
    other.graph.graph.lint()


def test_what_cannot_be_lowered_is_left_alone():
    chain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    captured = capture(chain, (torch.randn(3, 4),), train=False)
    assert reordering(captured.graph.graph) is None
    other = rewritten(captured, [Reorder()])
    assert [n.name for n in other.graph.graph.nodes] == [n.name for n in captured.graph.graph.nodes]


def test_results_of_several_go_with_what_makes_them():
    class Parts(nn.Module):
        def forward(self, x):
            a, b = (x * 2).chunk(2, 1)
            wide = [torch.cat([b] * 8, 1).tanh(), torch.cat([a] * 8, 1).tanh()]
            return wide[0].sum() + torch.topk(wide[1], 2)[0].sum()

    captured = capture(Parts(), (torch.randn(4, 6),), train=False)
    other = rewritten(captured, [Reorder()], weigh=Verifying(captured.constants))
    other.graph.graph.lint()
    assert other.records[-1].verdict is not None
    assert other.records[-1].verdict.stays


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_real_models(name):
    model, kwargs = family(name)
    captured = capture(model, (), kwargs)
    steps = steps_of(captured.graph.graph, training=True)
    other = rewritten(captured, [Reorder()], weigh=Verifying(captured.constants))
    after = steps_of(other.graph.graph, training=True)
    found = reordering(captured.graph.graph)
    worth = found is not None and found.after <= 0.99 * found.before
    assert after.peak == (found.after if worth else steps.peak) <= steps.peak

"""Sparse updates: the most valuable set within a budget, what a backward pass keeps for it, and steps that update it alone."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import shardwright as sw
import torch
from captures import TAG
from counting import Products
from models import build
from offloading import cluster
from running import eager
from shardwright.passes.capture import Captured, capture
from shardwright.passes.choose import Choice, exact, run
from shardwright.passes.gradients import mark
from shardwright.passes.kept import kept_bytes
from shardwright.passes.observe import Observer
from shardwright.passes.skeleton import skeleton, to_meta
from shardwright.passes.sparse_update import backward_of
from shardwright.planner.sparse import Backward, Candidate, Kept, choose, most_valuable, update_bytes
from shardwright.runtime.losses import loss_of
from shardwright.runtime.monitor import measure_step

# -- the choice


def instance(seed: int) -> tuple[dict[str, Candidate], Backward]:
    """A random graph over few parameters: a chain with skips whose ops keep their operands, results and tensors of their own."""
    dice = random.Random(seed)
    names = [f"p{i}" for i in range(dice.randint(1, 9))]
    candidates = {n: Candidate(dice.choice([0.0, 1.0, 2.5, dice.random() * 9]), dice.randint(1, 40)) for n in names}
    flows: dict[str, tuple[str, ...]] = {}
    kept = []
    for i, name in enumerate(names):
        back = dice.sample([t for t in flows if t.startswith("t")], k=min(len(flows), dice.randint(0, 2)))
        flows[f"t{i}"] = (name, *back)
        for _ in range(dice.randint(0, 3)):
            reasons = dice.sample([name, *back, f"t{i}"], k=dice.randint(1, 1 + len(back)))
            kept.append(Kept(dice.randint(1, 60), frozenset(reasons)))
            if len(reasons) > 1:  # what an op needs not keep where a gradient flows through all
                kept.append(Kept(-dice.randint(0, kept[-1].bytes), frozenset(reasons[1:])))
    return candidates, Backward(flows, kept)


@pytest.mark.parametrize("seed", range(40))
def test_no_other_set_is_worth_more_within_the_budget(seed: int) -> None:
    candidates, backward = instance(seed)
    every = [c for n in range(len(candidates) + 1) for c in itertools.combinations(candidates, n)]
    whole = update_bytes(candidates, backward, list(candidates))
    for budget in (0, whole // 3, whole // 2, whole - 1, whole):
        found = most_valuable(candidates, backward, budget)
        best = max(
            sum(candidates[n].value for n in names)
            for names in every if update_bytes(candidates, backward, names) <= budget
        )  # fmt: skip
        assert update_bytes(candidates, backward, found) <= budget
        assert sum(candidates[n].value for n in found) == pytest.approx(best, rel=1e-5)


def test_a_budget_below_every_update_is_refused_with_what_would_do() -> None:
    candidates, backward = instance(0)
    with pytest.raises(sw.Infeasible, match="budget_bytes=1000"):
        choose(candidates, backward, 999, lambda _: 1000)


# -- what is kept


def graph_of(name: str) -> Captured:
    case = build(name)
    made = capture(skeleton(case.model), to_meta(case.args), to_meta(dict(case.kwargs)), loss_fn=case.loss_fn)
    return run(made, Choice(exact()))


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "bert", "vit", "mixtral", "t5", "unet", "convnext", "resnet", "whisper"]
)
def test_the_bytes_of_any_set_are_those_of_a_graph_that_trains_it_alone(name: str) -> None:
    captured, observer, dice = graph_of(name), Observer(), random.Random(name)
    graph = captured.graph.graph
    trained = [e.node for e in captured.entries if e.role == "parameter" and e.trainable]
    backward = backward_of(graph, observer, {})
    nodes = {n.name: n for n in graph.nodes}
    for _ in range(20):
        chosen = set(dice.sample(trained, k=dice.choice([1, 1, 2, 3, len(trained) // 2, len(trained)])))
        for node in trained:
            nodes[node].meta["differentiable"] = node in chosen
        mark(graph)
        assert backward.kept_bytes(chosen) == kept_bytes(graph, observer), sorted(chosen)


# -- a real step


def steps(module: Any, args: Any, kwargs: Any, count: int = 2) -> list[float]:
    """Losses of plain SGD steps on what has a gradient."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = loss_of(module(*args, **kwargs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["tied", "unet"])
def test_what_is_chosen_fits_trains_and_leaves_the_rest_alone(name: str) -> None:
    model, args, kwargs = eager(name)
    del model.__dict__[TAG]  # what is trained changes here
    model.eval()
    before = copy.deepcopy(model)
    inputs = kwargs or args
    whole = sw.make_plan(model, inputs, cluster(1), optimizer="sgd", pins=["recompute=none"])
    budget = whole.predicted.peak_bytes_per_device * 7 // 10
    chosen = sw.choose_update(model, inputs, budget, optimizer="sgd", cluster=cluster(1))
    assert chosen.peak_bytes <= budget
    assert 0.0 < chosen.value < chosen.total_value
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    chosen.apply(model)
    golden = copy.deepcopy(model)
    pm = sw.auto_parallelize(model, inputs, cluster=cluster(1), optimizer="sgd", pins=["recompute=none"])
    with Products() as ours:
        losses = steps(pm, args, kwargs)
    with Products() as theirs:
        assert losses == pytest.approx(steps(golden, args, kwargs), rel=1e-12)
    assert ours.seen.total() == theirs.seen.total()
    start, wanted = dict(before.named_parameters()), dict(golden.named_parameters())
    for key, value in pm.named_parameters():
        if key in chosen.names:
            torch.testing.assert_close(value, wanted[key], atol=1e-12, rtol=1e-12)
            assert not torch.equal(value, start[key])
        else:
            assert torch.equal(value, start[key])
    optimizer = torch.optim.SGD([p for p in pm.parameters() if p.requires_grad])

    def step() -> None:
        optimizer.zero_grad()
        loss_of(pm(*args, **kwargs)).backward()
        optimizer.step()

    assert measure_step(step, pm, optimizer, args, kwargs).bytes <= budget


def test_contributions_of_ones_own_are_what_counts() -> None:
    model, _, kwargs = eager("tied")
    del model.__dict__[TAG]
    names = [name for name, _ in model.named_parameters()]
    chosen = sw.choose_update(model, kwargs, "1GiB", contribution={names[5]: 1.0, names[9]: 2.0}, cluster=cluster(1))
    assert chosen.names == {names[5], names[9]}
    with pytest.raises(sw.UsageError, match="no parameter that requires"):
        sw.choose_update(model, kwargs, "1GiB", contribution={"nobody": 1.0})
    with pytest.raises(sw.UsageError, match="pass contribution="):
        sw.choose_update(model.to("meta"), kwargs, "1GiB")

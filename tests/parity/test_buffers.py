"""Buffers that a call changes: running statistics of batch norm over the whole batch, counters, averages."""

from __future__ import annotations

import copy

import pytest
import torch
from pool import Pool
from running import TIGHT, eager, parallel, plan_of, records, same, traffic
from shardwright.errors import PinError
from shardwright.planner.plan import Plan
from torch import nn


def trains_like_eager(plan: Plan, compiled: bool = False) -> None:
    model, _, batch = eager("batch-norm")
    _, pm = parallel("batch-norm", plan, compile=compiled)

    def train(model: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            losses.append(model(**batch).item())  # in training mode statistics move without gradients, too
        model.eval()
        with torch.no_grad():
            return [*losses, model(**batch).item()]

    torch.testing.assert_close(train(pm), train(model), **TIGHT)
    same(pm.full_state_dict(), model.state_dict())
    assert model.blocks[0].norms[0].num_batches_tracked == 4
    other = copy.deepcopy(model)
    other.load_state_dict(pm.full_state_dict())


@pytest.mark.parametrize("pins", ["dp=2 zero=0", "dp=2 zero=3"])
def test_statistics_are_those_of_the_whole_batch(pins: str, ranks2: Pool) -> None:
    ranks2.run(trains_like_eager, plan_of("batch-norm", pins, 2))


@pytest.mark.parametrize("pins", ["dp=2 tp=2 zero=1", "dp=4 zero=2", "tp=4"])
def test_with_channels_split_too(pins: str, ranks4: Pool) -> None:
    ranks4.run(trains_like_eager, plan_of("batch-norm", pins, 4))


@pytest.mark.parametrize("pins", ["dp=2", "dp=2 zero=3", "tp=2"])
def test_what_communicates_is_predicted(pins: str, ranks2: Pool) -> None:
    made = plan_of("batch-norm", pins, 2)
    predicted = {(t.collective, t.axis): (t.count, t.bytes) for t in made.predicted.traffic}
    found = ranks2.run(records, "batch-norm", made)[0]
    assert traffic(found) == predicted
    if pins == "dp=2":  # statistics of every norm: gathered forward, summed backward
        assert predicted["all_gather", "dp"][0] == 8


def test_compiled() -> None:
    trains_like_eager(plan_of("batch-norm", "", 1), compiled=True)


def test_microbatches_are_refused() -> None:
    with pytest.raises(PinError, match=r"norm.*micro_batch=4"):
        plan_of("batch-norm", "dp=2 micro_batch=1", 2)


@pytest.mark.parametrize(
    "pins", ["pp=2 schedule=gpipe", pytest.param("pp=2 dp=2 schedule=1f1b zero=2", marks=pytest.mark.nightly)]
)
def test_stages_share_what_they_make_of_buffers(pins: str, pools: dict[int, Pool]) -> None:
    world = 4 if "dp" in pins else 2
    made = plan_of("batch-norm", f"{pins} recompute=none offload=none", world, runnable=False)
    assert made.pipeline.microbatches == 1
    pools[world].run(trains_like_eager, made)

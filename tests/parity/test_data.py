"""The two ways to pass a batch: the whole one on every rank, or each data-parallel rank its own part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pool import Pool
from running import TIGHT, eager, parallel, plan_of, same, whole_gradients
from shardwright.errors import UsageError
from shardwright.planner.plan import Plan
from shardwright.runtime.losses import loss_of
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class Rows(Dataset[dict[str, Tensor]]):
    """Twenty-one samples of the batch's kind."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.rows = {k: torch.cat([v, v.flip(0), v.roll(1, 0)])[:21] for k, v in batch.items()}

    def __len__(self) -> int:
        return 21

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {k: v[i] for k, v in self.rows.items()}


def sampled(plan: Plan) -> None:
    """Batches of 4, 4 and 3 on every rank (torch's sampler fills up to equal shares), against the whole ones in one process."""
    model, _, batch = eager("tied")
    _, pm = parallel("tied", plan, data="local")
    rows = Rows(dict(batch))

    def loader(index: int) -> Any:
        sampler = DistributedSampler(rows, pm.data_size, index, shuffle=True, seed=7)
        return DataLoader(rows, batch_size=4, sampler=sampler)

    assert pm.data_size == 2
    trained, reference = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (pm, model))
    sizes = []
    for mine, *parts in zip(loader(pm.data_rank), loader(0), loader(1), strict=True):
        whole = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        sizes.append(len(whole["labels"]))
        loss, wanted = loss_of(pm(**mine)), loss_of(model(**whole))
        torch.testing.assert_close(loss, wanted, **TIGHT)
        for optimizer, each in ((trained, loss), (reference, wanted)):
            optimizer.zero_grad()
            each.backward()
            optimizer.step()
    assert sizes == [8, 8, 6]
    same(pm.full_state_dict(), model.state_dict())


def test_a_distributed_sampler_feeds_the_data_ranks(ranks4: Pool) -> None:
    ranks4.run(sampled, plan_of("tied", "dp=2 tp=2", 4))


def unequal(plan: Plan) -> None:
    _, _, batch = eager("tied")
    _, pm = parallel("tied", plan, data="local")
    rows = 3 if pm.data_rank == 0 else 2
    with pytest.raises(UsageError, match=r"ids \(3, 16\).*rank 1 ids \(2, 16\).* 2 on each rank"):
        pm(**{k: v[:rows] for k, v in batch.items()})
    columns = 16 if pm.data_rank == 0 else 12
    with pytest.raises(UsageError, match="pad sequences"):
        pm(**{k: v[:4, :columns] for k, v in batch.items()})
    loss_of(pm(**{k: v[:4] for k, v in batch.items()})).backward()  # a refused call leaves the module usable


def test_unequal_parts_are_refused_on_every_rank(ranks2: Pool) -> None:
    ranks2.run(unequal, plan_of("tied", "dp=2", 2))


def last_batch(plan: Plan, data: str) -> None:
    _, _, batch = eager("tied")
    _, pm = parallel("tied", plan, data=data)
    parts = pm.data_size if data == "local" else 1
    more = {k: torch.cat([v, v]) for k, v in batch.items()}
    for size, near in ((6, 4), (10, 8), (14, 12), (2, 4)):  # a multiple of 4: two ranks of microbatches of two
        also = rf" \({near // 2} on each of them\)" if data == "local" else "$"
        with pytest.raises(UsageError, match=f"a batch of {size} .* nearest legal batch: {near}{also}"):
            pm(**{k: v[: size // parts] for k, v in more.items()})
    loss_of(pm(**{k: v[: 12 // parts] for k, v in more.items()})).backward()


@pytest.mark.parametrize("data", ["global", "local"])
def test_a_batch_without_whole_microbatches_is_refused_with_the_nearest(data: str, ranks2: Pool) -> None:
    ranks2.run(last_batch, plan_of("tied", "dp=2 micro_batch=2", 2), data)


def uneven(plan: Plan) -> None:
    model, _, batch = eager("tied")
    _, pm = parallel("tied", plan)
    short = {k: v[:5] for k, v in batch.items()}
    for module in (model, pm):
        loss_of(module(**short)).backward()
    same(whole_gradients(pm), {n: p.grad for n, p in model.named_parameters()})


def test_a_whole_batch_that_does_not_divide_is_exact(ranks2: Pool) -> None:
    """Without microbatches every rank computes all of it, rather than refuse the last batch of an epoch."""
    ranks2.run(uneven, plan_of("tied", "dp=2 zero=3", 2))

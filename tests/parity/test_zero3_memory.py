"""ZeRO-3's promise, on the module users get: never more unsharded parameter bytes alive than two parameter groups hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build
from pool import Pool
from running import parallel, plan_of
from shardwright.planner.plan import Plan
from shardwright.runtime.losses import loss_of
from shardwright.runtime.torch_compat import StorageRef
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
COPIES = {"cat", "clone", "_to_copy", "copy_", "slice_scatter", "constant_pad_nd"}
"""Ops whose result holds the same values as their inputs, in new memory."""
GATHERS = {"all_gather_into_tensor", "all_gather_into_tensor_coalesced"}


class Gathered(TorchDispatchMode):
    """Bytes of all storages that hold gathered values, what an all_gather returns and copies of it: `most` at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageRef, int]] = {}
        self.most, self.calls = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in GATHERS or (name in COPIES and any(self.holds(x) for x in tensors((args, kwargs)))):
            self.calls += name in GATHERS
            for x in tensors(result):
                storage = x.untyped_storage()
                self.alive[storage._cdata] = StorageRef(storage), storage.nbytes()
            self.most = max(self.most, self.bytes())
        return result

    def holds(self, x: Tensor) -> bool:
        entry = self.alive.get(x.untyped_storage()._cdata)
        return entry is not None and not entry[0].expired()

    def bytes(self) -> int:
        """Alive now."""
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        return sum(size for _, size in self.alive.values())


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def steps(name: str, plan: Plan, batch: int) -> tuple[int, int, list[int]]:
    """Rank function: the most bytes at once, gathers, and what is left after forward and after backward."""
    case, pm = parallel(name, plan, batch)
    optimizer = torch.optim.AdamW([p for p in pm.parameters() if p.requires_grad])
    left = []
    with Gathered() as watch:
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(pm(*case.args, **case.kwargs))
            left.append(watch.bytes())
            loss.backward()
            left.append(watch.bytes())
            optimizer.step()
    return watch.most, watch.calls, left


def group_bytes(name: str, plan: Plan) -> list[int]:
    """Unsharded bytes of each parameter group, rows padded to four equal chunks, largest first."""
    sizes = {n: -(-len(p) // 4) * 4 * p[0].numel() * p.element_size() for n, p in build(name).model.named_parameters()}
    found = []
    for region in plan.regions:
        total = sum(sizes[p.names[0]] for p in region.parameters if p.zero == 3)
        found += [total] * region.repeats
    return sorted(found, reverse=True)


@pytest.mark.parametrize(("name", "pins"), [("llama-deep", "dp=4 zero=3"), ("gpt2-deep", "dp=4 zero=3 micro_batch=1")])
def test_at_most_two_groups_are_whole(name: str, pins: str, ranks4: Pool) -> None:
    plan = plan_of(name, f"{pins} dtype=fp32", 4)
    groups = group_bytes(name, plan)
    assert sum(groups) > 3 * sum(groups[:2]), "too few groups to tell"
    for most, calls, left in ranks4.run(steps, name, plan, 8):
        assert calls >= 2 * (2 * len(groups) - 1)
        assert left == [0, 0, 0, 0]
        assert groups[0] <= most <= sum(groups[:2])

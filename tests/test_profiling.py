"""`profile`: what is measured, kept, known again, and said to fail; alone and as ranks of a torchrun."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from shardwright.errors import ClusterError
from shardwright.passes import profiling
from shardwright.passes.inplace import in_place, optimizer_key, parameter_sizes
from shardwright.passes.models import load_model
from shardwright.passes.prepare import prepare
from shardwright.passes.profiling import profile
from shardwright.passes.regions import local_sizes, timed_regions
from shardwright.passes.summarize import Summary
from shardwright.planner.cluster import Cluster
from shardwright.planner.prices import Prices
from shardwright.profiles import places
from shardwright.profiles.devices import parse_cluster
from shardwright.profiles.jobs import TimeUp
from shardwright.profiles.local import machine_key, versions
from shardwright.profiles.places import Torchrun, place_of
from shardwright.profiles.regions import Runner, decode_program
from shardwright.profiles.store import Store

MODEL = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(512), nn.Linear(512, 1024), nn.Linear(1024, 512)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(3)), nn.Linear(512, 1)

    def forward(self, x, y):
        for layer in self.layers:
            x = layer(x)
        return ((self.head(x) - y) ** 2).mean()

def make(batch=4):
    return Net(), (torch.randn(batch, 512), torch.randn(batch, 1))
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "net.py"
    path.write_text(MODEL)
    return f"{path}:make"


@pytest.fixture(scope="module")
def summary(spec: str) -> Summary:
    loaded = load_model(spec, batch=4)
    return prepare(loaded.model, loaded.args, loaded.kwargs, "float32")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("profiles") / "profiles.sqlite")


@pytest.fixture(scope="module")
def profiled(spec: str, store: Store) -> profiling.ProfileResult:
    """The model profiled once on one CPU rank."""
    return profile("local-cpu:1", spec, store=store, budget_seconds=10.0, batch=4)


@pytest.fixture(scope="module")
def alone(profiled: profiling.ProfileResult, store: Store) -> Cluster:
    return parse_cluster("local-cpu:1", cache=store.path)


def test_a_profile_keeps_rows_of_every_kind(profiled: profiling.ProfileResult, store: Store) -> None:
    kinds = {"machine", "copies", "allocator", "op", "region", "optimizer"}
    assert kinds <= set(profiled.measured)
    assert profiled.measured["op"] >= 6
    assert profiled.measured["region"] == 1
    assert all(store.read(machine_key(1), versions(), kind) for kind in kinds)
    assert profiled.seconds > 0


def test_what_is_known_is_not_measured_again(
    profiled: profiling.ProfileResult, spec: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_measuring(*_: object, **__: object) -> dict[str, Any]:
        raise AssertionError("measured again")

    monkeypatch.setattr(places, "run_ranks", no_measuring)
    again = profile("local-cpu:1", spec, store=store, budget_seconds=10.0, batch=4)
    assert again.measured == {}
    assert again.known["op"] == profiled.measured["op"] + len([k for k in profiled.failures if k.startswith("op")])


def test_other_clusters_are_not_here() -> None:
    with pytest.raises(ClusterError, match="is not here"):
        place_of("h100-sxm:8")


def test_an_op_that_hangs_is_a_failure_and_not_tried_again(
    spec: str, tmp_path: Path, alone: Cluster, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Store(tmp_path / "mine.sqlite")
    for kind in ("machine", "copies", "allocator"):
        mine.write(machine_key(1), versions(), kind, store.read(machine_key(1), versions(), kind))
    asked: list[list[str]] = []

    def hangs(
        ranks: int, threads: int, tasks: list[str], *, heard: Any, requests: Any = (), **_: Any
    ) -> dict[str, Any]:
        asked.append([str(r[0]) for r in requests])
        if "ops" not in tasks:
            return {task: {} for task in tasks}
        heard([("begin", "op", "first"), ("op", "first", [1.0, 2.0, 0.1]), ("begin", "op", "second")])
        raise TimeUp("late")

    monkeypatch.setattr(places, "run_ranks", hangs)
    found = profile("local-cpu:1", spec, store=mine, budget_seconds=5.0, batch=4)
    assert found.failures["op second"].startswith("timed out: no answer within")
    assert mine.read(machine_key(1), versions(), "op") == {"first": [1.0, 2.0, 0.1]}
    assert mine.read(machine_key(1), versions(), "failure")["op second"]["type"] == "timed out"


def test_programs_of_a_captured_region(summary: Summary) -> None:
    (region,), why = timed_regions(summary, 2)
    assert (region.repeats, why) == (2, {})  # nothing flows back into the input of the first of the three
    one, two = decode_program(region.one), decode_program(region.two)
    assert len(two.steps) == 2 * len(one.steps) == 2 * len(region.ops)
    assert {shape[0] for shape, _, _ in one.inputs if len(shape) == 2} == {2, 1024, 512}  # the batch of 4 cut in two
    gradients = Runner(two)()
    assert all(g is not None for g in gradients)  # type: ignore[attr-defined]


def test_regions_and_optimizer_steps_correct_the_prices(summary: Summary, alone: Cluster, tmp_path: Path) -> None:
    mine = Store(tmp_path / "mine.sqlite")
    plain = Prices(alone, "float32")
    rows = {plain.op_key(op, local_sizes(op, 1), summary.outline.tensors): op for op in summary.outline.ops}
    from shardwright.planner.prices import OpRow

    plain = replace(plain, ops={key: OpRow(1e-3, 2e-3, 0.05) for key in rows})
    assert in_place(plain, summary, mine).ops == plain.ops
    ((region,), _), tensors = timed_regions(summary, 1), summary.outline.tensors
    parts = sum(p.seconds for op in region.ops for p in plain.op(op, local_sizes(op, 1), tensors))
    sizes = parameter_sizes(summary)
    mine.write(machine_key(1), versions(), "region", {region.key: [1.5 * parts, 0.02], "another model's": [9.0, 0.0]})
    old = optimizer_key("adamw", "float32", sizes, "cpu").replace(" fused", "")  # timed before steps were one kernel
    mine.write(
        machine_key(1), versions(), "optimizer", {optimizer_key("adamw", "float32", sizes, "cpu"): 0.5, old: 9.0}
    )
    better = in_place(plain, summary, mine)
    assert all(row.forward == pytest.approx(1.5e-3) for row in better.ops.values())
    assert better.optimizer_rates == {"adamw": pytest.approx(sum(sizes) * 28 / 0.5)}


def as_torchrun(folder: str) -> dict[str, Any]:
    """Rank function: the ranks of the pool measure as those of a torchrun would."""
    import torch.distributed as dist

    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    try:
        place = place_of("h100-sxm:2")
        assert isinstance(place, Torchrun)
        if not place.leads:
            place.serve()
            return {}
        rows: list[Any] = []
        found = place.run(
            ["collectives", "ops"], heard=rows.extend, timeout=60.0, requests=[], budget=1.0, groups=[(2, 1)]
        )
        place.dismiss()
        return {"found": found, "rows": rows}
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]


def test_ranks_of_a_torchrun_measure_together(ranks2: Pool, tmp_path: Path) -> None:
    leader, follower = ranks2.run(as_torchrun, str(tmp_path))
    assert set(leader["found"]["collectives"]) == {
        f"{n}:2" for n in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    }
    assert follower == {}
    assert not torch.distributed.is_initialized()

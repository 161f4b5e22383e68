"""Offload executed: the same numbers as with everything on the device, fewer bytes there, and every copy as predicted."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from offloading import cluster, offloaded, saying
from pool import Pool
from running import differences, parallel
from shardwright.errors import PlanError, UsageError
from shardwright.passes.choose import listed
from shardwright.passes.prepare import prepare
from shardwright.planner import away
from shardwright.planner.capability import check_plan
from shardwright.planner.hostupdate import SLOTS
from shardwright.planner.offload import Traffic
from shardwright.planner.offloaded import copied
from shardwright.planner.plan import Plan
from shardwright.planner.prices import Prices
from shardwright.runtime import parameters
from shardwright.runtime.losses import loss_of
from shardwright.runtime.monitor import measure_step
from shardwright.runtime.offload.files import Files, whole
from shardwright.runtime.offload.memory import is_host
from shardwright.runtime.offload.rounds import DEVICE, DISK, Rounds, Subgroup

STATES = "offload=optimizer offload!=params offload!=activations"
PASSING = "offload=optimizer offload!=activations"
STEPS = 3
NOTHING = Traffic()


def bytes_of(t: Traffic, before: Traffic = NOTHING) -> tuple[float, ...]:
    """(onto the device, off it, read from disk, written) since `before`."""
    return (
        t.in_bytes - before.in_bytes, t.out_bytes - before.out_bytes, t.read_bytes - before.read_bytes,
        t.write_bytes - before.write_bytes,
    )  # fmt: skip


def trained(name: str, plan: Plan, batch: int = 8, **options: Any) -> dict[str, Any]:
    """Rank function: three steps of the user's own loop; losses, parameters, the peak of a further step and its copies."""
    case, pm = parallel(name, plan, batch, **options)
    optimizer = torch.optim.AdamW(pm.parameters())
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        loss = loss_of(pm(*case.args, **case.kwargs))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    for _ in range(STEPS):
        step()
    values = {n: parameters.full(p.detach()).clone() for n, p in pm.named_parameters()}
    seen = dict(pm.offload.moved) if pm.offload is not None else {}
    step()
    now = dict(pm.offload.moved) if pm.offload is not None else {}
    moved = {k: bytes_of(t, seen[k]) for k, t in now.items()}
    hosts = [n for n, p in pm.named_parameters() if is_host(p)]
    grads = all(is_host(p.grad) == is_host(p) for p in pm.parameters() if p.grad is not None)
    peak = measure_step(step, pm, optimizer, case.args, case.kwargs).bytes
    return {"losses": losses[:STEPS], "values": values, "moved": moved, "hosts": hosts, "grads": grads, "peak": peak}


def predicted_bytes(name: str, plan: Plan, world: int, batch: int = 8, rank: int = 0) -> dict[str, tuple[float, ...]]:
    """The same as predicted for one step of a pipeline rank, by class."""
    case = build(name, batch)
    compute = plan.precision.compute
    outline = prepare(case.model, case.args, case.kwargs, compute, loss_fn=case.loss_fn, choice=listed(plan)).outline
    found = copied(plan, outline, cluster(world), Prices(cluster(world), compute), rank)
    return {what: bytes_of(t) for what, t in found.items()}


def same_numbers(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Bit for bit."""
    assert found["losses"] == wanted["losses"]
    assert found["values"].keys() == wanted["values"].keys()
    assert all(torch.equal(found["values"][n], wanted["values"][n]) for n in wanted["values"])


TWO_RANKS = [
    ("zero=0", STATES), ("zero=3 micro_batch=1", f"{PASSING} micro_batch=1"),
    *(pytest.param(*pair, marks=pytest.mark.nightly)
      for pair in (("zero=1", STATES), ("zero=3", PASSING), ("zero=2 micro_batch=1", STATES))),
]  # fmt: skip


@pytest.mark.parametrize(("more", "pins"), TWO_RANKS)
def test_two_ranks_train_as_without_offload(more: str, pins: str, ranks2: Pool) -> None:
    """States in host memory under every ZeRO level, parameters too where each rank stores a chunk; gradients leave once a step
    where the plan adds them up on the device."""
    resident = ranks2.run(trained, "llama", offloaded("llama", f"dp=2 {more} offload=none", 2))
    plan = offloaded("llama", f"dp=2 {more} {pins}", 2)
    predicted = predicted_bytes("llama", plan, 2)
    for found, wanted in zip(ranks2.run(trained, "llama", plan), resident, strict=True):
        same_numbers(found, wanted)
        assert found["hosts"]
        assert found["grads"]
        assert found["peak"] < wanted["peak"]
        assert found["moved"] == predicted
        assert found["peak"] == pytest.approx(plan.predicted.peak_bytes_per_device, rel=0.08)


ALONE = [
    ("gpt2", "", STATES), ("llama", "", PASSING), ("llama", "", "offload=activations offload!=params offload!=optimizer"),
    ("llama", "micro_batch=2", STATES), ("llama", "micro_batch=2", "offload=activations offload!=params"),
    ("gpt2", "micro_batch=2", "offload=activations"), ("llama", "dtype=bf16", PASSING),
    ("llama", "recompute=full", "offload=activations"), ("bert", "", "offload=params"),
    pytest.param("llama", "micro_batch=2 recompute=selective", "offload=activations", marks=pytest.mark.nightly),
]  # fmt: skip


@pytest.mark.parametrize(("name", "more", "pins"), ALONE)
def test_one_device_trains_as_without_offload(name: str, more: str, pins: str) -> None:
    """Every class and mixtures of them, activations beside ops that run again too; a tied embedding is fetched by its owner and by
    the head."""
    wanted = trained(name, offloaded(name, f"{more} offload=none", 1))
    plan = offloaded(name, f"{more} {pins}", 1)
    found = trained(name, plan)
    same_numbers(found, wanted)
    assert found["peak"] < wanted["peak"]
    if (name, pins) != (
        "gpt2",
        "offload=activations",
    ):  # attention with dropout keeps less on a CPU than is planned for
        assert found["moved"] == predicted_bytes(name, plan, 1)
    assert found["peak"] == pytest.approx(plan.predicted.peak_bytes_per_device, rel=0.08)


STAGES = [
    ("tied", 2, "pp=2 schedule=1f1b micro_batch=2", "offload=activations"),
    *(pytest.param(*case, marks=pytest.mark.nightly)
      for case in (
          ("gpt2", 2, "pp=2 schedule=1f1b micro_batch=2", STATES),
          ("llama-deep", 2, "pp=2 vpp=2 schedule=interleaved micro_batch=2", PASSING),
          ("llama", 2, "pp=2 schedule=gpipe micro_batch=2", "offload=activations"),
          ("gpt2", 2, "pp=2 schedule=1f1b micro_batch=2 dtype=bf16", PASSING),
          ("llama", 4, "pp=2 dp=2 zero=3 schedule=1f1b micro_batch=1", "offload=optimizer"),
          ("tied", 4, "pp=2 dp=2 zero=2 schedule=1f1b micro_batch=1", STATES),
      )),
]  # fmt: skip


@pytest.mark.parametrize(("name", "world", "more", "pins"), STAGES)
def test_stages_train_as_without_offload(name: str, world: int, more: str, pins: str, pools: dict[int, Pool]) -> None:
    """Every class within the stages of a pipeline; a parameter that two of them hold has its gradients summed by the devices."""
    resident = pools[world].run(trained, name, offloaded(name, f"{more} offload=none", world))
    plan = offloaded(name, f"{more} {pins}", world)
    predicted = [predicted_bytes(name, plan, world, rank=rank) for rank in range(2)]
    for rank, (found, wanted) in enumerate(zip(pools[world].run(trained, name, plan), resident, strict=True)):
        same_numbers(found, wanted)
        assert found["hosts"]
        assert found["grads"]
        assert found["peak"] < wanted["peak"]
        assert found["moved"] == predicted[2 * rank // world]


def test_what_is_not_executed_is_refused_by_name() -> None:
    """One message that says which region, which class and what is executed instead."""
    plan = offloaded("llama", STATES, 1)
    for words, told in ((("optimizer/0",), "optimizer/K"), (("params",), "params with optimizer is")):
        with pytest.raises(PlanError, match=told):
            check_plan(saying(plan, words))
    with pytest.raises(UsageError, match="compile=True"):
        parallel("llama", plan, compile=True)


@pytest.mark.parametrize("name", ["bert", "deepseek"])
def test_every_class_at_once_equals_the_original(name: str) -> None:
    """Loss, gradients and parameters after three steps against the user's own module, in float64. That of deepseek has other
    regions once its casts to float32 are lifted."""
    classes = ("optimizer", "gradients", "params", "activations")
    plan = saying(offloaded(name, "offload=activations micro_batch=4", 1), classes)
    assert all(d["ok"] for d in differences(name, plan))


def test_loading_weights_and_evaluating_use_what_was_loaded() -> None:
    """The device's copies follow the host tensors, whoever changes them."""
    case, pm = parallel("llama", offloaded("llama", STATES, 1))
    before = float(loss_of(pm(**case.kwargs)).detach())
    pm.load_state_dict({name: value * 0.5 for name, value in pm.full_state_dict().items()})
    after = float(loss_of(pm(**case.kwargs)).detach())
    assert after != before
    with torch.no_grad():
        found = float(loss_of(pm(**case.kwargs)))  # of a graph that has its logits, in float32 as the model says
    assert found == pytest.approx(after, rel=1e-6)
    assert found != pytest.approx(before, rel=1e-4)
    assert all(is_host(p) for p in pm.parameters())


@pytest.mark.parametrize(
    "words",
    [("optimizer@disk", "gradients"), ("optimizer/2", "gradients"), ("optimizer/2@disk", "gradients", "params")],
)
def test_states_on_disk_and_updates_on_the_device(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit as on the device; what is read, written and moved is predicted; the files go with the module."""
    monkeypatch.setattr(away, "SUBGROUP", 3000)
    plan = saying(offloaded("llama", STATES, 1), words)
    wanted = trained("llama", offloaded("llama", "offload=none", 1))
    found = trained("llama", plan, offload_folder=tmp_path)
    same_numbers(found, wanted)
    assert found["moved"] == predicted_bytes("llama", plan, 1)
    assert any(v[0] or v[2] for k, v in found["moved"].items() if k == "states")
    assert found["peak"] < wanted["peak"]
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_subgroups_visit_the_device_while_the_host_updates_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next visit comes in before a subgroup is updated, what was updated leaves during the updates after it, and no more than
    `SLOTS` subgroups are on the device; on disk the next one is read and the ones before are written meanwhile."""
    monkeypatch.setattr(away, "SUBGROUP", 3000)
    seen: list[tuple[str, Subgroup]] = []
    for name in ("_bring", "_update", "_home", "_in_place"):
        monkeypatch.setattr(Rounds, name, noting(seen, name, getattr(Rounds, name)))
    for word, kind, most in (("optimizer/3", DEVICE, SLOTS), ("optimizer@disk", DISK, SLOTS + 2)):
        seen.clear()
        trained("llama", saying(offloaded("llama", STATES, 1), (word, "gradients")))
        for step in one_by_one(seen, most):
            updates = [group for name, group in step if name == "_update"]
            assert len(updates) >= 2
            assert {group.kind for group in updates} == {kind}
            for this, following in pairwise(updates):
                updated, home = step.index(("_update", this)), step.index(("_home", this))
                assert step.index(("_bring", following)) < updated < home
                assert any(name == "_in_place" for name, _ in step[updated:home]) == (kind == DEVICE)


def noting(seen: list[tuple[str, Subgroup]], name: str, run: Callable[..., None]) -> Callable[..., None]:
    """`run`, a method whose last argument is a subgroup, noted under its name."""

    def noted(*args: Any) -> None:
        seen.append((name, args[-1]))
        run(*args)

    return noted


def one_by_one(seen: list[tuple[str, Subgroup]], most: int) -> list[list[tuple[str, Subgroup]]]:
    """What happened in each step, where no more than `most` subgroups may be under way."""
    steps: list[list[tuple[str, Subgroup]]] = [[]]
    under_way = 0
    for name, group in seen:
        steps[-1].append((name, group))
        under_way += {"_bring": 1, "_home": -1}.get(name, 0)
        assert under_way <= most
        if name == "_home" and not under_way:
            steps.append([])
    assert under_way == 0
    return [step for step in steps if any(name == "_update" for name, _ in step)]


KILLED = """
import sys, torch
from pathlib import Path
from shardwright.runtime.offload.files import Files
files, x = Files(Path(sys.argv[1])), torch.zeros(1 << 20)
print(files.folder, flush=True)
while True:
    files.put("x", x.add_(1))
"""


def test_a_kill_leaves_whole_files_and_the_next_start_removes_them(tmp_path: Path) -> None:
    """Killed in the middle of writing, the file of each name is one that was written whole."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    while not (folder / "x.bin").exists():
        time.sleep(0.01)
    for _ in range(20):
        assert whole(folder / "x.bin")
    process.kill()
    process.wait()
    assert whole(folder / "x.bin")
    (folder / "x.bin").write_bytes((folder / "x.bin").read_bytes()[:-1])
    assert not whole(folder / "x.bin")
    files = Files(tmp_path)
    assert not folder.exists()
    files.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="does not exist"):
        Files(tmp_path / "none")

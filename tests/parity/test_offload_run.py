"""Offload executed: the same numbers as with everything on the device, fewer bytes there, and every copy as predicted."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from models import build, llama
from offloading import cluster, offloaded
from pool import Pool
from running import differences, parallel
from shardwright.api import apply_plan, make_plan
from shardwright.errors import PlanError, UsageError
from shardwright.passes.prepare import prepare
from shardwright.planner import offloaded as planned
from shardwright.planner.away import updated_on_device
from shardwright.planner.capability import check_plan
from shardwright.planner.offload import Traffic
from shardwright.planner.offloaded import copied
from shardwright.planner.plan import Plan
from shardwright.planner.prices import Prices
from shardwright.runtime import parameters
from shardwright.runtime.losses import loss_of
from shardwright.runtime.monitor import Budget, MemoryExceeded, live_bytes, measure_step
from shardwright.runtime.offload import update
from shardwright.runtime.offload.files import Files, whole
from shardwright.runtime.offload.memory import is_host

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


def predicted_bytes(name: str, plan: Plan, world: int, batch: int = 8) -> dict[str, tuple[float, ...]]:
    """The same as predicted for one step, by class."""
    case = build(name, batch)
    compute = plan.precision.compute
    outline = prepare(case.model, case.args, case.kwargs, compute, loss_fn=case.loss_fn).outline
    found = copied(plan, outline, cluster(world), Prices(cluster(world), compute))
    return {what: bytes_of(t) for what, t in found.items()}


def same_numbers(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Bit for bit."""
    assert found["losses"] == wanted["losses"]
    assert found["values"].keys() == wanted["values"].keys()
    assert all(torch.equal(found["values"][n], wanted["values"][n]) for n in wanted["values"])


def saying(plan: Plan, words: tuple[str, ...]) -> Plan:
    """The plan with these words as the offload of all its regions."""
    return msgspec.structs.replace(plan, regions=tuple(msgspec.structs.replace(r, offload=words) for r in plan.regions))


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


ALONE = [
    ("gpt2", "", STATES), ("llama", "", PASSING), ("llama", "", "offload=activations offload!=params offload!=optimizer"),
    ("llama", "micro_batch=2", STATES), ("llama", "micro_batch=2", "offload=activations offload!=params"),
    ("gpt2", "micro_batch=2", "offload=activations"), ("llama", "dtype=bf16", PASSING),
]  # fmt: skip


@pytest.mark.parametrize(("name", "more", "pins"), ALONE)
def test_one_device_trains_as_without_offload(name: str, more: str, pins: str) -> None:
    """Every class and mixtures of them; a tied embedding is fetched by the unit that owns it and by the head."""
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
    if "micro_batch" in more and "params" not in str([r.offload for r in plan.regions]):
        assert found["peak"] == pytest.approx(plan.predicted.peak_bytes_per_device, rel=0.08)
    assert found["peak"] < 1.08 * plan.predicted.peak_bytes_per_device


def test_a_model_whose_states_are_four_times_the_budget_trains() -> None:
    """The planner finds what to put where; every op of the steps stays within the budget, and half of it is not enough."""
    case = llama(2, num_hidden_layers=12, hidden_size=64, intermediate_size=128)
    budget = sum(
        p.numel() * p.element_size() for p in case.model.parameters()
    )  # gradients and moments are three times more
    plan = make_plan(
        case.model, dict(case.kwargs), cluster(1), memory_limit=budget, pins=("pp=1", "recompute=none"), runnable=False
    )
    assert plan.predicted.peak_bytes_per_device <= budget

    def losses(limit: int | None) -> list[float]:
        pm = apply_plan(copy.deepcopy(case.model), dict(case.kwargs), plan)
        optimizer = torch.optim.AdamW(pm.parameters())
        found = []
        with contextlib.nullcontext() if limit is None else Budget(limit, live_bytes(pm, case.kwargs)):
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss = pm(**case.kwargs).loss
                loss.backward()
                optimizer.step()
                found.append(float(loss.detach()))
        return found

    resident = copy.deepcopy(case.model)
    optimizer, wanted = torch.optim.AdamW(resident.parameters()), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = resident(**case.kwargs).loss
        loss.backward()
        optimizer.step()
        wanted.append(float(loss.detach()))
    assert losses(budget) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(MemoryExceeded, match=r"the budget is .* bytes, exceeded by the .* bytes that aten"):
        losses(budget // 4)


def test_what_is_not_executed_is_refused_by_name() -> None:
    """One message that says which region, which class and what is executed instead."""
    plan = offloaded("llama", STATES, 1)
    for words, told in ((("optimizer/0",), "optimizer/K"), (("params",), "params with optimizer is")):
        with pytest.raises(PlanError, match=told):
            check_plan(saying(plan, words))
    with pytest.raises(UsageError, match="compile=True"):
        parallel("llama", plan, compile=True)


def test_every_class_at_once_equals_the_original() -> None:
    """Loss, gradients and parameters after three steps against the user's own module, in float64."""
    plan = offloaded("bert", "offload=activations micro_batch=4", 1)
    assert {"optimizer", "gradients", "params", "activations"} <= {w for r in plan.regions for w in r.offload}
    assert all(d["ok"] for d in differences("bert", plan))


def test_loading_weights_and_evaluating_use_what_was_loaded() -> None:
    """The device's copies follow the host tensors, whoever changes them."""
    case, pm = parallel("llama", offloaded("llama", STATES, 1))
    before = float(loss_of(pm(**case.kwargs)).detach())
    pm.load_state_dict({name: value * 0.5 for name, value in pm.full_state_dict().items()})
    after = float(loss_of(pm(**case.kwargs)).detach())
    assert after != before
    with torch.no_grad():
        assert float(loss_of(pm(**case.kwargs))) == after
    assert all(is_host(p) for p in pm.parameters())


@pytest.mark.parametrize(
    "words",
    [("optimizer@disk", "gradients"), ("optimizer/2", "gradients"), ("optimizer/2@disk", "gradients", "params")],
)
def test_states_on_disk_and_updates_on_the_device(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit as on the device; what is read, written and moved is predicted; the files go with the module."""
    small = functools.partial(updated_on_device, subgroup=3000)
    monkeypatch.setattr(update, "updated_on_device", small)
    monkeypatch.setattr(planned, "updated_on_device", small)
    plan = saying(offloaded("llama", STATES, 1), words)
    wanted = trained("llama", offloaded("llama", "offload=none", 1))
    found = trained("llama", plan, offload_folder=tmp_path)
    same_numbers(found, wanted)
    assert found["moved"] == predicted_bytes("llama", plan, 1)
    assert any(v[0] or v[2] for k, v in found["moved"].items() if k == "states")
    assert found["peak"] < wanted["peak"]
    gc.collect()
    assert list(tmp_path.iterdir()) == []


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

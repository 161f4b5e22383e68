"""A model larger than the device: its parameters pass through a window, from host memory or from files."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Case, llama
from offloading import cluster, saying
from safetensors.torch import save_file
from shardwright.api import apply_plan, make_plan
from shardwright.planner.away import WINDOW
from shardwright.planner.plan import Plan
from shardwright.runtime.module import ParallelModule
from shardwright.runtime.monitor import Budget, MemoryExceeded, live_bytes, measure_peak
from shardwright.runtime.offload.files import whole
from shardwright.runtime.offload.lanes import Copy, Lanes
from shardwright.runtime.torch_compat import StorageRef
from shardwright.runtime.weights import load_safetensors
from torch import Tensor

STEPS = 3
ON_HOST = ("optimizer", "gradients", "params", "activations")
ON_DISK = ("optimizer@disk", *ON_HOST[1:])


@functools.cache
def deep() -> Case:
    """A model most of whose parameters are in equal layers; not to be changed."""
    return llama(2, num_hidden_layers=10, hidden_size=64, intermediate_size=128)


@functools.cache
def planned(pins: str, *, labels: bool = True, limit: int | None = None) -> Plan:
    texts = ("pp=1", *pins.split())
    inputs = {k: v for k, v in deep().kwargs.items() if labels or k != "labels"}
    return make_plan(copy.deepcopy(deep().model), inputs, cluster(1), pins=texts, runnable=False, memory_limit=limit)


def parameter_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def window_bytes(pm: ParallelModule) -> int:
    """The most bytes of parameters that may be on the device: those of the largest units in a row."""
    outline = pm._core.programs.summary.outline
    units = [sum(outline.tensors[t].bytes for t in ts) for region in outline.regions for ts in region.parameters]
    return max(sum(units[i : i + WINDOW]) for i in range(len(units)))


@contextlib.contextmanager
def resident(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of parameters on the device, after every one that comes in."""
    alive: dict[int, tuple[StorageRef, int]] = {}
    seen: list[int] = []
    into = Lanes.into

    def noted(lanes: Lanes, source: Tensor, target: Tensor, what: str) -> Copy:
        made = into(lanes, source, target, what)
        if what == "params":
            storage = target.untyped_storage()
            alive[storage._cdata] = StorageRef(storage), storage.nbytes()
            for key in [k for k, (ref, _) in alive.items() if ref.expired()]:
                del alive[key]
            seen.append(sum(size for _, size in alive.values()))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Lanes, "into", noted)
        yield seen


@pytest.mark.parametrize("word", ["params", "params@disk"])
def test_inference_streams_through_a_window(word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Repeated calls, longer ones too, under a budget of less than half of the parameters; never more than the window there."""
    case = deep()
    model = copy.deepcopy(case.model).eval()
    inputs = {"input_ids": case.kwargs["input_ids"]}
    plan = saying(planned("offload=params", labels=False), (word,))
    pm = apply_plan(copy.deepcopy(model), inputs, plan, offload_folder=tmp_path).eval()
    budget = parameter_bytes(model) // 2
    assert pm.offload is not None
    with torch.no_grad(), resident(monkeypatch) as seen, Budget(budget, live_bytes(pm, inputs)):
        for length in (8, 16, 12, 16):
            ids = inputs["input_ids"][:, :length]
            assert torch.equal(pm(input_ids=ids).logits, model(input_ids=ids).logits)
    assert len(seen) == 4 * len(list(model.parameters()))
    assert max(seen) <= window_bytes(pm) < budget
    moved = pm.offload.moved["params"]
    assert moved.in_bytes == 4 * parameter_bytes(model)
    assert moved.read_bytes == (moved.in_bytes if word == "params@disk" else 0)


def steps(pm: ParallelModule, inputs: dict[str, Any]) -> list[float]:
    optimizer = torch.optim.AdamW(pm.parameters())
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = pm(**inputs).loss
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("words", [(), ON_HOST, ON_DISK], ids=["planned", "host", "disk"])
def test_states_of_four_times_the_budget_train_as_resident_ones(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every op of the steps stays within the budget, losses and parameters are bit for bit those without offload, and half of the
    window is not enough. Without words the planner finds what to put where."""
    case = deep()
    inputs, budget = dict(case.kwargs), parameter_bytes(case.model)  # gradients and moments are three times more
    plan = planned("recompute=none", limit=budget)
    assert plan.predicted.peak_bytes_per_device <= budget
    plan = saying(plan, words) if words else plan
    wanted = apply_plan(copy.deepcopy(case.model), inputs, planned("recompute=none offload=none"))
    losses = steps(wanted, inputs)

    pm = apply_plan(copy.deepcopy(case.model), inputs, plan, offload_folder=tmp_path)
    with resident(monkeypatch) as seen, Budget(budget, live_bytes(pm, inputs)):
        assert steps(pm, inputs) == losses
        pm.eval()
        with torch.no_grad():
            found = pm(**inputs).loss
    assert max(seen, default=0) <= window_bytes(pm)
    assert bool(seen) or not words
    with torch.no_grad():
        assert torch.equal(found, wanted.eval()(**inputs).loss)
    assert all(torch.equal(p, q) for p, q in zip(pm.parameters(), wanted.parameters(), strict=True))
    pm = apply_plan(copy.deepcopy(case.model), inputs, plan, offload_folder=tmp_path)
    small = Budget(window_bytes(pm) // 2, live_bytes(pm, inputs))
    with pytest.raises(MemoryExceeded, match=r"exceeded by the .* bytes that aten"), small:
        steps(pm, inputs)


@pytest.mark.parametrize("words", [ON_HOST, ON_DISK], ids=["host", "disk"])
def test_a_model_without_memory_is_filled_behind_the_device(words: tuple[str, ...], tmp_path: Path) -> None:
    """Built on the meta device and loaded from safetensors: the device never holds any of it, memory nothing of what is on disk."""
    case = deep()
    save_file({n: p.detach() for n, p in case.model.named_parameters()}, tmp_path / "model.safetensors")
    (tmp_path / "scratch").mkdir()
    inputs = dict(case.kwargs)
    plan = saying(planned("recompute=none", limit=parameter_bytes(case.model)), words)
    with torch.device("meta"):
        empty = type(case.model)(case.model.config)

    def filled() -> ParallelModule:
        pm = apply_plan(empty, inputs, plan, offload_folder=tmp_path / "scratch")
        load_safetensors(pm, tmp_path)
        return pm

    peak = measure_peak(filled)
    pm, largest = peak.result, max(p.numel() * p.element_size() for p in case.model.parameters())
    assert peak.retained <= sum(b.numel() * b.element_size() for b in pm.buffers()) + largest
    assert all(torch.equal(p, q) for p, q in zip(pm.parameters(), case.model.parameters(), strict=True))
    files = {p.name: p for p in (tmp_path / "scratch").rglob("*.bin")}
    assert len(files) == (len(list(pm.parameters())) if words == ON_DISK else 0)
    assert all(whole(path) for path in files.values())
    for name, p in pm.named_parameters() if files else ():
        written = files[f"{name}.parameter.bin"].read_bytes()[64:]
        assert torch.equal(torch.frombuffer(bytearray(written), dtype=p.dtype).view(p.shape), p)
    assert steps(pm, inputs) == steps(apply_plan(case.model, inputs, plan), inputs)

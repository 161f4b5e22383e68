"""State across plans and ranks: saved under one plan, loaded under others and under none; weights in Hugging Face's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import build
from pool import Pool
from running import TIGHT, exact_applier, parallel, plan_of, same
from shardwright.errors import CheckpointError, UsageError
from shardwright.planner.plan import Plan
from shardwright.runtime import parameters, state, weights
from shardwright.runtime.apply import apply
from shardwright.runtime.losses import loss_of
from shardwright.runtime.module import ParallelModule
from shardwright.runtime.monitor import measure_peak
from torch import Tensor, nn

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def exact(name: str, plan: Plan) -> tuple[Any, ParallelModule]:
    """The case and its module in float64 without dropout."""
    case = build(name)
    return case, exact_applier(case)(case.model, case.args, case.kwargs, plan, "float64")


def steps(case: Any, model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = loss_of(model(*case.args, **case.kwargs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of model and optimizer, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameters.full(parameter).clone()
        for slot, value in optimizer.state[parameter].items():
            found[f"{name} {slot}"] = parameters.full(value).clone()
    return found


# -- exact resume


def trained(name: str, plan: Plan, folder: str, total: int, every: int, async_: bool) -> list[float]:
    """Train from the newest checkpoint in the folder, if any, to step `total`; the losses from there on."""
    torch.manual_seed(3)
    case, pm = parallel(name, plan)
    optimizer = OPTIMIZERS["adamw"](pm.parameters())
    at = 0
    if state.latest(folder) is not None:
        at = state.load_checkpoint(folder, pm, optimizer).step
    losses = []
    while at < total:
        losses += steps(case, pm, optimizer, 1)
        at += 1
        if at % every == 0:
            state.save_checkpoint(folder, pm, optimizer, step=at, async_=async_)
    state.finish_saving(pm)
    return losses


@pytest.mark.parametrize("async_", [False, True], ids=["waiting", "background"])
def test_a_resumed_run_goes_on_bit_for_bit(async_: bool, ranks2: Pool, tmp_path: Path) -> None:
    plan = plan_of("gpt2", "dp=2 zero=3 dtype=fp32", 2)
    wanted = ranks2.run(trained, "gpt2", plan, str(tmp_path / "a"), 5, 9, False)[0]  # with dropout
    first = ranks2.run(trained, "gpt2", plan, str(tmp_path / "b"), 3, 3, async_)[0]
    then = ranks2.run(trained, "gpt2", plan, str(tmp_path / "b"), 5, 9, False)[0]
    assert first + then == wanted
    assert len(set(wanted)) == 5


# -- other plans


def saved_under(name: str, plan: Plan, folder: str, kind: str) -> tuple[dict[str, Tensor], list[float]]:
    """Two steps, a checkpoint, and what the next two steps lose."""
    case, pm = exact(name, plan)
    optimizer = OPTIMIZERS[kind](pm.parameters())
    steps(case, pm, optimizer, 2)
    state.save_checkpoint(folder, pm, optimizer, step=2)
    return whole(pm, optimizer), steps(case, pm, optimizer, 2)


def loaded_under(name: str, plan: Plan, folder: str, kind: str) -> tuple[dict[str, Tensor], list[float]]:
    case, pm = exact(name, plan)
    for parameter in pm.parameters():
        with torch.no_grad():
            parameter.zero_()
    optimizer = OPTIMIZERS[kind](pm.parameters())
    state.load_checkpoint(folder, pm, optimizer)
    return whole(pm, optimizer), steps(case, pm, optimizer, 2)


@pytest.mark.parametrize(
    ("name", "pins", "others", "kind"),
    [
        ("gpt2", "dp=2 tp=2 zero=3", ["dp=2 zero=1", "tp=2"], "adamw"),
        pytest.param("llama", "tp=4", ["dp=2 zero=3 micro_batch=2"], "sgd", marks=pytest.mark.nightly),
        pytest.param("gpt2", "dp=4 zero=3", ["tp=2"], "adamw", marks=pytest.mark.nightly),
    ],
)
def test_a_checkpoint_is_loaded_under_another_plan_and_under_none(
    name: str, pins: str, others: list[str], kind: str, pools: dict[int, Pool], tmp_path: Path
) -> None:
    wanted, losses = pools[4].run(saved_under, name, plan_of(name, pins, 4), str(tmp_path), kind)[0]
    files = sorted(p.name for p in (tmp_path / "step-00000002").iterdir())
    assert files == ["checkpoint.json", *(f"rank-0000{i}.safetensors" for i in range(4))]
    for other in others:
        for found, then in pools[2].run(loaded_under, name, plan_of(name, other, 2), str(tmp_path), kind):
            assert all(torch.equal(value, wanted[key]) for key, value in found.items())
            assert found.keys() == wanted.keys()
            torch.testing.assert_close(then, losses, **TIGHT)
    case = build(name)
    model = case.model.double()
    optimizer = OPTIMIZERS[kind](model.parameters())
    state.load_checkpoint(tmp_path, model, optimizer)
    found = whole(model, optimizer)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    state.save_checkpoint(tmp_path / "plain", model, optimizer, step=7)  # and back again
    for found, then in pools[4].run(loaded_under, name, plan_of(name, pins, 4), str(tmp_path / "plain"), kind):
        assert all(torch.equal(value, wanted[key]) for key, value in found.items())
        torch.testing.assert_close(then, losses, **TIGHT)


def boxes_once(plan: Plan, folder: str) -> int:
    """A box that several ranks hold is written by one; the bytes this rank wrote."""
    _, pm = exact("gpt2", plan)
    state.save_checkpoint(folder, pm, step=0)
    dist.barrier()
    part = Path(folder) / "step-00000000" / f"rank-{dist.get_rank():05d}.safetensors"
    return part.stat().st_size


def test_every_box_is_written_once_by_some_rank(ranks4: Pool, tmp_path: Path) -> None:
    sizes = ranks4.run(boxes_once, plan_of("gpt2", "dp=2 tp=2 zero=0", 4), str(tmp_path))
    total = sum(p.numel() for p in build("gpt2").model.parameters()) * 8
    assert total < sum(sizes) < total + 4 * 20_000  # headers, random state
    assert min(sizes) > total // 10


def refused(plan: Plan, folder: str) -> list[str]:
    """Errors of one rank reach all of them."""
    _, pm = exact("tied", plan)
    found = []
    path = Path(folder) / "step-00000001"
    state.save_checkpoint(folder, pm, step=1)
    dist.barrier()
    if dist.get_rank() == 0:
        raw = json.loads((path / "checkpoint.json").read_text())
        raw["heading"]["step"] = -1
        (path / "checkpoint.json").write_text(json.dumps(raw))
    dist.barrier()
    for action in (
        lambda: state.load_checkpoint(folder, pm),
        lambda: state.load_checkpoint(f"{folder}/none", pm),
        lambda: state.save_checkpoint("/proc/none" if dist.get_rank() == 0 else folder, pm, step=2),
        lambda: weights.load_safetensors(pm, folder),
    ):
        with pytest.raises(CheckpointError) as raised:
            action()
        found.append(str(raised.value))
    return found


def test_errors_are_raised_on_every_rank(ranks2: Pool, tmp_path: Path) -> None:
    for messages in ranks2.run(refused, plan_of("tied", "dp=2 zero=3", 2), str(tmp_path)):
        for message, text in zip(
            messages, ["heading.step", "no checkpoint in it", "cannot write", "no weights in it"], strict=True
        ):
            assert text in message


class Half(nn.Module):
    """A pipeline rank's part of two layers that share a bias: it holds one of them."""

    def __init__(self, part: int) -> None:
        super().__init__()
        torch.manual_seed(part)
        self.add_module(f"layer{part}", nn.Linear(3, 3))


def parts(folder: str) -> tuple[bool, int]:
    """Each rank saves, loads, exports and imports what it holds; nobody misses what only others hold."""
    pm = Half(dist.get_rank())
    optimizer = torch.optim.AdamW(pm.parameters())
    loss_of(pm.get_submodule(f"layer{dist.get_rank()}")(torch.ones(3)).sum()).backward()
    optimizer.step()
    wanted = whole(pm, optimizer)
    state.save_checkpoint(folder, pm, optimizer, step=1, async_=True)
    state.finish_saving(pm)
    weights.export_safetensors(pm, f"{folder}/out")
    with torch.no_grad():
        for value in pm.parameters():
            value.zero_()
    read = weights.load_safetensors(pm, f"{folder}/out").bytes_read
    first = all(torch.equal(v, wanted[n]) for n, v in pm.named_parameters())
    again = Half(dist.get_rank())
    other = torch.optim.AdamW(again.parameters())
    state.load_checkpoint(folder, again, other)
    return first and all(torch.equal(v, wanted[k]) for k, v in whole(again, other).items()), read


def test_ranks_may_hold_different_tensors(ranks2: Pool, tmp_path: Path) -> None:
    assert ranks2.run(parts, str(tmp_path)) == [(True, 48), (True, 48)]


# -- Hugging Face files


def exported(name: str, plan: Plan, folder: str, limit: int) -> dict[str, Tensor]:
    _, pm = exact(name, plan)
    weights.export_safetensors(pm, folder, max_shard_bytes=limit)
    return pm.full_state_dict()


@pytest.mark.parametrize(
    ("name", "pins", "limit"),
    [("gpt2", "dp=2 zero=3", 100_000), ("llama", "tp=2", 1 << 30), ("mixtral", "tp=2", 1 << 30)],
)
def test_exports_are_what_transformers_reads(name: str, pins: str, limit: int, ranks2: Pool, tmp_path: Path) -> None:
    wanted = ranks2.run(exported, name, plan_of(name, pins, 2), str(tmp_path), limit)[0]
    kind = type(build(name).model)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert ("model.safetensors.index.json" in files) == (limit == 100_000)
    model, info = kind.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    same(model.state_dict(), wanted)
    if name == "gpt2":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert "lm_head.weight" not in index["weight_map"]
        assert len(set(index["weight_map"].values())) > 2
    with pytest.raises(CheckpointError, match="already"):
        weights.export_safetensors(model, tmp_path)


def from_meta(name: str, plan: Plan, folder: str) -> tuple[dict[str, Tensor], float, int, int, tuple[int, int]]:
    """A meta model under a plan, filled from files: whole state, loss, bytes read, bytes of the rank's slices, peaks."""
    case = build(name)
    with torch.device("meta"):
        model = type(case.model)(case.model.config)

    applied = measure_peak(lambda: apply(model.train(), case.args, case.kwargs, plan))
    pm = applied.result
    with pytest.raises(UsageError, match="have no values"):
        pm(**case.kwargs)
    filled = measure_peak(lambda: weights.load_safetensors(pm, folder))
    held = sum(parameters.local(p).numel() * 8 for p in pm.parameters())
    with torch.no_grad():
        loss = pm.eval()(**case.kwargs).loss.item()
    return pm.full_state_dict(), loss, filled.result.bytes_read, held, (applied.bytes, filled.bytes)


@pytest.mark.parametrize(("name", "pins"), [("llama", "dp=2 zero=3"), ("gpt2", "tp=2"), ("bert", "dp=2 zero=3")])
def test_a_meta_model_is_filled_slice_by_slice(name: str, pins: str, ranks2: Pool, tmp_path: Path) -> None:
    case = build(name)
    case.model.double().eval().save_pretrained(tmp_path, max_shard_size="100KB")
    with torch.no_grad():
        wanted = case.model(**case.kwargs).loss.item()
    total = sum(p.numel() for p in case.model.parameters()) * 8
    for found, loss, read, held, peaks in ranks2.run(from_meta, name, plan_of(name, pins, 2), str(tmp_path)):
        same(found, case.model.state_dict())
        assert loss == pytest.approx(wanted, abs=1e-11)  # also right where rotary tables had to be computed again
        assert read == held
        assert held < 0.75 * total
        assert peaks[0] < 0.8 * total  # the slices, and what capture holds
        assert peaks[1] < 0.05 * total


def test_a_plain_meta_model_is_filled(tmp_path: Path) -> None:
    case = build("llama")
    case.model.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = type(case.model)(case.model.config)
    weights.load_safetensors(model.eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**case.kwargs).logits, case.model.eval()(**case.kwargs).logits)
    (tmp_path / "b").mkdir()
    with torch.device("meta"):
        model = build("gpt2").model.to("meta")
    with pytest.raises(CheckpointError, match="holds no"):
        weights.load_safetensors(model, tmp_path)

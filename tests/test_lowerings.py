"""Lowerings of composite ops: chosen by measured price, recorded in the plan, equal to plain torch ops."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import plans
import pytest
import shardwright
import torch
from shardwright.errors import PinError, PlanError
from shardwright.passes import lowerings
from shardwright.passes.choose import Choice
from shardwright.passes.fuse.ops.liger import WIDEST, gate_kernels, rms_mode
from shardwright.passes.measure import request_of
from shardwright.passes.prepare import prepare
from shardwright.passes.summarize import Summary, operands_of
from shardwright.planner.cluster import Cluster
from shardwright.planner.fit import samples
from shardwright.planner.lowerings import cheapest, key_of, under
from shardwright.planner.pins import parse_pins
from shardwright.planner.planfile import dump_plan, parse_plan
from shardwright.planner.prices import Prices
from shardwright.profiles.devices import parse_cluster
from shardwright.profiles.local import versions
from shardwright.profiles.ops import argument_text, key_text
from shardwright.profiles.store import Store
from torch import nn

NORM, GATED = "shardwright.rms_norm", "shardwright.gated"
PINS = ("dtype=fp32", "passes=rms_norm,gated")


class Block(nn.Module):
    """An RMS norm written out, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12))
        self.gate, self.up, self.down = (nn.Linear(12, 12, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return (x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))).square().mean()


def block() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Block(), (torch.randn(2, 6, 12),)


@pytest.fixture(scope="module")
def summary() -> Summary:
    model, args = block()
    return prepare(model, args, {}, "float32", choice=Choice(("rms_norm", "gated")))


def gpu() -> Cluster:
    """A GPU of this machine, as far as its description goes."""
    return replace(parse_cluster("h100-sxm:1"), spec="local:1")


def rows(summary: Summary, seconds: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float, float]]:
    """A store's rows of ops: (plain, liger) seconds by target, half of them forward."""
    arguments = {name: argument_text(*operands_of(call.node)[1:]) for name, call in summary.calls.items()}
    prices = Prices(gpu(), "float32", arguments=arguments)
    found = {}
    for sample in samples(summary.outline, prices):
        if sample.op.target in seconds:
            key = prices.op_key(sample.op, sample.sizes, summary.outline.tensors)
            for one, total in zip((key, key_of(key, "liger")), seconds[sample.op.target], strict=True):
                found[key_text(one)] = (total / 2, total / 2, 0.01)
    return found


def test_without_the_extra_there_is_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("triton", "liger_kernel") else find(name)
    )
    assert lowerings.installed() == ("torch",)
    with pytest.raises(
        PlanError, match=r"needs liger_kernel and triton.*pip install 'shardwright\[kernels\]'.*lowering=torch"
    ):
        lowerings.check(plans.plan(lowerings={NORM: "liger"}), torch.device("cuda"))
    lowerings.check(plans.plan(), torch.device("cpu"))


def test_a_lowering_that_there_is_not_is_refused() -> None:
    for wrong in ({NORM: "quick"}, {"aten.linear": "liger"}):
        with pytest.raises(PlanError, match="there is no lowering"):
            lowerings.check(plans.plan(lowerings=wrong), torch.device("cuda"))


def test_nothing_is_imported_ahead() -> None:
    code = "import sys, shardwright.passes.lowerings; print({'triton', 'liger_kernel'} & set(sys.modules))"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ({NORM: (2e-5, 1e-5), GATED: (1e-5, 2e-5)}, {NORM: "liger"}),
        ({NORM: (1e-5, 1e-5), GATED: (3e-5, 2e-5)}, {GATED: "liger"}),
        ({}, {}),
    ],
)
def test_the_plan_takes_and_records_what_was_measured_to_be_quicker(
    seconds: dict[str, tuple[float, float]], wanted: dict[str, str], summary: Summary, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(lowerings, "installed", lambda: ("torch", "liger"))
    store = tmp_path / "p.sqlite"
    Store(store).write(gpu().device.name, versions(), "op", rows(summary, seconds))
    model, args = block()
    plan = shardwright.make_plan(model, args, gpu(), pins=PINS, store=store)
    assert plan.lowerings == wanted
    assert parse_plan(dump_plan(plan)) == parse_plan(dump_plan(parse_plan(dump_plan(plan))))
    assert parse_plan(dump_plan(plan)).lowerings == wanted
    assert ('"lowerings"' in dump_plan(plan)) == bool(wanted)
    plain = shardwright.make_plan(model, args, gpu(), pins=(*PINS, "lowering=torch"), store=store)
    assert plain.lowerings == {}
    saved = sum(a - b for target, (a, b) in seconds.items() if target in wanted)
    assert plain.predicted.step_seconds - plan.predicted.step_seconds == pytest.approx(saved, rel=1e-6, abs=1e-12)


def test_what_is_not_installed_is_not_chosen(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowerings, "installed", lambda: ("torch",))
    assert lowerings.choose(summary, Prices(gpu(), "float32"), parse_pins(PINS)) == {}


def test_pins_force_and_forbid(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowerings, "installed", lambda: ("torch", "liger"))
    prices = Prices(gpu(), "float32")
    assert lowerings.choose(summary, prices, parse_pins(["lowering=liger"])) == {GATED: "liger", NORM: "liger"}
    assert lowerings.choose(summary, prices, parse_pins(["lowering!=liger"])) == {}
    model = nn.Sequential(nn.Linear(4, 4))
    bare = prepare(model, (torch.randn(2, 4),), {}, "float32")
    with pytest.raises(PinError, match="no op of this model"):
        lowerings.choose(bare, prices, parse_pins(["lowering=liger"]))


def test_only_calls_with_the_same_meaning_are_taken() -> None:
    half, single = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(2, 8)
    weight, wide = half[0], single[0]
    f32, bf16 = torch.float32, torch.bfloat16
    assert rms_mode(single, wide, 1e-6) == "gemma"
    assert rms_mode(half, weight, 1e-6, 0.0, f32, bf16) == "llama"
    assert rms_mode(half, weight, 1e-6, 1.0, f32, None, bf16) == "gemma"
    assert rms_mode(half, weight, 1e-6, 1.0, f32, bf16) == ""  # the offset is rounded to half precision
    assert rms_mode(half, wide, 1e-6, 0.0, f32, bf16) == ""  # a wide weight makes the result wide
    assert rms_mode(half, weight, 1e-6) == ""  # the mean of squares is taken in half precision
    assert rms_mode(single.double(), wide.double(), 1e-6) == ""
    assert rms_mode(torch.empty(1, WIDEST + 1, device="meta"), None, 1e-6) == ""
    assert gate_kernels(half, half, "silu") == "swiglu"
    assert gate_kernels(half, half, "gelu") == ""  # by the error function
    assert gate_kernels(half, single, "silu") == ""


def test_profiles_time_every_lowering(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowerings, "installed", lambda: ("torch", "liger"))
    prices = Prices(gpu(), "float32")
    sample = next(s for s in samples(summary.outline, prices) if s.op.target == NORM)
    request = request_of(summary, sample, prices)
    assert request is not None
    call = summary.calls[sample.op.name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lowerings.requests_of(request, call) == ()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (other,) = lowerings.requests_of(request, call)
    assert other.key == key_of(request.key, "liger")
    assert (other.args, other.operands) == (request.args, request.operands)


def test_no_rows_change_no_prices(summary: Summary) -> None:
    prices = Prices(gpu(), "float32")
    assert cheapest(summary.outline, prices, lowerings.offered(summary.calls, ["liger"])) == {}
    assert under(prices, {NORM: "liger"}) is prices


def run_interpreted(**extra: str) -> str:
    script = Path(__file__).with_name("interpreted.py")
    made = subprocess.run([sys.executable, script], env={**os.environ, **extra}, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-4000:]
    return made.stdout


def test_kernels_equal_plain_ops_under_the_interpreter() -> None:
    pytest.importorskip("triton", minversion="3.9")  # the interpreter of 3.5 fails on loops with numpy 2.4
    pytest.importorskip("liger_kernel")
    assert run_interpreted(TRITON_INTERPRET="1").strip().endswith("equal")


@pytest.mark.gpu
def test_kernels_equal_plain_ops_on_a_gpu() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    assert run_interpreted().strip().endswith("equal")

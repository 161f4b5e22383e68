"""benchmarks/runtime.py: how it judges, and at night that every comparison runs and computes the same."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))


def script() -> ModuleType:
    """The script under another name: `runtime` is a package where tests start in the checkout."""
    spec = importlib.util.spec_from_file_location("runtime_speed", BENCHMARKS / "runtime.py")
    assert spec is not None
    assert spec.loader is not None
    made = sys.modules["runtime_speed"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


runtime = script()
from runtime_peers import PEERS, Size  # noqa: E402
from runtime_speed import Case, Steps, cases, compared, interval, judged  # noqa: E402

CASE = Case("llama ddp", "llama", 2, ("ddp",), "dp=2 zero=0", limit=1.05)
TINY = Size(layers=2, blocks=2, width=64, heads=4, vocabulary=128, batch=4, seq=16)


def steps(ratios: list[float], loss: float = 1.0) -> Steps:
    return Steps([(r, 1.0) for r in ratios], [(2 * r, 1.0) for r in ratios], [(loss, 1.0)] * len(ratios))


def test_the_interval_is_of_order_statistics() -> None:
    assert interval([3.0, 1.0, 2.0, 4.0, 5.0]) == (1.0, 5.0)  # of five none reaches 95 %
    assert interval([float(i) for i in range(6)]) == (0.0, 5.0)  # 2 / 2^6 lie outside
    assert interval([float(i) for i in range(20)]) == (5.0, 14.0)  # the 6th and the 15th, as tables have it


def test_medians_of_ratios_are_judged() -> None:
    good = compared(CASE, "ddp", steps([1.0, 1.04, 1.2]), "dp=2")
    assert (good.ratio, good.low, good.high, good.cpu, good.held) == (1.04, 1.0, 1.2, 2.08, True)
    assert not compared(CASE, "ddp", steps([1.06, 1.06, 0.9]), "dp=2").held
    assert not compared(CASE, "ddp", steps([1.0], loss=1.001), "dp=2").held
    assert "not held" in runtime.line(compared(CASE, "ddp", steps([1.1]), "dp=2"))


def test_a_free_plan_is_held_against_the_quickest_peer() -> None:
    found = judged([compared(CASE, name, steps([r]), "dp=2") for name, r in (("ddp", 1.01), ("fsdp", 0.8))])
    assert (found.peer, found.ratio, found.others) == ("ddp", 1.01, {"fsdp": 0.8})
    wrong = [compared(CASE, "ddp", steps([1.0]), ""), compared(CASE, "fsdp", steps([0.8], loss=2.0), "")]
    assert not judged(wrong).held


def test_cases_cover_what_torch_offers() -> None:
    assert len({case.name for case in cases()}) == len(cases())
    assert {peer for case in cases() for peer in case.peers} == set(PEERS)
    assert {case.limit for case in cases() if case.compile} == {1.02}
    assert {case.limit for case in cases() if case.ranks == 2 and not case.pins} == {1.03}
    assert {case.limit for case in cases() if case.pins} == {1.05}


@pytest.mark.nightly
@pytest.mark.parametrize("case", [case for case in cases() if case.pins or case.ranks == 1], ids=lambda case: case.name)
def test_both_sides_of_a_case_compute_the_same(case: Case) -> None:
    """Each peer, written by hand, has the losses of our plan over some steps of training."""
    found = runtime.executed(case, TINY, 1, runtime.planned(case, TINY, None))
    assert [o.peer for o in found] == list(case.peers)
    assert all(o.same and o.ours > 0 and o.theirs > 0 for o in found)

"""The profilers: clock, heap, progress, regions, copies, overlap, allocator, optimizer."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from shardwright.planner.rule_types import Operand
from shardwright.profiles import clock, regions, timing
from shardwright.profiles.allocator import measure_allocator
from shardwright.profiles.clock import Span, Watch
from shardwright.profiles.comms import strided_groups
from shardwright.profiles.copies import time_copies
from shardwright.profiles.devices import parse_cluster
from shardwright.profiles.failures import KIND, failed, failure, key_of
from shardwright.profiles.jobs import TimeUp, run_ranks
from shardwright.profiles.measured import measured_collectives, with_measured
from shardwright.profiles.ops import ROUNDS, OpRequest, encode_request
from shardwright.profiles.progress import Tail, into
from shardwright.profiles.regions import RegionProgram, Runner, Step, decode_program, encode_program, time_regions
from shardwright.profiles.store import Store
from shardwright.profiles.timing import calmest, time_call

FLOATS = ((4, 8), "float32", True)
LAYER = RegionProgram(
    (FLOATS, ((8, 8), "float32", True)),
    (
        Step("aten.linear", (Operand(0), Operand(1)), {}, (2,)),
        Step("aten.mul", (Operand(2), 2.0), {}, (3,)),
        Step("aten.split", (Operand(3), 4), {"dim": -1}, (4, 5)),
        Step("aten.cat", ([Operand(5), Operand(4)], -1), {}, (6,)),
    ),
    (6,),
)


def spent(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]
) -> None:
    """Thread counters (nanoseconds run, waited) at the start and the end of a watch, over one second of wall time."""
    counters, moments = iter([before, after]), iter([0.0, 1.0])
    monkeypatch.setattr(clock, "queued", lambda: next(counters))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(moments))


@pytest.mark.parametrize(
    ("mine", "other", "team", "waited"),
    [
        ((700, 300), (0, 0), False, 0.3),  # ran and waited: all of the second
        ((600, 100), (0, 250), False, 0.35),  # slept 0.3 s, in which another thread waited
        ((600, 100), (0, 900), False, 0.4),  # but not longer than it slept
        ((1000, 0), (100, 600), False, 0.0),  # never slept: nobody kept it waiting
        ((800, 100), (500, 400), True, 0.4),  # the longest wait of a team
    ],
)
def test_waiting(
    mine: tuple[int, int], other: tuple[int, int], team: bool, waited: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = str(clock.threading.get_native_id())
    now = {me: (10**9 + mine[0] * 10**6, mine[1] * 10**6), "1": (other[0] * 10**6, other[1] * 10**6)}
    spent(monkeypatch, {me: (10**9, 0)}, now)
    span = Watch(team=team).stop()
    assert span.seconds == 1.0
    assert span.waited == pytest.approx(waited)
    assert span.own == pytest.approx(1.0 - waited)


def test_nothing_is_known_of_waiting_without_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "TASKS", "/no/such/folder")
    assert clock.queued() == {}
    assert Watch().stop().waited == 0.0


def test_own_seconds_are_never_nothing() -> None:
    assert Span(1.0, 1.0).own == pytest.approx(0.1)


def test_calm_samples_are_kept() -> None:
    spans = [Span(1.0, w) for w in (0.5, 0.0, 0.4, 0.1, 0.3, 0.2, 0.6)]
    assert [s.waited for s in calmest(spans)] == [0.0, 0.1, 0.2, 0.3]
    assert len(calmest(spans[:3])) == 3


def test_short_calls_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def sample(call: Any, calls: int) -> Span:
        counts.append(calls)
        return Span(calls * 1e-6, 0.0)

    monkeypatch.setattr(timing, "_sample", sample)
    assert time_call(lambda: None, 0.01).seconds == pytest.approx(1e-6)
    assert counts[0] == 1
    assert {abs(n - round(timing.SAMPLE_SECONDS / 1e-6)) <= 1 for n in counts[1:]} == {True}
    assert len(counts) > timing.LEAST_REPEATS


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of glibc's heap")
def test_a_kept_heap_serves_without_faults() -> None:
    count = (
        "import resource, torch\n"
        "from shardwright.profiles.heap import keep_pages\n"
        "assert keep_pages()\n"
        "faults = []\n"
        "for _ in range(12):\n"
        "    [torch.ones(48 << 20, dtype=torch.uint8) for _ in range(2)]\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
        "print(faults[-1] - faults[-3])\n"
    )
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000  # 49,152 pages, were they new


def test_half_a_line_of_progress_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    tail = Tail(path)
    assert tail.rows() == []
    with path.open("a") as file:
        tell = into(file)
        tell("op", "a", [1.0])
        file.write('["op", "b"')
        file.flush()
        assert tail.rows() == [("op", "a", [1.0])]
        file.write(", 2]\n")
    assert tail.rows() == [("op", "b", 2)]
    assert tail.rows() == []


def test_failures_have_types() -> None:
    assert failure(torch.OutOfMemoryError("CUDA out of memory"))["type"] == "out of memory"
    assert failure(RuntimeError("DefaultCPUAllocator: not enough memory"))["type"] == "out of memory"
    assert failure(MemoryError())["type"] == "out of memory"
    assert failure(AttributeError("no such op")) == {"type": "unsupported", "message": "AttributeError: no such op"}
    assert failed({key_of("op", "x"): {}, key_of("region", "y"): {}}, "op") == {"x"}


def test_groups_of_a_mesh() -> None:
    assert strided_groups(1) == []
    assert strided_groups(4) == [(2, 1), (4, 1), (2, 2)]
    assert set(strided_groups(8)) == {(2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (2, 4)}


def test_programs_survive_json_and_run() -> None:
    again = decode_program(json.loads(json.dumps(encode_program(LAYER))))
    assert again == LAYER
    gradients = Runner(again)()
    assert [tuple(g.shape) for g in gradients] == [(4, 8), (8, 8)]  # type: ignore[attr-defined]


def test_a_program_computes_what_its_ops_say() -> None:
    runner = Runner(LAYER)
    x, w = (t.detach() for t in runner._inputs)
    ones = torch.ones(4, 8)
    gradient_x, gradient_w = runner()  # type: ignore[misc]
    torch.testing.assert_close(gradient_x, 2 * ones @ w)
    torch.testing.assert_close(gradient_w, 2 * ones.T @ x)


def test_regions_are_timed_or_said_to_fail() -> None:
    told: list[tuple[str, str, object]] = []
    big = RegionProgram(
        (((256, 256), "float32", True), ((256, 256), "float32", True)),
        (Step("aten.linear", (Operand(0), Operand(1)), {}, (2,)),), (2,),
    )  # fmt: skip
    twice = RegionProgram(big.inputs, (*big.steps, Step("aten.linear", (Operand(2), Operand(1)), {}, (3,))), (3,))
    odd = RegionProgram((FLOATS,), (Step("aten.no_such_op", (Operand(0),), {}, (1,)),), (1,))
    found = time_regions([("good", big, twice), ("odd", odd, odd)], lambda *row: told.append(row))
    assert set(found) == {"good"}
    assert 0 < found["good"][0] < 1
    kinds = [(kind, key) for kind, key, _ in told]
    good = [("begin", "region"), ("region", "good")]
    assert kinds == [*good, ("begin", "region"), ("failure", "region odd"), *good]  # what fails is not tried again
    assert told[3][2]["type"] == "unsupported"  # type: ignore[index]
    assert told[-1][2][0] <= told[1][2][0]  # type: ignore[index]


def test_copies_and_disk(tmp_path: Path) -> None:
    found = time_copies(tmp_path)
    assert {"memory", "disk_write"} <= set(found)
    assert all(rate > 1e6 for rate in found.values())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=r"."):
        time_copies(tmp_path / "missing")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_allocator_keeps_more_than_is_used() -> None:
    found = run_ranks(1, 1, ["allocator"])["allocator"]
    assert 1.0 <= found["reserve"] < 3.0


def test_tasks_of_two_ranks() -> None:
    told = []
    found = run_ranks(
        2, 1, ["overlap", "optimizers", "ops"], heard=told.extend,
        optimizers={"one": ["adamw", [1000, 2000], "float32"], "two": ["muon2", [10], "float32"]},
        requests=[encode_request(OpRequest("aten.cos", (((5,), "float32", False),), (Operand(0),), {}))], budget=5.0,
    )  # fmt: skip
    overlap = found["overlap"]["all ranks"]
    assert overlap["both"] >= 0.5 * overlap["compute"]
    assert overlap["slowdown"] >= 1.0
    assert set(found["optimizers"]) == {"one"}
    assert found["optimizers"]["one"] > 0
    kinds = [row[0] for row in told]
    assert len({row[1] for row in told if row[0] == "op"}) == 1
    assert kinds.count("op") == ROUNDS
    assert [row[1] for row in told if row[0] == "failure"] == ["optimizer two"]


def test_ranks_out_of_time_are_told_apart() -> None:
    with pytest.raises(TimeUp, match="in time"):
        run_ranks(1, 1, ["machine"], timeout=0.1)


@pytest.mark.gpu
def test_copies_of_a_gpu() -> None:
    found = time_copies(Path(tempfile.gettempdir()))
    assert all(found[key] > 1e9 for key in ("host_to_device", "device_to_host", "both_ways"))
    assert 0 < found["latency"] < 1e-3


@pytest.mark.gpu
def test_allocator_of_a_gpu() -> None:
    torch.zeros(1, device="cuda")
    found = measure_allocator()
    assert found["reserve"] >= 1.0
    assert found["context_bytes"] > 0


@pytest.mark.gpu
def test_ops_of_a_gpu_are_waited_for() -> None:
    x = torch.rand(4096, 4096, device="cuda")
    seconds = time_call(lambda: x @ x, 0.1).seconds
    assert 2 * 4096**3 / seconds < 2e15  # launched alone, it would seem to take microseconds


def test_measured_figures_of_gpus_replace_the_data_sheet(tmp_path: Path) -> None:
    cluster, store = parse_cluster("h100-sxm:8"), Store(tmp_path / "p.sqlite")
    assert with_measured(cluster, store, "torch x") == cluster
    store.write("h100-sxm", "torch x", "overlap", {"all ranks": {"compute": 2.0, "slowdown": 1.2}})
    store.write("h100-sxm", "torch x", "allocator", {"reserve": 1.25, "context_bytes": 5e8})
    copies = {"host_to_device": 5e10, "device_to_host": 4e10, "both_ways": 3e10, "latency": 1e-5, "disk_read": 1e9}
    store.write("h100-sxm", "torch x", "copies", copies)
    store.write(
        "h100-sxm", "torch x", "collectives", {"all_reduce:2": [[1024, 1e-5]], "all_reduce:4@2": [[1024, 2e-5]]}
    )
    found = with_measured(cluster, store, "torch x")
    device, host = found.device, found.host
    assert (device.overlap_fraction, device.overlap_slowdown) == (1.0, 1.2)
    assert (device.reserve_fraction, device.context_bytes) == (0.2, 500_000_000)
    assert host is not None
    assert (host.copy_bytes_per_second, host.duplex_fraction, host.copy_latency_seconds) == (4e10, 0.75, 1e-5)
    assert host.disk_read_bytes_per_second == 8e9
    assert host.sources["copy_bytes_per_second"].startswith("measured")
    level = cluster.route(1, 2).level
    assert level is not None
    table = measured_collectives(cluster, store, "torch x")
    assert table["all_reduce", level.name, 2] == ((1024.0, 1e-5),)
    assert table["all_reduce", level.name, 4] == ((1024.0, 2e-5),)
    assert ("send", level.name, 2) not in table
    store.write("h100-sxm", "torch x", "sends", {"pairs": [[1024, 3e-5]]})
    assert measured_collectives(cluster, store, "torch x")["send", level.name, 2] == ((1024.0, 3e-5),)


def test_a_difference_that_another_process_hid_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"late": [regions.SHORT, (2.0, 0.1)], "early": [(3.0, 0.1), regions.SHORT], "never": [regions.SHORT] * 2}
    monkeypatch.setattr(regions, "_time_region", lambda key, _: answers[key].pop(0))
    told: list[tuple[object, ...]] = []
    found = time_regions([(key, key, key) for key in answers], lambda *row: told.append(row))
    assert found == {"late": (2.0, 0.1), "early": (3.0, 0.1)}
    assert [row for row in told if row[0] == KIND] == [(KIND, "region never", regions.SHORT)]

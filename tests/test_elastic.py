"""Another number of ranks than planned: planning again, and going on with what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import toy
from pool import Pool
from shardwright.api import make_plan
from shardwright.errors import LaunchError
from shardwright.planner.plan import Plan
from shardwright.profiles.devices import parse_cluster
from shardwright.runtime.elastic import cluster_for_world, plan_for_world
from test_kills import Net, batch
from test_kills import plan as pipeline
from test_watch import free_port

TOY = Path(toy.__file__)


def planned(cluster: str, *pins: str, limit: int | None = None) -> Plan:
    """A plan of the toy model."""
    model, inputs = toy.build(8)
    return make_plan(model, inputs, cluster, pins=pins, memory_limit=limit)


def again(plan: Plan, world: int) -> Plan:
    model, inputs = toy.build(plan.source.batch)
    return plan_for_world(plan, world, model, (), inputs)


def test_pins_stay_as_far_as_they_can_be_met() -> None:
    plan = planned("cpu:4", "dp=2", "tp=2", "dtype=fp64")
    half, double = again(plan, 2), again(plan, 8)
    assert {a.name: a.size for a in half.mesh if a.size > 1} == {"tp": 2}
    assert {a.name: a.size for a in double.mesh} == {"dp": 4, "tp": 2}
    assert half.pins == ("tp=2", "dtype=fp64")
    assert half.notes[-1] == "made for 2 ranks from a plan for 4, without the pins dp=2"
    assert half.graph == plan.graph
    assert (half.source.batch, half.precision, half.optimizer) == (plan.source.batch, plan.precision, plan.optimizer)
    for pins in (("tp=2",), ("dp=2", "zero=3")):
        alone = again(planned("cpu:2", *pins), 1)
        assert alone.ranks == 1
        assert alone.notes[-1].endswith(f"without the pins {' '.join(pins)}")


def piped(plan: Plan) -> tuple[int, ...]:
    """Rank function: what an elastic script makes of a plan that has as many ranks as run."""
    import shardwright

    pm = shardwright.auto_parallelize(Net(), batch(0), plan=plan, elastic=True)
    return pm.plan.pipeline.ranks, pm.plan.ranks


def test_a_pipeline_of_the_ranks_that_run_is_run(ranks2: Pool) -> None:
    plan = pipeline(("pp=2", "dp=1", "schedule=1f1b", "micro_batch=4"), 2)
    assert ranks2.run(piped, plan) == [(2, 2)] * 2


def test_a_number_without_a_plan_is_refused_with_the_reason() -> None:
    plan = planned("cpu:4", "dp=4", "zero=3")
    few, many = (p.predicted.peak_bytes_per_device for p in (plan, again(plan, 1)))
    assert few < many
    tight = planned("cpu:4", "dp=4", "zero=3", limit=few + (many - few) // 4)
    with pytest.raises(
        LaunchError, match=r"(?s)no plan for the 1 ranks that run \(the given one is for 4\): nothing fits"
    ):
        again(tight, 1)


@pytest.mark.parametrize(
    ("spec", "world", "found"),
    [("h100-sxm:8x4", 24, "h100-sxm:8x3"), ("h100-sxm:8x2@3200Gbps", 32, "h100-sxm:8x4@3200Gbps"),
     ("h100-sxm:8", 4, "h100-sxm:4"), ("cpu:2", 4, "cpu:2x2")],
)  # fmt: skip
def test_the_machines_stay_of_their_kind(spec: str, world: int, found: str) -> None:
    made = cluster_for_world(parse_cluster(spec, "12GiB"), world)
    assert (made.spec, made.devices, made.limit_bytes) == (found, world, 12 * 2**30)


def test_parts_of_nodes_are_refused() -> None:
    with pytest.raises(
        LaunchError, match=r"h100-sxm:8x2 with 12 ranks in place of 16: not a whole number of nodes of 8"
    ):
        cluster_for_world(parse_cluster("h100-sxm:8x2"), 12)


def ran(file: str, elastic: bool) -> dict[str, Any] | str:
    """Rank function: what a run of the plan file gives, or its error."""
    import torch
    from shardwright.runtime.execute import parsed, run_plan

    options = parsed([file, "--steps=1", *["--elastic"] * elastic])
    try:
        return run_plan(options, torch.device("cpu"))
    except LaunchError as error:
        return str(error)


def test_ranks_that_are_left_run_a_plan_of_their_own(ranks2: Pool, tmp_path: Path) -> None:
    file = plan_file(tmp_path, "cpu:4", "dp=2", "tp=2")
    refused = ranks2.run(ran, str(file), False)
    assert "the plan is for 4 ranks (dp=2 x tp=2) but 2 are running" in refused[0]
    first, second = ranks2.run(ran, str(file), True)
    assert prod(a["size"] for a in first["planned_again"]["mesh"]) == 2
    assert first["planned_again"] == second["planned_again"]
    assert first["losses"] == second["losses"]
    assert first["fits"]


def applied(plan: Plan) -> tuple[int, int]:
    """Rank function: a script's one call under a plan for other ranks."""
    import shardwright

    model, inputs = toy.build(8)
    with pytest.raises(LaunchError, match="the plan is for 4 ranks"):
        shardwright.auto_parallelize(model, inputs, plan=plan)
    pm = shardwright.auto_parallelize(model, inputs, plan=plan, elastic=True)
    pm(**inputs).backward()
    return pm.plan.ranks, pm.data_size


def test_a_script_goes_on_with_what_is_left(ranks2: Pool) -> None:
    assert ranks2.run(applied, planned("cpu:4", "dp=4")) in ([(2, 2)] * 2, [(2, 1)] * 2)


def plan_file(folder: Path, cluster: str, *pins: str) -> Path:
    """A plan file of the toy model, made by its file."""
    from shardwright.api import plan_model
    from shardwright.planner.planfile import save_plan

    path = folder / "plan.json"
    made = plan_model(f"{TOY}:build", cluster, batch=8, pins=pins)
    save_plan(made.plan, path)
    return path


# -- torchrun: one of two machines goes


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two torchrun agents with a rank each, the first of which serves the rendezvous."""
    file, port = plan_file(tmp_path, "cpu:2", "dp=2"), free_port()
    own = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "XDG_CACHE_HOME": str(tmp_path)}
    started = [
        subprocess.Popen(
            [
                sys.executable, "-m", "shardwright.cli.main", "run", str(file), "--nnodes", "1:2", "--node-rank", str(node),
                "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-endpoint", f"127.0.0.1:{port}", "--steps",
                "8000", "--timeout", "20", "--json",
            ],
            env=own, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )
        for node in range(2)
    ]  # fmt: skip
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.nightly
def test_a_machine_that_goes_is_planned_around(machines: list[subprocess.Popen[str]]) -> None:
    """The second machine is cut off in the middle of a run; the first one starts again with its rank alone."""
    stay, leave = machines
    while not _descendants(leave.pid):
        time.sleep(0.2)
    time.sleep(8)  # they start, or train already: either may be cut off
    assert stay.poll() is None
    os.killpg(leave.pid, signal.SIGKILL)
    for child in _descendants(leave.pid):
        os.kill(child, signal.SIGKILL)
    out, said = stay.communicate(timeout=400)
    assert stay.returncode == 0, said
    assert "2 ranks were planned, 1 run: planning again" in said
    assert json.loads(out)["world_size"] == 1


def _descendants(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.splitlines()[
        1:
    ]
    pairs = [tuple(map(int, line.split())) for line in listed]
    found = [pid for pid, above in pairs if above == parent]
    return [*found, *(deeper for pid in found for deeper in _descendants(pid))]

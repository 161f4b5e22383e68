"""Measured peaks against known allocations, eager and compiled, and the enforced budget."""

from __future__ import annotations

import pytest
import torch
from pool import Pool
from shardwright.planner.plan import MeshAxis
from shardwright.runtime import parameters, transitions
from shardwright.runtime.mesh import Mesh
from shardwright.runtime.monitor import Budget, MemoryExceeded, live_bytes, measure_peak, measure_step
from torch import nn

MB = 1 << 20


def known() -> torch.Tensor:
    a = torch.empty(MB)  # 4 MB
    b = a + 1  # 8 MB
    del a  # 4 MB
    c = torch.empty(2 * MB)  # 12 MB
    del b, c
    return torch.zeros(MB // 4)  # 1 MB is kept


def test_peak_of_known_allocations() -> None:
    measure_peak(known)
    peak = measure_peak(known)
    assert peak.bytes == 12 * MB
    assert peak.retained == MB
    assert peak.result.numel() == MB // 4
    assert max(size for _, size in peak.timeline) == peak.bytes
    assert peak.timeline[-1][1] == peak.retained
    moments = [moment for moment, _ in peak.timeline]
    assert moments == sorted(moments)


def test_what_an_earlier_measured_call_kept_is_seen_to_go() -> None:
    held = []
    measure_peak(lambda: held.append(torch.empty(MB)))
    peak = measure_peak(held.clear)
    assert (peak.bytes, peak.retained) == (0, -4 * MB)


def test_backward_pass() -> None:
    layers = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(4)])
    x = torch.randn(1024, 256)
    peak = measure_peak(lambda: layers(x).sum().backward())
    activation, weight = x.nbytes, 256 * 256 * 4
    assert peak.retained == 4 * weight
    # The outputs of three layers are kept; two gradients (or the last output) and the first weight gradients come on top.
    assert 3 * activation <= peak.bytes <= 6 * activation + 4 * weight


def test_compiled_code_is_measured() -> None:
    @torch.compile
    def fused(x: torch.Tensor) -> torch.Tensor:
        return ((x + 1) * 2).sin()

    x = torch.randn(MB)
    fused(x)
    assert measure_peak(lambda: fused(x)).bytes == 4 * MB
    eager = measure_peak(lambda: ((x + 1) * 2).sin())
    assert 8 * MB <= eager.bytes <= 8 * MB + 64  # the numbers become scalar tensors


def test_step_in_steady_state() -> None:
    module = nn.Linear(1024, 1024, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        module(torch.ones(1, 1024)).sum().backward()
        optimizer.step()

    for _ in range(2):
        step()
        peak = measure_step(step, module, optimizer)
        assert peak.retained == 8 * MB  # parameter and gradient
        assert 8 * MB <= peak.bytes <= 8 * MB + 64 * 1024


def gathered() -> tuple[int, int]:
    mesh = Mesh.create([MeshAxis("tp", 2, "model", "")], torch.device("cpu"))
    x = torch.zeros(MB)
    args = "S(0)", "R", [1, 1], 2, mesh.coordinate[0], mesh.group_name("tp")
    transitions.transition(x, *args)
    peak = measure_peak(lambda: transitions.transition(x, *args))
    parameter = parameters.distribute(torch.zeros(2 * MB), ((2 * MB,),), (parameters.WHOLE,), ("tp",), mesh)
    parameters.local(parameter).sum().backward()
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    return peak.bytes, live_bytes(parameter, optimizer)


def test_collectives_and_dtensors(ranks2: Pool) -> None:
    for bytes_, alive in ranks2.run(gathered):
        assert 8 * MB <= bytes_ <= 16 * MB
        # parameter, gradient, two moments; the step count is a scalar
        assert 16 * MB <= alive <= 16 * MB + 64


def test_live_bytes_counts_storages_once() -> None:
    x = torch.zeros(MB)
    assert live_bytes(x, [x.view(2, -1), {"a": x[5:]}]) == 4 * MB
    module = nn.Linear(16, 16, bias=False)
    assert live_bytes(module) == 1024
    module(torch.randn(1, 16)).sum().backward()
    assert live_bytes(module, module.weight) == 2048


def test_budget() -> None:
    with Budget(12 * MB) as budget:
        known()
    assert budget.peak == 12 * MB
    with Budget(8 * MB, baseline=4 * MB), pytest.raises(MemoryExceeded, match="budget is 8,388,608"):
        torch.zeros(MB) + 1
    with Budget(9 * MB):
        x = torch.zeros(MB, requires_grad=True)
        for _ in range(5):
            x.view(-1)[1:].add(1)
    with Budget(10 * MB), pytest.raises(MemoryExceeded):
        (torch.zeros(MB, requires_grad=True) * 2).exp().sum().backward()


@pytest.mark.gpu
def test_peak_on_a_gpu() -> None:
    device = torch.device("cuda")

    def run() -> torch.Tensor:
        a = torch.empty(MB, device=device)
        b = a + 1
        del a
        c = torch.empty(2 * MB, device=device)
        del b, c
        return torch.zeros(MB // 4, device=device)

    run()
    peak = measure_peak(run, device)
    assert peak.bytes == 12 * MB
    assert peak.retained == MB

"""The optimizers that runs make: one kernel where torch has a right one, and plans that say the same."""

from __future__ import annotations

import pytest
import torch
from shardwright.planner.memory import Setting, held
from shardwright.planner.outline import Tensor
from shardwright.planner.precision import FUSED, RECIPES, fused, state_bytes
from shardwright.profiles.local import _device
from shardwright.runtime.checkpoint import optimizer as saved
from shardwright.runtime.offload.rounds import step_apart
from shardwright.runtime.optimizers import MAKERS, make_optimizer
from torch import nn

DTYPES = ("float32", "float64", "bfloat16", "float16")
STEPS = 4


def parameters(dtype: str, seed: int = 0) -> list[nn.Parameter]:
    """Large enough for vectorised kernels, one transposed, one empty, one of no dims."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(1000,), (7, 33), (0, 4), ()]
    values = [torch.randn(shape, generator=draw) for shape in shapes] + [torch.randn(48, 20, generator=draw).t()]
    return [nn.Parameter(v.to(getattr(torch, dtype))) for v in values]


def trained(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int = 5) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for p in parameters:
            (p * torch.randn(p.shape, generator=draw).to(p.dtype)).sum().backward()
        optimizer.step()
    return [p.detach().double() for p in parameters]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_right_in_every_dtype(name: str, dtype: str) -> None:
    """Held against float64: as close as the dtype lets it, whatever kernel runs."""
    mine, exact = parameters(dtype), parameters(dtype)
    exact = [nn.Parameter(p.detach().double()) for p in exact]
    optimizer = make_optimizer(name, mine)
    assert bool(optimizer.param_groups[0].get("fused")) == fused(name, "cpu", dtype)
    found = trained(optimizer, mine)
    wanted = trained(MAKERS[name](exact, lr=optimizer.param_groups[0]["lr"]), exact)
    most = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 0.06, "float16": 0.01}[dtype]
    if name in ("adam", "adamw", "adagrad", "sgd"):  # of the others half precision is the loop's own
        assert all(torch.allclose(a, b, rtol=0, atol=most) for a, b in zip(found, wanted, strict=True))


def test_the_callers_way_and_gaps_are_left_alone() -> None:
    plain = [nn.Parameter(torch.randn(8))]
    assert make_optimizer("adamw", plain, foreach=True).param_groups[0]["fused"] is None
    assert make_optimizer("adamw", plain, fused=False).param_groups[0]["fused"] is False
    gaps = [nn.Parameter(torch.randn(8, 8)[:, :4])]
    assert make_optimizer("adamw", gaps).param_groups[0]["fused"] is None
    assert make_optimizer("AdamW", plain, capturable=True).param_groups[0]["fused"] is True
    assert not make_optimizer("adamw", [nn.Parameter(torch.empty(3, device="meta"))]).param_groups[0]["fused"]


def test_checkpoint_options_leave_the_kernel() -> None:
    one, other = parameters("float32"), parameters("float32")
    first, second = make_optimizer("adamw", one, lr=0.5), make_optimizer("adamw", other, fused=False)

    class Named:
        def name_of(self, p: torch.Tensor) -> str:
            return str(next(i for i, x in enumerate(one) if x is p))

    saved.restore_options(second, saved.record(first, Named()))  # type: ignore[arg-type]
    assert second.param_groups[0]["lr"] == 0.5
    assert second.param_groups[0]["fused"] is False


@pytest.mark.parametrize(("kind", "tensors"), [("cpu", 2), ("gpu", 1)])
def test_bytes_leave_room_for_default_kernels(kind: str, tensors: int) -> None:
    tensor = Tensor("w", ((100,),), "float32", "parameter", True, "w")
    precision = RECIPES["fp32"].precision()
    setting = Setting(precision, "adamw", foreach=kind == "gpu")
    step = held(tensor, True, 100, 100.0, 0, 0, state_bytes(precision, "adamw"), setting).step
    assert step == tensors * 400


def test_table_of_kernels() -> None:
    assert ("adagrad", "gpu") not in FUSED
    assert not fused("sgd", "cpu", "bfloat16")
    assert not fused("radam", "cpu", "float32")
    assert {name for name, _ in FUSED} <= {*MAKERS, "sgd+momentum"}


def test_measured_kernel_prices_the_step() -> None:
    figures = {"memory": 10e9, "matmul.float32": 1e11, "elementwise": 5e9, "copy": 5e9, "overhead": 1e-5}
    device = _device({**figures, "optimizer": 3e9, "fused_optimizer": 12e9}, 1 << 30, 1)
    assert (device.efficiency("optimizer"), device.efficiency("fused_optimizer")) == (0.3, 1.2)


@pytest.mark.parametrize("kernel", [True, False])
def test_steps_apart_count_as_changes(kernel: bool) -> None:
    """Copies on the device are renewed by the count, which torch's fused kernels leave alone."""
    parameter = nn.Parameter(torch.randn(8))
    optimizer = make_optimizer("adamw", [parameter], fused=kernel)
    parameter.grad = torch.randn(8)
    before = parameter._version
    step_apart(optimizer, [(optimizer.param_groups[0], parameter)], optimizer.state)
    assert parameter._version > before

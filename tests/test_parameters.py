"""Parameters as DTensors: round trips, optimizers, gradient norms and checkpoints equal those of whole tensors."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from placed import sliced
from pool import Pool
from shardwright.errors import UsageError
from shardwright.planner.placement import Dims, P, Placement, R, shape_of, split
from shardwright.planner.plan import MeshAxis
from shardwright.runtime import norms, parameters
from shardwright.runtime.mesh import Mesh
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Case:
    """A parameter on the mesh (dp, tp): factors, home on tp, ZeRO axes."""

    dims: Dims
    tp: Any = R
    zero: tuple[str, ...] = ()
    trainable: bool = True

    @property
    def home(self) -> Placement:
        return (R, self.tp)


S0, S1 = split(0), split(1)
CASES = [
    Case(((6,), (4,))),
    Case(((7,), (4,)), zero=("dp",)),
    Case(((50257,),), zero=("dp",)),
    Case(((1,), (3,)), zero=("dp",)),
    Case((), zero=("dp",)),
    Case(((10,), (4,)), S0),
    Case(((10,), (4,)), S0, ("dp",)),
    Case(((7,), (4,)), S1, ("dp",)),
    Case(((7,), (3, 4)), split(1, 1), ("dp",)),
    Case(((3, 4), (2,)), split(0, 1)),
    Case(((3, 4), (2,)), split(0, 1), ("dp",)),
    Case(((3, 2, 3),), split(0, 1), ("dp",)),
    Case(((2, 6),), split(0, 1), ("dp",)),
    Case(((9,), (2,)), R, ("tp",)),
    Case(((9,), (2,)), R, ("dp", "tp")),
    Case(((1,),), R, ("dp", "tp")),
    Case(((5,), (4,)), S1, ("dp",), trainable=False),
]


@functools.cache
def mesh2x2() -> Mesh:
    axes = [MeshAxis("dp", 2, "data", ""), MeshAxis("tp", 2, "model", "")]
    return Mesh.create(axes, torch.device("cpu"))


def values(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape_of(c.dims), generator=generator, dtype=torch.float64) for c in CASES]


def distributed(seed: int) -> list[nn.Parameter]:
    mesh = mesh2x2()
    return [
        parameters.distribute(v, c.dims, c.home, c.zero, mesh, c.trainable)
        for v, c in zip(values(seed), CASES, strict=True)
    ]


def own(value: Tensor, case: Case) -> Tensor:
    """This rank's slice, by index arithmetic and torch.chunk."""
    mesh = mesh2x2()
    part = sliced(value, case.dims, case.home, mesh.sizes, mesh.coordinate)
    for axis in ("tp", "dp"):
        if axis in case.zero and part.dim():
            cut = part.chunk(mesh.size(axis))
            part = cut[mesh.position(axis)] if mesh.position(axis) < len(cut) else part[:0]
    return part


def round_trip() -> None:
    for case, value, parameter in zip(CASES, values(1), distributed(1), strict=True):
        assert isinstance(parameter, nn.Parameter)
        assert isinstance(parameter, DTensor)
        assert parameter.shape == value.shape
        assert parameter.requires_grad == case.trainable
        with torch.no_grad():
            assert torch.equal(parameter.to_local(), own(value, case)), case
        assert torch.equal(parameters.full(parameter), value), case
        assert torch.equal(parameter.full_tensor().detach(), value), case
        mesh = mesh2x2()
        again = parameters.from_part(own(value, case).clone(), case.dims, case.home, case.zero, mesh, case.trainable)
        assert torch.equal(parameters.full(again), value), case
        other = parameters.distribute(value * 2, case.dims, case.home, case.zero, mesh)
        parameters.assign(again, other)
        assert torch.equal(parameters.full(again), value * 2), case
        parameters.assign(again, value)
        assert torch.equal(parameters.full(again), value), case
        portable = parameters.portable(parameter)
        assert torch.equal(parameters.full(portable), value), case


def test_round_trips(ranks4: Pool) -> None:
    ranks4.run(round_trip)


def local_gradient() -> None:
    for case, value, parameter in zip(CASES, values(1), distributed(1), strict=True):
        part = parameters.local(parameter)
        with torch.no_grad():
            assert part.data_ptr() == parameter.to_local().data_ptr()
        if not case.trainable:
            assert not part.requires_grad
            continue
        for _ in range(2):
            parameters.local(parameter).square().sum().backward()
        assert parameter.grad.placements == parameter.placements
        assert torch.allclose(parameters.full(parameter.grad), 4 * value), case


def test_gradients_arrive_as_dtensors(ranks4: Pool) -> None:
    ranks4.run(local_gradient)


def element_wise() -> None:
    """Ops on slices, and those that need DTensor's own way, against ops on whole tensors."""
    mesh = mesh2x2()
    for case, u, v, a, b in zip(CASES, values(1), values(2), distributed(1), distributed(2), strict=True):
        x, y = a.detach(), b.detach()
        made = [
            (x.mul(y), u * v),
            (x.clone().addcmul_(y, y, value=0.5).lerp_(y, 0.1), u.addcmul(v, v, value=0.5).lerp(v, 0.1)),
        ]
        for found, expected in [*made, (x.square().sqrt().add_(2.0), u.abs() + 2.0), (torch.zeros_like(x), u * 0)]:
            assert type(found) is type(x)
            assert found.placements == x.placements
            assert torch.allclose(parameters.full(found), expected), case
        assert x.gt(0).dtype == torch.bool
        assert torch.equal(x.gt(0).to_local(), own(u > 0, case))
        assert torch.zeros_like(x, dtype=torch.float32).to_local().dtype == torch.float32
    case, u, v = CASES[5], values(1)[5], values(2)[5]
    split_one, whole = (
        parameters.distribute(t, case.dims, home, (), mesh).detach() for t, home in ((u, case.home), (v, (R, R)))
    )
    assert torch.allclose((split_one * whole).full_tensor(), u * v)  # placed otherwise: fitted first


def test_element_wise_ops_go_to_slices(ranks4: Pool) -> None:
    ranks4.run(element_wise)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
}


def trained(name: str, foreach: bool | None) -> None:
    mine = distributed(1)
    whole = [nn.Parameter(v, requires_grad=c.trainable) for v, c in zip(values(1), CASES, strict=True)]
    targets = values(2)
    optimizers = [OPTIMIZERS[name]([p for p in ps if p.requires_grad]) for ps in (mine, whole)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for case, parameter, reference, target in zip(CASES, mine, whole, targets, strict=True):
            if case.trainable:
                (parameters.local(parameter) - own(target, case)).square().sum().backward()
                (reference - target).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(mine, 5.0, foreach=foreach)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        wanted = nn.utils.clip_grad_norm_(whole, 5.0, foreach=foreach)
        assert torch.allclose(norm, wanted, atol=1e-12), (norm, wanted)
        for optimizer in optimizers:
            optimizer.step()
    for case, parameter, reference in zip(CASES, mine, whole, strict=True):
        assert torch.allclose(parameters.full(parameter), reference.detach(), atol=1e-12), case


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_gradient_norm(ranks4: Pool, name: str) -> None:
    ranks4.run(trained, name, None)


def test_gradient_norm_without_foreach(ranks4: Pool) -> None:
    ranks4.run(trained, "sgd", False)


def other_norms() -> None:
    mine = distributed(1)
    for case, parameter in zip(CASES, mine, strict=True):
        if case.trainable:
            parameters.local(parameter).square().sum().backward()
    grads = [2 * v for v, c in zip(values(1), CASES, strict=True) if c.trainable]
    own = [p.grad for p in mine if p.grad is not None]
    for kind in (1.0, 2.0, 3.0, float("inf")):
        wanted = nn.utils.get_total_norm(grads, kind)
        assert torch.allclose(norms.total_norm(own, kind), wanted), kind
        if kind != float("inf"):  # torch raises on ranks with an empty shard there
            assert torch.allclose(nn.utils.get_total_norm(own, kind).full_tensor(), wanted), kind
    norms.clip_grad_norm_(mine, 1.0)
    assert torch.allclose(norms.total_norm(own), torch.ones((), dtype=torch.float64))


def test_other_norms(ranks4: Pool) -> None:
    ranks4.run(other_norms)


def checkpoint(folder: str) -> None:
    mine = distributed(1)
    dcp.save({str(i): parameters.portable(p) for i, p in enumerate(mine)}, checkpoint_id=folder)
    loaded = {str(i): torch.zeros_like(v) for i, v in enumerate(values(1))}
    dcp.load(loaded, checkpoint_id=folder)
    for i, value in enumerate(values(1)):
        assert torch.equal(loaded[str(i)], value), CASES[i]
    others = {str(i): parameters.portable(p) for i, p in enumerate(distributed(2))}
    dcp.load(others, checkpoint_id=folder)
    for i, (case, value, parameter) in enumerate(zip(CASES, values(1), distributed(2), strict=True)):
        parameters.assign(parameter, others[str(i)])
        assert torch.equal(parameters.full(parameter), value), case


def test_checkpoints(ranks4: Pool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks4.run(checkpoint, folder)


def loaded() -> None:
    """nn.Module.load_state_dict on DTensors, from whole values and from other placements."""
    holder = nn.ParameterList(distributed(1))
    own = holder.state_dict()
    whole = {str(i): v for i, v in enumerate(values(2))}
    holder.load_state_dict({k: parameters.like(own[k], v) for k, v in whole.items()})
    for k, v in whole.items():
        assert torch.equal(parameters.full(holder[int(k)]), v)
    other = {str(i): parameters.portable(p) for i, p in enumerate(distributed(3))}
    holder.load_state_dict({k: parameters.like(own[k], v) for k, v in other.items()})
    for k, v in enumerate(values(3)):
        assert torch.equal(parameters.full(holder[k]), v)
    assert all(parameters.is_distributed(p) for p in holder)
    with pytest.raises(UsageError, match="shape"):
        parameters.like(own["0"], torch.zeros(2, 2))


def test_load_state_dict(ranks4: Pool) -> None:
    ranks4.run(loaded)


def over_four_ranks() -> None:
    mesh = Mesh.create([MeshAxis("dp", 4, "data", "")], torch.device("cpu"))
    for shape in ((50257, 2), (5,), (2, 2), (4, 3), ()):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        parameter = parameters.distribute(value, tuple((n,) for n in shape), (R,), ("dp",), mesh)
        assert torch.equal(parameters.full(parameter), value)
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        parameters.local(parameter).square().sum().backward()
        optimizer.step()
        assert not torch.equal(parameters.full(parameter), value)


def test_uneven_over_four_ranks(ranks4: Pool) -> None:
    ranks4.run(over_four_ranks)


def refusals() -> list[str]:
    mesh = mesh2x2()
    found = []
    for home, zero in [((R, S0), ("tp",)), ((R, P), ()), ((S0, S0), ("dp",)), ((R, split(0, 1)), ())]:
        with pytest.raises(UsageError) as raised:
            parameters.distribute(torch.zeros(6, 2), ((6,), (2,)), home, zero, mesh)
        found.append(str(raised.value))
    with pytest.raises(UsageError) as raised:
        parameters.distribute(torch.zeros(5, 2), ((5,), (2,)), (R, S0), (), mesh)
    return [*found, str(raised.value)]


def test_refusals_name_what_is_wrong(ranks4: Pool) -> None:
    messages = ranks4.run(refusals)[0]
    expected = ["cannot both split", "is R or a split", "cannot both split", "no factor", "does not divide 5"]
    for text, message in zip(expected, messages, strict=True):
        assert text in message


def test_alone_a_parameter_is_ordinary() -> None:
    mesh = Mesh.create([], torch.device("cpu"))
    value = torch.randn(3, 2)
    parameter = parameters.distribute(value, ((3,), (2,)), (), (), mesh)
    assert type(parameter) is nn.Parameter
    assert parameters.local(parameter) is parameter
    assert torch.equal(parameters.full(parameter), value)

"""Bucketed collectives of parameter groups against plain per-tensor arithmetic, and the memory promise of regathering."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from shardwright.errors import UsageError
from shardwright.planner.plan import MeshAxis
from shardwright.runtime import groups, regather
from shardwright.runtime.collectives import CommLedger
from shardwright.runtime.mesh import Mesh
from shardwright.runtime.torch_compat import StorageRef
from torch import Tensor

SHAPES = [(9, 3), (8,), (1, 5), (3, 2, 2), (4, 4)]


def mesh2x2() -> Mesh:
    axes = [MeshAxis("dp", 2, "data", ""), MeshAxis("tp", 2, "model", "")]
    return Mesh.create(axes, torch.device("cpu"))


def flat_mesh() -> Mesh:
    return Mesh.create([MeshAxis("dp", dist.get_world_size(), "data", "")], torch.device("cpu"))


def wholes(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator, dtype=dtype) for s in SHAPES]


def chunks(tensors: list[Tensor], n: int, position: int) -> list[Tensor]:
    """This rank's shards, cut by torch.chunk itself (which drops empty chunks)."""
    cut = [t.chunk(n) for t in tensors]
    return [c[position].clone() if position < len(c) else t[:0].clone() for c, t in zip(cut, tensors, strict=True)]


def nested(tensors: list[Tensor], mesh: Mesh, axes: tuple[str, ...]) -> list[Tensor]:
    """This rank's shards, cut over the axes one after the other."""
    for axis in axes:
        tensors = chunks(tensors, mesh.size(axis), mesh.position(axis))
    return tensors


def weights(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def loss_of(tensors: list[Tensor], rank: int) -> Tensor:
    return sum((t * t * w).sum() for t, w in zip(tensors, weights(rank), strict=True))


def expected_gradients(ranks: range) -> list[Tensor]:
    return [sum(2 * t * weights(r)[i] for r in ranks) for i, t in enumerate(wholes())]


def gathered(mesh: Mesh, axes: tuple[str, ...]) -> None:
    members, sizes = mesh.members(*axes), [mesh.size(a) for a in axes]
    group = mesh.group_name(*axes)
    ranks = range(dist.get_world_size())
    shards = [s.requires_grad_() for s in nested(wholes(), mesh, axes)]
    with CommLedger(mesh.axis_of_group()) as ledger:
        full = groups.gather(shards, [s[0] for s in SHAPES], members, group, sizes=sizes)
        for a, b in zip(full, wholes(), strict=True):
            assert torch.equal(a, b)
        loss_of(full, dist.get_rank()).backward()
    assert ledger.counts("forward") == {"all_gather": 1}
    assert ledger.counts("backward") == {"reduce_scatter": 1}
    assert {r.axis for r in ledger.records} == {"+".join(a.name for a in mesh.axes if a.name in axes)}
    for shard, grad in zip(shards, nested(expected_gradients(ranks), mesh, axes), strict=True):
        assert torch.allclose(shard.grad, grad, atol=1e-12)


def gather_over_one_axis() -> None:
    gathered(flat_mesh(), ("dp",))


def gather_over_two_axes() -> None:
    mesh = mesh2x2()
    gathered(mesh, ("dp", "tp"))
    mesh = mesh2x2()
    assert mesh.members("tp", "dp") == (0, 2, 1, 3)
    gathered(mesh, ("tp", "dp"))


def test_gather(ranks2: Pool, ranks4: Pool) -> None:
    ranks2.run(gather_over_one_axis)
    ranks4.run(gather_over_one_axis)


def test_gather_over_a_group_of_two_axes(ranks4: Pool) -> None:
    ranks4.run(gather_over_two_axes)


def attach_and_reduce() -> None:
    mesh = flat_mesh()
    n, position, group, rank = mesh.size("dp"), mesh.position("dp"), mesh.group_name("dp"), dist.get_rank()
    shards = [s.requires_grad_() for s in chunks(wholes(), n, position)]
    with CommLedger() as ledger:
        full = groups.attach(shards, wholes(), mesh.members("dp"), group)
        loss_of(full, rank).backward()
    assert ledger.counts() == {"reduce_scatter": 1}
    wanted = expected_gradients(range(n))
    for shard, grad in zip(shards, chunks(wanted, n, position), strict=True):
        assert torch.allclose(shard.grad, grad, atol=1e-12)
    tensors = [w.requires_grad_() for w in wholes()]
    with CommLedger() as ledger:
        same = groups.reduce(tensors, group)
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(same, tensors, strict=True))
        loss_of(same, rank).backward()
    assert ledger.counts() == {"all_reduce": 1}
    for tensor, grad in zip(tensors, wanted, strict=True):
        assert torch.allclose(tensor.grad, grad, atol=1e-12)


def test_attach_and_reduce(ranks2: Pool, ranks4: Pool) -> None:
    ranks2.run(attach_and_reduce)
    ranks4.run(attach_and_reduce)


def mixed_precision() -> None:
    mesh = flat_mesh()
    n, position, group = mesh.size("dp"), mesh.position("dp"), mesh.group_name("dp")
    shards = [s.requires_grad_() for s in chunks(wholes(torch.float32), n, position)]
    with CommLedger() as ledger:
        full = groups.gather(shards, [s[0] for s in SHAPES], mesh.members("dp"), group, torch.bfloat16, torch.float32)
        assert all(f.dtype == torch.bfloat16 for f in full)
        assert all(torch.equal(f, w.bfloat16()) for f, w in zip(full, wholes(torch.float32), strict=True))
        sum(f.sum() for f in full).backward()
    gather, scatter = ledger.records
    assert scatter.bytes == 2 * gather.bytes
    assert all(s.grad.dtype == torch.float32 and (s.grad == n).all() for s in shards)
    weight = wholes(torch.float32)[0].requires_grad_()
    (low,) = groups.reduce([weight], group, torch.bfloat16)
    assert low.dtype == torch.bfloat16
    low.sum().backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad == n).all()


def test_mixed_precision(ranks2: Pool) -> None:
    ranks2.run(mixed_precision)


def test_one_dtype_per_group() -> None:
    with pytest.raises(UsageError, match="one dtype"):
        groups.reduce([torch.zeros(2), torch.zeros(2, dtype=torch.float64)], "")


def test_alone_nothing_is_copied() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    (y,) = groups.gather([x], [3], [0], "", None, None, True)
    assert y.data_ptr() == x.data_ptr()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 2))


class Watch:
    """Counts gathered groups of which something is alive, by weak references to storages, whenever one is made."""

    def __init__(self) -> None:
        self.refs: list[list[StorageRef]] = []
        self.most = 0

    def alive(self) -> int:
        return sum(any(not r.expired() for r in group) for group in self.refs)

    def __enter__(self) -> Watch:
        self.original = groups.gather_wholes

        def watched(*args: object) -> list[Tensor]:
            found = self.original(*args)
            self.refs.append([StorageRef(x.untyped_storage()) for x in found])
            self.most = max(self.most, self.alive())
            return found

        groups.gather_wholes = watched
        return self

    def __exit__(self, *_: object) -> None:
        groups.gather_wholes = self.original


LAYERS, WIDTH = 5, 6


def layers() -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(LAYERS):
        yield [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((WIDTH, WIDTH), (WIDTH,))]


def network(x: Tensor, parameters: Iterator[list[Tensor]]) -> Tensor:
    for weight, bias in parameters:
        x = torch.tanh(torch.nn.functional.linear(x, weight, bias))
    return (x * x).sum()


def batch(rank: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def regathered(frozen: tuple[int, ...] = ()) -> None:
    mesh = flat_mesh()
    n, position, group = mesh.size("dp"), mesh.position("dp"), mesh.group_name("dp")
    shards = [[s.requires_grad_(i not in frozen) for s in chunks(p, n, position)] for i, p in enumerate(layers())]

    def gather_each() -> Iterator[list[Tensor]]:
        for own in shards:
            yield groups.gather(own, [WIDTH, WIDTH], mesh.members("dp"), group, None, None, True)

    with Watch() as watch, CommLedger() as ledger:
        manager = regather.Regather()
        with manager:
            loss = network(batch(dist.get_rank()), gather_each())
        assert watch.alive() == 0
        assert watch.most <= 2
        watch.most = 0
        loss.backward()
        # A trained group leaves when its gradients are scattered, before the next one is gathered.
        assert watch.most <= (2 if frozen else 1)
        assert watch.alive() == 0
    assert ledger.counts("forward") == {"all_gather": LAYERS}
    trained = LAYERS - len(frozen)
    # The first group's weight is used for no input gradient and its bias by nothing: it is not gathered again.
    assert ledger.counts("backward") == {"all_gather": LAYERS - 1, "reduce_scatter": trained}
    reference = [[p.requires_grad_() for p in layer] for layer in layers()]
    sum(network(batch(r), iter(reference)) for r in range(n)).backward()
    for i, (own, whole) in enumerate(zip(shards, reference, strict=True)):
        for shard, grad in zip(own, chunks([w.grad for w in whole], n, position), strict=True):
            assert shard.grad is None if i in frozen else torch.allclose(shard.grad, grad, atol=1e-12)


def test_regather_holds_at_most_two_groups(ranks4: Pool) -> None:
    ranks4.run(regathered)


def test_regather_of_frozen_groups(ranks4: Pool) -> None:
    ranks4.run(regathered, (1, 2, 3))


def stale_parameters() -> None:
    mesh = flat_mesh()
    n, position, group = mesh.size("dp"), mesh.position("dp"), mesh.group_name("dp")
    shard = chunks([torch.randn(4, 4)], n, position)[0].requires_grad_()
    x = torch.randn(2, 4, requires_grad=True)
    with regather.Regather():
        (whole,) = groups.gather([shard], [4], mesh.members("dp"), group, None, None, True)
        loss = (x @ whole).sum()
    with torch.no_grad():
        shard.mul_(2)
    with pytest.raises(UsageError, match="modified"):
        loss.backward()


def test_regather_refuses_changed_parameters(ranks2: Pool) -> None:
    ranks2.run(stale_parameters)


def with_a_scalar() -> None:
    mesh = flat_mesh()
    n, position, group = mesh.size("dp"), mesh.position("dp"), mesh.group_name("dp")
    scale = torch.tensor(2.0, requires_grad=True)
    shard = chunks([torch.arange(3.0)], n, position)[0].requires_grad_()
    whole, again = groups.gather([scale, shard], [1, 3], mesh.members("dp"), group)
    assert whole.shape == ()
    assert torch.equal(again, torch.arange(3.0))
    ((position + 1) * whole * again.sum()).backward()
    total = n * (n + 1) / 2
    assert scale.grad.item() == 3 * total
    assert (shard.grad == 2 * total).all()


def test_a_scalar_in_a_group_stays_whole(ranks4: Pool) -> None:
    ranks4.run(with_a_scalar)

"""Every transition, forward and gradient, against what the placements mean in a single process."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from placed import error, place
from pool import Pool
from shardwright.planner import placement as pl
from shardwright.planner.plan import MeshAxis
from shardwright.runtime import collectives, transitions
from shardwright.runtime.mesh import Mesh

DIMS = {
    "plain": ((8,), (3,)),
    "merged": ((4, 8),),
    "triple": ((3, 4, 8), (2,)),
    "two dims": ((4,), (3,), (4, 4)),
    "all": ((8, 4), (), (4,)),
}


def states(dims: pl.Dims, n: int) -> list[pl.State]:
    """Every state of a tensor with these factors over n ranks."""
    splits = [pl.split(d, f) for d, sizes in enumerate(dims) for f, size in enumerate(sizes) if size % n == 0]
    return [pl.R, pl.V, pl.P, *splits]


def mesh_of(*sizes: int) -> Mesh:
    names = ("dp", "tp") if len(sizes) == 2 else ("tp",)
    axes = [MeshAxis(name, n, "data" if name == "dp" else "model", "") for name, n in zip(names, sizes, strict=True)]
    return Mesh.create(axes, torch.device("cpu"))


def run_steps(x: torch.Tensor, dims: pl.Dims, steps: tuple[pl.Step, ...], mesh: Mesh) -> torch.Tensor:
    for step in steps:
        group = mesh.group_name(mesh.names[step.axis])
        x = transitions.transition(x, *transitions.emit_args(step, dims, mesh.sizes, mesh.coordinate, group))
    return x


def check(dims: pl.Dims, source: pl.Placement, target: pl.Placement, mesh: Mesh, steps=None) -> list[str]:
    """Problems of going from source to target: value, gradient."""
    generator = torch.Generator().manual_seed(1)
    value, grad = (torch.randn(pl.shape_of(dims), generator=generator, dtype=torch.float64) for _ in range(2))
    at = mesh.sizes, mesh.coordinate
    x = place(value, dims, source, *at).requires_grad_()
    steps = pl.steps(dims, source, target, mesh.sizes) if steps is None else steps
    y = run_steps(x, dims, steps, mesh)
    back = tuple(pl.dual(s) for s in target)
    y.backward(place(grad, dims, back, *at, seed=10))
    worst = error(y.detach(), value, dims, target, mesh.sizes)
    worst_grad = error(x.grad, grad, dims, tuple(pl.dual(s) for s in source), mesh.sizes)
    if max(worst, worst_grad) < 1e-12:
        return []
    names = [" ".join(map(str, p)) for p in (source, target)]
    return [f"{dims}: {names[0]} -> {names[1]}: value {worst:.1e}, gradient {worst_grad:.1e}"]


def sweep_single(dims: pl.Dims) -> list[str]:
    mesh = mesh_of(dist.get_world_size())
    problems = []
    for a, b in itertools.permutations(states(dims, mesh.sizes[0]), 2):
        if (a.kind, b.kind) in pl.TRANSITIONS:
            problems += check(dims, (a,), (b,), mesh, (pl.Step(0, a, b, (a,)),))
    return problems


def sweep_pairs(dims: pl.Dims, sizes: tuple[int, int], every: int) -> tuple[int, list[str]]:
    """Each `every`th ordered pair."""
    mesh = mesh_of(*sizes)
    problems, count = [], 0
    legal = []
    for candidate in itertools.product(*(states(dims, n) for n in sizes)):
        try:
            pl.local_dims(dims, candidate, sizes)
        except ValueError:
            continue
        legal.append(candidate)
    for source, target in itertools.islice(itertools.permutations(legal, 2), None, None, every):
        count += 1
        problems += check(dims, source, target, mesh)
    return count, problems


@pytest.mark.parametrize("kind", DIMS)
def test_every_row_of_the_table_on_two_ranks(ranks2: Pool, kind: str) -> None:
    for problems in ranks2.run(sweep_single, DIMS[kind]):
        assert problems == []


@pytest.mark.parametrize("kind", DIMS)
def test_every_row_of_the_table_on_four_ranks(ranks4: Pool, kind: str) -> None:
    for problems in ranks4.run(sweep_single, DIMS[kind]):
        assert problems == []


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.nightly)])
def test_ordered_pairs_on_a_2x2_mesh(ranks4: Pool, every: int) -> None:
    """Six and the 35 targets of a source have no common factor: in turn all targets are met."""
    for count, problems in ranks4.run(sweep_pairs, ((4, 4), (4,)), (2, 2), every):
        assert problems == []
        assert count == 36 * 35 // every


def not_differentiable() -> None:
    mesh = mesh_of(dist.get_world_size())
    n, index = mesh.sizes[0], mesh.coordinate[0]

    def go(x: torch.Tensor, a: str, b: str) -> torch.Tensor:
        return transitions.transition(x, a, b, [1, 1], n, index, mesh.group_name("tp"))

    whole = torch.arange(8)
    mine = go(whole, "R", "S(0)")
    assert mine.tolist() == whole.chunk(n)[index].tolist()
    for a, b in (("S(0)", "R"), ("S(0)", "V")):
        assert go(mine, a, b).tolist() == whole.tolist()
    assert go(go(whole, "R", "P"), "P", "R").tolist() == whole.tolist()
    assert go(go(mine, "S(0)", "P"), "P", "S(0)").tolist() == mine.tolist()
    mask = whole % 3 == 0
    for dtype in (torch.bool, torch.float16, torch.bfloat16, torch.int32):
        part = go(mask.to(dtype), "R", "S(0)")
        assert torch.equal(go(part, "S(0)", "R"), mask.to(dtype))
        padded = go(part, "S(0)", "P")
        assert padded.dtype == dtype
        assert torch.equal(go(padded, "P", "R"), mask.to(dtype))
        assert torch.equal(go(padded, "P", "S(0)"), part)


def test_tensors_without_gradient(ranks2: Pool, ranks4: Pool) -> None:
    ranks2.run(not_differentiable)
    ranks4.run(not_differentiable)


def local_rows_do_not_copy() -> None:
    mesh = mesh_of(dist.get_world_size())
    for a, b in (("R", "V"), ("V", "R")):
        x = torch.randn(4, requires_grad=True)
        y = transitions.transition(x, a, b, [1, 1], mesh.sizes[0], mesh.coordinate[0], mesh.group_name("tp"))
        assert y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_local_rows_do_not_copy(ranks2: Pool) -> None:
    ranks2.run(local_rows_do_not_copy)


def counted() -> tuple[list[collectives.Record], list[collectives.Record]]:
    mesh = mesh_of(dist.get_world_size())
    n, index, group = mesh.sizes[0], mesh.coordinate[0], mesh.group_name("tp")
    x = torch.randn(4, 2, requires_grad=True)
    outside = collectives.CommLedger()
    with collectives.CommLedger(mesh.axis_of_group()) as ledger:
        y = transitions.transition(x, "S(0)", "V", [1, 1], n, index, group)
        z = transitions.transition(y, "V", "S(0)", [1, 1], n, index, group)
    z.sum().backward()
    assert outside.records == []
    return ledger.records, outside.records


def test_ledger_records_both_phases(ranks2: Pool) -> None:
    records, _ = ranks2.run(counted)[0]
    full = 2 * 4 * 2 * 4
    assert records == [
        collectives.Record("all_gather", "tp", full, "forward"),
        collectives.Record("reduce_scatter", "tp", full, "backward"),
    ]


def compiled() -> None:
    mesh = mesh_of(dist.get_world_size())
    n, index, group = mesh.sizes[0], mesh.coordinate[0], mesh.group_name("tp")

    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        full = transitions.transition(w, "S(1)", "V", [1, 1], n, index, group)
        y = transitions.transition(x @ full, "S(0)", "S(1)", [1, 1], n, index, group)
        return transitions.transition((y * y).sum(), "P", "R", [1, 1], n, index, group)

    torch.manual_seed(index)
    x, w = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    expected = forward(x, w)
    grads = torch.autograd.grad(expected, (x, w))
    again = torch.compile(forward, backend="aot_eager", fullgraph=True)(x, w)
    with collectives.CommLedger() as ledger:
        assert torch.equal(again, expected)
        for a, b in zip(torch.autograd.grad(again, (x, w)), grads, strict=True):
            assert torch.equal(a, b)
    assert ledger.records == []


def test_compiled_equals_eager(ranks2: Pool) -> None:
    ranks2.run(compiled)


def test_alone_without_a_process_group() -> None:
    mesh = mesh_of(1)
    x = torch.randn(4, requires_grad=True)
    y = transitions.transition(x, "P", "S(0)", [1, 1], 1, 0, mesh.group_name("tp"))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(4))
    assert mesh.device_mesh is None


def test_a_wrong_world_size_says_how_to_launch() -> None:
    from shardwright.errors import LaunchError

    with pytest.raises(LaunchError, match="torchrun --nproc-per-node 4"):
        mesh_of(2, 2)

"""`compile=True`: the lowered body through torch.compile and Inductor gives the loss and gradients of the eager one."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
import torch
from pool import Pool
from running import parallel, plan_of
from shardwright.planner.plan import Plan
from shardwright.runtime import parameters, torch_compat
from shardwright.runtime.losses import loss_of
from torch import Tensor
from torch._dynamo.utils import counters


def step(name: str, plan: Plan, compile: bool) -> tuple[Tensor, dict[str, Tensor], Counter[str]]:
    """Loss, whole gradients, and the collectives and products of matrices seen by the profiler, of a second step."""
    torch.manual_seed(3)
    case, pm = parallel(name, plan, compile=compile)
    loss_of(pm(*case.args, **case.kwargs)).backward()
    pm.zero_grad()
    with torch.profiler.profile() as profile:
        loss = loss_of(pm(*case.args, **case.kwargs))
        loss.backward()
    names = [e.name for e in profile.events()]
    seen = Counter(name.partition("::")[2] for name in names if name.startswith("_c10d_functional::"))
    seen["products"] = sum(name in ("aten::mm", "aten::addmm", "aten::bmm") for name in names)
    return loss.detach(), {n: parameters.full(p.grad) for n, p in pm.named_parameters()}, seen


def compared(name: str, plan: Plan) -> tuple[Counter[str], Counter[str]]:
    """Rank function: compiled against eager, dropout included; returns the collectives of both."""
    torch._dynamo.reset()
    counters.clear()
    loss, gradients, seen = step(name, plan, True)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    wanted, eager, plain = step(name, plan, False)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    for key, value in eager.items():
        torch.testing.assert_close(
            gradients[key], value, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )
    return seen, plain


def count(seen: Counter[str], kind: str) -> int:
    """Calls of a collective, however it is written: in place, into given memory, or of several tensors at once."""
    return sum(seen[kind + form] for form in ("", "_", "_out", "_coalesced"))


def test_one_process() -> None:
    compared("llama-1", plan_of("llama-1", "dtype=fp32", 1))


@pytest.mark.nightly
def test_recompute_by_tags() -> None:
    """A compiled step runs again what the plan says, also where the same graph was compiled without before."""
    plan = plan_of("llama-1", "recompute=full dtype=fp32", 1)
    regions = tuple(msgspec.structs.replace(region, recompute=()) for region in plan.regions)
    kept, _ = compared("llama-1", msgspec.structs.replace(plan, regions=regions))
    found, _ = compared("llama-1", plan)
    assert found["products"] >= kept["products"] + 3


@pytest.mark.parametrize(
    ("name", "pins"),
    [pytest.param("gpt2-dropout", "dp=2 micro_batch=2", marks=pytest.mark.nightly), ("llama-1", "dp=2 zero=3")],
)
def test_two_ranks(name: str, pins: str, ranks2: Pool) -> None:
    wanted = "all_gather_into_tensor" if "zero=3" in pins else "all_reduce"
    for compiled, eager in ranks2.run(compared, name, plan_of(name, f"{pins} dtype=fp32", 2)):
        assert count(eager, wanted) > 0
        # The gathers of ZeRO-3 run again in backward, compiled as eager.
        for kind in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            assert count(compiled, kind) == count(eager, kind), (kind, compiled, eager)


@pytest.mark.parametrize(
    ("name", "pins", "world"),
    [
        ("llama", "pp=2 schedule=1f1b micro_batch=4", 2),
        pytest.param("gpt2", "pp=2 schedule=gpipe micro_batch=2 recompute=full", 2, marks=pytest.mark.nightly),
        pytest.param("llama", "pp=2 dp=2 zero=3 schedule=1f1b micro_batch=2", 4, marks=pytest.mark.nightly),
        pytest.param("t5", "pp=2 tp=2 schedule=1f1b micro_batch=4", 4, marks=pytest.mark.nightly),
        pytest.param("llama-deep", "pp=2 vpp=2 schedule=interleaved micro_batch=2", 2, marks=pytest.mark.nightly),
    ],
)
def test_stages(name: str, pins: str, world: int, pools: dict[int, Pool]) -> None:
    """Every stage of a pipeline is a graph of its own; their collectives are those of the eager stages."""
    for compiled, eager in pools[world].run(compared, name, plan_of(name, f"{pins} dtype=fp32", world)):
        for kind in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            assert count(compiled, kind) == count(eager, kind), (kind, compiled, eager)


def test_cached_code_is_that_of_the_ops_as_they_are() -> None:
    """Torch's cache of compiled graphs knows composite ops by name only: another definition must not get the old one's code."""
    doubled = torch.library.Library("shardwright", "FRAGMENT")
    doubled.define("cached_or_not(Tensor x) -> Tensor")
    found = []
    for version, factor in (("a", 2), ("b", 3), ("a", 2)):
        torch._dynamo.reset()
        op = torch.library.Library("shardwright", "IMPL")
        op.impl("cached_or_not", lambda x, factor=factor: x * factor + 0.5, "CompositeImplicitAutograd")
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(torch.ops.shardwright.cached_or_not.default, (x,)),))
        run = torch_compat.compiled(torch.fx.GraphModule({}, graph), tagged=False, made_by=version)
        result = run(torch.ones(3, requires_grad=True))[0]
        result.sum().backward()  # what is cached is saved with the backward pass
        found.append(result.tolist()[0])
        op._destroy()
    assert found == [2.5, 3.5, 2.5]

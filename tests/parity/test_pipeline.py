"""Plans with pipeline stages against the user's eager module: loss, gradients and parameters after three steps."""

from __future__ import annotations

import math

import msgspec
import pytest
from counting import Products
from pool import Pool, RankError
from running import differences, parallel, plan_of
from shardwright.planner.plan import Plan
from shardwright.runtime.losses import loss_of
from shardwright.runtime.mesh import rank_grid

CLUSTER = "a100-sxm-80gb"
KEPT = "recompute=none offload=none"


def staged_plan(name: str, pins: str, world: int, batch: int = 8) -> Plan:
    """A plan of the joint search for a named cluster; it keeps everything unless the pins say otherwise."""
    pins = pins if "recompute=" in pins else f"{pins} {KEPT}"
    return plan_of(name, pins, world, batch, device=CLUSTER, runnable=False)


def ranks_of(pins: str) -> int:
    """Product of the pinned axes."""
    return math.prod(int(pin[3:]) for pin in pins.split() if pin[:3] in ("pp=", "dp=", "tp=", "cp="))


SAMPLE = [
    ("gpt2", "pp=2 schedule=1f1b micro_batch=2"), ("llama", "pp=2 schedule=gpipe micro_batch=4"),
    ("llama", "pp=2 dp=2 zero=1 schedule=1f1b micro_batch=1"), ("gpt2", "pp=2 dp=2 zero=2 schedule=1f1b micro_batch=1"),
    ("tied", "pp=2 dp=2 zero=3 schedule=1f1b micro_batch=2"), ("gpt2", "pp=2 tp=2 schedule=1f1b micro_batch=2"),
    ("t5", "pp=2 schedule=1f1b micro_batch=4"), ("gpt2", "pp=2 schedule=zb-h1 micro_batch=2"),
    ("llama-deep", "pp=2 vpp=2 schedule=zbv micro_batch=2"),
]  # fmt: skip
"""(case, pins) run every time."""

MORE = [
    ("llama-deep", "pp=2 vpp=2 schedule=interleaved micro_batch=2"), ("llama-deep", "pp=4 schedule=1f1b micro_batch=1"),
    ("unet", "pp=2 dp=2 zero=1 schedule=1f1b micro_batch=2"),
    ("gpt2", "pp=2 dp=2 zero=0 schedule=gpipe micro_batch=2"),
    ("llama", "pp=2 tp=2 sequence_parallel=on schedule=1f1b micro_batch=2"),
    ("albert", "pp=2 schedule=1f1b micro_batch=2"), ("bart", "pp=2 dp=2 zero=3 schedule=1f1b micro_batch=1"),
    ("gpt2-deep", "pp=4 schedule=gpipe micro_batch=2"), ("vit", "pp=2 schedule=1f1b micro_batch=8"),
    ("gpt2-deep", "pp=2 dp=2 vpp=2 zero=1 schedule=interleaved micro_batch=1"),
    ("adapter", "pp=2 schedule=1f1b micro_batch=2"), ("llama", "pp=2 schedule=1f1b micro_batch=2 dtype=fp32"),
    ("bert", "pp=2 dp=2 zero=2 schedule=1f1b micro_batch=2 dtype=bf16"), ("unet-deep", "pp=4 schedule=gpipe micro_batch=4"),
    ("unet-deep", "pp=2 vpp=2 schedule=interleaved micro_batch=4"), ("mixtral", "pp=2 tp=2 schedule=1f1b micro_batch=4"),
]  # fmt: skip

SPLIT = [
    ("mixtral", "pp=2 schedule=zb-h1 micro_batch=2"), ("t5", "pp=2 schedule=zb-h1 micro_batch=2"),
    ("tied", "pp=2 dp=2 zero=3 schedule=zb-h1 micro_batch=1"), ("unet", "pp=2 schedule=zb-h1 micro_batch=2"),
    ("gpt2-deep", "pp=2 vpp=2 schedule=dualpipev micro_batch=2"), ("gpt2", "pp=2 tp=2 schedule=zb-h1 micro_batch=2"),
    ("llama", "pp=2 tp=2 sequence_parallel=on schedule=zb-h1 micro_batch=2"),
    ("gpt2", "pp=2 dp=2 zero=2 schedule=zb-h1 micro_batch=1"), ("gpt2", "pp=2 dp=2 zero=1 schedule=zb-h1 micro_batch=1"),
    ("llama-deep", "pp=2 dp=2 vpp=2 zero=3 schedule=zbv micro_batch=1"),
    ("gpt2-deep", "pp=2 dp=2 vpp=2 zero=3 schedule=dualpipev micro_batch=1"),
    ("unet-deep", "pp=2 vpp=2 schedule=zbv micro_batch=2"), ("unet-deep", "pp=4 schedule=zb-h1 micro_batch=2"),
    ("gpt2-deep", "pp=2 vpp=2 schedule=zb-h1 micro_batch=2"), ("llama-deep", "pp=4 schedule=zb-h1 micro_batch=1"),
    ("mixtral", "pp=2 tp=2 schedule=zb-h1 micro_batch=4"), ("mixtral", "pp=2 dp=2 ep=2 schedule=zb-h1 micro_batch=1"),
    ("adapter", "pp=2 schedule=zb-h1 micro_batch=2"),
    ("albert", "pp=2 schedule=zb-h1 micro_batch=2"), ("vit", "pp=2 schedule=zb-h1 micro_batch=2"),
    ("bert", "pp=2 dp=2 zero=2 schedule=zb-h1 micro_batch=2 dtype=bf16"),
    ("llama", "pp=2 cp=2 schedule=zb-h1 micro_batch=2"),
    ("bart", "pp=2 dp=2 zero=3 schedule=zb-h1 micro_batch=1"),
]  # fmt: skip
"""Schedules that split the backward pass."""

AGAIN = [
    ("llama", "pp=2 schedule=zb-h1 micro_batch=2 recompute=full offload=none"),
    ("gpt2", "pp=2 dp=2 zero=3 schedule=zb-h1 micro_batch=1 recompute=full offload=none"),
    ("llama-deep", "pp=2 vpp=2 schedule=zbv micro_batch=2 recompute=selective offload=none"),
]  # fmt: skip
"""The same with activations made again."""


def check(name: str, pins: str, pools: dict[int, Pool]) -> Plan:
    world = ranks_of(pins)
    plan = staged_plan(name, pins, world)
    assert plan.pipeline.ranks > 1
    found = pools[world].run(differences, name, plan)
    assert all(answer == found[0] for answer in found)
    wrong = [d for d in found[0] if not d["ok"]]
    assert not wrong, (wrong, plan.pipeline)
    assert {(d["dtype"], d["kind"]) for d in found[0]} >= {
        ("float64", "loss"), ("float64", "gradient"), ("float64", "parameter after 3 steps"),
    }  # fmt: skip
    return plan


@pytest.mark.parametrize(("name", "pins"), SAMPLE)
def test_sample(name: str, pins: str, pools: dict[int, Pool]) -> None:
    check(name, pins, pools)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "pins"), [*MORE, *SPLIT, *AGAIN])
def test_more(name: str, pins: str, pools: dict[int, Pool]) -> None:
    check(name, pins, pools)


def products(name: str, plan: Plan) -> dict[object, int]:
    """Rank function: the products of matrices and convolutions of one step."""
    case, pm = parallel(name, plan)
    with Products() as seen:
        loss_of(pm(*case.args, **case.kwargs)).backward()
    return dict(seen.seen)


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("unet", "mixtral"))])
def test_a_split_backward_pass_runs_no_product_twice(name: str, ranks2: Pool) -> None:
    split = staged_plan(name, "pp=2 schedule=zb-h1 micro_batch=2", 2)
    whole = msgspec.structs.replace(split, pipeline=msgspec.structs.replace(split.pipeline, schedule="1f1b"))
    found = ranks2.run(products, name, split)
    assert found == ranks2.run(products, name, whole)
    assert all(sum(seen.values()) > 50 for seen in found)


def test_ranks_are_numbered_in_the_order_of_the_plan(ranks4: Pool) -> None:
    """The same plan with the pipeline inside the data axis."""
    plan = staged_plan("llama", "pp=2 dp=2 zero=3 schedule=1f1b micro_batch=2", 4)
    assert plan.pipeline.order == ("pp", "dp")
    turned = msgspec.structs.replace(plan, pipeline=msgspec.structs.replace(plan.pipeline, order=("dp", "pp")))
    assert rank_grid(plan.mesh, plan.pipeline).tolist() == [[0, 1], [2, 3]]
    assert rank_grid(turned.mesh, turned.pipeline).tolist() == [[0, 2], [1, 3]]
    found = ranks4.run(differences, "llama", turned)
    assert all(d["ok"] for d in found[0]), found[0]


def test_stages_elsewhere_than_the_schedule_runs_them_are_refused(ranks2: Pool) -> None:
    plan = staged_plan("llama", "pp=2 schedule=1f1b micro_batch=2", 2)
    stages = tuple(msgspec.structs.replace(stage, rank=1 - stage.rank) for stage in plan.stages)
    with pytest.raises(RankError, match=r"stages: on ranks \[1, 0\]; schedule 1f1b has them on \[0, 1\]"):
        ranks2.run(differences, "llama", msgspec.structs.replace(plan, stages=stages))

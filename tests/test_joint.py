"""The joint search end to end: plans as files, pins, certificates and interrupts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from jointplans import (
    SPEC,
    again,
    ask,
    attending,
    check,
    cluster,
    free,
    made,
    model,
    plan_with,
    replaced,
    ringed,
    sizes,
    zero_levels,
)
from shardwright.errors import PinError
from shardwright.planner.outline import Outline, Parameter, Region, Saved
from shardwright.planner.plan import Plan
from shardwright.planner.planfile import dump_plan, parse_plan
from shardwright.planner.prices import Prices
from shardwright.planner.progress import Event
from shardwright.planner.solve import solve
from solver_outlines import Builder, transformer

# -- plans as files


@pytest.mark.parametrize("which", ["model", "attending"])
@pytest.mark.parametrize("spec", [SPEC, "a100-sxm-80gb:4x2"])
def test_a_plan_goes_to_a_file_and_back(which: str, spec: str) -> None:
    plan = free(which, spec)
    text = dump_plan(plan)
    read = parse_plan(text)
    assert dump_plan(read) == text
    assert not read.edited
    assert replaced(read, digest="", cluster={}) == replaced(plan, digest="", cluster={})
    check(read, {"model": model, "attending": attending}[which]())


@pytest.mark.parametrize("pins", [(), ("pp=2", "zero=1"), ("tp=2", "recompute=selective")])
def test_two_searches_give_the_same_file(pins: tuple[str, ...]) -> None:
    outline = transformer(layers=6, batch=16, seq=512, hidden=512, heads=8, vocab=1024)
    assert dump_plan(made(*pins)) == dump_plan(plan_with(outline, *pins))


# -- pins

PINNED: dict[tuple[str, ...], Callable[[Plan], bool]] = {
    ("pp=2",): lambda p: p.pipeline.ranks == 2,
    ("pp=2", "vpp=2", "schedule=interleaved"): lambda p: (p.pipeline.chunks, p.pipeline.schedule) == (2, "interleaved"),
    ("pp=2", "schedule=gpipe", "micro_batch=1"): lambda p: p.pipeline.schedule == "gpipe",
    ("schedule=zb-h1",): lambda p: p.pipeline.ranks > 1 and p.pipeline.schedule == "zb-h1",
    ("schedule=zbv", "pp=2"): lambda p: p.pipeline.schedule == "zbv" and len(p.stages) == 4,
    ("recompute=full",): lambda p: all(r.policy == "full" for r in p.regions if r.repeats > 1),
    ("recompute=none",): lambda p: not any(r.recompute for r in p.regions),
    ("recompute=selective",): lambda p: any(r.recompute for r in p.regions),
    ("tp=2", "sequence_parallel=on"): lambda p: (
        sizes(p)["tp"] == 2 and all(r.exit == "S" for r in p.regions if r.repeats > 1)
    ),
    ("zero=3", "dp=8"): lambda p: zero_levels(p) == {3},
    ("zero=0",): lambda p: zero_levels(p) == {0},
    ("offload=optimizer",): lambda p: all("optimizer" in " ".join(r.offload) for r in p.regions if r.parameters),
    ("micro_batch=1",): lambda p: p.pipeline.micro_batch == 1,
    ("dp=2", "pp=2"): lambda p: sizes(p) == {"pp": 2, "dp": 2, "tp": 2},
    ("pp!=1", "schedule!=zb-h1"): lambda p: p.pipeline.ranks > 1 and p.pipeline.schedule != "zb-h1",
    ("pp!=2",): lambda p: p.pipeline.ranks != 2,
    ("zero!=1", "zero!=2"): lambda p: not zero_levels(p) & {1, 2},
    ("recompute!=none",): lambda p: any(r.recompute for r in p.regions),
}


@pytest.mark.parametrize("pins", PINNED, ids=" ".join)
def test_a_pinned_plan_has_what_was_pinned_and_is_no_faster_than_the_free_one(pins: tuple[str, ...]) -> None:
    plan, best = made(*pins), free()
    check(plan, model())
    assert plan.pins == pins
    assert PINNED[pins](plan), dump_plan(plan)
    assert best.search.bound_seconds <= plan.predicted.step_seconds * (1 + 1e-12)


def test_context_parallelism_can_be_pinned_where_attention_can_be_a_ring() -> None:
    plan = ringed()
    check(plan, attending())
    assert sizes(plan)["cp"] == 2
    assert free("attending").search.bound_seconds <= plan.predicted.step_seconds


@pytest.mark.parametrize(
    ("pins", "named"),
    [
        (("pp=3",), "pp=3 does not divide the 8 devices"),
        (("dp=3",), "dp=3 does not divide"),
        (("pp=2", "tp=8"), "pp=2 tp=8 needs 16 devices"),
        (("vpp=2", "schedule=1f1b"), "schedule=1f1b and vpp=2"),
        (("vpp=2", "schedule=1f1b", "pp=2"), "schedule=1f1b and vpp=2"),
        (("vpp=3", "schedule=zbv"), "schedule=zbv and vpp=3"),
        (("vpp=1", "schedule=interleaved"), "schedule=interleaved and vpp=1"),
        (("pp=8", "vpp=2"), "pp=8 x 2 chunks is more stages than the model has units"),
        (("pp=1", "schedule=zbv"), "schedule=zbv"),
        (("schedule=none", "pp=2"), "schedule=none"),
        (("pp=1", "vpp=2"), "vpp=2"),
        (("dp=8", "zero=3", "micro_batch=3"), "micro_batch=3"),
        (("tp=1", "sequence_parallel=on"), "sequence_parallel=on"),
        (("pp=8", "zero=3"), "zero=3"),
        (("ep=2",), "ep=2"),
        (("cp=2",), "cp=2"),
        (("pp=2", "pp!=2"), "pp=2 and pp!=2"),
        (("pp!=1", "pp!=2", "pp!=4", "pp!=8"), "pp!=1"),
    ],
    ids=" ".join,
)
def test_pins_that_cannot_be_are_named(pins: tuple[str, ...], named: str) -> None:
    with pytest.raises(PinError, match=re.escape(named)):
        plan_with(model(), *pins)


def test_positions_that_do_not_divide_are_named_with_the_pin() -> None:
    with pytest.raises(PinError, match="cp=2"):
        plan_with(attending(513), "cp=2")


# -- interrupts


class Stop:
    """Raises an interrupt at an event of the search that `when` picks."""

    def __init__(self, when: Callable[[Event], bool]) -> None:
        self.when = when

    def __call__(self, event: Event) -> None:
        if self.when(event):
            raise KeyboardInterrupt


def stopped(when: Callable[[Event], bool], limit: int | None = None) -> Plan:
    request = replace(ask(model(), limit=limit), progress=Stop(when))
    return solve(model(), cluster(), Prices(cluster(), "bfloat16"), request)


def test_an_interrupt_keeps_the_best_plan_so_far() -> None:
    plan = stopped(lambda e: e.phase == "solve" and e.best_seconds is not None)
    check(plan, model())
    assert plan.search.interrupted
    assert free().search.bound_seconds >= plan.search.bound_seconds * (1 - 1e-12)
    assert plan.search.bound_seconds <= free().predicted.step_seconds
    assert parse_plan(dump_plan(plan)).search.interrupted


@pytest.mark.parametrize("phase", ["front", "solve"])
def test_an_interrupt_before_any_plan_passes(phase: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped(lambda e: e.phase == phase)


def test_an_interrupt_while_nothing_fits_passes() -> None:
    events: list[Event] = []

    def late(event: Event) -> bool:
        events.append(event)
        return len([e for e in events if e.phase == "solve"]) > 3

    with pytest.raises(KeyboardInterrupt):
        stopped(late, limit=2**20)


# -- models whose layers differ


def uneven(widths: list[int], kinds: int) -> Outline:
    """Residual blocks of two linears; `kinds` 0 makes each its own region, else runs of equal widths are one."""
    make, b, s, h = Builder(), 16, 512, 512
    rows = {"b": {"size": b, "batch": True, "token": True}, "s": {"size": s, "token": True}}
    lead, both = [[b], [s]], (Saved("operand", 0), Saved("operand", 1))
    x = make.tensor("x", [*lead, [h]], "input", False)
    blocks: list[tuple[int, tuple[str, ...], tuple[str, ...]]] = []
    for k, f in enumerate(widths):
        start = len(make.ops)
        make.tensor(f"b{k}.up", [[f], [h]], "parameter")
        make.tensor(f"b{k}.down", [[h], [f]], "parameter")
        make.tensor(f"b{k}.y", [*lead, [f]])
        make.tensor(f"b{k}.z", [*lead, [h]])
        wide = rows | {"h": h, "f": f}
        make.op(f"b{k}.lin_up", "matmul", [(x, ["b", "s", "h"]), (f"b{k}.up", ["f", "h"])],
                [(f"b{k}.y", ["b", "s", "f"])], wide, projection=True, linear=((0,), (1,)), saved=both)  # fmt: skip
        make.op(f"b{k}.lin_down", "matmul", [(f"b{k}.y", ["b", "s", "f"]), (f"b{k}.down", ["h", "f"])],
                [(f"b{k}.z", ["b", "s", "h"])], wide, projection=True, linear=((0,), (1,)), saved=both)  # fmt: skip
        x = f"b{k}.z"
        blocks.append((f, tuple(op.name for op in make.ops[start:]), (f"b{k}.up", f"b{k}.down")))
    make.tensor("loss", [])
    make.op("sum", "reduction", [(x, ["b", "s", "h"])], [("loss", [])], rows | {"h": h}, linear=((0,),))
    regions: list[Region] = []
    for i, (f, ops, owned) in enumerate(blocks):
        if kinds and i and blocks[i - 1][0] == f:
            known = regions[-1]
            regions[-1] = Region(known.name, (*known.instances, ops), (*known.parameters, owned))
        else:
            regions.append(Region(f"r{len(regions)}", (ops,), (owned,)))
    regions.append(Region("end", (("sum",),), ((),)))
    found = tuple(Parameter((n,), n, True) for n, t in make.tensors.items() if t.role == "parameter")
    return Outline(make.tensors, tuple(make.ops), tuple(regions), found, ("x",), "loss", (), b, b * s, "uneven")


@pytest.mark.parametrize(
    ("widths", "kinds"), [([512, 1024, 2048, 4096, 768], 0), ([1024] * 3 + [4096] * 2, 2), ([1024] * 4 + [2048], 1)]
)
@pytest.mark.parametrize("pins", [("pp=2",), ("pp=2", "tp=2")], ids=" ".join)
def test_models_with_layers_that_differ(widths: list[int], kinds: int, pins: tuple[str, ...]) -> None:
    outline = uneven(widths, kinds)
    plan = plan_with(outline, *pins)
    check(plan, outline)
    assert again(plan, outline).predicted.step_seconds == pytest.approx(plan.predicted.step_seconds, rel=1e-9)

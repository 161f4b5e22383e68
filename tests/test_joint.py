"""The joint search end to end: plans as files, pins, certificates, edits, explanations and interrupts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import msgspec
import pytest
from attention_outlines import Form, decoder
from shardwright.errors import Infeasible, PinError, PlanError
from shardwright.planner.assign import assign
from shardwright.planner.cluster import Cluster, default_limit_bytes
from shardwright.planner.objectives import least_memory
from shardwright.planner.outline import Outline, Parameter, Region, Saved
from shardwright.planner.pins import parse_pins
from shardwright.planner.plan import Plan, Precision, Source, StagePlan
from shardwright.planner.plancheck import problems
from shardwright.planner.planfile import dump_plan, parse_plan
from shardwright.planner.prices import Prices
from shardwright.planner.progress import Event
from shardwright.planner.rebatch import rebatch
from shardwright.planner.solve import Request, reprice, solve
from shardwright.profiles.devices import parse_bytes, parse_cluster
from solver_outlines import Builder, transformer

BF16 = Precision("bf16-mixed", "bfloat16", "float32", "float32", "float32")
SPEC = "h100-sxm:8"


@cache
def cluster(spec: str = SPEC) -> Cluster:
    return parse_cluster(spec)


@cache
def model() -> Outline:
    return transformer(layers=6, batch=16, seq=512, hidden=512, heads=8, vocab=1024)


@cache
def attending(seq: int = 512) -> Outline:
    return decoder(Form(layers=4, batch=16, seq=seq, heads=8, width=64, vocab=1024))


def ask(outline: Outline, *pins: str, spec: str = SPEC, limit: int | None = None) -> Request:
    source = Source("module", "test", outline.batch)
    found = limit if limit is not None else default_limit_bytes(cluster(spec))
    return Request(source, "adamw", BF16, found, parse_pins(pins))


def plan_with(outline: Outline, *pins: str, spec: str = SPEC, limit: int | None = None) -> Plan:
    request = ask(outline, *pins, spec=spec, limit=limit)
    return solve(outline, cluster(spec), Prices(cluster(spec), "bfloat16"), request)


@cache
def free(which: str = "model", spec: str = SPEC) -> Plan:
    return plan_with({"model": model, "attending": attending}[which](), spec=spec)


@cache
def made(*pins: str) -> Plan:
    """The plan of `model()` under pins, made once for all tests that look at it."""
    return plan_with(model(), *pins) if pins else free()


@cache
def ringed() -> Plan:
    return plan_with(attending(), "cp=2")


def again(plan: Plan, outline: Outline, spec: str = SPEC) -> Plan:
    return reprice(plan, outline, cluster(spec), Prices(cluster(spec), "bfloat16"))


def units(outline: Outline) -> list[tuple[str, int]]:
    return [(region.name, k) for region in outline.regions for k in range(region.repeats)]


def check(plan: Plan, outline: Outline) -> None:
    """What holds for every plan of the joint search."""
    assert list(problems(plan)) == []
    assign(plan, outline)
    owner = {entry.name: entry.region or entry.name for entry in plan.regions}
    held = [(owner[run.use], k) for s in plan.stages for run in s.runs for k in range(run.first, run.first + run.count)]
    assert held == units(outline)
    assert plan.predicted.step_seconds > 0
    assert plan.search.bound_seconds <= plan.predicted.step_seconds
    seconds, bound = plan.predicted.step_seconds, plan.search.bound_seconds
    assert plan.search.gap == pytest.approx((seconds - bound) / seconds, abs=1e-12)
    assert all(0 < stage.peak_bytes <= plan.memory_limit_bytes for stage in plan.stages)
    assert max(s.peak_bytes for s in plan.stages) == pytest.approx(plan.predicted.peak_bytes_per_device, abs=16)
    best = min(r.step_seconds for r in plan.search.shapes if r.status == "solved" and r.step_seconds is not None)
    assert best == pytest.approx(seconds, rel=1e-9)


def sizes(plan: Plan) -> dict[str, int]:
    return {"pp": plan.pipeline.ranks, **{axis.name: axis.size for axis in plan.mesh}}


def zero_levels(plan: Plan) -> set[int]:
    return {p.zero for region in plan.regions for p in region.parameters}


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


# -- edited plans


def moved(plan: Plan) -> Plan:
    """The first border moved by one instance of the region that lies on both sides of it."""
    one, two = plan.stages[:2]
    last, first = one.runs[-1], two.runs[0]
    assert last.use == first.use
    if last.count > 1:
        runs = (*one.runs[:-1], replaced(last, count=last.count - 1))
        others = (replaced(first, first=first.first - 1, count=first.count + 1), *two.runs[1:])
    else:
        runs = (*one.runs[:-1], replaced(last, count=last.count + 1))
        others = (replaced(first, first=first.first + 1, count=first.count - 1), *two.runs[1:])
    return replaced(plan, stages=(replaced(one, runs=runs), replaced(two, runs=others), *plan.stages[2:]))


def replaced(struct, **fields):
    return msgspec.structs.replace(struct, **fields)


@pytest.mark.parametrize(
    "pins",
    [
        (), ("pp=2", "vpp=2", "schedule=interleaved"), ("tp=2", "sequence_parallel=on"), ("zero=3",),
        ("recompute=full",), ("recompute=selective", "tp=2"), ("offload=optimizer",), ("offload=activations",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_an_unchanged_plan_is_priced_as_it_was(pins: tuple[str, ...]) -> None:
    plan = parse_plan(dump_plan(made(*pins)))
    same = again(plan, model())
    assert same.edited
    assert same.predicted.step_seconds == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    assert same.predicted.peak_bytes_per_device == pytest.approx(plan.predicted.peak_bytes_per_device, rel=1e-9)
    assert same.stages == plan.stages
    assert (same.search.bound_seconds, same.search.gap) == (0.0, 1.0)
    check_file = parse_plan(dump_plan(same))
    assert check_file.edited


def test_context_plans_are_priced_again() -> None:
    plan = ringed()
    same = again(plan, attending())
    assert same.predicted.step_seconds == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    assert same.predicted.peak_bytes_per_device == pytest.approx(plan.predicted.peak_bytes_per_device, rel=1e-9)


@cache
def two_stages() -> Plan:
    return plan_with(model(), "pp=2", "dp=4", "recompute=full", "zero=1", "schedule=1f1b", "micro_batch=1")


def test_a_moved_border_is_priced() -> None:
    plan = again(moved(two_stages()), model())
    assert plan.edited
    assert plan.predicted.step_seconds > two_stages().predicted.step_seconds
    assert plan.stages[0].forward_seconds != two_stages().stages[0].forward_seconds
    assign(plan, model())


def test_recompute_taken_out_is_faster_and_larger() -> None:
    regions = tuple(replaced(r, recompute=()) for r in two_stages().regions)
    plan = again(replaced(two_stages(), regions=regions), model())
    assert plan.predicted.step_seconds < two_stages().predicted.step_seconds
    assert plan.predicted.peak_bytes_per_device > two_stages().predicted.peak_bytes_per_device


def test_an_edit_above_the_limit_is_refused() -> None:
    peak = two_stages().predicted.peak_bytes_per_device
    regions = tuple(replaced(r, recompute=()) for r in two_stages().regions)
    with pytest.raises(Infeasible, match="the edited plan needs"):
        again(replaced(two_stages(), regions=regions, memory_limit_bytes=peak), model())


def _stage(plan: Plan, s: int, **fields: object) -> tuple[StagePlan, ...]:
    return tuple(replaced(stage, **fields) if i == s else stage for i, stage in enumerate(plan.stages))


def _layers(plan: Plan, **fields: object) -> Plan:
    return replaced(plan, regions=tuple(replaced(r, **fields) if r.repeats > 1 else r for r in plan.regions))


def _first_op(plan: Plan, choice: tuple[str, ...]) -> Plan:
    ops = next(r.ops for r in plan.regions if r.repeats > 1)
    return _layers(plan, ops=(replaced(ops[0], choice=choice), *ops[1:]))


def _first_parameter(plan: Plan, **fields: object) -> Plan:
    parameters = next(r.parameters for r in plan.regions if r.repeats > 1)
    return _layers(plan, parameters=(replaced(parameters[0], **fields), *parameters[1:]))


ILLEGAL: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "an op is not there": (lambda p: _layers(p, recompute=("l0.nothing",)), "l0.nothing"),
    "a copy is not there": (lambda p: _layers(p, recompute=("l0.nothing -> R",)), "l0.nothing"),
    "no such choice": (lambda p: _first_op(p, ("zz",) * len(p.mesh)), "l0.norm_n1"),
    "data axis whole": (lambda p: _first_op(p, ("R",) * len(p.mesh)), "l0.norm_n1"),
    "home": (lambda p: _first_parameter(p, home=("S(0)",) * len(p.mesh)), "l0.n1"),
    "zero": (lambda p: _first_parameter(p, zero=0, zero_axes=()), "l0.n1"),
    "offload": (lambda p: _layers(p, offload=("nowhere",)), "region r1"),
    "entry": (lambda p: _layers(p, entry="X"), "region r1"),
    "region": (lambda p: replaced(p, regions=(replaced(p.regions[0], name="other"), *p.regions[1:])), "other|r0"),
    "schedule": (lambda p: replaced(p, pipeline=replaced(p.pipeline, schedule="zbv")), "pipeline.schedule"),
    "no schedule": (lambda p: replaced(p, pipeline=replaced(p.pipeline, schedule="none")), "pipeline.schedule"),
    "chunks": (lambda p: replaced(p, pipeline=replaced(p.pipeline, chunks=2)), "pipeline.stages"),
    "microbatches": (lambda p: replaced(p, pipeline=replaced(p.pipeline, microbatches=3)), "pipeline: 3 microbatches"),
    "rank": (lambda p: replaced(p, stages=_stage(p, 1, rank=0)), r"stages\[1\].rank"),
    "twice": (lambda p: replaced(p, stages=(p.stages[0], p.stages[0])), "stages"),
    "order": (lambda p: replaced(p, stages=_stage(p, 0, runs=p.stages[0].runs[::-1])), r"stages\[0\]"),
    "axis order": (lambda p: replaced(p, pipeline=replaced(p.pipeline, order=("xx",))), "order"),
}


@pytest.mark.parametrize("edit", ILLEGAL)
def test_an_illegal_edit_names_its_place(edit: str) -> None:
    change, named = ILLEGAL[edit]
    with pytest.raises(PlanError, match=named):
        again(change(two_stages()), model())


# -- nothing fits


@cache
def small() -> Outline:
    return transformer(layers=3, batch=4, seq=512, hidden=512, heads=8, vocab=1024)


def test_the_memory_that_is_named_suffices() -> None:
    with pytest.raises(Infeasible, match="nothing fits in") as error:
        plan_with(small(), limit=2**20, spec="h100-sxm:2")
    named = [re.search(r"devices with (\d+[MG]iB)", text) for text in error.value.nearest]
    limit = next(parse_bytes(found[1]) for found in named if found)
    check(plan_with(small(), limit=limit, spec="h100-sxm:2"), small())


def test_the_memory_that_is_named_suffices_beside_a_small_host() -> None:
    found = cluster("h100-sxm:2")
    assert found.host is not None
    found = replace(found, host=replace(found.host, host_bytes=2**21))
    request, prices = ask(small(), spec="h100-sxm:2", limit=2**20), Prices(found, "bfloat16")
    with pytest.raises(Infeasible) as error:
        solve(small(), found, prices, request)
    named = [re.search(r"devices with (\d+[MG]iB)", text) for text in error.value.nearest]
    limit = next(parse_bytes(size[1]) for size in named if size)
    check(solve(small(), found, prices, replace(request, memory_limit_bytes=limit)), small())


def test_an_edit_that_overfills_the_host_is_refused() -> None:
    plan, found = plan_with(small(), "offload=optimizer", spec="h100-sxm:2"), cluster("h100-sxm:2")
    assert found.host is not None
    tiny = replace(found, host=replace(found.host, host_bytes=2**10))
    with pytest.raises(Infeasible, match="host memory"):
        reprice(plan, small(), tiny, Prices(tiny, "bfloat16"))


def test_the_pins_and_batch_that_are_named_are_in_the_way() -> None:
    spec, pins = "h100-sxm:2", ("zero=0", "dp=2", "micro_batch=2", "recompute=none", "offload=none")
    prices = Prices(cluster(spec), "bfloat16")
    least = least_memory(small(), cluster(spec), prices, ask(small(), *pins[1:], spec=spec))
    assert least is not None
    limit = least.predicted.peak_bytes_per_device
    with pytest.raises(Infeasible) as error:
        plan_with(small(), *pins, limit=limit, spec=spec)
    without = [text.removeprefix("without --pin ") for text in error.value.nearest if text.startswith("without")]
    assert "zero=0" in without
    for pin in without:
        check(plan_with(small(), *(p for p in pins if p != pin), limit=limit, spec=spec), small())
    for text in error.value.nearest:
        if text.startswith("--batch"):
            fewer = rebatch(small(), int(text.split()[1]))
            check(plan_with(fewer, *pins, limit=limit, spec=spec), fewer)


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

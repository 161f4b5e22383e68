"""Host memory and disk in the joint search: offered always, used where they pay, inside the bound."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from jointplans import ask, check, cluster, plan_with
from rich.console import Console
from shardwright.cli.figures import behind_texts, bytes_text
from shardwright.cli.report.build import build
from shardwright.cli.tables import plan_tables
from shardwright.planner.joint import JointSearch
from shardwright.planner.objectives import least_memory
from shardwright.planner.plan import Plan
from shardwright.planner.prices import Prices
from shardwright.planner.progress import silent
from shardwright.planner.shapes import Arrangement
from shardwright.planner.solve import make_bench
from shardwright.planner.stages import StageSolve
from solver_outlines import transformer


def printed(plan: Plan) -> str:
    """The tables of a plan as text."""
    console = Console(width=120, markup=False, highlight=False, emoji=False)
    with console.capture() as caught:
        console.print(plan_tables(plan))
    return caught.get()


def test_the_host_is_used_where_it_pays() -> None:
    """Memory for a plan that runs nearly everything again, on devices that compute long enough: the host does better."""
    spec = "h100-sxm:2"
    outline = transformer(layers=2, batch=256, seq=1024, hidden=1024, heads=16, vocab=1024)
    roomy = plan_with(outline, spec=spec)
    prices, asked = Prices(cluster(spec), "bfloat16"), ask(outline, "offload=none", spec=spec)
    least = least_memory(outline, cluster(spec), prices, asked)
    assert least is not None
    limit = round(1.05 * least.predicted.peak_bytes_per_device)
    free, without = (plan_with(outline, *pins, spec=spec, limit=limit) for pins in ((), ("offload=none",)))
    check(free, outline)
    assert any(r.offload for r in free.regions)
    assert not any(r.offload for p in (without, roomy) for r in p.regions)
    assert free.predicted.step_seconds < 0.8 * without.predicted.step_seconds
    host = cluster(spec).host
    assert host is not None
    assert 0 < free.predicted.host_bytes_per_device <= host.rank_host_bytes
    assert without.predicted.host_bytes_per_device == without.predicted.disk_bytes_per_device == 0
    said = [("in host memory", bytes_text(free.predicted.host_bytes_per_device))]
    assert behind_texts(free) == said
    assert not behind_texts(without)
    assert re.search(rf"in host memory +{said[0][1]}", printed(free))
    assert re.search(rf"In host memory</th><td class=.n.>{said[0][1]}<", build(free))
    assert "in host memory" not in printed(without)
    assert "In host memory<" not in build(without)


@pytest.mark.parametrize("hidden", [256, 1024])
def test_bounds_without_memory_hold_with_a_host(hidden: int) -> None:
    """For every third shape: made of options without a host, and never above the best plan with one, whatever the memory."""
    spec = "h100-sxm:4"
    outline = transformer(layers=3, batch=16, seq=256, hidden=hidden, heads=8, vocab=512)
    prices = Prices(cluster(spec), "bfloat16")
    bench, shapes = make_bench(outline, cluster(spec), prices, ask(outline, "cp=1", spec=spec), tiers=False)
    offered, solved = bench.offering(True), 0
    for shape in shapes[::3]:
        bound = bench.roomy(shape, bench.bound(shape), math.inf)
        found = StageSolve(offered.problem(shape), gap=1e-3, ready=bench.ready(shape)).run()
        assert bound <= found.step_seconds * (1 + 1e-9), shape.told()
        solved += found.stages is not None
    assert solved > 20


def test_nothing_is_said_without_memory_where_the_host_is_the_faster_one() -> None:
    spec = "h100-sxm:4"
    outline, found = transformer(layers=2, batch=16, seq=256, hidden=256, heads=8, vocab=512), cluster(spec)
    assert found.host is not None
    found = replace(found, host=replace(found.host, host_update_seconds_per_element=1e-15))
    bench, shapes = make_bench(outline, found, Prices(found, "bfloat16"), ask(outline, spec=spec), tiers=False)
    assert bench.roomy(shapes[0], 0.0, math.inf) == 0.0


def test_an_interrupt_before_the_second_search_has_begun_keeps_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while its shapes are being queued: the plan of the first search comes back, with no bound for the others."""
    spec, outline = "h100-sxm:2", transformer(layers=2, batch=16, seq=256, hidden=256, heads=8, vocab=512)
    prices, asked = Prices(cluster(spec), "bfloat16"), ask(outline, "cp=1", spec=spec)
    bench, shapes = make_bench(outline, cluster(spec), prices, asked, tiers=False)
    first = JointSearch(bench, shapes, silent, onward=True).run()
    second = JointSearch(bench.offering(True), shapes, silent, replace(first, roomy={}))

    def interrupt(shape: Arrangement) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(second.bench, "bound", interrupt)
    found = second.run()
    assert found.interrupted
    assert found.best is first.best
    assert found.bound_seconds == 0.0

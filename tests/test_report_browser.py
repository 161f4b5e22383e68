"""The report in a browser: every chart is drawn at load, nothing is fetched, nothing is complained of, no string runs."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import browser
import msgspec
import plans
import pytest
import stagedplans
from jointplans import SPEC, cluster, model, plan_with
from shardwright.cli.report.build import build, write_report
from shardwright.cli.report.replayed import looked_at
from shardwright.planner.prices import Prices

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"


@pytest.mark.parametrize("plan", [plans.plan(), stagedplans.plan()], ids=["tensor parallel", "pipeline"])
def test_all_charts_are_drawn_at_load(plan: plans.p.Plan, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    write_report(plan, page)
    assert page.stat().st_size < 2_000_000
    document, console = browser.loaded(page, tmp_path)
    assert console == ""
    charts = browser.drawn(document)
    assert len(charts) >= 6
    assert all(count > 3 for count in charts.values()), charts
    assert browser.timing(document) < 3000


SEEN = {"placements", "regions", "timeline", "memory_time", "waterline", "time", "memory", "shapes"}


@pytest.mark.parametrize(
    ("pins", "spec"), [(("pp=2", "tp=2"), SPEC), (("offload=optimizer",), SPEC), ((), "h100-sxm:1")],
    ids=["pipeline and tensor", "offload", "one device"],
)  # fmt: skip
def test_plans_looked_at_again_have_every_view(pins: tuple[str, ...], spec: str, tmp_path: Path) -> None:
    plan = plan_with(model(), *pins, spec=spec)
    seen = looked_at(plan, model(), cluster(spec), Prices(cluster(spec), "bfloat16"))
    assert max(task[1] for task in seen.charts["timeline"]["tasks"]) == pytest.approx(
        plan.predicted.step_seconds, rel=1e-5
    )
    page = tmp_path / "r.html"
    write_report(plan, page, seen=seen)
    text = page.read_text()
    assert ("Nothing lies off the device." in text) == (not plan.predicted.host_bytes_per_device)
    assert set(seen.ops) == {op.op for region in plan.regions for op in region.ops}
    document, console = browser.loaded(page, tmp_path)
    assert console == ""
    assert set(browser.drawn(document)) >= (SEEN if spec != SPEC else SEEN | {"mesh", "links"})
    assert all(count > 3 for count in browser.drawn(document).values())


def test_nothing_is_fetched(tmp_path: Path) -> None:
    asking, page = tmp_path / "asking.html", tmp_path / "r.html"
    asking.write_text("<!doctype html><img src='http://127.0.0.1:9/x.png'>")
    browser.loaded(asking, tmp_path)
    assert browser.fetched(tmp_path) == ["http://127.0.0.1:9/x.png"]
    write_report(plans.plan(), page)
    browser.loaded(page, tmp_path)
    assert browser.fetched(tmp_path) == []


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    plan = plans.plan()
    op = msgspec.structs.replace(plan.regions[1].ops[1], op=HOSTILE, target=HOSTILE)
    region = msgspec.structs.replace(plan.regions[1], name=HOSTILE, ops=(op,))
    links = tuple(msgspec.structs.replace(axis, link=HOSTILE) for axis in plan.mesh)
    source = msgspec.structs.replace(plan.source, model=HOSTILE)
    page = tmp_path / "r.html"
    page.write_text(build(plans.plan(source=source, regions=(region,), mesh=links)))
    document, console = browser.loaded(page, tmp_path)
    assert console == ""
    assert "<title>run</title>" not in document
    library = (resources.files("shardwright.cli.report") / "vendor" / "echarts.min.js").read_text(encoding="utf-8")
    assert "<img" not in document.replace(library, "")
    assert document.count("<script") == page.read_text().count("<script")

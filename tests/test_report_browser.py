"""The report in a browser: every chart is drawn at load, nothing is fetched, nothing is complained of, no string runs."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import browser
import msgspec
import plans
import pytest
import stagedplans
from shardwright.cli.report.build import build, write_report

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

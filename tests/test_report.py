"""The report: one page without a request, complete, and nothing of a plan ever becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import plans
import pytest
import stagedplans
from shardwright.cli.report.build import build, write_report

HOSTILE = '</style></script><script>alert(1)</script><img src=x onerror="alert(2)">\'"&{{ 7*7 }}'
LIBRARY = (resources.files("shardwright.cli.report") / "vendor" / "echarts.min.js").read_text(encoding="utf-8")
RESULT = {
    "step_seconds": 0.15, "peak_bytes": [6_500_000_000] * 4, "losses": [3.5, 3.25],
    "collectives": [{"collective": "all_reduce", "axis": "tp", "count": 8, "bytes": 268_435_456}],
    "verify": [
        {"dtype": "float64", "kind": "gradient", "worst": 1e-13, "at": "wte.weight", "limit": 1e-10, "ok": True},
        {"dtype": "float64", "kind": "loss", "worst": 1.0, "at": "loss", "limit": 1e-10, "ok": False},
    ],
}  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is closed but not open."""

    EMPTY = ("meta", "br", "img", "input", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def drawn(text: str) -> dict[str, Any]:
    """The data of the charts of a page."""
    found = re.search(r'<script type="application/json" id="chart-data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    charts: dict[str, Any] = json.loads(found[1])
    return charts


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(build(plans.plan(), RESULT))


def test_everything_asked_for_stands_there(page: Page) -> None:
    for heading in (
        "Memory at the peak",
        "Time of a step",
        "Mesh on the links",
        "Model and placements",
        "Bytes by link",
        "What else was possible",
        "Predicted and measured",
    ):
        assert heading in page.text
    for fact in ("hf:tiny", "125 ms", "6.24 GiB", "13.7 GiB", "column, row", "zero-1 over dp, S(0) on tp", "saved activations",
                 "cut: bound above the incumbent", "h.0.up.weight", "0.40 %", "150 ms", "+20.0 %", "DIFFERS"):  # fmt: skip
        assert fact in page.text, fact


def test_one_self_contained_page(page: Page) -> None:
    names = {tag for tag, _ in page.tags}
    assert not names & {"link", "img", "iframe", "object", "embed", "base", "form", "video", "audio", "source"}
    for tag, attributes in page.tags:
        assert (attributes.get("href") or "#").startswith("#")
        assert not {"src", "srcset", "action", "onload", "onerror", "onclick"} & set(attributes), tag
    assert not re.search(r"https?://|url\(|@import|//cdn", build(plans.plan()).replace(LIBRARY, ""))


def test_policy_allows_only_its_own_script_and_style(page: Page) -> None:
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    text = build(plans.plan())
    for kind, count in (("script", 5), ("style", 1)):
        bodies = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
        assert len(digests) == count
        allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
        assert f"{kind}-src {allowed};" in policy


def test_readable_on_a_phone_in_print_and_in_the_dark() -> None:
    text = build(plans.plan())
    assert 'name="viewport"' in text
    for rule in ("prefers-color-scheme: dark", "@media print", "@media (max-width: 40rem)"):
        assert rule in text


def test_charts_have_the_plans_figures() -> None:
    plan = plans.plan()
    charts = drawn(build(plan, RESULT))
    assert sum(row[1] for row in charts["memory"]["rows"]) == plan.predicted.peak_bytes_per_device
    assert charts["memory"]["limit"] == plan.memory_limit_bytes
    assert sum(row[1] for row in charts["time"]["rows"]) == pytest.approx(plan.predicted.step_seconds)
    assert [(a["name"], a["size"], a["stride"]) for a in charts["mesh"]["axes"]] == [("dp", 2, 2), ("tp", 2, 1)]
    assert [level["ranks"] for level in charts["mesh"]["levels"]] == [2, 4]
    assert len(charts["placements"]["ops"]) == sum(len(region.ops) for region in plan.regions)
    linear = next(op for op in charts["placements"]["ops"] if op[0] == "linear")
    assert [charts["placements"]["words"][i] for i in linear[3]] == ["batch", "column"]
    assert [node["name"] for node in charts["regions"]["nodes"]] == [region.name for region in plan.regions]
    assert {row[2] for row in charts["shapes"]["rows"]} >= {"chosen", "cut"}


def test_every_chart_of_the_page_has_data_and_a_height() -> None:
    for plan in (plans.plan(), stagedplans.plan()):
        text = build(plan)
        places = re.findall(r'data-chart="(\w+)" style="height:(\d+)px" role="img" aria-label="[^"]{10,}"', text)
        assert {name for name, _ in places} == set(drawn(text))
        assert all(int(height) >= 80 for _, height in places)


def test_the_first_sentence_says_what_it_takes() -> None:
    text = Page(build(plans.plan())).text
    assert "on 4 toy devices is predicted to take 125 ms" in text
    assert "every layer is split over 2 devices (tensor parallel)" in text
    assert "by the cost model no plan of that space is faster by more than 0.40 %" in text


def test_hostile_strings_stay_text() -> None:
    plan = plans.plan()
    op = msgspec.structs.replace(plan.regions[1].ops[1], op=HOSTILE, target=HOSTILE)
    parameter = msgspec.structs.replace(plan.regions[1].parameters[0], names=(HOSTILE,))
    region = msgspec.structs.replace(plan.regions[1], name=HOSTILE, ops=(op,), parameters=(parameter,))
    hostile = plans.plan(
        regions=(region,), notes=(HOSTILE,), pins=(HOSTILE,), optimizer=HOSTILE, graph=HOSTILE, objective=HOSTILE,
        mesh=tuple(msgspec.structs.replace(a, link=HOSTILE) for a in plan.mesh),
        source=msgspec.structs.replace(plan.source, model=HOSTILE, config={HOSTILE: HOSTILE}),
        predicted=msgspec.structs.replace(
            plan.predicted, memory={HOSTILE: 7}, seconds={HOSTILE: 0.1}, sources={HOSTILE: HOSTILE}
        ),
        search=msgspec.structs.replace(plan.search, solver=HOSTILE, given_up=(HOSTILE,)),
        cluster={**plan.cluster, "spec": HOSTILE},
    )  # fmt: skip
    result = {**RESULT, "verify": [{**RESULT["verify"][0], "at": HOSTILE, "kind": HOSTILE}]}  # type: ignore[index]
    text = build(hostile, result)
    page = Page(text)
    assert [t for t, _ in page.tags].count("script") == 6
    assert any(HOSTILE in op[0] for op in drawn(text)["placements"]["ops"])
    assert "img" not in {t for t, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in page.text
    assert "49" not in re.findall(r"alert\(2\)&quot;&gt;(.*?)<", text)


def test_edited_plan_has_no_certificate() -> None:
    text = Page(build(plans.plan(edited=True))).text
    assert "no certificate" in text
    assert "proven bound" not in text


def test_pipeline_stages_and_what_runs_again() -> None:
    text = Page(build(stagedplans.plan())).text
    for fact in ("2 ranks, interleaved, 2 chunks a rank", "embed, h.1", "h.2 x 2", "Peak of the rank", "7.00 GiB",
                 "2 ops, 1 gather", "optimizer (1 part in 3 updated here)", "split by positions", "as h.1",
                 "Ops again in the backward pass: layer_norm, gelu", "linear -> R", "waiting (bubble)", "interleaved x 2",
                 "18 more shapes: 18 cut"):  # fmt: skip
        assert fact in text, fact
    assert "Stages" not in Page(build(plans.plan())).text


def test_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    write_report(plans.plan(), path, RESULT)
    assert path.read_text(encoding="utf-8") == build(plans.plan(), RESULT)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]

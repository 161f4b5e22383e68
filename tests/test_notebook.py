"""Plans and reports show themselves in notebooks, and nothing in them runs there."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import msgspec
import plans
import pytest
import shardwright
from shardwright.cli.report.build import build

HOSTILE = "<script>alert(1)</script>"


def test_a_plan_shows_its_figures() -> None:
    plan = plans.plan()
    text = plan._repr_html_()
    for fact in ("hf:tiny", "is predicted to take 125 ms", "6.24 GiB", "saved activations", "tensor parallel"):
        assert fact in text, fact
    sizes = [float(size) for size in re.findall(r"flex:([\d.e+-]+)", text)]
    assert len(sizes) == sum(v > 0 for v in (*plan.predicted.seconds.values(), *plan.predicted.memory.values()))


def test_hostile_names_stay_text() -> None:
    plan = plans.plan()
    hostile = plans.plan(
        source=msgspec.structs.replace(plan.source, model=HOSTILE),
        predicted=msgspec.structs.replace(plan.predicted, memory={HOSTILE: 7}, seconds={HOSTILE: 0.1}),
    )
    assert "<script" not in hostile._repr_html_()
    assert HOSTILE in unescape(hostile._repr_html_())


def test_a_report_is_its_page_in_a_frame(tmp_path: Path) -> None:
    report = shardwright.Report(plans.plan())
    shown = report._repr_html_()
    assert shown.startswith('<iframe sandbox="allow-scripts"')
    assert shown.count("<") == 2
    frame = re.search(r'srcdoc="(.*?)"', shown, re.DOTALL)
    assert frame is not None
    assert unescape(frame[1]) == build(plans.plan())
    report.write(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == report.html


def test_the_documented_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "report.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shardwright.save_plan(plans.plan(), tmp_path / "plan.json")
    found: dict[str, object] = {}
    exec(code.replace("\nshardwright.Report", "\nshown = shardwright.Report"), found)
    assert isinstance(found["shown"], shardwright.Report)

"""What a little more is worth: each row is the plan of a search of its own, or says why there is none."""

from __future__ import annotations

import msgspec
import plans
import pytest
from shardwright.cli.report import worth as w
from shardwright.cli.report.build import build
from shardwright.cli.report.replayed import Replayed
from shardwright.errors import Infeasible
from shardwright.profiles.devices import parse_cluster


def test_rows_are_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, asked = plans.plan(), list[dict[str, str]]()

    def again(plan: plans.p.Plan, change: dict[str, str], store: object = None) -> plans.p.Plan:
        asked.append(change)
        if "memory" in change and int(change["memory"]) < plan.memory_limit_bytes:
            raise Infeasible("nothing fits")
        predicted = msgspec.structs.replace(plan.predicted, step_seconds=plan.predicted.step_seconds / 2)
        return msgspec.structs.replace(plan, predicted=predicted)

    monkeypatch.setattr(w, "asked_again", again)
    monkeypatch.setattr(w.Cluster, "from_dict", lambda _: parse_cluster("h100-sxm:8x2"))
    chart = w.worth(plan, lambda _: None)
    assert {"link": "2"} in asked
    assert {"devices": "24"} in asked
    rows = {name: (gain, told) for name, gain, told in chart["rows"]}
    assert rows["twice the outermost link"][0] == pytest.approx(100)
    assert rows["1 GiB less a device"] == (None, "nothing fits")
    text = build(plan, seen=Replayed(charts={"worth": chart}))
    assert "nothing fits" in text
    assert 'data-chart="worth"' in text

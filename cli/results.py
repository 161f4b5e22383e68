"""Tables of what a run measured: differences found by --verify, predicted against measured, memory of every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..planner.plan import Plan
from ..profiles.ledger import times_of
from .figures import bytes_text, change_text, seconds_text
from .tables import table

SOME = 0.01
"""Share of a step from which on waiting for processors is told."""


def result_tables(plan: Plan, result: Mapping[str, Any]) -> Group:
    """Everything a run measured, for the terminal."""
    parts: list[RenderableType] = []
    if result.get("verify"):
        parts += [_verified(result["verify"]), Text()]
    if "step_seconds" in result:
        parts += [_measured(plan, result), Text(), _losses(result["losses"])]
    return Group(*parts)


def comparison(plan: Plan, result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (what, predicted, measured, difference of the measured from the predicted)."""
    predicted = plan.predicted
    step, (measured, waited) = predicted.step_seconds, times_of(result)
    times = [("step time", measured)]
    if waited > SOME * measured:
        times.append(("  when no other program takes processors", measured - waited))
    rows: list[tuple[str, str, str, str]] = [
        (name, seconds_text(step), seconds_text(own), change_text(own / step - 1) if step else "")
        for name, own in times
    ]
    peak = predicted.peak_bytes_per_device
    for rank, size in enumerate(result["peak_bytes"]):
        rows.append(
            (
                f"peak memory, rank {rank}",
                bytes_text(peak),
                bytes_text(size),
                change_text(size / peak - 1) if peak else "",
            )
        )
    expected = {(row.collective, row.axis): (row.count, row.bytes) for row in predicted.traffic_of(0)}
    found = {(row["collective"], row["axis"]): (row["count"], row["bytes"]) for row in result.get("collectives", ())}
    for key in [*expected, *(k for k in found if k not in expected)]:
        said, ran = _calls(expected.get(key)), _calls(found.get(key))
        rows.append((f"{key[0]} on {key[1]}", said, ran, "" if said == ran else "differs"))
    return rows


def verify_rows(found: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Rows (what, largest difference and where, limit, verdict)."""
    return [
        (f"{d['kind']}, {d['dtype']}", f"{d['worst']:.1e}" + (f" ({d['at']})" if d["at"] != d["kind"] else ""),
         f"{d['limit']:.0e}", "ok" if d["ok"] else "DIFFERS")
        for d in found
    ]  # fmt: skip


def _calls(row: tuple[int, int] | None) -> str:
    return "none" if row is None else f"{row[0]} {'call' if row[0] == 1 else 'calls'}, {bytes_text(row[1])}"


def _verified(found: list[dict[str, Any]]) -> RenderableType:
    made = table("value", "largest difference", "limit", "", title="Against the original module", right=(2,))
    for row in verify_rows(found):
        made.add_row(*map(Text, row), style=None if row[-1] == "ok" else "red")
    return made


def _measured(plan: Plan, result: Mapping[str, Any]) -> RenderableType:
    made = table("", "predicted", "measured", "difference", title="Predicted and measured", right=(1, 2, 3))
    for row in comparison(plan, result):
        made.add_row(*map(Text, row))
    return made


def _losses(losses: list[float]) -> Text:
    shown = losses if len(losses) <= 8 else [*losses[:4], *losses[-4:]]
    words = [f"{value:.4f}" for value in shown]
    if len(losses) > 8:
        words.insert(4, "...")
    return Text(f"loss  {' '.join(words)}")

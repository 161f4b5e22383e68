"""Tables of `clusters`, `diff` and `check`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..planner.plandiff import Difference
from .figures import bytes_text, change_text, count_text, percent_text, seconds_text
from .sheet import Prose
from .stages import again_text, runs_text
from .tables import table

_SHOWN, _SHOWN_OF_SEARCH = 40, 12
_NAMED = 3
"""Ops that run again which a difference names; more are counted."""


def cluster_list(found: Sequence[Mapping[str, Any]]) -> Table:
    """All presets, one line each."""
    made = table("name", "device", "memory", "bf16 peak", "per node", "link", "network", right=(2, 3, 4))
    for each in found:
        peaks = each["peak_flops"]
        peak = peaks.get("bfloat16") or peaks.get("float16") or peaks.get("float32") or (0.0, "")
        memory = each["figures"]["memory_bytes"][0]
        levels = [f"{level['name']} {_rate(level['bytes_per_second'])}" for level in each["levels"]]
        made.add_row(each["name"], Text(each["title"]), f"{memory / 1e9:.0f} GB", f"{count_text(peak[0])}FLOP/s",
                     str(each["usual_node"]), *levels)  # fmt: skip
    return made


def cluster_details(described: Mapping[str, Any]) -> Group:
    """Every figure assumed of one device, with its source."""
    head = Text(f"{described['name']}: {described['title']}, {described['usual_node']} to a node", style="bold")
    rows = table("figure", "value", "source", right=(1,))
    for name, (value, source) in described["figures"].items():
        rows.add_row(name.replace("_", " "), _figure(name, value), Text(source))
    for dtype, (value, source) in described["peak_flops"].items():
        rows.add_row(f"peak {dtype}", f"{count_text(value)}FLOP/s", Text(source))
    for kind, (value, source) in described["efficiencies"].items():
        rows.add_row(f"efficiency {kind}", f"{value:.2f}", Text(source))
    links = table("link", "ranks", "per rank", "efficiency", "latency", "source", right=(1, 2, 3, 4))
    for level in described["levels"]:
        links.add_row(level["name"], str(level["ranks"]), _rate(level["bytes_per_second"]), f"{level['efficiency']:.2f}",
                      seconds_text(level["latency_seconds"]), Text(level["source"]))  # fmt: skip
    return Group(head, Text(), rows, Text(), links)


def _figure(name: str, value: float) -> str:
    if name.endswith("bytes_per_second"):
        return _rate(value)
    if name.endswith("bytes"):
        return f"{value / 1e9:.1f} GB" if value >= 1e9 else bytes_text(value)
    if name.endswith("seconds"):
        return seconds_text(value)
    return f"{value:g}"


def _rate(value: float) -> str:
    return f"{value / 1e9:,.0f} GB/s" if value >= 1e10 else f"{value / 1e9:.2f} GB/s"


def difference_tables(found: Sequence[Difference], a: str, b: str) -> list[RenderableType]:
    """Differences by dimension, a long dimension cut to its first rows."""
    parts: list[RenderableType] = []
    for dimension in dict.fromkeys(d.dimension for d in found):
        rows = [d for d in found if d.dimension == dimension]
        made = table("where", a, b, "change", title=dimension, right=(3,))
        most = _SHOWN_OF_SEARCH if dimension in ("search", "runners_up") else _SHOWN
        for row in rows[:most]:
            change = change_text(row.change) if row.change is not None else ""
            made.add_row(Text(row.where), Text(_side(row.where, row.a)), Text(_side(row.where, row.b)), change)
        parts += [made, Text(f"... and {len(rows) - most} more (--json shows all)\n" if len(rows) > most else "")]
    return parts


def _side(where: str, value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        leaf = where.rpartition(".")[2]
        if "seconds" in leaf or ".seconds." in where:
            return seconds_text(value)
        if "bytes" in leaf or ".memory." in where:
            return bytes_text(value)
        return f"{value:,.6g}" if isinstance(value, float) else str(value)
    if where.endswith(".runs"):
        return runs_text([(run["use"], run["count"]) for run in value])
    if where.endswith(".recompute") and len(value) > _NAMED:
        return again_text(value)
    if isinstance(value, (list, tuple)) and all(isinstance(each, dict) for each in value) and value:
        return f"{len(value)} records"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(str, value)) + "]"
    if isinstance(value, dict):
        if "runs" in value:
            return f"rank {value['rank']}: {_side('.runs', value['runs'])}"
        if "repeats" in value:
            return f"x {value['repeats']}"
        name = next((value[key] for key in ("op", "name", "names", "collective") if key in value), None)
        return str(name[0] if isinstance(name, (list, tuple)) else name) if name is not None else "present"
    return str(value)


def pass_tables(found: Mapping[str, Any]) -> Group:
    """What `check --passes` found: cleanup, then optional passes with what they gain a step."""
    first = table("cleanup", "time", "nodes", title="Always", right=(1, 2))
    rows = table(
        "pass", "nodes", "gain", "saved bytes", "outcome", title=f"By price on {found['cluster']}", right=(1, 2, 3)
    )
    for row in found["passes"]:
        nodes = f"{row['nodes_after'] - row['nodes_before']:+d}"
        if "applied" not in row:
            first.add_row(row["name"], seconds_text(row["seconds"]), nodes)
        elif not row["applied"]:
            rows.add_row(row["name"], "", "", "", Text(row["why_not"]))
        else:
            gain, saved = row["gain_seconds"], row["gain_saved_bytes"]
            rows.add_row(
                row["name"], nodes, signed(gain, seconds_text), signed(saved, bytes_text),
                Text(f"verified: {row['verified']}" if "verified" in row else "not verified"),
            )  # fmt: skip
    parts: list[RenderableType] = [first, Text(), rows]
    parts += [Text(), _efficiency(found["waterline"])]
    if found["unverified"]:
        parts += [Text(), Text(f"Not verified: {found['unverified']}")]
    return Group(*parts)


def _efficiency(lines: Mapping[str, Any]) -> Table:
    """Where the seconds of a step go before and after the passes."""
    before, after = lines["before"], lines["after"]
    made = table("seconds of a step", "before", "after", title="Where they go", right=(1, 2))
    for part in before["parts"]:
        made.add_row(part, *(seconds_text(side["parts"][part]) for side in (before, after)))
    made.add_row("all", *(seconds_text(side["seconds"]) for side in (before, after)))
    made.add_row("efficiency", *(percent_text(side["efficiency"]) for side in (before, after)))
    return made


def signed(value: float, text: Callable[[float], str]) -> str:
    """What is gained a step, and with a sign what is lost."""
    return text(value) if value >= 0 else f"-{text(-value)}"


def check_tables(found: Mapping[str, Any]) -> Group:
    """What `check` found."""
    trained = f"loss {found['loss']}" if found["loss"] else "no loss: an inference graph"
    parts: list[RenderableType] = [
        Text(f"{found['ops']} ops, {count_text(found['parameters'])} parameters, {trained}", style="bold"), Text()
    ]  # fmt: skip
    regions = table("region", "repeats", "ops", "parameters", "mostly", title="Regions", right=(1, 2, 3))
    for region in found["regions"]:
        mostly = ", ".join(
            f"{name.removeprefix('aten.')} x{count}" for name, count in list(region["targets"].items())[:5]
        )
        regions.add_row(
            Text(region["name"]), str(region["repeats"]), str(region["ops"]), str(region["parameters"]), Text(mostly)
        )
    parts += [regions, Text()]
    if found["discovered"]:
        rows = table("op", "calls", "rule found by experiment", title="Ops without a line", right=(1,))
        for row in found["discovered"]:
            rows.add_row(Text(row["target"]), str(row["calls"]), Text(row["rule"]))
        parts += [rows, Text()]
    else:
        parts.append(Text("Every op has a rule."))
    if found["replicated"]:
        names = ", ".join(f"{row['target'].removeprefix('aten.')} x{row['calls']}" for row in found["replicated"])
        parts.append(Text(f"Run whole on every rank: {names}"))
    parts += [Text(f"Couples samples (one microbatch): {name}") for name in found["microbatch_blockers"]]
    parts.append(Prose(*found["notes"], first="- "))
    if "modules" in found:
        parts += [Text(), module_table(found["modules"])]
    return Group(*parts)


def module_table(modules: Sequence[Mapping[str, Any]]) -> Table:
    """By module: parameters, their bytes, and what the backward pass keeps, on one device with the whole batch."""
    whole = sum(row["saved_bytes"] for row in modules)
    made = table(
        "module", "of them", "parameters", "bytes", "kept", "of kept", title="Modules, and what the backward pass keeps",
        right=(1, 2, 3, 4, 5), gap=2,
    )  # fmt: skip
    for row in modules[:_SHOWN]:
        kept = row["saved_bytes"]
        share = percent_text(kept / whole) if kept else ""
        cells = (row["name"], str(row["count"]), count_text(row["parameters"]), bytes_text(row["parameter_bytes"]))
        made.add_row(*map(Text, (*cells, bytes_text(kept), share)))
    rest = modules[_SHOWN:]
    if rest:
        made.add_row(Text(f"{len(rest)} more"), "", count_text(sum(r["parameters"] for r in rest)), "", "", "")
    made.add_row(Text("all"), "", count_text(sum(r["parameters"] for r in modules)),
                 bytes_text(sum(r["parameter_bytes"] for r in modules)), bytes_text(whole), "")  # fmt: skip
    return made

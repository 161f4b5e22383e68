"""`shardwright check MODEL`: what capture finds, and what passes do. All problems together, ops without a rule, the regions."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .options import json_option, output_option

if TYPE_CHECKING:
    from ..passes.capture import Captured
    from ..passes.review import Review
    from ..passes.summarize import Summary
    from ..planner.waterline import Moment, Totals, Waterline

DTYPE = "float32"
"""What passes are priced in."""


@click.command("check")
@click.argument("model")
@click.option(
    "--batch", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Samples to capture it with."
)
@click.option("--seq", type=click.IntRange(min=1), metavar="N", help="Sequence length.")
@click.option(
    "--modules", is_flag=True, help="Also show, by module, parameters and the bytes kept for the backward pass."
)
@click.option("--passes", is_flag=True, help="Run every graph pass: time, nodes, gain by price, verified in float64.")
@click.option("--print-after", metavar="PASS", help="Print the graph as it is after PASS.")
@click.option(
    "--cluster", default="cpu:1", show_default=True, metavar="C", help="Device whose prices say what passes gain."
)
@output_option("--report", help="HTML page to write: waterline and efficiency gap before and after the passes.")
@json_option
def command(
    model: str, batch: int, seq: int | None, modules: bool, passes: bool, print_after: str | None, cluster: str,
    report: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Capture MODEL and show problems, ops without a rule, and the regions found; or what every pass does to it."""
    if modules and (passes or print_after is not None):
        raise UsageError("--modules is of the model as it is captured; leave out --passes and --print-after")
    if report is not None and not passes:
        raise UsageError("--report shows what passes change; add --passes")
    if passes or print_after is not None:
        _review(model, batch, seq, print_after, cluster, passes, report, as_json)
        return
    from ..passes.capture import capture
    from ..passes.discover import discover_node
    from ..passes.models import load_model
    from ..passes.summarize import summarize
    from ..planner.bymodule import by_module
    from .listings import check_tables
    from .tables import print_json, progress, show

    with progress() as tell:
        tell("load")
        loaded = load_model(model, batch=batch, seq=seq, device="meta")
        tell("capture")
        captured = capture(loaded.model, loaded.args, loaded.kwargs)
        tell("summarize")
        summary = summarize(captured, discover=lambda node: discover_node(node).instance)
    found = document(captured, summary)
    if modules:
        found["modules"] = [asdict(module) for module in by_module(summary.outline)]
    if as_json:
        print_json(found)
    else:
        show(check_tables(found))


def _review(
    model: str, batch: int, seq: int | None, print_after: str | None, cluster: str, passes: bool, report: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Show every pass, or the graph after one."""
    from ..passes.models import load_model
    from ..passes.review import review
    from ..planner.prices import Prices
    from ..profiles.devices import parse_cluster
    from .listings import pass_tables
    from .tables import aside, print_json, progress, show

    with progress() as tell:
        tell("load")
        loaded = load_model(model, batch=batch, seq=seq, device="meta")
        prices = Prices(parse_cluster(cluster), DTYPE)
        found = review(
            loaded.model, loaded.args, loaded.kwargs, prices, print_after=print_after, waterlines=passes, say=tell
        )
    shown = reviewed(found, cluster) | {"batch": batch} | ({"sequence": seq} if seq else {})
    if report is not None and found.waterlines is not None:
        from .report.passes import write_passes

        write_passes(report, model, shown, found.waterlines)
    if as_json:
        print_json(shown)
        return
    if passes:
        show(pass_tables(shown))
    if print_after is not None:
        click.echo(found.listing)
    if report is not None:
        aside(f"wrote {report}")


def reviewed(found: Review, cluster: str) -> dict[str, Any]:
    """What every pass did, as plain values."""
    rows: list[dict[str, Any]] = []
    for record in (*found.cleanup, *found.optional):
        row: dict[str, Any] = {
            "name": record.name, "seconds": record.seconds, "nodes_before": record.before, "nodes_after": record.after,
        }  # fmt: skip
        if record in found.optional:
            verdict = record.verdict
            row |= {
                "applied": verdict is not None and verdict.stays,
                "why_not": "it finds nothing to rewrite" if verdict is None else verdict.why,
                "gain_seconds": verdict.seconds if verdict is not None else 0.0,
                "gain_saved_bytes": verdict.saved_bytes if verdict is not None else 0.0,
            }
            if record.name in found.verified:
                row["verified"] = found.verified[record.name] or "equal"
        rows.append(row)
    shown: dict[str, Any] = {"passes": rows, "cluster": cluster, "dtype": DTYPE, "unverified": found.unverified}
    shown |= {"listing": found.listing} if found.listing else {}
    if found.waterlines is not None:
        before, after = found.waterlines
        shown["waterline"] = {
            "peak_flops": before.peak_flops, "bytes_per_second": before.bytes_per_second, "before": _line(before),
            "after": _line(after),
        }  # fmt: skip
    return shown


def _line(line: Waterline) -> dict[str, Any]:
    """A waterline as plain values: its sums, and every pass of every op in order."""
    return {"calls": line.totals.calls, **_amounts(line.totals), "ops": [_moment(one) for one in line.moments]}


def _moment(one: Moment) -> dict[str, Any]:
    named = {"op": one.op, "target": one.target, "source": one.source, "phase": one.phase, "bound": one.bound}
    return named | _amounts(one) | {"price": one.origin}


def _amounts(one: Moment | Totals) -> dict[str, Any]:
    from ..planner.waterline import PARTS

    return {
        "flops": one.flops, "bytes": one.bytes, "seconds": one.seconds, "ideal_seconds": one.ideal_seconds,
        "gap_seconds": one.gap_seconds, "efficiency": one.efficiency, "parts": dict(zip(PARTS, one.parts, strict=True)),
    }  # fmt: skip


def document(captured: Captured, summary: Summary) -> dict[str, Any]:
    """What was found, as plain values."""
    outline = summary.outline
    by_name = outline.by_name
    regions = [
        {
            "name": region.name,
            "repeats": region.repeats,
            "ops": len(region.instances[0]),
            "parameters": len(region.parameters[0]),
            "targets": dict(Counter(by_name[op].target for op in region.instances[0]).most_common()),
        }
        for region in outline.regions
    ]
    return {
        "ops": len(outline.ops),
        "parameters": sum(outline.tensors[p.tensor].elements for p in outline.parameters),
        "loss": outline.loss,
        "discovered": _discovered(summary),
        "replicated": _replicated(summary),
        "microbatch_blockers": list(outline.microbatch_blockers),
        "notes": [*captured.notes, *outline.notes],
        "regions": regions,
    }


def _discovered(summary: Summary) -> list[dict[str, Any]]:
    """Ops whose rule was found by experiment, one row per op and line."""
    calls = Counter((target, str(summary.calls[name].rule)) for name, target in summary.discovered.items())
    return [{"target": target, "rule": rule, "calls": count} for (target, rule), count in calls.items()]


def _replicated(summary: Summary) -> list[dict[str, Any]]:
    """Ops that have loops but none that may be split: they run whole on every rank."""
    calls = Counter(
        op.target for op in summary.outline.ops if op.factors and all(f.split == "never" for f in op.factors)
    )
    return [{"target": target, "calls": count} for target, count in calls.items()]

"""`shardwright profile [MODEL]`: measure this machine for a model, recalibrate from past runs, move profiles as text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from ..errors import UsageError
from .options import ABOVE_ZERO, json_option, output_option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..passes.profiling import ProfileResult
    from ..profiles.calibrate import Calibration, Group
    from ..profiles.store import Store

BUDGET_SECONDS = 240.0
"""A profile of a model ends within five minutes with starting and writing."""


@click.command("profile")
@click.argument("model", required=False)
@click.option("--cluster", metavar="C", help="What to measure: local[:N], local-cpu:N [default: local].")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Global batch of MODEL [default: the ranks].")
@click.option("--seq", type=click.IntRange(min=1), metavar="N", help="Sequence length of MODEL.")
@click.option("--db", type=click.Path(path_type=Path), metavar="FILE", help="Profile store [default: the user's own].")
@click.option(
    "--seconds", type=ABOVE_ZERO, metavar="S", help=f"Most seconds of measuring [default: {BUDGET_SECONDS:.0f}]."
)
@click.option("--from-ledger", is_flag=True, help="Recalibrate from the runs in the ledger; nothing is measured.")
@output_option("--export", "export", help="Write the whole store as text.")
@click.option("--import", "import_", type=click.Path(path_type=Path), metavar="FILE", help="Take over such a text.")
@json_option
def command(
    model: str | None, cluster: str | None, batch: int | None, seq: int | None, db: Path | None, seconds: float | None,
    from_ledger: bool, export: Path | None, import_: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure what plans are priced with, and keep it in the profile store.

    MODEL (as for `plan`) has its ops timed at the local shapes that plans may ask for; without one only the machine, its links
    and copies are. What the store has is not measured again, so that an interrupted profile goes on where it was. Started by
    torchrun on every rank of a cluster, it measures that cluster.
    """
    from ..profiles.store import Store, default_path

    acts = [
        name for name, asked in (("--from-ledger", from_ledger), ("--export", export), ("--import", import_)) if asked
    ]
    sizes = [("--batch", batch), ("--seq", seq)]
    given = [
        name for name, asked in (("MODEL", model), ("--cluster", cluster), ("--seconds", seconds), *sizes) if asked
    ]
    if len(acts) > 1 or (acts and given):
        raise click.UsageError(f"{acts[0]} stands alone: leave out {', '.join([*acts[1:], *given])}")
    if model is None and (batch or seq):
        raise click.UsageError("--batch and --seq belong to a MODEL")
    store = Store(db or default_path())
    if from_ledger:
        _recalibrate(store, as_json)
    elif export is not None:
        _export(store, export, as_json)
    elif import_ is not None:
        _import(store, import_, as_json)
    else:
        _measure(
            store, cluster or "local", model, as_json, budget_seconds=seconds or BUDGET_SECONDS, batch=batch, seq=seq
        )


def _recalibrate(store: Store, as_json: bool) -> None:
    from ..profiles.calibrate import LEAST_RUNS, keep, recalibrate, stored
    from ..profiles.ledger import entries

    groups = recalibrate(entries(store))
    if not any(group.found for group in groups):
        had = "; ".join(f"{g.device}, {g.stack}: {_counted(g.runs)} usable, {g.left_out} not" for g in groups)
        raise UsageError(
            f"the ledger in {store.path} has too few runs to recalibrate from: a device and stack needs {LEAST_RUNS} that ran "
            f"where they were planned for and had its processors to themselves ({had or 'it has none at all'}); run plans with "
            "`shardwright run`"
        )
    before = {(g.device, g.versions, g.stack): stored(store, g.device, g.versions).get(g.stack) for g in groups}
    keep(store, groups)
    rows = [(group, before[group.device, group.versions, group.stack]) for group in groups]
    if as_json:
        from .tables import print_json

        print_json({"store": str(store.path), "calibrations": [_plain(*row) for row in rows]})
    else:
        _show_calibrations(rows, store)


def _plain(group: Group, before: Calibration | None) -> dict[str, Any]:
    found = asdict(group)
    new = found.pop("found")
    return {**found, "before": asdict(before) if before else None, "calibration": new}


def _show_calibrations(rows: Sequence[tuple[Group, Calibration | None]], store: Store) -> None:
    from .figures import percent_text
    from .tables import show, table

    made = table("device", "versions", "stack", "runs", "left out", "before", "factor", "spread", right=(3, 4, 5, 6, 7))
    for group, before in rows:
        new = group.found
        texts = (group.device, group.versions, group.stack, str(group.runs), str(group.left_out))
        found = (f"x{new.factor:.4g}", percent_text(new.spread)) if new is not None else ("too few runs", "")
        made.add_row(*map(Text, texts), f"x{before.factor:.4g}" if before else "none", *found)
    show(made, "", f"kept in {store.path}: plans for these devices are now predicted with these factors")


def _export(store: Store, path: Path, as_json: bool) -> None:
    from ..profiles.exchange import export_to

    if store.path is None or not store.path.exists():
        raise UsageError(f"there is no profile store {store.path}; measure something first (`shardwright profile`)")
    _done({"file": str(path), "rows": export_to(store, path)}, as_json, "wrote {rows} rows to {file}")


def _import(store: Store, path: Path, as_json: bool) -> None:
    from ..profiles.exchange import import_from

    counts = asdict(import_from(store, path))
    told = (
        "{file}: {new} new figures, {replaced} in place of others, {same} as they were; {runs} new runs; into {store}"
    )
    _done({"file": str(path), "store": str(store.path), **counts}, as_json, told)


def _measure(store: Store, cluster: str, model: str | None, as_json: bool, **limits: Any) -> None:
    from ..passes.profiling import profile
    from .tables import print_json, progress, show

    with progress() as tell:
        result = profile(cluster, model, store=store, say=tell, **limits)
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json({"store": str(store.path), **asdict(result)})
    else:
        show(*_profiled(result), "", f"{result.seconds:.0f} s; kept in {store.path}")


def _profiled(result: ProfileResult) -> list[RenderableType]:
    """Rows by kind, and what failed."""
    from .tables import table

    made = table(
        "kind", "measured", "known before", title=f"Profile of {result.device or result.cluster}", right=(1, 2)
    )
    for kind in sorted({*result.measured, *result.known}):
        made.add_row(Text(kind), str(result.measured.get(kind, 0)), str(result.known.get(kind, 0)))
    told = [Text(f"- {what}: {why}") for what, why in sorted(result.failures.items())]
    return [made, *([Text("\nNot measured"), *told] if told else [])]


def _done(found: Mapping[str, Any], as_json: bool, told: str) -> None:
    from .tables import print_json

    if as_json:
        print_json(found)
    else:
        click.echo(told.format_map(found))


def _counted(runs: int) -> str:
    return f"{runs} run" if runs == 1 else f"{runs} runs"

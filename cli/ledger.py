"""The ledger at the command line: runs are noted, and the runs of a plan are read for its report.

A ledger that cannot be used costs one line of warning, never a run or a report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from .figures import bytes_text, change_text, seconds_text

if TYPE_CHECKING:
    from ..planner.plan import Plan
    from ..profiles.ledger import Entry

RUNS = (
    ("Date (UTC)", False), ("Device", False), ("Stack", False), ("Step predicted", True), ("Measured", True),
    ("Difference", True), ("Phases", False), ("Peak predicted", True), ("Measured peak", True), ("Difference", True),
)  # fmt: skip
"""Columns of a table of runs, and whether they hold numbers."""

_ORDER = {"forward": 0, "forward and backward": 0, "backward": 1, "optimizer": 2}


def note_run(plan: Plan, result: Mapping[str, Any]) -> None:
    """Append what a run measured to the ledger in the profile store, if it timed steps."""
    from ..profiles.ledger import append, entry_of
    from ..profiles.store import Store, default_path

    path = default_path()
    try:
        entry = entry_of(plan, result)
        if entry is not None:
            append(Store(path), [entry])
    except Exception as error:  # whatever is wrong with the file: the run is done and counts
        _warn(f"this run is not in the ledger {path}", error)


def runs_of(plan: Plan) -> tuple[Entry, ...]:
    """The ledger's runs of a plan, oldest first; none where the store cannot be read."""
    from ..planner.planfile import digest
    from ..profiles.ledger import entries
    from ..profiles.store import Store, default_path

    path = default_path()
    try:
        return entries(Store(path), digest(plan))
    except Exception as error:  # as above
        _warn(f"no runs are shown from the ledger {path}", error)
        return ()


def run_rows(runs: Sequence[Entry]) -> list[tuple[str, ...]]:
    """The cells of `RUNS` for each run; seconds are those without waiting for processors, the peak is the fullest rank's."""
    return [_row(run) for run in runs]


def _row(run: Entry) -> tuple[str, ...]:
    predicted, peak = run.predicted_peak_bytes, max(run.measured_peak_bytes, default=0)
    known = sorted(run.measured_phases.items(), key=lambda part: (_ORDER.get(part[0], 9), part[0]))
    phases = ", ".join(f"{name} {seconds_text(value)}" for name, value in known)
    return (
        run.date[:16].replace("T", " "), run.device, run.stack, seconds_text(run.predicted_seconds),
        seconds_text(run.own_seconds), change_text(run.ratio - 1) if run.predicted_seconds else "", phases,
        bytes_text(predicted), bytes_text(peak), change_text(peak / predicted - 1) if predicted else "",
    )  # fmt: skip


def _warn(what: str, error: Exception) -> None:
    told = " ".join(str(error).split())
    click.echo(f"warning: {what}: {told}", err=True)

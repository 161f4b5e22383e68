"""Plans and reports in notebooks: a plan as a fragment of HTML without scripts, a report as its page in a frame of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import markupsafe

from ...planner.plan import Plan
from ...planner.planfile import write_whole
from .build import Runs, build, cause_bars, key_figures
from .headline import headline, how, why
from .page import fragment

COLOURS = ("#1f6aa5", "#e0962b", "#2a9d78", "#c8553d", "#a76ba4", "#6db3dd", "#b7a52a", "#8a8f96")
"""The palette of the page (report.css), which reads on light and dark notebooks."""

HEIGHT_PIXELS = 720


def plan_html(plan: Plan) -> str:
    """A plan as notebooks show it; every string of the plan is escaped, and nothing in it runs."""
    time, memory = cause_bars(plan)
    return fragment(
        "notebook.html", title=plan.source.model, headline=headline(plan), figures=key_figures(plan), time=time,
        memory=memory, colours=COLOURS, lines=[*how(plan), *why(plan)],
    )  # fmt: skip


class Report:
    """The report of a plan: shown by notebooks as the whole page, and written with `write`.

    `result` is what a run of it measured (`run --json`), `runs` its rows of the ledger.
    """

    def __init__(self, plan: Plan, result: Mapping[str, Any] | None = None, runs: Runs = ()) -> None:
        self.plan = plan
        self.html = build(plan, result, runs)

    def write(self, path: Path | str) -> None:
        """Write the page to a file, whole or not at all. Raises UsageError where it cannot be written."""
        write_whole(Path(path), self.html)

    def _repr_html_(self) -> str:
        """A frame that has no access to the notebook around it."""
        return (
            f'<iframe sandbox="allow-scripts" style="width:100%;height:{HEIGHT_PIXELS}px;border:0" '
            f'title="Report of a plan" srcdoc="{markupsafe.escape(self.html)}"></iframe>'
        )
